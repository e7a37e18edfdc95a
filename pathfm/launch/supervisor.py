"""One process per job, on the host: starts the payload, passes signals on to it, waits, says how it ended."""

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any

_PASSED_ON = (signal.SIGUSR2, signal.SIGTERM)


def batch_step(command: Sequence[str]) -> int:
    """What submitit runs in the batch step of a Slurm job. The job ends with the status of `command`."""
    if status := supervise(command):
        raise SystemExit(status)  # past submitit, which would otherwise report every job as ended well
    return status


def supervise(command: Sequence[str], **streams: Any) -> int:
    """Run `command` to its end. Returns its exit status as a shell would, 128 + n when signal n ended it.

    USR2 and TERM are passed on, and never end the supervisor itself: whoever sends them wants the payload to save
    and leave, and somebody must be there afterwards to see how it left. The handlers stay; this is the last thing
    that a process does.
    """
    child = _Child()
    for number in _PASSED_ON:
        signal.signal(number, child.pass_on)  # in place of submitit's handlers, which would requeue at once
    status = child.run(command, **streams)
    return 128 - status if status < 0 else status


class _Child:
    """The payload, and the signals that came before it had a process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)

    def run(self, command: Sequence[str], **streams: Any) -> int:
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **streams)
        for number in self._early:
            self._process.send_signal(number)
        return self._process.wait()

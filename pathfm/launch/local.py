"""The payload on this machine: as a job of submitit's local executor, or in this very process."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from pathfm.launch.payload import TRAINER_MODULE
from pathfm.launch.supervisor import supervise

_FOREVER_MIN = 10**6  # submitit's local jobs have a time limit; ours do not
_SECONDS_BETWEEN_LOOKS = 0.1


def run_local(command: Sequence[str], folder: Path) -> int:
    """Run `command` as a job of submitit's local executor and stay with it. Returns its exit status.

    On a terminal the trainer is given the terminal itself, so its progress bar is a real one and nothing is polled;
    otherwise (a pipe, a file, CI) the job's log is copied to our output as it grows.
    Ctrl-C, or TERM to this process, is passed to the trainer as TERM; we stay until it has left.
    """
    from submitit import LocalExecutor
    from submitit.helpers import clean_env, environment_variables

    executor = LocalExecutor(folder)
    executor.update_parameters(timeout_min=_FOREVER_MIN, stderr_to_stdout=True)
    with ExitStack() as stack:
        # alone on this machine, whatever job or step this shell belongs to
        stack.enter_context(clean_env())
        stack.enter_context(environment_variables(SUBMITIT_LOG_LEVEL="WARNING"))
        with _interrupts_ignored():  # inherited by submitit's processes: only the trainer leaves at Ctrl-C
            job = executor.submit(_run_here, list(command), os.environ.get("CUDA_VISIBLE_DEVICES"), _terminal())
        stop = _stay_with(int(job.job_id), job.paths.stdout, job.done)
    if not job.paths.result_pickle.exists():  # submitit's process was itself ended, perhaps before the trainer began
        print(f"the job ended without saying how; its log is {job.paths.stdout}", file=sys.stderr)
        return 128 + stop if stop else 1
    status = job.result()
    return 128 + stop if stop and status else status


def run_in_this_process(command: Sequence[str], folder: Path) -> int:
    """Run the trainer of `command` here, where a debugger sees it, through submitit's debug executor."""
    from submitit import DebugExecutor

    outcome = DebugExecutor(folder).submit(_run_module, list(command)).result()
    if isinstance(outcome, Exception):
        raise outcome
    return int(outcome)


def gpus_of_this_machine() -> int:
    """How many NVIDIA GPUs the trainer will see, told without torch; 0 when torch is a CPU build."""
    if version("torch").endswith("+cpu") or not shutil.which("nvidia-smi"):
        return 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return listed.stdout.count("UUID") if listed.returncode == 0 else 0


def _run_here(command: Sequence[str], visible_devices: str | None, terminal: str | None) -> int:
    """Inside submitit's local job: the payload, writing to the terminal if there is one, else to the job's log."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides every GPU from a job that did not ask for any
    if visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices
    if terminal is None:
        return supervise(command)
    with open(terminal, "wb", buffering=0) as screen:
        return supervise(command, stdout=screen, stderr=screen)


def _run_module(command: Sequence[str]) -> int | Exception:
    """Inside the debug job. An error is returned, not raised: submitit would open a debugger on it unasked."""
    arguments, sys.argv = sys.argv, [TRAINER_MODULE, *command[command.index(TRAINER_MODULE) + 1 :]]
    try:
        runpy.run_module(TRAINER_MODULE, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):  # a message instead of a status
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        return error
    finally:
        sys.argv = arguments
    return 0


def _terminal() -> str | None:
    """The device of the terminal that shows both our streams, when a process of ours may open it."""
    try:
        names = {os.ttyname(stream.fileno()) for stream in (sys.stdout, sys.stderr)}
    except (OSError, ValueError):  # not a terminal, or (under a test) not a file at all
        return None
    return names.pop() if len(names) == 1 and all(os.access(name, os.W_OK) for name in names) else None


def _stay_with(controller: int, log: Path, done: Callable[[], bool]) -> int:
    """Copy the job's log to our output until the job is done. Returns the signal that asked us to stop, or 0."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, note))
        position, passed_on, ended = 0, 0, False
        while not ended:
            ended = done()  # before the last look at the log, which is complete only then
            position = _copy_from(log, position)
            if len(asked) > passed_on and not ended:
                passed_on = len(asked)
                print("stopping: waiting for the trainer to save and leave", file=sys.stderr)
                os.kill(controller, signal.SIGTERM)  # the controller hands it to the job, the job to the trainer
            time.sleep(0 if ended else _SECONDS_BETWEEN_LOOKS)
    return asked[0] if asked else 0


def _copy_from(log: Path, position: int) -> int:
    """Print what `log` holds beyond byte `position`. Returns the new position."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        sys.stdout.buffer.write(file.read())
        sys.stdout.flush()
        return file.tell()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

"""Processes that must not outlive their use: one and all that it started."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SECONDS_TO_DIE = 0.5


def end_with_children(process: int) -> None:
    """Kill a process and all below it."""
    for number in [process, *children_of(process)]:
        _kill(number)


def end_children() -> None:
    """Kill all that this process started, and do not leave them behind as zombies."""
    numbers = children_of(os.getpid())
    for number in numbers:
        _kill(number)
    for number in numbers:
        _reap(number)


def children_of(process: int) -> list[int]:
    """All below a process, grandchildren too."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found = [process]
    for number in found:
        found.extend(children.get(number, ()))
    return found[1:]


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all processes; none where the system has no /proc."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = status.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        yield int(status.parent.name), int(after_name[1])


def _reap(process: int) -> None:
    """A process that hangs in the kernel is not waited for."""
    give_up_at = time.monotonic() + _SECONDS_TO_DIE
    with suppress(ChildProcessError):  # it is a child's child, or was waited for
        while os.waitpid(process, os.WNOHANG)[0] == 0 and time.monotonic() < give_up_at:
            time.sleep(0.01)


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return

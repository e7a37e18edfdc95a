"""Processes that must not outlive their use: one and all that it started."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path


def end_with_children(process: int) -> None:
    """Kill a process and all below it."""
    for number in [process, *_descendants(process)]:
        _kill(number)


def end_children() -> None:
    """Kill all that this process started."""
    for number in _descendants(os.getpid()):
        _kill(number)


def _descendants(process: int) -> list[int]:
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


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return

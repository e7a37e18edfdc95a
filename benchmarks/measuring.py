"""How the benchmarks measure: contestants take turns, so that whatever else the machine does meets all alike."""

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pathfm.lifecycle.run import processor


def taking_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every round; one that warms up is not counted. `before` is called before each turn, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        for name, run in contestants.items():
            before()
            start = clock()
            run()
            taken = clock() - start
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def spread(numbers: Sequence[float], form: str) -> str:
    """Median, and the range in brackets."""
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def forget(file: Path) -> None:
    """Drop a file from the operating system's cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine(torch: str = "") -> str:
    """Processor, cores and torch (this Python's, unless another is named) of this machine, for the head of a table."""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}, torch {torch or version('torch')}"


def command() -> str:
    """The command that makes the table."""
    return f"python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}"

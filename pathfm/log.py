"""What a person reads while it runs: log lines, and a progress bar that becomes a line every ten seconds in a file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 10.0


def get_logger(name: str) -> logging.Logger:
    """The logger of one room, e.g. `get_logger(__name__)`."""
    return logging.getLogger(name)


def start_logging(*, speak: bool = True, file: str | None = None) -> None:
    """Called once by a command. `speak`: print to stderr (only rank 0 does); `file`: also append there."""
    root = logging.getLogger("pathfm")
    root.handlers.clear()
    root.setLevel(logging.INFO)
    root.propagate = False
    handlers: list[logging.Handler] = []
    if speak:
        handlers.append(logging.StreamHandler(sys.stderr))
    if file is not None:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(handler)


def progress(items: Iterable[Item], description: str, total: int | None = None, unit: str = "items") -> Iterator[Item]:
    """Pass `items` on while showing how far we are: a bar on a terminal, otherwise one line every 10 s."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if sys.stderr.isatty():
        yield from _as_bar(items, description, total)
    else:
        yield from _as_lines(items, description, total, unit)


def _as_bar(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, total=total, console=Console(stderr=True), transient=True)


def _as_lines(items: Iterable[Item], description: str, total: int | None, unit: str) -> Iterator[Item]:
    started = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_LINES:
            last = now
            of_total = f" of {total:,}" if total else ""
            print(f"{description}: {count:,}{of_total} {unit}, {count / (now - started):,.0f}/s", file=sys.stderr)

"""What a person reads while it runs: log lines, and a progress bar that becomes a line every ten seconds in a file."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.1


def get_logger(name: str) -> logging.Logger:
    """The logger of one room, e.g. `get_logger(__name__)`."""
    return logging.getLogger(name)


def start_logging(*, speak: bool = True) -> None:
    """Called once by a command. `speak`: print to stderr; only rank 0 does."""
    logger = logging.getLogger("pathfm")
    logger.handlers.clear()
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr) if speak else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)


@contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """Yields a list that takes what is logged meanwhile, in place of whoever prints it."""
    kept = _Keeper()
    logger = logging.getLogger("pathfm")
    printers, logger.handlers = logger.handlers, [kept]
    try:
        yield kept.messages
    finally:
        logger.handlers = printers


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def progress(
    items: Iterable[Item],
    description: str,
    total: float | None = None,
    unit: str = "items",
    done: Callable[[Item], float] | None = None,
) -> Iterator[Item]:
    """Pass `items` on while showing how far we are: a bar on a terminal, otherwise one line every 10 s.

    `done(item)` says how much of `total` is behind us after an item (megabytes of a file, say); without it items count.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    counted = ((done(item) if done else count, item) for count, item in enumerate(items, start=1))
    if sys.stderr.isatty():
        yield from _as_bar(counted, description, total)
    else:
        yield from _as_lines(counted, description, total, unit)


def _as_bar(counted: Iterable[tuple[float, Item]], description: str, total: float | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import Progress

    drawn = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        for done, item in counted:
            yield item
            if (now := time.monotonic()) - drawn >= _SECONDS_BETWEEN_REDRAWS:  # an update costs more than many an item
                drawn = now
                bar.update(task, completed=done)


def _as_lines(
    counted: Iterable[tuple[float, Item]], description: str, total: float | None, unit: str
) -> Iterator[Item]:
    started = last = time.monotonic()
    for done, item in counted:
        yield item
        if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_LINES:
            last = now
            of_total = f" of {total:,.0f}" if total else ""
            print(
                f"{description}: {done:,.0f}{of_total} {unit}, {done / (now - started):,.0f}/s",
                file=sys.stderr,
                flush=True,
            )

"""A signal handler writes a note; the loop reads it between steps, saves and leaves."""

import signal
import time
from types import FrameType

_NOTED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_INSISTING = 3  # presses of Ctrl-C: a person who means it. Two may come of one press, by way of a launcher
_SECONDS_OF_A_PRESS = 0.5
_notes: list[tuple[str, float]] = []  # name, and when it came on the monotonic clock
_presses: list[float] = []


def take_notes() -> None:
    """Install the handlers. Called by commands that train, before the slow imports."""
    for number in _NOTED:
        signal.signal(number, _note)


def noted() -> str | None:
    """The first signal that came, by name, or None."""
    return _notes[0][0] if _notes else None


def seconds_since_noted() -> float:
    """How long ago the first signal came; 0 without one."""
    return time.monotonic() - _notes[0][1] if _notes else 0.0


def _note(number: int, frame: FrameType | None) -> None:
    """A second signal changes nothing: the save that the first asked for goes on."""
    now = time.monotonic()
    _notes.append((signal.Signals(number).name, now))
    if number == signal.SIGINT and (not _presses or now - _presses[-1] > _SECONDS_OF_A_PRESS):
        _presses.append(now)
        if len(_presses) >= _INSISTING:
            raise KeyboardInterrupt

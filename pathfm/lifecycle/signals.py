"""A signal handler writes a note; the loop reads it between steps, saves and leaves."""

import signal
from types import FrameType

_NOTED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_notes: list[str] = []


def take_notes() -> None:
    """Install the handlers. Called by commands that train, before the slow imports."""
    for number in _NOTED:
        signal.signal(number, _note)


def noted() -> str | None:
    """The first signal that came, by name, or None."""
    return _notes[0] if _notes else None


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and "SIGINT" in _notes:  # a person who presses Ctrl-C twice means it
        raise KeyboardInterrupt
    _notes.append(name)

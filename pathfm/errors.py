"""The one exception that is meant for people, words for its message, and how a command ends on it."""

import errno
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from io import TextIOWrapper
from itertools import islice

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: a checkpoint is written, start the same command again to go on
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_OF_THE_PLACE = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}  # a folder where a file is to be, or the other way round
_LISTED = 10  # how many wrong names or rows a message lists


class UserError(ValueError):
    """Something the user can mend: one line that names the wrong value and says what to do next."""


def nearest(word: str, known: Iterable[str], at_most: int = 1) -> list[str]:
    """The known words that a mistyped one is most like, in whatever case; the best first."""
    lower = {name.lower(): name for name in known}
    return [lower[name] for name in get_close_matches(word.lower(), lower, n=at_most, cutoff=0.5)]


def listed(items: Iterable[str], at_most: int = _LISTED) -> str:
    """The first few, and how many more there are."""
    first = list(islice(iterator := iter(items), at_most))
    more = sum(1 for _ in iterator)
    return ", ".join(first) + (f" and {more:,} more" if more else "")


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; a `UserError`, or a disk that is full or closed to us, is one line on stderr and status 2."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: names of files need not be UTF-8
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has read enough; nothing more can be told to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE | _OF_THE_PLACE:
            raise
        file = error.filename2 or error.filename or "a file"
        print(f"error: {error.strerror}: {file}; make room or choose another place", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

"""The one exception that is meant for people, words for its message, and how a command ends on it."""

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import islice

_LISTED = 10  # how many wrong names or rows a message lists


class UserError(ValueError):
    """Something the user can mend: one line that names the wrong value and says what to do next."""


def nearest(word: str, known: Iterable[str], at_most: int = 1) -> list[str]:
    """The known words that a mistyped one is most like, in whatever case; the best first."""
    lower = {name.lower(): name for name in known}
    return [lower[name] for name in get_close_matches(word.lower(), lower, n=at_most, cutoff=0.5)]


def listed(items: Iterable[str]) -> str:
    """The first ten, and how many more there are."""
    first = list(islice(iterator := iter(items), _LISTED))
    more = sum(1 for _ in iterator)
    return ", ".join(first) + (f" and {more:,} more" if more else "")


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; turn a `UserError` into one line on stderr and status 2, an interrupt into 130."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

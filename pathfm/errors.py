"""The one exception that is meant for people, and how a command ends on it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend: one line that names the wrong value and says what to do next."""


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

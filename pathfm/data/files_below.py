"""The files of a folder and of those below it, sorted; links are followed, hidden ones passed over and counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathfm.data.entries import printable
from pathfm.errors import UserError


def files_below(folder: Path, skipped: Counter[str], parents: Sequence[Path] = ()) -> Iterator[Path]:
    """`skipped` counts, by kind, what is passed over. `parents`: the real paths of the folders that led here.

    Raises `UserError` when a folder cannot be read, or links back to one that holds it.
    """
    here = folder.resolve()
    if here in parents:
        raise UserError(f"{printable(str(folder))} links back to {printable(str(here))}, which holds it")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {printable(str(folder))}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            skipped["hidden files and folders"] += 1
        elif entry.is_dir():
            yield from files_below(entry, skipped, (*parents, here))
        else:
            yield entry

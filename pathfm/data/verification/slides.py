"""Which slide a tile was cut from, as far as its file name tells."""

import re
from posixpath import basename, dirname, splitext

from pathfm.data.entries import printable
from pathfm.errors import UserError

_NUMBER_AT_THE_END = re.compile(r"[-_ ,(]+[xy]?=?\d+\)?$", re.IGNORECASE)  # _1024, -7, _x512, (3
_DIGIT = re.compile(r"\d")
_COORDINATES_ALONE = re.compile(r"(?:[xy]?=?\d+|[-_ ,()])+", re.IGNORECASE)


class SlideNames:
    """Slides by file name: what `pattern` finds in a member's path (its first group, if it has one).

    Without a pattern a slide is the file's name without the two numbers or coordinates at its end, as long as a number
    is left; or the name of its folder when nothing but numbers is in the name, or only the folder tells by a number.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise UserError(f"--slide '{pattern}' is no regular expression: {error}") from error
        self.is_guess = pattern is None

    def slide_of(self, path: str) -> str:
        """The slide of a tile. Raises `UserError` when the pattern finds none."""
        if self._pattern is None:
            return _guessed(path)
        found = self._pattern.search(path)
        slide = found and (found.group(1) if self._pattern.groups else found.group())
        if not slide:
            raise UserError(f"--slide '{self._pattern.pattern}' finds no slide in '{printable(path)}'")
        return slide


def _guessed(path: str) -> str:
    name, folder = splitext(basename(path))[0], basename(dirname(path))
    if _COORDINATES_ALONE.fullmatch(name):
        return folder or name
    for _ in range(2):
        shorter = _NUMBER_AT_THE_END.sub("", name)
        if not _DIGIT.search(shorter):  # tile_7 is no tile of a slide called 'tile'
            return folder if _DIGIT.search(folder) else name
        name = shorter
    return name

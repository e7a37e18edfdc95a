"""Data set strings: `Name:key=value:key=value`, as recipes and the ancestors' command lines hold them."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pathfm.errors import UserError


@dataclass(frozen=True)
class Keys:
    """Which keys a data set takes."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.required + self.optional


KEYS: Mapping[str, Keys] = {
    "Pathology": Keys(required=("root",), optional=("extra", "subset")),
}


@dataclass(frozen=True)
class DatasetString:
    """A parsed string; every key is known to the data set and every required one is there."""

    name: str
    options: Mapping[str, str]


def parse_dataset_string(text: str) -> DatasetString:
    r"""`Pathology:root=/data:subset=train` -> name and options. A value may hold '='; a ':' in it is written '\:'.

    Raises `UserError` that says what was expected and what was found.
    """
    name, *pairs = (part.replace(r"\:", ":") for part in re.split(r"(?<!\\):", text.strip()))
    if name not in KEYS:
        raise UserError(f"'{text}': no data set is called '{name}'{_nearest(name, KEYS)}; known: {', '.join(KEYS)}")
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in KEYS[name].all:
            raise UserError(
                f"'{text}': {name} takes {', '.join(KEYS[name].all)}, not '{key}'{_nearest(key, KEYS[name].all)}"
                + ("" if equals else r" (a ':' inside a value is written '\:')")
            )
        if not value:
            raise UserError(f"'{text}': '{key}' has no value; write {key}=...")
        if key in options:
            raise UserError(f"'{text}': '{key}' is given twice ('{options[key]}' and '{value}')")
        options[key] = value
    for key in KEYS[name].required:
        if key not in options:
            raise UserError(f"'{text}': {name} needs {key}=...; found {', '.join(options) or 'no keys'}")
    return DatasetString(name, options)


def _nearest(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""

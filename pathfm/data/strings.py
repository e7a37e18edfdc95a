"""Data set strings: `Name:key=value:key=value`, as recipes and the ancestors' command lines hold them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pathfm.errors import UserError, nearest


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
    "PathologyFoundation": Keys(required=("root",), optional=("extra", "subset")),
    "Regions": Keys(required=("root",), optional=("extra", "subset")),
    "KNN": Keys(required=("root", "split"), optional=("extra", "subset")),
}


@dataclass(frozen=True)
class DatasetString:
    """A parsed string; every key is known to the data set and every required one is there."""

    name: str
    options: Mapping[str, str]

    def __str__(self) -> str:
        """What `parse_dataset_string` reads."""
        return ":".join([self.name, *(f"{key}={value}".replace(":", r"\:") for key, value in self.options.items())])


def is_dataset_string(text: str) -> bool:
    """Whether a text names a data set, rightly or not, where a path could stand too."""
    return text.partition(":")[0] in KEYS and ":" in text


def parse_dataset_string(text: str) -> DatasetString:
    r"""`Pathology:root=/data:subset=train` -> name and options. A value may hold '='; a ':' in it is written '\:'.

    Raises `UserError` that says what was expected and what was found.
    """
    name, *pairs = (part.replace(r"\:", ":") for part in re.split(r"(?<!\\):", text.strip()))
    if name not in KEYS:
        raise UserError(
            f"'{text}': no data set is called '{name}'{_did_you_mean(name, KEYS)}; known: {', '.join(KEYS)}"
        )
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in KEYS[name].all:
            raise UserError(
                f"'{text}': {name} takes {', '.join(KEYS[name].all)}, not '{key}'{_did_you_mean(key, KEYS[name].all)}"
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


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    return "".join(f" (did you mean '{name}'?)" for name in nearest(word, known))

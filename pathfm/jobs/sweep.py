"""A sweep: one run for every combination of some settings' values. Pure."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from pathfm.errors import UserError

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Point:
    """One combination."""

    suffix: str  # of the run's name
    overrides: tuple[str, ...]


def points(sweeps: Sequence[str]) -> list[Point]:
    """Of `KEY=VALUE,VALUE,...` each; the last one varies fastest. Commas in brackets do not part values.

    Raises `UserError` when one is not of this form, or when two combinations would have one name.
    """
    found = [Point("-".join(map(_name, settings)), settings) for settings in product(*map(_settings, sweeps))]
    by_suffix: dict[str, Point] = {}
    for point in found:
        if (other := by_suffix.setdefault(point.suffix, point)) is not point:
            both = f"{' '.join(other.overrides)} and {' '.join(point.overrides)}"
            raise UserError(f"two runs of the sweep would be named -{point.suffix}: {both}")
    return found


def _settings(sweep: str) -> list[str]:
    """`KEY=VALUE` for each value."""
    key, equals, values = sweep.partition("=")
    parts = list(_parted(values))
    if not (key and equals) or not all(parts):
        raise UserError(f"--sweep {sweep}: give KEY=VALUE,VALUE,... as in --sweep optim.base_lr=1e-3,2e-3")
    return [f"{key}={value}" for value in parts]


def _parted(values: str) -> Iterator[str]:
    depth, part = 0, ""
    for letter in values:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            yield part
            part = ""
        else:
            part += letter
    yield part


def _name(setting: str) -> str:
    """`optim.base_lr=1e-3` -> `base_lr_1e-3`."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}_{_NOT_IN_NAMES.sub('_', value).strip('_')}"

"""The rows that W&B is shown of a run: metrics, tunings and pictures of one step together, in the order of steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pathfm.track.wandb_mirror.followed import Line, Picture

X_AXIS = "samples_seen"


@dataclass
class Row:
    """What is new of one training step."""

    step: int
    values: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    shown: dict[str, Any] = field(default_factory=dict)  # for the list of what was sent


def rows_of(
    metrics: Sequence[Line], tunings: Sequence[Line], pictures: Sequence[Picture], at: int, samples_per_step: int | None
) -> Iterator[Row]:
    """In the order of steps. `at`: the step of pictures that tell none."""
    rows: dict[int, Row] = {}

    def row(step: int) -> Row:
        return rows.setdefault(step, Row(step))

    for picture in pictures:
        place = row(at if picture.step is None else picture.step)
        if samples_per_step:
            place.values |= {"step": place.step, X_AXIS: place.step * samples_per_step}
        place.pictures.append(picture)
        place.shown.setdefault("picture", []).append(picture.key)
    for line in tunings:
        row(line["step"]).values |= tuning_values(line)
        row(line["step"]).shown.setdefault("tuning", []).append(tuning_key(line))
    for line in metrics:
        row(line["step"]).values |= flat(line)
        row(line["step"]).shown |= {"metrics": line["step"], "left_out": left_out(line)}
    return (rows[step] for step in sorted(rows))


def left_out(line: Line) -> int:
    """Batches that training has left out so far: more of them mean that the run went back to an earlier step."""
    return line.get("batches_passed_over") or 0


def tuning_key(line: Line) -> str:
    return f"{line['step']} {line.get('by', 'run')}"


def tuning_values(line: Line) -> dict[str, Any]:
    """By the ancestors' names: tune/teacher.acc_20, and its interval from tune/teacher.acc_20_low to ..._high."""
    place = {name: line[name] for name in ("step", X_AXIS, "epoch") if name in line}
    values: dict[str, Any] = {}
    for network in ("teacher", "student"):
        values |= {f"{network}.{name}": value for name, value in (line.get(network) or {}).items()}
        for name, (low, high) in ((line.get("intervals") or {}).get(network) or {}).items():
            values |= {f"{network}.{name}_low": low, f"{network}.{name}_high": high}
    stopping = line.get("early_stopping") or {}
    values |= {f"early_stopping.{name}": value for name, value in stopping.items() if _is_number(value)}
    values["seconds"] = line.get("seconds")
    return place | {f"tune/{name}": value for name, value in values.items() if value is not None}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups become prefixes: timing/seconds_per_step. What has no value is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            found[prefix + key] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

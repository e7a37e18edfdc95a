"""The W&B page of a run as data: which curves stand together, in the order in which a person looks at them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pathfm.track.wandb_mirror.rows import X_AXIS


@dataclass(frozen=True)
class Panel:
    """Curves over the samples seen; or pictures, where `pictures` says so."""

    title: str
    keys: tuple[str, ...]
    to: float | None = None  # the axis goes from 0 to this
    log: bool = False
    pictures: bool = False


@dataclass(frozen=True)
class DashboardSection:
    name: str
    panels: tuple[Panel, ...]


def sections_of(
    prototypes: int, metrics_of_tuning: Sequence[str], first_metric: str, pictures: Sequence[str]
) -> Iterator[DashboardSection]:
    """`metrics_of_tuning`: acc_20 and the like, of the recipe; `first_metric` is the one that early stopping tracks.

    `pictures`: names of series, as in previews/.
    """
    yield DashboardSection(
        "1 losses",
        (
            Panel("total loss", ("total_loss",)),
            Panel("[CLS] tokens", ("dino_global_crops_loss", "dino_local_crops_loss")),
            Panel("masked patches", ("ibot_loss",)),
            Panel("KoLeo", ("koleo_loss",)),
        ),
    )
    if metrics_of_tuning:
        ordered = sorted(metrics_of_tuning, key=lambda metric: metric != first_metric)
        yield DashboardSection("2 tuning", tuple(_tuning_panel(metric) for metric in ordered))
    uniform = math.log(prototypes)
    yield DashboardSection(
        "3 health",
        (
            Panel(
                f"entropies; at most log K = {uniform:.2f}",
                ("health/teacher_entropy", "health/student_entropy", "health/prototype_entropy"),
                to=round(uniform * 1.02, 3),
            ),
            Panel("effective rank of the teacher's [CLS]", ("health/effective_rank",)),
            Panel("distance to the nearest sample", ("health/nearest_distance",), to=2.0),
            Panel("student and teacher name the same prototype", ("health/agreement",), to=1.0),
            Panel("gradient norms", ("grad_norm/backbone", "grad_norm/dino_head", "grad_norm/ibot_head"), log=True),
            Panel("passed over", ("samples_skipped", "steps_skipped", "batches_passed_over")),
        ),
    )
    yield DashboardSection(
        "4 throughput",
        (
            Panel("samples per second", ("timing/samples_per_second",)),
            Panel("share of time that waits for data", ("timing/data_wait_fraction",), to=1.0),
            Panel("model FLOPs utilisation", ("timing/mfu",), to=1.0),
            Panel("GPU memory, GiB", ("timing/gpu_memory_gib",)),
            Panel("seconds per step", ("timing/seconds_per_step",)),
            Panel("seconds that checkpoints stop training", ("timing/checkpoint_stall_s",)),
        ),
    )
    yield DashboardSection(
        "5 schedules",
        tuple(Panel(name.replace("_", " "), (name,)) for name in ("lr", "weight_decay", "momentum", "teacher_temp")),
    )
    if pictures:
        named = tuple(Panel(name, (f"previews/{name}",), pictures=True) for name in pictures)
        yield DashboardSection("6 pictures", named)


def as_tree(name: str, entity: str | None, project: str, sections: Sequence[DashboardSection]) -> dict[str, Any]:
    """For people and records: everything that is to be made."""
    return {
        "name": name,
        "entity": entity,
        "project": project,
        "x": X_AXIS,
        "sections": [
            {"name": section.name, "panels": [_panel_tree(panel) for panel in section.panels]} for section in sections
        ],
    }


def _tuning_panel(metric: str) -> Panel:
    interval = (f"tune/teacher.{metric}_low", f"tune/teacher.{metric}_high")
    return Panel(metric.replace("_", " "), (f"tune/teacher.{metric}", f"tune/student.{metric}", *interval))


def _panel_tree(panel: Panel) -> dict[str, Any]:
    options = {"to": panel.to, "log": panel.log or None, "pictures": panel.pictures or None}
    return {
        "title": panel.title,
        "keys": list(panel.keys),
        **{name: value for name, value in options.items() if value is not None},
    }

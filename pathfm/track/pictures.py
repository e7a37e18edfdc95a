"""Curves that a person looks at: losses from metrics.jsonl, schedules before a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathfm.files import written_aside

_LOSSES = ("total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")


def draw_losses(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """One small plot per loss over samples seen; steps without a finite loss leave a gap."""
    names = [name for name in _LOSSES if any(line.get(name) is not None for line in lines)]
    panels = {
        name: ([line["samples_seen"] for line in lines], [_number(line.get(name)) for line in lines]) for name in names
    }
    _draw_panels(panels, path, title, "samples seen")


def draw_schedules(values: Mapping[str, Sequence[float]], steps: Sequence[int], path: Path, title: str) -> None:
    """One small plot per schedule over the steps of the run."""
    _draw_panels({name: (steps, series) for name, series in values.items()}, path, title, "step")


def _draw_panels(
    panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str, x_label: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=11)
    for index, (name, (x, y)) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, index + 1)
        axis.plot(x, y, color="#6b2c7e", linewidth=1.4)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel(x_label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with written_aside(path) as aside:
        FigureCanvasAgg(figure).print_png(str(aside))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

"""Confusion matrices and reliability curves of an evaluation as one picture, a row for each task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathfm.evaluate.report import in_words
from pathfm.files import written_aside

_USUAL_K = "knn_20"
_MOST_WRITTEN = 12  # classes of a matrix whose cells have numbers
_BAR, _LINE, _GREY = "#d9c8de", "#6b2c7e", "#888888"


def shown_tasks(tasks: Sequence[str]) -> list[str]:
    """kNN by k = 20 or else the first k there is, the probe, and the regression; few shots have a table."""
    knn = [task for task in tasks if task.startswith("knn_") and not task.endswith("per_class")]
    first = [_USUAL_K] if _USUAL_K in knn else knn[:1]
    return first + [task for task in ("linear", "logistic") if task in tasks]


def draw_evaluation(report: Mapping[str, Any], path: Path) -> bool:
    """Whether there was a task to draw."""
    tasks = shown_tasks(list(report["tasks"]))
    if not tasks:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = list(report["test"]["classes"])
    side = min(max(3.2, 0.5 * len(classes) + 1.6), 9.0)
    figure = Figure(figsize=(side + 5.2, (side + 0.5) * len(tasks) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(str(report["name"]), fontsize=12)
    rows = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=[side, 4.4])
    for task, (left, right) in zip(tasks, rows, strict=True):
        _draw_confusion(left, np.array(report["tasks"][task]["confusion"]), classes, in_words(task))
        _draw_reliability(right, report["tasks"][task], in_words(task))
    with written_aside(path) as aside, aside.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    return True


def _draw_confusion(axis: Any, counts: np.ndarray, classes: Sequence[str], task: str) -> None:
    """Shades are shares of the true class; a class without samples stays white."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, vmin=0, vmax=1, cmap="Purples", aspect="equal")
    places = range(len(classes))
    if len(classes) <= _MOST_WRITTEN:
        for row in places:
            for column in places:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(places, classes, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(places, classes, fontsize=8)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    axis.set_title(f"{task}: test samples", fontsize=10)


def _draw_reliability(axis: Any, found: Mapping[str, Any], task: str) -> None:
    """Accuracy over confidence; bars below are how many samples have such a confidence."""
    said = found["reliability"]
    counts = np.array(said["counts"])
    edges = np.linspace(0, 1, len(counts) + 1)
    share = counts / counts.sum()
    axis.bar(edges[:-1], share, width=1 / len(counts), align="edge", color=_BAR, label="share of samples")
    axis.plot([0, 1], [0, 1], linestyle="--", color=_GREY, linewidth=1, label="means what it says")
    there = [(c, a) for c, a in zip(said["confidence"], said["accuracy"], strict=True) if c is not None]
    axis.plot(*zip(*there, strict=True), marker="o", markersize=4, color=_LINE, linewidth=1.4, label="accuracy")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("confidence", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    error = f"{100 * found['calibration_error']:.1f} %"
    axis.set_title(f"{task}: calibration error {error}", fontsize=10)

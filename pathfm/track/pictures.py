"""Curves that a person looks at: a run's metrics over samples seen, several runs beside each other, schedules."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from pathfm.files import written_aside

# Apart for every kind of colour vision, and apart in lightness too.
_COLOURS = ("#6b2c7e", "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#000000")
_STYLES = ("-", "--", ":")  # of the curves of a panel
_ALARM, _START = "#d55e00", "#888888"
_MOST_POINTS = 300  # of a curve; where there are more, groups of them are averaged, and their range is shaded
_FEW_POINTS = 30  # are dots too
_NAN = float("nan")

Line = Mapping[str, Any]
_LOSSES = {
    "total_loss": "total loss",
    "dino_global_crops_loss": "DINO loss, global crops",
    "dino_local_crops_loss": "DINO loss, local crops",
    "ibot_loss": "iBOT loss",
    "koleo_loss": "KoLeo loss",
}
_TUNED = {"acc": "accuracy", "balanced_acc": "balanced accuracy", "auc": "AUC"}
_TUNED_KEY = re.compile(r"(?:balanced_acc|acc|auc)_(\w+)")


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of a run. Positions are in samples seen."""

    name: str
    lines: Sequence[Line]  # of metrics
    tunings: Sequence[Line] = ()
    tracked: str = ""  # the number of tuning that the run is judged by, e.g. auc_20
    log_k: float | None = None  # of the class tokens' prototypes
    starts: Sequence[float] = ()  # where it was taken up again
    alarms: Mapping[str, Sequence[float]] = field(default_factory=dict)  # where, by kind


@dataclass(frozen=True)
class _Curve:
    label: str
    x: Sequence[float]
    y: Sequence[float]  # nan leaves a gap
    run: int = 0
    band: Sequence[tuple[float, float]] | None = None
    best: tuple[float, float] | None = None

    @property
    def is_there(self) -> bool:
        return any(map(math.isfinite, self.y))


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: Sequence[_Curve]  # those of one run after those of another
    levels: Sequence[float] = ()  # dashed
    level_name: str = ""
    log: bool = False
    percent: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class _Mark:
    """A thin vertical line in all panels."""

    label: str
    places: Sequence[float]
    colour: Any
    style: str
    width: float
    height: float  # of the panel's: 1 is all of it


def draw_losses(lines: Sequence[Line], path: Path, title: str) -> None:
    """One small plot per loss over samples seen; steps without a finite loss leave a gap."""
    _draw_panels(_loss_panels([RunCurves("", lines)]), path, title, "samples seen")


def draw_schedules(values: Mapping[str, Sequence[float]], steps: Sequence[int], path: Path, title: str) -> None:
    """One small plot per schedule over the steps of the run."""
    panels = [_Panel(name.replace("_", " "), [_Curve("", steps, series)]) for name, series in values.items()]
    _draw_panels(panels, path, title, "step")


def draw_runs(runs: Sequence[RunCurves], path: Path, title: str) -> None:
    """Losses, tuning, health and throughput; several runs in the same panels, each in its colour."""
    panels = [*_loss_panels(runs), *_tuning_panels(runs), *_health_panels(runs), *_throughput_panels(runs)]
    names = [run.name for run in runs] if len(runs) > 1 else []
    _draw_panels(panels, path, title, "samples seen", names, _marks(runs))


def tuned_at(runs: Sequence[RunCurves]) -> str:
    """Behind `acc_`, what all runs have: the tracked k, or else the largest one; empty when they share none."""
    found = [{key for tuning in run.tunings for key in _suffixes(tuning)} for run in runs if run.tunings]
    shared = set.intersection(*found) if found else set()
    tracked = {match[1] for run in runs if run.tunings and (match := _TUNED_KEY.fullmatch(run.tracked))}
    if len(tracked) == 1 and tracked <= shared:
        return tracked.pop()
    return max(shared, key=lambda suffix: (suffix.isdigit(), int(suffix.split("_")[0])), default="")


# ---- which panels


def _loss_panels(runs: Sequence[RunCurves]) -> list[_Panel]:
    return _with_content(_Panel(title, _of_lines(runs, {"": key})) for key, title in _LOSSES.items())


def _tuning_panels(runs: Sequence[RunCurves]) -> list[_Panel]:
    at = tuned_at(runs)
    return _with_content(
        _Panel(f"{title}, {_in_words(at)}", _of_tunings(runs, f"{key}_{at}"), percent=True)
        for key, title in _TUNED.items()
    )


def _health_panels(runs: Sequence[RunCurves]) -> list[_Panel]:
    entropies = {name: f"health/{name}_entropy" for name in ("teacher", "student", "prototype")}
    norms = {name.replace("_", " "): f"grad_norm/{name}" for name in ("backbone", "dino_head", "ibot_head")}
    levels = sorted({run.log_k for run in runs if run.log_k is not None})
    return _with_content(
        [
            _Panel("entropy, nats", _of_lines(runs, entropies), levels, "log K"),
            _Panel("effective rank of the teacher", _of_lines(runs, {"": "health/effective_rank"})),
            _Panel("distance to the nearest sample", _of_lines(runs, {"": "health/nearest_distance"})),
            _Panel("agreement of student and teacher", _of_lines(runs, {"": "health/agreement"}), percent=True),
            _Panel("gradient norm", _of_lines(runs, norms), log=True),
        ]
    )


def _throughput_panels(runs: Sequence[RunCurves]) -> list[_Panel]:
    speed, wait, mfu = "timing/samples_per_second", "timing/data_wait_fraction", "timing/mfu"
    return _with_content(
        [
            _Panel("samples per second", _of_lines(runs, {"": speed}), from_zero=True),
            _Panel("time spent waiting for data", _of_lines(runs, {"": wait}), percent=True, from_zero=True),
            _Panel("model FLOPs utilisation", _of_lines(runs, {"": mfu}), percent=True, from_zero=True),
        ]
    )


def _with_content(panels: Iterable[_Panel]) -> list[_Panel]:
    return [panel for panel in panels if any(curve.is_there for curve in panel.curves)]


def _of_lines(runs: Sequence[RunCurves], keys: Mapping[str, str]) -> list[_Curve]:
    return [
        _Curve(label, [line["samples_seen"] for line in run.lines], [_value(line, key) for line in run.lines], number)
        for number, run in enumerate(runs)
        for label, key in keys.items()
    ]


def _of_tunings(runs: Sequence[RunCurves], key: str) -> list[_Curve]:
    """Teacher and student; the teacher's best step by the tracked number is marked."""
    curves = []
    for number, run in enumerate(runs):
        x = [tuning["samples_seen"] for tuning in run.tunings]
        best = _best(run)
        for name in ("teacher", "student"):
            y = [_value(tuning, f"{name}/{key}") for tuning in run.tunings]
            band = (
                [_interval(tuning, name, key) for tuning in run.tunings]
                if name == "teacher" or len(runs) == 1
                else None
            )
            is_marked = name == "teacher" and best is not None and math.isfinite(y[best])
            curves.append(
                _Curve(name, x, y, number, band, (x[best], y[best]) if is_marked and best is not None else None)
            )
    return curves


def _best(run: RunCurves) -> int | None:
    """Which tuning: the one that early stopping holds for the best, else that with the best tracked number."""
    judged = run.tunings[-1].get("early_stopping") if run.tunings else None
    steps = [tuning.get("step") for tuning in run.tunings]
    if isinstance(judged, Mapping) and judged.get("best_step") in steps:
        return steps.index(judged["best_step"])
    values = [_value(tuning, f"teacher/{run.tracked}") for tuning in run.tunings]
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    return max(finite, key=values.__getitem__, default=None)


def _marks(runs: Sequence[RunCurves]) -> list[_Mark]:
    """Of one run through all of a panel; of several in the run's colour at its foot, where they hide nothing."""
    alone = len(runs) == 1
    found = []
    for number, run in enumerate(runs):
        colour = _colour(number, len(runs))
        found.append(_Mark("taken up again", run.starts, _START if alone else colour, "-", 0.8, 1 if alone else 0.06))
        places = [place for of_kind in run.alarms.values() for place in of_kind]
        kinds = f": {', '.join(run.alarms)}" if alone else ""
        found.append(_Mark(f"alarm{kinds}", places, _ALARM if alone else colour, ":", 1.4, 1 if alone else 0.12))
    return [mark for mark in found if mark.places]


# ---- drawing


def _draw_panels(
    panels: Sequence[_Panel],
    path: Path,
    title: str,
    x_label: str,
    run_names: Sequence[str] = (),
    marks: Sequence[_Mark] = (),
) -> None:
    """With several `run_names` a colour is a run and a style is a curve of it; else a curve has both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4 if len(panels) > 6 else 3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(12.6 / 3 * min(columns, 3), 2.5 * rows + 0.5), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12)
    places = [x for panel in panels for curve in panel.curves for x in curve.x]
    for index, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axis, panel, len(run_names))
        for mark in marks:
            feet, colour, style = axis.get_xaxis_transform(), mark.colour, mark.style
            axis.vlines(mark.places, 0, mark.height, colour, style, linewidth=mark.width, transform=feet)
        if min(places) < max(places):
            margin = 0.02 * (max(places) - min(places))
            axis.set_xlim(min(places) - margin, max(places) + margin)
    _draw_foot(figure, x_label, run_names, marks)
    with written_aside(path) as aside:
        FigureCanvasAgg(figure).print_png(str(aside))


def _draw_panel(axis: Any, panel: _Panel, num_runs: int) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set_title(panel.title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.log and _is_wide([y for curve in panel.curves for y in curve.y]):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    _draw_curves(axis, panel, num_runs)
    for level in panel.levels:
        axis.axhline(level, color=_START, linestyle="--", linewidth=1, label=panel.level_name)
    if panel.percent:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    _draw_key(axis, num_runs)


def _draw_curves(axis: Any, panel: _Panel, num_runs: int) -> None:
    labels = list(dict.fromkeys(curve.label for curve in panel.curves if curve.is_there))
    for curve in panel.curves:
        if not curve.is_there:
            continue
        number = labels.index(curve.label)
        colour = _colour(curve.run, num_runs) if num_runs > 1 else _COLOURS[number]
        _draw_curve(axis, curve, colour, _STYLES[number], is_alone=num_runs < 2)


def _draw_curve(axis: Any, curve: _Curve, colour: Any, style: str, *, is_alone: bool) -> None:
    x, y = _grouped(curve.x), _grouped(curve.y)
    middle = [_mean_of_finite(group) for group in y]
    dot = "." if len(x) <= _FEW_POINTS else ""
    places = [fmean(group) for group in x]
    axis.plot(places, middle, color=colour, linestyle=style, marker=dot, linewidth=1.4, label=curve.label or "_")
    if curve.band is not None:
        axis.fill_between(curve.x, *zip(*curve.band, strict=True), color=colour, alpha=0.15, linewidth=0)
    elif len(y) < len(curve.y):
        ranges = zip(*map(_range_of_finite, y), strict=True)
        axis.fill_between(places, *ranges, color=colour, alpha=0.2, linewidth=0)
    if curve.best is not None:
        label = f"best: {100 * curve.best[1]:.1f} %" if is_alone else "_"
        axis.plot(*curve.best, "*", color=colour, markersize=11, markeredgecolor="white", label=label)


def _draw_key(axis: Any, num_runs: int) -> None:
    """The curves' names, each once; of several runs their styles alone, as the colours are the runs'."""
    handles, labels = axis.get_legend_handles_labels()
    named = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0].startswith("best")))
    if len(named) < 2:
        return
    key = axis.legend(named.values(), named.keys(), fontsize=7.5, frameon=False, handlelength=1.8)
    for handle in key.legend_handles if num_runs > 1 else ():
        handle.set_color("#444444")


def _draw_foot(figure: Any, x_label: str, run_names: Sequence[str], marks: Sequence[_Mark]) -> None:
    """What all panels share: the label below them, and what colours and marks mean."""
    from matplotlib.lines import Line2D

    runs = [Line2D([], [], color=_colour(i, len(run_names)), linewidth=2.5) for i in range(len(run_names))]
    named = dict(zip(run_names, runs, strict=True))
    for mark in marks:
        colour = _START if len(run_names) > 1 else mark.colour
        named.setdefault(mark.label, Line2D([], [], color=colour, linestyle=mark.style, linewidth=mark.width))
    if named:
        words: dict[str, Any] = {"fontsize": 9, "title": x_label, "title_fontsize": 10, "frameon": False}
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(len(named), 6), **words)
    else:
        figure.supxlabel(x_label, fontsize=10)


def _colour(run: int, num_runs: int) -> Any:
    """Of many runs no colours are quite apart; they then follow each other from dark to light."""
    if num_runs <= len(_COLOURS):
        return _COLOURS[run]
    from matplotlib import colormaps

    return colormaps["viridis"](run / num_runs)


# ---- numbers


def _grouped(values: Sequence[float]) -> list[Sequence[float]]:
    """Consecutive values together, where there are more than a picture has room for; else each alone."""
    number = min(len(values), _MOST_POINTS)
    ends = [round(i * len(values) / number) for i in range(number + 1)] if number else []
    return [values[first:behind] for first, behind in pairwise(ends)]


def _mean_of_finite(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else _NAN


def _range_of_finite(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (_NAN, _NAN)


def _is_wide(values: Sequence[float]) -> bool:
    """Whether they are of several sizes, so that an even axis would hide the small ones."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > 10 * min(positive)


def _value(line: Any, path: str) -> float:
    """`timing/samples_per_second` is either such a key, or a key within a key; nan where there is no number."""
    group, _, key = path.partition("/")
    value = line[path] if path in line else line.get(group)
    if isinstance(value, Mapping):
        value = value.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else _NAN


def _interval(tuning: Line, name: str, key: str) -> tuple[float, float]:
    found = tuning.get("intervals")
    for part in (name, key):
        found = found.get(part) if isinstance(found, Mapping) else None
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(isinstance(end, int | float) for end in found):
        return _NAN, _NAN
    return found[0], found[1]


def _suffixes(tuning: Line) -> set[str]:
    numbers = tuning.get("teacher")
    found = map(_TUNED_KEY.fullmatch, numbers if isinstance(numbers, Mapping) else ())
    return {match[1] for match in found if match and match[1].split("_")[0].isdigit()}


def _in_words(suffix: str) -> str:
    """20_5_per_class -> k = 20, 5 per class."""
    k, _, rest = suffix.partition("_")
    return f"k = {k}{f', {rest}' if rest else ''}".replace("_", " ")

"""What a dense evaluation found, as Markdown; the same numbers as its JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from pathfm.evaluate.bootstrap import Score

_OVERALL = {
    "segmentation": {"miou": "mIoU", "mdice": "mean Dice", "pixel_acc": "pixel accuracy"},
    "regression": {
        "abs_rel": "AbsRel (lower is better)",
        "rmse": "RMSE (lower is better)",
        "delta_1": "delta < 1.25",
        "delta_2": "delta < 1.25^2",
        "delta_3": "delta < 1.25^3",
    },
}
_OF_CLASSES = {"iou": "IoU", "dice": "Dice", "acc": "accuracy"}


def as_json(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    return {name: {"value": score.value, "low": score.low, "high": score.high} for name, score in scores.items()}


def headline(task: str, scores: Mapping[str, Any]) -> str:
    """One line for a terminal."""
    names = _OVERALL[task]
    return ", ".join(f"{names[name]} {_shown(scores[name])}" for name in names if name in scores)


def markdown(report: Mapping[str, Any]) -> str:
    """A page for people. `report` is what goes into the JSON."""
    parts = [
        f"# Dense {report['task']} by a {report['head']} head on {report['weights']['name']}",
        _facts(report),
        _overall(report),
    ]
    if report["task"] == "segmentation":
        parts += [_classes(report), _confusion(report)]
    parts += [_pictures(report), f"Made by `{report['command']}`, commit {report['commit'] or 'unknown'}."]
    return "\n\n".join(parts) + "\n"


def _facts(report: Mapping[str, Any]) -> str:
    data, settings, training = report["data"], report["settings"], report["training"]
    groups = f" of {data['test_groups']:,} groups" if data["test_groups"] else ""
    drawn = "groups" if data["test_groups"] else "pictures"
    size, stride = (" x ".join(map(str, settings[key])) for key in ("window", "stride"))
    return (
        f"The backbone is frozen. The head learned from {data['train']:,} pictures and is scored on {data['test']:,} "
        f"others{groups}; split by {data['split']}. Intervals: 95 %, by resampling {drawn}. "
        f"Windows of {size} px every {stride} px, at scale {', '.join(f'{scale:g}' for scale in settings['scales'])}; "
        f"{training['steps']:,} steps, loss {training['first_loss']:.4f} -> {training['last_loss']:.4f}."
    )


def _overall(report: Mapping[str, Any]) -> str:
    """Beside what a head gets that says the same everywhere."""
    scores, constant = report["scores"], report["constant"]
    rows = [
        [label, _value(scores[name]), _interval(scores[name]), _value(constant["scores"].get(name))]
        for name, label in _OVERALL[report["task"]].items()
        if name in scores
    ]
    return _table(["", "value", "95 % interval", f"{constant['says']} everywhere"], rows)


def _classes(report: Mapping[str, Any]) -> str:
    scores, names = report["scores"], report["classes"]
    rows = [[name, *(_shown(scores.get(f"{what}/{name}")) for what in _OF_CLASSES)] for name in names]
    return _table(["class", *_OF_CLASSES.values()], rows)


def _confusion(report: Mapping[str, Any]) -> str:
    names, matrix = report["classes"], report["confusion"]
    rows = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, matrix, strict=True)]
    return "Pixels, by what they are (rows) and what was said (columns):\n\n" + _table(["", *names], rows)


def _pictures(report: Mapping[str, Any]) -> str:
    """The worst first: they are worth a look."""
    metric = "miou" if report["task"] == "segmentation" else "abs_rel"
    is_better_high = metric == "miou"
    scored = [one for one in report["pictures"] if metric in one]
    worst = sorted(scored, key=lambda one: one[metric] if is_better_high else -one[metric])[:10]
    rows = [[one["name"], one.get("group") or "", f"{one[metric]:.4f}"] for one in worst]
    label = _OVERALL[report["task"]][metric].split(" (")[0]
    return "![Pictures, truth, prediction, errors](pictures.png)\n\nThe worst pictures:\n\n" + _table(
        ["picture", "group", label], rows
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _shown(score: Mapping[str, float] | None) -> str:
    return "–" if score is None else f"{_value(score)} ({_interval(score)})"


def _value(score: Mapping[str, float] | None) -> str:
    return "–" if score is None else f"{score['value']:.4f}"


def _interval(score: Mapping[str, float]) -> str:
    return f"{score['low']:.4f} to {score['high']:.4f}"

"""What an evaluation found, as JSON, as Markdown, and as the probabilities that backbones are compared by.

T test samples   C classes   A tries
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from pathfm.errors import UserError
from pathfm.evaluate.bootstrap import Score
from pathfm.evaluate.calibration import confusion, reliability
from pathfm.evaluate.metrics import mean_scores, scores
from pathfm.evaluate.tasks import Found
from pathfm.files import write_json, write_text, written_aside

METRICS = {"acc": "accuracy", "balanced_acc": "balanced accuracy", "auc": "AUC"}
FORMAT_VERSION = 1
FEW_SHOTS = " Of few shots they tell what other test samples would change, not what other shots would."


@dataclass(frozen=True)
class JudgedSamples:
    """Which samples were judged. `groups` None: nothing is known of slides or patients."""

    rows: Int[np.ndarray, " T"]  # of the test split
    labels: Int[np.ndarray, " T"]
    groups: Int[np.ndarray, " T"] | None

    def as_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Labels and groups."""
        return torch.from_numpy(self.labels), None if self.groups is None else torch.from_numpy(self.groups)


@dataclass(frozen=True)
class Evaluation:
    """A report that was read, with the probabilities beside it."""

    path: Path
    report: Mapping[str, Any]
    test: JudgedSamples
    tries: Mapping[str, Float[np.ndarray, "A T C"]]  # by task

    @property
    def name(self) -> str:
        return str(self.report["name"])


def report_of_task(found: Found, test: JudgedSamples, resamples: int, seed: int) -> dict[str, Any]:
    """Every metric with its interval, how far tries lie apart, calibration, confusion and what was chosen."""
    labels, groups = test.as_tensors()
    tries = [torch.from_numpy(one) for one in found.tries]
    of_all = mean_scores(tries, labels, groups=groups, resamples=resamples, seed=seed)
    report: dict[str, Any] = {"chosen": dict(found.chosen), **{name: asdict(score) for name, score in of_all.items()}}
    if len(tries) > 1:
        each = [scores(one, labels, resamples=0) for one in tries]
        report["tries"] = len(tries)
        report["deviation"] = {name: float(np.std([one[name].value for one in each], ddof=1)) for name in of_all}
    bins = [reliability(one, test.labels) for one in found.tries]
    report["calibration_error"] = float(np.mean([one.expected_error for one in bins]))
    if len(tries) == 1:
        report["confusion"] = confusion(found.tries[0], test.labels).tolist()
        report["reliability"] = {
            "counts": bins[0].counts.tolist(),
            "confidence": _with_null(bins[0].confidence),
            "accuracy": _with_null(bins[0].accuracy),
        }
    return report


def write_evaluation(
    folder: Path, report: Mapping[str, Any], test: JudgedSamples, tries: Mapping[str, Float[np.ndarray, "A T C"]]
) -> Path:
    """NAME.npz and NAME.md, and at last NAME.json, which says that all is there."""
    name = report["name"]
    arrays: dict[str, Any] = {} if test.groups is None else {"groups": test.groups}
    arrays |= {f"task:{task}": one.astype(np.float32) for task, one in tries.items()}
    with written_aside(folder / f"{name}.npz") as aside, aside.open("wb") as file:
        np.savez_compressed(file, rows=test.rows, labels=test.labels, **arrays)
    write_text(folder / f"{name}.md", as_markdown(report))
    write_json(folder / f"{name}.json", {"format_version": FORMAT_VERSION, **report})
    return folder / f"{name}.json"


def read_evaluation(path: Path) -> Evaluation:
    """Raises `UserError` for what is no report of an evaluation, or has lost its probabilities."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not {"name", "tasks", "test"} <= report.keys():
            raise UserError(f"{path} is no report of 'pathfm evaluate'")
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            groups = arrays.get("groups")
            test = JudgedSamples(arrays["rows"], arrays["labels"], groups)
            tries = {key.removeprefix("task:"): arrays[key] for key in arrays.files if key.startswith("task:")}
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no report of 'pathfm evaluate' ({error})") from error
    return Evaluation(path, report, test, tries)


def as_markdown(report: Mapping[str, Any]) -> str:
    """The same for people; what only a machine reads is left to the JSON."""
    parts = [
        f"# {report['name']}",
        _weights_in_words(report["weights"]),
        markdown_table(["task", *METRICS.values(), "calibration error"], map(_task_row, *_items(report["tasks"]))),
        _intervals_in_words(report),
        "## Chosen without the test split\n\n" + _chosen_in_words(report["tasks"]),
        "## Data\n\n" + _data_table(report),
        f"![Confusion and reliability]({report['name']}.png)",
        f"```\n{report['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def in_words(task: str) -> str:
    """knn_20_5_per_class -> kNN, k = 20, 5 per class."""
    what, _, few = task.removesuffix("_per_class").partition("_")
    numbers = few.split("_") if few else []
    words = {"knn": "kNN", "linear": "linear probe", "logistic": "logistic regression"}.get(what, what)
    if what == "knn" and numbers:
        words += f", k = {numbers.pop(0)}"
    return words + (f", {numbers[0]} per class" if numbers else "")


def percent(score: Mapping[str, float] | None, signed: bool = False) -> str:
    """`87.1 % [84.0, 90.2]`."""
    if score is None:
        return "–"
    sign = "+" if signed else ""
    value, low, high = (f"{100 * score[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def as_mapping(score: Score | None) -> dict[str, float] | None:
    return None if score is None else asdict(score)


def _items(tasks: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    return list(tasks), list(tasks.values())


def _task_row(name: str, found: Mapping[str, Any]) -> list[str]:
    cells = []
    for metric in METRICS:
        cell = percent(found.get(metric))
        if metric in found.get("deviation", {}):
            cell += f", ±{100 * found['deviation'][metric]:.1f} over {found['tries']} tries"
        cells.append(cell)
    return [in_words(name), *cells, f"{100 * found['calibration_error']:.1f} %"]


def _weights_in_words(weights: Mapping[str, Any]) -> str:
    return (
        f"`{weights['path']}`, sha256 `{weights['sha256']}`: {weights['arch']}, patches of {weights['patch_size']} px, "
        f"tiles seen at {weights['side']} px, features {weights['width']} wide."
    )


def _intervals_in_words(report: Mapping[str, Any]) -> str:
    resamples, groups = report["settings"]["bootstrap"], report["groups"]
    if groups is None:
        drawn = (
            "test samples. Nothing was said of slides or patients (`--groups FILE.csv:COLUMN`): where tiles of one "
            "slide are alike, the truth is less certain than these intervals say, and query and test may share slides."
        )
    else:
        drawn = f"the {report['test']['groups']} test groups (`{groups['column']}` of {groups['file']})."
        if groups["shared"]:
            drawn += f" **{groups['shared']} groups are in query and test both**, so these numbers are too good."
    few = any("tries" in found for found in report["tasks"].values())
    return f"In brackets 95 % intervals of {resamples} bootstrap resamples of {drawn}{FEW_SHOTS if few else ''}"


def _chosen_in_words(tasks: Mapping[str, Any]) -> str:
    lines = [
        f"- {in_words(name)}: "
        + ", ".join(f"{key.replace('_', ' ')} {_short(v)}" for key, v in found["chosen"].items())
        for name, found in tasks.items()
        if found["chosen"]
    ]
    return "\n".join(lines) or "Nothing had to be chosen."


def _data_table(report: Mapping[str, Any]) -> str:
    rows = [
        [
            split,
            f"`{said['dataset']}`",
            f"{said['samples']:,}",
            said["left_out"],
            "unknown" if said["groups"] is None else said["groups"],
            ", ".join(f"{name} {number:,}" for name, number in said["classes"].items()),
            f"`{said['fingerprint']}`",
        ]
        for split, said in ((split, report[split]) for split in ("query", "test"))
    ]
    return markdown_table(["split", "data set", "samples", "left out", "groups", "classes", "fingerprint"], rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_null(values: Float[np.ndarray, " B"]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]

"""`pathfm dense`: segmentation or dense regression by a head on a frozen backbone; report, predictions, pictures."""

import shlex
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pathfm.errors import EXIT_INTERRUPTED
from pathfm.evaluate.bootstrap import Score
from pathfm.evaluate.dense.fit import Examples, FitSettings, fit, look
from pathfm.evaluate.dense.heads import LinearHead, Regression, Segmentation
from pathfm.evaluate.dense.losses import IGNORED
from pathfm.evaluate.dense.metrics import confusion, deviations, regression_scores, segmentation_scores
from pathfm.evaluate.dense.pictures import Seen, regression_picture, segmentation_picture, spread_by
from pathfm.evaluate.dense.report import as_json, headline, markdown
from pathfm.files import write_json, write_text, written_aside
from pathfm.jobs.dense_plan import BLOCKS, Plan, planned
from pathfm.lifecycle.run import commit_of_this_code
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger, progress, start_logging

_log = get_logger(__name__)
_SHOWN = 5  # pictures
_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    arguments.command = shlex.join(["pathfm", "dense", *words])
    start_logging()
    started = time.monotonic()
    plan = planned(arguments)
    trained = _trained(plan)
    scored = trained and _scored(plan, trained)
    if not trained or not scored:
        _log.info("told to leave (%s); the same command begins again", noted())
        return EXIT_INTERRUPTED
    _publish(plan, trained, scored, time.monotonic() - started)
    return 0


@dataclass(frozen=True)
class Trained:
    head: LinearHead
    losses: Sequence[float]


@dataclass(frozen=True)
class Scored:
    amounts: np.ndarray  # [test pictures, ...] confusion matrices, or sums of deviations
    of_constant: np.ndarray


def _trained(plan: Plan) -> Trained | None:
    """None: told to leave."""
    arguments, sight = plan.arguments, plan.sight
    examples = Examples(plan.split.train, plan.pairs.read, sight, plan.task, int(arguments.cache_gib * _GIB))
    for _ in progress(examples.fill(), "tokens of training pictures", total=len(plan.split.train), unit="pictures"):
        if noted():
            return None
    head = LinearHead(sight.tokens.channels, plan.task.outputs, use_cls=arguments.cls, seed=plan.settings.seed)
    losses = []
    steps = fit(head, plan.task, examples, plan.settings, sight.device)
    for loss in progress(steps, "training the head", total=plan.settings.steps(len(examples)), unit="steps"):
        losses.append(loss)
        if noted():
            return None
    return Trained(head, losses)


def _scored(plan: Plan, trained: Trained) -> Scored | None:
    """Predictions are written as they come. None: told to leave."""
    amounts, of_constant = [], []
    for number in progress(plan.split.test, "scoring", unit="pictures"):
        truth = plan.pairs.read(number)
        said = look(trained.head, plan.task, plan.sight, truth.image)
        _write_prediction(_prediction_file(plan, number), said)
        amounts.append(_amounts(plan.task, truth.target, said))
        of_constant.append(_amounts(plan.task, truth.target, torch.full_like(said, plan.constant.value)))
        if noted():
            return None
    return Scored(np.stack(amounts), np.stack(of_constant))


def _amounts(task: Segmentation | Regression, truth: Tensor, said: Tensor) -> np.ndarray:
    return confusion(truth, said, task.outputs) if isinstance(task, Segmentation) else deviations(truth, said)


def _scores(plan: Plan, amounts: np.ndarray, groups: Sequence[str] | None, resamples: int) -> dict[str, Score]:
    if isinstance(plan.task, Segmentation):
        return segmentation_scores(amounts, plan.task.classes, groups, resamples=resamples)
    return regression_scores(amounts, groups, resamples=resamples)


def _prediction_file(plan: Plan, number: int) -> Path:
    suffix = "png" if isinstance(plan.task, Segmentation) else "npy"
    return plan.output / "predictions" / f"{plan.pairs.names[number]}.{suffix}"


def _write_prediction(path: Path, said: Tensor) -> None:
    """A grey PNG of class indices, or a float32 array."""
    with written_aside(path) as aside:
        if path.suffix == ".png":
            Image.fromarray(said.to(torch.uint8).numpy()).save(aside, format="PNG")
        else:
            with aside.open("wb") as file:
                np.save(file, said.float().numpy())


def _read_prediction(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path) if path.suffix == ".npy" else np.array(Image.open(path)))


def _publish(plan: Plan, trained: Trained, scored: Scored, seconds: float) -> None:
    pictures = list(_of_pictures(plan, scored))
    report = _report(plan, trained, scored, pictures, seconds)
    with written_aside(plan.output / "pictures.png") as aside:
        _picture(plan, pictures).save(aside, format="PNG")
    plan.split.write(plan.output / "split.csv", plan.pairs.names)
    write_text(plan.output / "report.md", markdown(report))
    write_json(plan.output / "report.json", report)
    print(f"{headline(plan.arguments.task, report['scores'])}\n  {plan.output / 'report.md'}")


def _of_pictures(plan: Plan, scored: Scored) -> Iterator[dict[str, Any]]:
    """The overall metrics of every test picture alone."""
    for number, amounts in zip(plan.split.test, scored.amounts, strict=True):
        found = _scores(plan, amounts[None], None, 0) if amounts.any() else {}
        group = plan.split.group_of[number] if plan.split.group_of is not None else None
        alone = {name: score.value for name, score in found.items() if "/" not in name}
        yield {"name": plan.pairs.names[number], "group": group, **alone}


def _picture(plan: Plan, pictures: Sequence[dict[str, Any]]) -> Image.Image:
    is_segmentation = isinstance(plan.task, Segmentation)
    metric, label, sign = ("miou", "mIoU", 1.0) if is_segmentation else ("abs_rel", "AbsRel", -1.0)
    places = [place for place, one in enumerate(pictures) if metric in one]
    shown = [places[rank] for rank in spread_by([sign * pictures[place][metric] for place in places], _SHOWN)]
    seen = [_seen(plan, plan.split.test[place], f"{label} {pictures[place][metric]:.3f}") for place in shown]
    if isinstance(plan.task, Segmentation):
        return segmentation_picture(seen, plan.task.classes)
    return regression_picture(seen)


def _seen(plan: Plan, number: int, verdict: str) -> Seen:
    truth = plan.pairs.read(number)
    said = _read_prediction(_prediction_file(plan, number))
    return Seen(plan.pairs.names[number], truth.image, truth.target, said, verdict)


def _report(
    plan: Plan, trained: Trained, scored: Scored, pictures: Sequence[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    arguments, split = plan.arguments, plan.split
    groups = split.groups(split.test)
    is_segmentation = isinstance(plan.task, Segmentation)
    constant = _scores(plan, scored.of_constant, None, 0)
    return {
        "task": arguments.task,
        "head": arguments.head,
        "weights": plan.weights.facts,
        "data": {
            "images": arguments.images,
            "masks": arguments.masks,
            "split": arguments.split,
            "train": len(split.train),
            "test": len(split.test),
            "test_groups": len(set(groups)) if groups is not None else None,
        },
        "settings": {
            **vars(plan.settings),
            "window": list(plan.sight.windows.size),
            "stride": list(plan.sight.windows.stride),
            "scales": list(plan.sight.scales),
            "blocks": BLOCKS[arguments.head],
            "cls": arguments.cls,
        },
        "classes": list(plan.task.classes) if isinstance(plan.task, Segmentation) else None,
        "training": {
            "steps": len(trained.losses),
            "first_loss": trained.losses[0],
            "last_loss": float(np.mean(trained.losses[-10:])),
        },
        "scores": as_json(_scores(plan, scored.amounts, groups, arguments.resamples)),
        "constant": {"says": plan.constant.says, "scores": as_json(constant)},
        "confusion": scored.amounts.sum(0).tolist() if is_segmentation else None,
        "pictures": list(pictures),
        "seconds": seconds,
        "device": str(plan.sight.device),
        "command": arguments.command,
        "commit": commit_of_this_code(),
        "versions": {name: version(name) for name in ("pathfm", "torch", "numpy", "pillow")},
    }


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm dense",
        description="Train a head on the patch tokens of a frozen backbone and score it on other pictures: a class "
        "for every pixel, or a number. Writes report.json, report.md, predictions, split.csv and a picture.",
        epilog="Exit status: 75 when told to leave (TERM, USR2, Ctrl-C) before the end.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a file; a run (its best, else its newest export); or random:RECIPE"
    )
    parser.add_argument("--config", help="recipe of WEIGHTS (default: recipe.yaml of their run, or their shapes)")
    parser.add_argument("--images", required=True, metavar="SOURCE", help="a folder, a tar, or a data set string")
    parser.add_argument(
        "--masks",
        required=True,
        metavar="SOURCE",
        help="of the same names: grey PNG; for regression also .npy of a folder, and what is not above 0 is unknown",
    )
    parser.add_argument(
        "--split",
        required=True,
        metavar="CSV[:COLUMN]",
        help="columns filename and split (train, test; others are left out); or the word fields: pictures whose edges "
        "go on in each other stay together, a third is for the test",
    )
    parser.add_argument("--group", metavar="COLUMN", help="of --split: what is resampled together (default: group)")
    parser.add_argument("--task", choices=("segmentation", "regression"), default="segmentation")
    parser.add_argument(
        "--head",
        choices=tuple(BLOCKS),
        default="linear",
        help="linear: the last block; multiscale: the last four, at several scales",
    )
    parser.add_argument("--cls", action="store_true", help="every patch also reads the class token")
    parser.add_argument(
        "--scales", type=_scales, metavar="S,...", help="of pictures (default: 1; of multiscale 1,1.5,2)"
    )
    parser.add_argument(
        "--window", type=int, metavar="PX", help="side (default: that of the largest picture, up to 512 px)"
    )
    parser.add_argument("--stride", type=int, metavar="PX", help="default: two thirds of the window")
    parser.add_argument("--classes", type=_names, metavar="A,B,...", help="names of mask values 0, 1, ...")
    parser.add_argument("--instances", action="store_true", help="masks number single objects: any is a nucleus")
    parser.add_argument(
        "--ignore", type=int, default=IGNORED, metavar="VALUE", help="the mask value that is no class (default: 255)"
    )
    parser.add_argument("--epochs", type=_positive, default=FitSettings.epochs, help="default: 50")
    parser.add_argument("--batch-size", type=_positive, default=FitSettings.batch_size, help="windows (default: 8)")
    parser.add_argument("--lr", type=float, default=FitSettings.lr, help="of AdamW (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument(
        "--cache-gib", type=float, default=4.0, help="memory for tokens; more are computed anew (default: 4)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="default: in results/ of the run of WEIGHTS, else in evaluations/"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or not all(names) or len(set(names)) < len(names) or len(names) > IGNORED:
        raise ArgumentTypeError(f"{text} is no list of at least two different names")
    return names


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0.1 <= scale <= 8 for scale in scales):
        raise ArgumentTypeError(f"{text} is no list of scales, such as 1,1.5,2")
    return scales


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)

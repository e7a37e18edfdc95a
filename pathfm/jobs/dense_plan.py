"""What `pathfm dense` is to do: weights, pictures, split, task and windows, checked before anything is computed."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathfm.dist.env import ALONE
from pathfm.dist.groups import device_of
from pathfm.errors import UserError
from pathfm.evaluate.dense.data import (
    INSTANCE_CLASSES,
    Pairs,
    ReadMask,
    class_mask,
    instance_mask,
    number_mask,
    open_pairs,
)
from pathfm.evaluate.dense.fields import fields
from pathfm.evaluate.dense.fit import FitSettings, Sight
from pathfm.evaluate.dense.heads import FrozenTokens, Regression, Segmentation
from pathfm.evaluate.dense.losses import IGNORED, is_known
from pathfm.evaluate.dense.split import Split, split_by_csv, split_by_fields
from pathfm.evaluate.dense.windows import windows_for
from pathfm.jobs.extraction import student_named
from pathfm.jobs.named_weights import named_weights
from pathfm.jobs.random_backbone import random_backbone
from pathfm.log import progress
from pathfm.models.pretrained import load_backbone
from pathfm.models.vit import ViT
from pathfm.random_streams import derived_seed

EVALUATIONS = Path("evaluations")
_BY_FIELDS = "fields"
_MOST_BY_FIELDS = 3000  # pictures: each edge is compared with every other
BLOCKS = {"linear": 1, "multiscale": 4}  # DINOv2, section 7.4
_SCALES = {"linear": (1.0,), "multiscale": (1.0, 1.5, 2.0)}


@dataclass(frozen=True)
class Weights:
    """A frozen backbone, and what the report says of it."""

    vit: ViT
    facts: dict[str, Any]
    label: str  # for names of folders
    run: Path | None = None  # the directory of the run whose export it is


@dataclass(frozen=True)
class Constant:
    """What says the same everywhere: the most frequent class of the training pixels, or their geometric mean."""

    value: float
    says: str


@dataclass(frozen=True)
class Plan:
    """All that was asked for, checked as far as headers and masks tell."""

    arguments: Namespace
    weights: Weights
    pairs: Pairs
    split: Split
    task: Segmentation | Regression
    constant: Constant
    sight: Sight
    settings: FitSettings
    output: Path


def planned(arguments: Namespace) -> Plan:
    """Raises `UserError` for whatever is wrong before anything is computed."""
    weights = backbone_named(arguments.weights, arguments.config, arguments.seed)
    output = _output(arguments, weights)
    device = device_of(ALONE, _known_device(arguments.device))
    pairs = open_pairs(arguments.images, arguments.masks, _reader(arguments))
    split = _split(arguments, pairs)
    numbers = [*split.train, *split.test]
    windows = windows_for(weights.vit.patch_size, _largest(pairs, numbers), arguments.window, arguments.stride)
    task, constant = _task(arguments, pairs, split)
    tokens = FrozenTokens(weights.vit.to(device), BLOCKS[arguments.head])
    sight = Sight(tokens, windows, arguments.scales or _SCALES[arguments.head], device)
    settings = FitSettings(arguments.epochs, arguments.batch_size, arguments.lr, seed=arguments.seed)
    return Plan(arguments, weights, pairs, split, task, constant, sight, settings, output)


def backbone_named(text: str, config: str | None = None, seed: int = 0) -> Weights:
    """Of a file, of a run's best export, else its newest, or random. Raises `UserError` for what reads no images."""
    named = named_weights(text)
    if named.path is None:
        vit, student, digest = *random_backbone(named, derived_seed(seed, 0, "random backbone")), None
    else:
        found = load_backbone(named.path, student_named(config))
        vit, student, digest = found.vit, found.student, found.sha256
    if student.feature_width is not None:
        raise UserError(f"{text} reads patch features, not images; give the weights of a patch backbone")
    facts = {"name": str(named.path or text), "sha256": digest, "student": student.model_dump(mode="json")}
    is_export = named.path is not None and named.path.absolute().parent.name == "exports"
    return Weights(vit, facts, named.label, named.path.absolute().parents[1] if named.path and is_export else None)


def _output(arguments: Namespace, weights: Weights) -> Path:
    if arguments.output:
        return Path(arguments.output)
    folder = weights.run / "results" if weights.run is not None else EVALUATIONS
    return folder / f"dense_{arguments.task}_{arguments.head}_{weights.label}"


def _known_device(name: str) -> Any:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; use --device auto or cpu")
    return name


def _reader(arguments: Namespace) -> ReadMask:
    if arguments.task == "regression":
        if arguments.classes or arguments.instances:
            raise UserError("--classes and --instances are for --task segmentation; leave them out")
        return number_mask
    if arguments.instances:
        return instance_mask
    return partial(class_mask, ignored=arguments.ignore, classes=len(arguments.classes or ()) or IGNORED)


def _split(arguments: Namespace, pairs: Pairs) -> Split:
    if arguments.split == _BY_FIELDS:
        if len(pairs) > _MOST_BY_FIELDS:
            raise UserError(f"--split fields is for at most {_MOST_BY_FIELDS:,} pictures; name a CSV that says which")
        images = [pairs.image(number) for number in progress(range(len(pairs)), "looking for fields", unit="pictures")]
        return split_by_fields(fields(images), arguments.seed)
    path, column = arguments.split, "split"
    if not Path(path).is_file() and ":" in path:
        path, _, column = path.rpartition(":")
    return split_by_csv(Path(path), column, pairs.names, arguments.group)


def _largest(pairs: Pairs, numbers: Sequence[int]) -> tuple[int, int]:
    sizes = [pairs.size_px(number) for number in progress(numbers, "looking at sizes", unit="pictures")]
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _task(arguments: Namespace, pairs: Pairs, split: Split) -> tuple[Segmentation | Regression, Constant]:
    if arguments.task == "regression":
        return _regression(pairs, split)
    return _segmentation(arguments, pairs, split)


def _segmentation(arguments: Namespace, pairs: Pairs, split: Split) -> tuple[Segmentation, Constant]:
    """Every mask is read once, so that a value that is no class is known before the backbone runs."""
    pixels = np.zeros(IGNORED, np.int64)
    of_train, is_train = np.zeros_like(pixels), {*split.train}
    for number in progress([*split.train, *split.test], "reading masks", unit="masks"):
        target = pairs.target(number).flatten()
        found = target[target != IGNORED].long().bincount(minlength=IGNORED).numpy()
        pixels += found
        of_train += found if number in is_train else 0
    seen = int(np.flatnonzero(pixels).max(initial=0)) + 1
    names = arguments.classes or (INSTANCE_CLASSES if arguments.instances else [f"class_{i}" for i in range(seen)])
    if len(names) < 2:
        raise UserError(f"masks of {arguments.masks} hold one class alone; --instances takes single objects' numbers")
    if not of_train.any():
        raise UserError(f"every pixel of the training masks of {arguments.masks} is ignored (--ignore)")
    most = int(of_train.argmax())
    return Segmentation(tuple(names)), Constant(most, names[most])


def _regression(pairs: Pairs, split: Split) -> tuple[Regression, Constant]:
    """Bins reach from the lowest to the highest number of the training pictures."""
    lows, highs, logs, counts = [], [], 0.0, 0
    for number in progress(split.train, "reading masks", unit="masks"):
        target = pairs.target(number)
        if len(known := target[is_known(target)]):
            lows.append(float(known.min()))
            highs.append(float(known.max()))
            logs += float(known.double().log().sum())
            counts += len(known)
    if not counts:
        raise UserError(f"{pairs.masks.source} has no number above 0 for the training pictures, so all is unknown")
    mean = float(np.exp(logs / counts))
    return Regression(min(lows), max(highs)), Constant(mean, f"{mean:.3g}")

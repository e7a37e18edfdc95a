"""`pathfm extract --dataset`: features of every sample of a data set, as arrays beside the names of their rows."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import torch

from pathfm.data.datasets import open_dataset
from pathfm.dist.collect import decided_by_first
from pathfm.dist.env import Ranks
from pathfm.dist.groups import Team, joined
from pathfm.errors import EXIT_INTERRUPTED, UserError, listed
from pathfm.features.array_files import FORMATS
from pathfm.features.dataset_features import (
    DTYPES,
    MANIFEST,
    NAMES,
    PARTS,
    Part,
    Wanted,
    demand_possible,
    extract_dataset,
    open_features,
)
from pathfm.jobs.extraction import student_named
from pathfm.lifecycle.run import commit_of_this_code
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger
from pathfm.models.pretrained import Pretrained, load_backbone

_log = get_logger(__name__)

_STALL_AFTER_S, _LOST_AFTER_S = 1800.0, 60.0
_OWN = ("features", "last_blocks", "dtype", "side")  # options that are for --dataset alone
_OF_OTHERS = ("table", "slides", "slide", "region_size", "patch_size", "input_size", "other_sizes")


def add_options(parser: ArgumentParser) -> None:
    own = parser.add_argument_group("of a data set (--dataset)")
    own.add_argument(
        "--features", type=_parts, default=("cls",), metavar="PARTS", help=f"some of {','.join(PARTS)} (default: cls)"
    )
    own.add_argument("--last-blocks", type=int, default=1, metavar="N", help="features after each of the last N blocks")
    own.add_argument("--dtype", choices=DTYPES, default="fp32", help="as stored")
    own.add_argument("--side", type=int, metavar="PX", help="of tiles as they are seen (default: the weights' own)")


def demand_options(arguments: Namespace, parser: ArgumentParser) -> None:
    """Raises `UserError` for an option of a mode that is not asked for."""
    given = [name for name in (*_OWN, *_OF_OTHERS) if getattr(arguments, name) != parser.get_default(name)]
    wrong = [name for name in given if name in (_OF_OTHERS if arguments.dataset else _OWN)]
    if wrong:
        whose = "--regions and --tiles" if arguments.dataset else "--dataset"
        raise UserError(f"--{wrong[0].replace('_', '-')} is for {whose}; leave it out")
    formats = FORMATS if arguments.dataset else ("packed", "files")
    if arguments.format not in (None, *formats):
        raise UserError(f"--format {arguments.format} is not for this; take one of {listed(formats)}")


def extract(arguments: Namespace, ranks: Ranks, device: torch.device) -> int:
    """The same exit status on every rank."""
    dataset = open_dataset(arguments.dataset)
    model = load_backbone(arguments.weights, student_named(arguments.config))
    wanted = Wanted(
        side=arguments.side or _own_side(model),
        parts=arguments.features,
        last_blocks=arguments.last_blocks,
        dtype=arguments.dtype,
        precision=arguments.precision,
    )
    demand_possible(dataset, model, wanted)
    output: Path = arguments.output
    with joined(ranks, device, _STALL_AFTER_S, _LOST_AFTER_S) as team:
        was_there = decided_by_first((output / MANIFEST).is_file)
        is_done = extract_dataset(
            dataset,
            model,
            wanted,
            output,
            ranks,
            device,
            batch_size=arguments.batch_size,
            num_workers=arguments.readers,
            go_on=_Asked(team),
            format=arguments.format,
            notes={
                "command": arguments.command,
                "source": arguments.dataset,
                "commit": commit_of_this_code(),
            },
        )
    if not is_done:
        _log.info("told to leave (%s); the same command goes on from here", noted() or "another rank was")
        return EXIT_INTERRUPTED
    if ranks.is_first:
        print(f"{output} holds this extraction already; nothing to do" if was_there else _summary(output))
    return 0


class _Asked:
    """Whether to go on, before every batch; the watch over the ranks hears of each."""

    def __init__(self, team: Team) -> None:
        self._team, self._batch = team, 0

    def __call__(self) -> bool:
        self._team.watch.at(self._batch, "extracting")
        self._batch += 1
        return noted() is None


def _own_side(model: Pretrained) -> int:
    """For which positions were learned."""
    return model.vit.learned_grid * model.student.patch_size


def _summary(output: Path) -> str:
    found = open_features(output)
    arrays = {part: array for part in PARTS if (array := getattr(found, part)) is not None}
    lines = [f"  {part} {list(array.shape)} {array.dtype}" for part, array in arrays.items()]
    if found.left_out:
        lines.append(f"  {len(found.left_out):,} samples could not be decoded and are NaN; rows says which are there")
    left_out = ", ".join(f"{count} of {owner}" for owner, count in found.manifest["tensors_left_out"].items())
    lines += [f"  left out of the weights: {left_out}"] if left_out else []
    lines.append(f"  names and labels {output / NAMES}\n  manifest {output / MANIFEST}")
    return "\n".join([f"{output}: features of {len(found.rows):,} samples", *lines])


def _parts(text: str) -> tuple[Part, ...]:
    words = text.split(",")
    if wrong := [word for word in words if word not in PARTS]:
        raise ArgumentTypeError(f"'{wrong[0]}' is none of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in words)

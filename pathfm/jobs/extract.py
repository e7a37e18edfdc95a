"""`pathfm extract`: regions, tiles or a data set through a frozen patch backbone to features."""

import shlex
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from pathfm.dist.agreement import Agreement
from pathfm.dist.collect import decided_by_first
from pathfm.dist.env import Ranks, ranks_from_environment
from pathfm.dist.groups import Team, device_of, joined, run_rank
from pathfm.errors import EXIT_INTERRUPTED, UserError
from pathfm.features.array_files import FORMATS
from pathfm.features.blocks import Blocks
from pathfm.features.extract import Extractor
from pathfm.features.frozen import FrozenBackbone
from pathfm.jobs import extract_dataset
from pathfm.jobs.extraction import Extraction, begin, finish, plan
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger, progress, start_logging

_log = get_logger(__name__)

_STALL_AFTER_S, _LOST_AFTER_S = 1800.0, 60.0
_SECONDS_BETWEEN_LOOKS = 0.2
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments = parser.parse_args(words)
    extract_dataset.demand_options(arguments, parser)
    arguments.format = arguments.format or ("npy" if arguments.dataset else "packed")
    arguments.command = shlex.join(["pathfm", "extract", *words])
    ranks = ranks_from_environment()
    start_logging(speak=ranks.is_first)
    if ranks.world_size > 1:
        run_rank(lambda: _extract(arguments, ranks))
    return _extract(arguments, ranks)


def _extract(arguments: Namespace, ranks: Ranks) -> int:
    """Extract what is missing, and put all together once nothing is. The same exit status on every rank."""
    if arguments.dataset:
        return extract_dataset.extract(arguments, ranks, _device(arguments, ranks))
    extraction = plan(arguments)
    device = _device(arguments, ranks)
    with ExitStack() as stack:
        team = stack.enter_context(joined(ranks, device, _STALL_AFTER_S, _LOST_AFTER_S))
        missing = decided_by_first(partial(begin, extraction, stack))
        if missing is None:
            if ranks.is_first:
                print(f"{arguments.output} holds this extraction already; nothing to do")
            return 0
        if not _extract_blocks(extraction, missing, team):
            _log.info("told to leave (%s); the same command goes on from here", noted() or "another rank was")
            return EXIT_INTERRUPTED
        if ranks.is_first:
            team.watch.stop()  # the others leave; what follows may take long and needs none of them
            finish(extraction)
    return 0


def _device(arguments: Namespace, ranks: Ranks) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; use --device auto or cpu")
    return device_of(ranks, arguments.device)


def _extract_blocks(extraction: Extraction, missing: Sequence[int], team: Team) -> bool:
    """Every rank its share of the missing blocks. False when the ranks were told to leave before the end.

    All ranks go through as many rounds, and may leave after each.
    """
    blocks, ranks = extraction.blocks, team.ranks
    own = missing[ranks.rank :: ranks.world_size]
    agreement = Agreement(team.agreement_group)
    written = _extractor(extraction, team.device).run(own)
    if ranks.is_first:
        written = _with_progress(extraction, own, written)
    for number in range(-(-len(missing) // ranks.world_size)):
        team.watch.at(number, "extracting")
        next(written, None)
        _wait_for(blocks, missing[number * ranks.world_size : (number + 1) * ranks.world_size])
        if agreement.exchange([int(noted() is not None)])[0]:
            return False
    return True


def _wait_for(blocks: Blocks, wanted: Sequence[int]) -> None:
    """By looking at the disk, as a collective has a deadline and a block may take long; the watch sees who is lost."""
    while not all(map(blocks.is_there, wanted)):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _extractor(extraction: Extraction, device: torch.device) -> Extractor:
    options = extraction.arguments
    backbone = FrozenBackbone(extraction.model.vit.to(device), options.input_size, _PRECISIONS[options.precision])
    return Extractor(
        extraction.items,
        extraction.images,
        extraction.geometry,
        backbone,
        extraction.blocks,
        device,
        batch_size=options.batch_size,
        readers=options.readers,
        of_tiles=bool(options.tiles),
    )


def _with_progress(extraction: Extraction, own: Sequence[int], written: Iterator[int]) -> Iterator[int]:
    """Counted in patches, of this rank's share."""
    patches = extraction.geometry.side**2
    behind = 0

    def done(block: int) -> float:
        nonlocal behind
        behind += len(extraction.blocks.items_of(block)) * patches
        return behind

    total = sum(len(extraction.blocks.items_of(block)) for block in own) * patches
    return progress(written, "extracting", total=total, unit="patches", done=done)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm extract",
        description="Features of regions by a frozen patch backbone: [npatch, width] each, row-major over the grid; "
        "or of every sample of a data set: arrays [samples, last blocks, width]. "
        "Killed at any moment, the same command goes on. Several ranks (torchrun, or a Slurm step) share the work.",
        epilog="Exit status: 75 when told to leave (TERM, USR2, Ctrl-C) before the end.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--regions",
        metavar="SOURCE",
        help="region images, or with --table their tiles: a folder, a tar, or a data set string",
    )
    source.add_argument("--tiles", metavar="SOURCE", help="tiles, for --slides")
    source.add_argument("--dataset", metavar="DATASET", help="a data set, like KNN:root=FOLDER:split=test")
    parser.add_argument(
        "--weights", type=Path, required=True, help="a run's exports/teacher_*, or weights of DINO or HIPT"
    )
    parser.add_argument(
        "--config", help="the recipe of the weights (default: recipe.yaml of their run, or their shapes)"
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="CSV",
        help="columns file; slide; x, y; region, row, column: which "
        "images, of which slide, where, and in which cell of which region",
    )
    parser.add_argument(
        "--slides", action="store_true", help="one file for each slide: [regions, npatch, width], [tiles, width]"
    )
    parser.add_argument(
        "--slide", metavar="REGEX", help="finds the slide in a file's path, and x and y in groups of these names"
    )
    parser.add_argument("--region-size", type=int, default=4096, help="px (default: 4096)")
    parser.add_argument(
        "--patch-size", type=int, default=256, help="px of a region's patch, or of a tile (default: 256)"
    )
    parser.add_argument("--input-size", type=_positive, help="resize patches to so many px (default: as they are)")
    parser.add_argument(
        "--other-sizes",
        choices=("refuse", "pad"),
        default="refuse",
        help="pad: lay smaller images, and cells without a tile, on white; the manifest says which cells",
    )
    parser.add_argument(
        "--format",
        choices=("packed", "files", *FORMATS),
        help="packed: one tar and its index (default); files: NAME.pt; with --dataset: npy (default) or safetensors",
    )
    parser.add_argument("--precision", choices=tuple(_PRECISIONS), default="fp32", help="bf16: autocast, for GPUs")
    parser.add_argument(
        "--batch-size", type=_positive, default=64, help="patches, or tiles of --dataset, at once (default: 64)"
    )
    parser.add_argument(
        "--readers",
        type=_positive,
        default=2,
        help="threads (with --dataset: processes) that decode ahead (default: 2)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    extract_dataset.add_options(parser)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)

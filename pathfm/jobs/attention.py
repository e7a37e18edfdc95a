"""`pathfm attention`: pictures of what the [CLS] token looks at in a region, at the patch and at the region level."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from pathfm.data.decode import DecodeError, decode
from pathfm.dist.env import ALONE
from pathfm.dist.groups import device_of
from pathfm.errors import UserError
from pathfm.features.attention import attention_picture, patch_attention, region_attention
from pathfm.files import written_aside
from pathfm.hierarchical import CHUNK, PATCH_SIZE, HierarchicalModel, grid_of, in_chunks, of_levels
from pathfm.jobs.extraction import student_named
from pathfm.log import start_logging
from pathfm.models.pretrained import Pretrained, load_backbone
from pathfm.models.vit import ViT


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging()
    output = arguments.output or _previews_of(arguments.weights)
    levels = {"patch": load_backbone(arguments.weights, student_named(arguments.config))}
    if arguments.region_weights:
        levels["region"] = load_backbone(arguments.region_weights, student_named(arguments.region_config))
    if levels["patch"].reads_features:
        raise UserError(f"{arguments.weights} reads patch features; give it as --region-weights")
    for path in arguments.images:
        for level, picture in _pictures(_read(path), levels, arguments):
            _save(picture, output / f"attention_{path.stem}_{level}.png")
    return 0


def _pictures(
    tissue: UInt8[np.ndarray, "H W 3"], levels: dict[str, Pretrained], arguments: Namespace
) -> Iterator[tuple[str, Image.Image]]:
    device = device_of(ALONE, arguments.device)
    region = torch.from_numpy(tissue).permute(2, 0, 1)
    rows, columns = grid_of(region, arguments.patch_size)
    patch: ViT = levels["patch"].vit.to(device)
    chunks = in_chunks(region, arguments.patch_size, arguments.batch_size)
    yield "patch", attention_picture(tissue, patch_attention(patch, chunks, rows, columns), "patch level")
    if "region" in levels:
        model = _composed(levels, arguments).to(device)
        yield (
            "region",
            attention_picture(tissue, region_attention(model.region, model.patch_grid(region)), "region level"),
        )


def _composed(levels: dict[str, Pretrained], arguments: Namespace) -> HierarchicalModel:
    return of_levels(levels, patch_size=arguments.patch_size, chunk=arguments.batch_size)


def _read(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise UserError(f"{path} cannot be decoded: {error}") from error


def _save(picture: Image.Image, path: Path) -> None:
    with written_aside(path) as aside:
        picture.save(aside, format="PNG")
    print(f"wrote {path}")


def _previews_of(weights: Path) -> Path:
    """Of the run whose export it is."""
    if weights.parent.name != "exports":
        raise UserError(f"{weights} is no export of a run; say by --output where the pictures are to go")
    return weights.parent.parent / "previews"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm attention",
        description="Draw what the [CLS] token of the last block looks at in regions: the patches stitched and, "
        "with --region-weights, the whole region over its patches; the heads' mean and each head.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images of regions")
    parser.add_argument(
        "--weights", type=Path, required=True, help="patch level: a run's exports/teacher_*, or others'"
    )
    parser.add_argument("--region-weights", type=Path, help="region level")
    parser.add_argument("--config", help="recipe of --weights (default: recipe.yaml of their run, or their shapes)")
    parser.add_argument("--region-config", help="recipe of --region-weights")
    parser.add_argument("--output", type=Path, help="a folder (default: previews/ of the run of --weights)")
    parser.add_argument("--patch-size", type=int, default=PATCH_SIZE, help="px of a region's patch (default: 256)")
    parser.add_argument("--batch-size", type=int, default=CHUNK, help="patches at once (default: 64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser

"""What an extraction is: from what, by what and to where; how it begins or goes on, and what it leaves when done."""

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD
from pathfm.data.image_files import ImageFiles, open_images
from pathfm.data.image_table import read_image_table
from pathfm.errors import UserError
from pathfm.features.blocks import Blocks
from pathfm.features.frozen import architecture_of
from pathfm.features.items import Item, SlidePattern, items_of_grids, items_of_images
from pathfm.features.patches import Geometry, size_error, wrong_size
from pathfm.features.resume import begin_or_go_on, demand_free
from pathfm.features.writers import by_slide, packed_tar, write_files, write_packed, write_slides
from pathfm.files import write_json
from pathfm.jobs.arguments import CONFIGS
from pathfm.lifecycle.run import commit_of_this_code
from pathfm.log import progress
from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import Pretrained, load_backbone
from pathfm.recipe import find_config, read_recipe

MANIFEST = "extraction.json"
_WORK = ".extraction"  # blocks that are not yet put together, and what they are
_BLOCK_REGIONS, _BLOCK_TILES = 4, 1024  # as much is lost at most, for each rank, when an extraction is killed


@dataclass(frozen=True)
class Extraction:
    """What is to be extracted, from what, by what and to where."""

    arguments: Namespace
    images: ImageFiles
    items: Sequence[Item]
    geometry: Geometry
    model: Pretrained

    @property
    def output(self) -> Path:
        output: Path = self.arguments.output
        return output

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.output / _WORK, len(self.items), _BLOCK_TILES if self.arguments.tiles else _BLOCK_REGIONS)

    def identity(self) -> dict[str, Any]:
        """What an extraction must share with one that goes on with it."""
        options = self.arguments
        content = json.dumps([[self.images.paths[n] for n in item.images if n >= 0] for item in self.items])
        named = json.dumps([[item.name, item.slide, item.x, item.y] for item in self.items])
        return {
            "of": "tiles" if options.tiles else "regions",
            "format": "slides" if options.slides else options.format,
            "count": len(self.items),
            "names_sha256": hashlib.sha256((content + named).encode("utf-8", "surrogateescape")).hexdigest(),
            "weights_sha256": self.model.sha256,
            "architecture": architecture_of(self.model.student),
            "region_size": self.geometry.region_size,
            "patch_size": self.geometry.patch_size,
            "input_size": options.input_size or self.geometry.patch_size,
            "other_sizes": self.geometry.other_sizes,
            "precision": options.precision,
        }


def plan(arguments: Namespace) -> Extraction:
    """Raises `UserError` for whatever is wrong before the first image is decoded."""
    geometry = Geometry(arguments.region_size, arguments.patch_size, arguments.other_sizes)
    if arguments.tiles:
        if not arguments.slides:
            raise UserError("features of tiles are written by slide: add --slides")
        geometry = Geometry(arguments.patch_size, arguments.patch_size, arguments.other_sizes)
    geometry.check()
    model = load_backbone(arguments.weights, student_named(arguments.config))
    _demand_whole_patches(model, arguments.input_size or geometry.patch_size)
    images = open_images(arguments.regions or arguments.tiles)
    items = _items(arguments, images, geometry)
    if arguments.slides:
        by_slide(items)
    return Extraction(arguments, images, items, geometry, model)


def student_named(config: str | None) -> StudentConfig | None:
    """Of a recipe, where one is named."""
    return read_recipe(find_config(config, CONFIGS)).recipe.student if config else None


def _demand_whole_patches(model: Pretrained, size: int) -> None:
    if model.reads_features:
        raise UserError(f"{model.path} reads patch features, not images; give the weights of a patch backbone")
    own = model.student.patch_size
    if size % own:
        near = max(own, size // own * own)
        raise UserError(
            f"{size} px are no whole number of the {own} px patches of {model.path}; "
            f"add --input-size {near} to resize them first"
        )


def _items(arguments: Namespace, images: ImageFiles, geometry: Geometry) -> list[Item]:
    slides = SlidePattern(arguments.slide) if arguments.slide else None
    table = read_image_table(arguments.table) if arguments.table else None
    if table and table.has_grid and not arguments.tiles:
        return items_of_grids(images, table, geometry.side, geometry.other_sizes, slides)
    return items_of_images(images, table, slides)


def begin(extraction: Extraction, stack: ExitStack) -> list[int] | None:
    """The blocks that are missing, or None when all is done. Rank 0 holds the folder for as long as `stack` is open."""
    manifest = extraction.output / MANIFEST

    def before_first() -> None:
        demand_free(manifest, packed_tar(extraction.output), *sorted(extraction.output.glob("*.pt")))
        _demand_sizes(extraction)

    return begin_or_go_on(manifest, extraction.blocks, extraction.identity(), before_first, stack)


def _demand_sizes(extraction: Extraction) -> None:
    """Of regions that are images, before the first is decoded. Tiles, which are many, are looked at when they are."""
    if extraction.arguments.tiles:
        return
    items = [item for item in extraction.items if len(item.images) == 1]
    looked_at = progress(items, "looking at sizes", unit="regions")
    wrong = [said for item in looked_at if (said := wrong_size(item, extraction.images, extraction.geometry))]
    if wrong:
        geometry = extraction.geometry
        raise size_error(wrong, geometry.region_size, geometry.other_sizes, extraction.images.source)


def finish(extraction: Extraction) -> None:
    """Put the blocks together, write what was done, and only then remove the blocks."""
    options, items, blocks = extraction.arguments, extraction.items, extraction.blocks
    if options.slides:
        write_slides(items, blocks, extraction.output)
    elif options.format == "packed":
        write_packed(items, blocks, extraction.output, options.command)
    else:
        write_files(items, blocks, extraction.output)
    shape = list(blocks.feature(0).shape)
    write_json(extraction.output / MANIFEST, _manifest(extraction, shape))
    shutil.rmtree(blocks.folder)
    print(_summary(extraction, shape))


def _manifest(extraction: Extraction, shape: Sequence[int]) -> dict[str, Any]:
    options, model, geometry = extraction.arguments, extraction.model, extraction.geometry
    input_size = options.input_size or geometry.patch_size
    resized = input_size != geometry.patch_size
    notes = zip(extraction.items, extraction.blocks.notes(), strict=True)
    padded = {item.name: dict(note) for item, note in notes if note}
    return {
        "identity": extraction.identity(),
        "command": options.command,
        "source": extraction.images.source,
        "weights": str(model.path.resolve()),
        "tensors_left_out": dict(model.left_out),
        "preprocessing": {
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "patches": f"resized to {input_size} px (bicubic, antialiased)" if resized else "at their own size",
            "positions": "as learned" if _is_native(model, input_size) else "resampled to the patch's grid",
        },
        "features": {"shape": list(shape), "dtype": "float32", "what": "[CLS] after the last norm"},
        "padded": padded,
        "slides": _slides_of(extraction),
        "versions": {name: version(name) for name in ("pathfm", "torch", "numpy", "pillow", "simplejpeg")},
        "commit": commit_of_this_code(),
    }


def _is_native(model: Pretrained, input_size: int) -> bool:
    return (input_size // model.student.patch_size) ** 2 == model.vit.pos_embed.shape[1] - 1


def _slides_of(extraction: Extraction) -> dict[str, Any]:
    """Region -> slide and place, as far as they are known. Of slides' files, slides.csv tells it."""
    if extraction.arguments.slides:
        return {}
    return {
        item.name: {key: value for key in ("slide", "x", "y") if (value := getattr(item, key)) is not None}
        for item in extraction.items
        if item.slide is not None
    }


def _summary(extraction: Extraction, shape: Sequence[int]) -> str:
    options = extraction.arguments
    what = f"{len(extraction.items):,} {'tiles' if options.tiles else 'regions'} of {list(shape)}"
    if options.slides:
        what += f", {len(by_slide(extraction.items)):,} slides"
        how = f"one .pt for each slide; {extraction.output / 'slides.csv'} says what their rows are"
    else:
        how = f"Regions:root={extraction.output}"
    left_out = ", ".join(f"{count} of {owner}" for owner, count in extraction.model.left_out.items())
    note = f"\n  left out of the weights: {left_out}" if left_out else ""
    return f"{extraction.output}: {what}\n  {how}{note}\n  manifest {extraction.output / MANIFEST}"

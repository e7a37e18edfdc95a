"""What becomes of the blocks at the end: one tar and its index, a file for each region, or a file for each slide."""

import csv
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pathfm.data.entries import IndexFiles
from pathfm.data.folder_reader import REGION_SUFFIX
from pathfm.data.index import IndexRequest, build_index
from pathfm.errors import UserError, listed
from pathfm.features.blocks import Blocks
from pathfm.features.items import Item
from pathfm.files import written_aside
from pathfm.log import progress

NAME = "regions"  # of the data set: regions_dataset.tar, regions_entries.npy, ...
SLIDE_TABLE = "slides.csv"


def packed_tar(output: Path) -> Path:
    return output / f"{NAME}_dataset.tar"


def write_packed(items: Sequence[Item], blocks: Blocks, output: Path, command: str) -> None:
    """`regions_dataset.tar` of one .pt for each region, and its index: what `Regions:root=OUTPUT` opens.

    The same items and features give the same bytes, whoever extracted them.
    """
    tar = packed_tar(output)
    IndexFiles(output, NAME).side_car.unlink(missing_ok=True)  # an index that was left half-way vouches for no new tar
    with written_aside(tar) as aside, tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as file:
        for name, content in _encoded(items, blocks, f"packing {tar.name}"):
            member = tarfile.TarInfo(f"{NAME}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    build_index(IndexRequest(tar, output, NAME, command=command))


def write_files(items: Sequence[Item], blocks: Blocks, output: Path) -> None:
    """`NAME.pt` for each region, as the ancestors have them: what `Regions:root=OUTPUT` opens too."""
    for name, content in _encoded(items, blocks, "writing files"):
        with written_aside(output / name) as aside:
            aside.write_bytes(content)


def write_slides(items: Sequence[Item], blocks: Blocks, output: Path) -> None:
    """`SLIDE.pt` for each slide, [regions, npatch, width] or [tiles, width], and `slides.csv`: what their rows are.

    A slide's rows are ordered from top to bottom and left to right where places are known, and by name otherwise.
    """
    slides = by_slide(items)
    for slide, numbers in progress(slides.items(), "writing slides", unit="slides", total=len(slides)):
        features = torch.stack([blocks.feature(number) for number in numbers])
        with written_aside(output / f"{_file_name(slide)}{REGION_SUFFIX}") as aside:
            aside.write_bytes(encoded(features))
    with written_aside(output / SLIDE_TABLE) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["slide", "row", "name", "x", "y"])
        for slide, numbers in slides.items():
            table.writerows(
                [slide, row, items[number].name, items[number].x, items[number].y] for row, number in enumerate(numbers)
            )


def by_slide(items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
    """Slide -> numbers of its items in the order of its file. Raises `UserError` when a slide is not known."""
    if unknown := [item.name for item in items if item.slide is None]:
        raise UserError(
            f"no slide is known of {listed(unknown)}; "
            "give a column 'slide' in --table, or a regular expression by --slide"
        )
    slides: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        slides.setdefault(item.slide or "", []).append(number)
    if len({_file_name(slide) for slide in slides}) < len(slides):
        raise UserError("slides whose names differ in '/' and '_' alone would share a file; rename one of them")
    return {slide: sorted(slides[slide], key=lambda number: _place(items[number])) for slide in sorted(slides)}


def encoded(features: Tensor) -> bytes:
    """As torch.save writes it, of its own storage alone."""
    file = io.BytesIO()
    torch.save(features.clone(), file)
    return file.getvalue()


def _encoded(items: Sequence[Item], blocks: Blocks, description: str) -> Iterator[tuple[str, bytes]]:
    pairs = zip(items, blocks.features(), strict=True)
    for item, features in progress(pairs, description, total=len(items), unit="regions"):
        yield f"{item.name}{REGION_SUFFIX}", encoded(features)


def _place(item: Item) -> tuple[bool, int, int, str]:
    if item.x is None or item.y is None:
        return True, 0, 0, item.name
    return False, item.y, item.x, item.name


def _file_name(slide: str) -> str:
    return slide.replace("/", "_")

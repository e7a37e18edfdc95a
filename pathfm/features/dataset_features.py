"""Features of a whole data set, each sample once on any number of ranks, as arrays that are read without loading them.

N samples of the data set   n of them that could be decoded   S px   b last blocks   t tokens kept of a tile
L patches of a tile   D width
"""

import csv
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD, normalise_crops
from pathfm.data.datasets import KNN, Dataset
from pathfm.data.fit import spread
from pathfm.data.labelled import Tiles, load_tiles
from pathfm.dist.collect import agree_any, decided_by_first
from pathfm.dist.env import Ranks
from pathfm.errors import UserError, listed
from pathfm.features.array_files import Array, ArrayFormat, array_files, open_arrays, write_arrays
from pathfm.features.blocks import Blocks
from pathfm.features.extract import ahead
from pathfm.features.frozen import architecture_of
from pathfm.features.resume import begin_or_go_on, demand_free, read_manifest
from pathfm.files import write_json, written_aside
from pathfm.log import get_logger, progress
from pathfm.models.pretrained import Pretrained
from pathfm.models.vit import Features

_log = get_logger(__name__)

MANIFEST = "features.json"
NAMES = "names.csv"  # row, file, cohort, label, class of every sample
Part = Literal["cls", "mean_patch", "patches"]
Dtype = Literal["fp32", "fp16"]
PARTS: tuple[Part, ...] = get_args(Part)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_WORK = ".features"  # blocks that are not yet put together, and what they are
_BLOCK_ROWS, _BLOCK_BYTES = 1024, 128 << 20  # of a block at most; as much is lost, for each rank, at a SIGKILL
_LOOKED_AT = 16  # samples
_SECONDS_BETWEEN_LOOKS = 0.2
_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """What is kept of every sample, and how it is computed."""

    side: int  # px at which tiles are seen (`pathfm.data.labelled.at_side`)
    parts: tuple[Part, ...] = ("cls",)
    last_blocks: int = 1  # after each of them the last norm, as `ViT.intermediate_layers` does; oldest first
    dtype: Dtype = "fp32"  # as stored
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast while computing


class LeftOut(NamedTuple):
    """A sample that could not be decoded. No neighbour stands in for it."""

    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class DatasetFeatures:
    """Memory maps, read-only: nothing is loaded before it is looked at.

    Row i of an array is row i of the data set, so that `cls[rows]` goes with `dataset.labels[rows]`. A row that could
    not be decoded is not in `rows`, and NaN in the arrays.
    """

    folder: Path
    cls: Float[np.ndarray, "N b D"] | None
    mean_patch: Float[np.ndarray, "N b D"] | None
    patches: Float[np.ndarray, "N b L D"] | None
    rows: Int64[np.ndarray, " n"]  # ascending
    left_out: tuple[LeftOut, ...]
    manifest: Mapping[str, Any]


def key_of(dataset: Dataset, model: Pretrained, wanted: Wanted) -> str:
    """Hex; the same for the same weights, samples and wishes, wherever they lie."""
    content = json.dumps(_identity(dataset, model, wanted), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def extract_dataset(
    dataset: Dataset,
    model: Pretrained,
    wanted: Wanted,
    folder: Path,
    ranks: Ranks,
    device: torch.device,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    go_on: Callable[[], bool] = lambda: True,
    format: ArrayFormat = "npy",
    notes: Mapping[str, Any] | None = None,
) -> bool:
    """Extract what is missing in `folder`; nothing where all is there. False when a rank was told to leave before.

    `go_on` is asked on every rank before every batch. `notes`: what else the manifest is to say. Killed at any moment,
    the same call goes on to the same bytes. All ranks call this together.
    Raises `UserError` for a folder that holds other features, and for wishes that the model cannot fulfil.
    """
    demand_possible(dataset, model, wanted)
    work = _Work(dataset, model, wanted, folder, ranks, device, batch_size, num_workers, go_on, format, notes or {})
    with ExitStack() as stack:
        missing = decided_by_first(partial(work.begin, stack))
        return missing is None or (work.extract(missing) and work.assemble())


def demand_possible(dataset: Dataset, model: Pretrained, wanted: Wanted) -> None:
    """Raises `UserError` for what the model cannot give of this data set."""
    student, depth = model.student, len(model.vit.blocks)
    if dataset.name == "Regions":
        raise UserError("Regions are features already; name a data set of images, like KNN:root=FOLDER:split=test")
    if model.reads_features:
        raise UserError(f"{model.path} reads patch features, not images; give the weights of a patch backbone")
    if wanted.side < 1 or wanted.side % student.patch_size:
        near = max(student.patch_size, wanted.side // student.patch_size * student.patch_size)
        raise UserError(
            f"a side of {wanted.side} px is no whole number of the {student.patch_size} px patches of {model.path}; "
            f"take {near}"
        )
    if not 1 <= wanted.last_blocks <= depth:
        raise UserError(f"{model.path} has {depth} blocks; features of its last {wanted.last_blocks} are not there")
    if not wanted.parts or not {*wanted.parts} <= {*PARTS}:
        raise UserError(f"features are some of {listed(PARTS)}, not {listed(wanted.parts) or 'none'}")


def open_features(folder: Path) -> DatasetFeatures:
    """What `extract_dataset` left. Raises `UserError` where it is not there, or not complete."""
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None:
        begun = "; an extraction was left there, which goes on when started again" if (folder / _WORK).is_dir() else ""
        raise UserError(f"{folder} holds no features of a data set: it has no {MANIFEST}{begun}")
    arrays = open_arrays(folder, manifest["format"], manifest["arrays"])
    return DatasetFeatures(
        folder,
        cls=arrays.get("cls"),
        mean_patch=arrays.get("mean_patch"),
        patches=arrays.get("patches"),
        rows=arrays["rows"],
        left_out=tuple(LeftOut(**one) for one in manifest["left_out"]),
        manifest=manifest,
    )


def _identity(dataset: Dataset, model: Pretrained, wanted: Wanted) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "data_set": dataset.name,
        "samples": len(dataset),
        "fingerprint": dataset.fingerprint(),
        "content_sha256": _content_sha256(dataset),
        "weights_sha256": model.sha256,
        "architecture": architecture_of(model.student),
        **asdict(wanted),
        "parts": _in_order(wanted.parts),
    }


def _content_sha256(dataset: Dataset) -> str:
    """Names and bytes of a few samples: two tars of as many files of the same sizes have the same fingerprint."""
    content = hashlib.sha256()
    for row in spread(len(dataset), _LOOKED_AT).tolist():
        for said in (dataset.name_of(row).encode("utf-8", "surrogateescape"), dataset.read_bytes(row)):
            content.update(len(said).to_bytes(8, "little") + said)
    return content.hexdigest()


def _in_order(parts: Sequence[Part]) -> list[Part]:
    return [part for part in PARTS if part in parts]


@dataclass(frozen=True)
class _Work:
    """An extraction on this rank. Blocks are the rows' alone, and a block is one rank's: so ranks change no byte."""

    dataset: Dataset
    model: Pretrained
    wanted: Wanted
    folder: Path
    ranks: Ranks
    device: torch.device
    batch_size: int
    num_workers: int
    go_on: Callable[[], bool]
    format: ArrayFormat
    notes: Mapping[str, Any]

    @property
    def num_patches(self) -> int:
        """Of a tile."""
        return (self.wanted.side // self.model.student.patch_size) ** 2

    @property
    def tokens(self) -> dict[Part, slice]:
        """Where a part is among the tokens that are kept of a tile."""
        places: dict[Part, slice] = {}
        end = 0
        for part in _in_order(self.wanted.parts):
            start, end = end, end + (self.num_patches if part == "patches" else 1)
            places[part] = slice(start, end)
        return places

    @property
    def shape(self) -> tuple[int, int, int]:
        """b, t, D of a sample."""
        return self.wanted.last_blocks, max(place.stop for place in self.tokens.values()), self.model.vit.width

    @property
    def dtype(self) -> torch.dtype:
        return _TORCH_DTYPES[self.wanted.dtype]

    @property
    def blocks(self) -> Blocks:
        of_one = math.prod(self.shape) * self.dtype.itemsize
        return Blocks(self.folder / _WORK, len(self.dataset), min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // of_one)))

    def begin(self, stack: ExitStack) -> list[int] | None:
        """On rank 0, which holds the folder from now on: the blocks that are missing, or None when all is done."""
        manifest = self.folder / MANIFEST
        identity = {**_identity(self.dataset, self.model, self.wanted), "format": self.format}
        files = [*array_files(self.folder, self.format, (*PARTS, "rows")), self.folder / NAMES]
        return begin_or_go_on(manifest, self.blocks, identity, lambda: demand_free(manifest, *files), stack)

    def extract(self, missing: Sequence[int]) -> bool:
        """Every rank its share of the missing blocks, a round each; all ranks have as many rounds and batches."""
        self.model.vit.to(self.device)
        own = missing[self.ranks.rank :: self.ranks.world_size]
        batches = [batch for block in own for batch in self._batches_of(block)]
        tiles = load_tiles(self.dataset, batches, self.wanted.side, num_workers=self.num_workers)
        names = ahead(self._names_of, own, threads=1)  # a name takes as long as a tile does on a GPU
        rounds: Iterator[int] = iter(range(self.ranks.rank, len(missing) + self.ranks.rank, self.ranks.world_size))
        if self.ranks.is_first:
            rounds = progress(rounds, "extracting", len(self.dataset), "samples", partial(self._behind, missing))
        for place in rounds:
            if not self._extract_block(missing[place] if place < len(missing) else None, tiles, names):
                return False
        return not agree_any(not self.go_on())

    def _behind(self, missing: Sequence[int], place: int) -> int:
        """Samples that are extracted after this round of rank 0's, roughly."""
        still = len(missing) - place - self.ranks.world_size
        return len(self.dataset) - max(0, still) * self.blocks.block_items

    def _extract_block(self, block: int | None, tiles: Iterator[Tiles], names: Iterator[list[str]]) -> bool:
        """Write it, NaN where a row could not be decoded. A rank that has none left votes with the others, too."""
        rows = self.blocks.items_of(block) if block is not None else range(0)
        features = torch.full((len(rows), *self.shape), math.nan, dtype=self.dtype)
        reasons: dict[int, str] = {}
        for first in range(0, self.blocks.block_items, self.batch_size):
            if agree_any(not self.go_on()):
                return False
            if batch := rows[first : first + self.batch_size]:
                found = next(tiles)
                features[found.rows - rows.start] = self._computed(found.images)
                reasons |= _reasons(batch, found)
        if block is not None:
            pairs = zip(rows, next(names), strict=True)
            notes = [{"name": name} | ({"reason": reasons[row]} if row in reasons else {}) for row, name in pairs]
            self.blocks.write(block, features, notes)
        return True

    def _batches_of(self, block: int) -> list[range]:
        rows = self.blocks.items_of(block)
        return [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]

    def _names_of(self, block: int) -> list[str]:
        return list(map(self.dataset.name_of, self.blocks.items_of(block)))

    @torch.inference_mode()
    def _computed(self, images: UInt8[Tensor, "n 3 S S"]) -> Float[Tensor, "n b t D"]:
        if not len(images):
            return torch.empty((0, *self.shape), dtype=self.dtype)
        pixels = normalise_crops(images.to(self.device))
        autocast = self.wanted.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            layers = self.model.vit.intermediate_layers(pixels, self.wanted.last_blocks)
        kept = [torch.cat([_tokens_of(layer, part) for part in self.tokens], dim=1) for layer in layers]
        features = torch.stack(kept, dim=1).to(self.dtype).cpu()
        if not features.isfinite().all():
            larger = "; they may exceed fp16, so take fp32" if self.wanted.dtype == "fp16" else ""
            raise UserError(f"{self.model.path} gives features that are no finite numbers{larger}")
        return features

    def assemble(self) -> bool:
        """Rank 0 puts the blocks together, piece by piece, while the others wait for it: so none waits too long."""
        pieces = self._assembled()
        while decided_by_first(lambda: next(pieces, False)):
            if agree_any(not self.go_on()):
                pieces.close()
                return False
        return True

    def _assembled(self) -> Generator[bool, None, None]:
        """Yields True after every piece. The manifest comes last, and only then are the blocks removed."""
        while self.blocks.missing():  # other nodes' files, which a network's file system shows late
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            yield True
        left_out: list[LeftOut] = []
        for _ in self._write_names(left_out):
            yield True
        rows = np.setdiff1d(np.arange(len(self.dataset)), [one.row for one in left_out])
        if not len(rows):
            raise UserError(f"none of {len(self.dataset)} samples can be decoded; the first: {left_out[0].reason}")
        arrays: dict[str, Array] = {"rows": Array(rows.shape, "int64", [rows])}
        arrays |= {part: self._array(part) for part in self.tokens}
        for _ in write_arrays(self.folder, self.format, arrays):
            yield True
        write_json(self.folder / MANIFEST, self._manifest(arrays, left_out))
        if left_out:
            names = listed((f"{one.name}: {one.reason}" for one in left_out), at_most=3)
            _log.warning("%s: %d samples could not be decoded: %s", self.folder, len(left_out), names)
        shutil.rmtree(self.blocks.folder)

    def _write_names(self, left_out: list[LeftOut]) -> Iterator[None]:
        dataset, labelled = self.dataset, isinstance(self.dataset, KNN)
        path = self.folder / NAMES
        with written_aside(path) as aside, aside.open("w", newline="", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["row", "file", "cohort", "label", "class"])
            for block in range(len(self.blocks)):
                notes = self.blocks.block(block)[1]
                for row, note in zip(self.blocks.items_of(block), notes, strict=True):
                    if "reason" in note:
                        left_out.append(LeftOut(row, note["name"], note["reason"].removeprefix(f"{note['name']}: ")))
                    label = dataset.label(row) if labelled else None
                    table.writerow([row, note["name"], dataset.cohort_of(row), label, self._class_name(label)])
                yield

    def _class_name(self, label: int | None) -> str | None:
        return self.dataset.class_names[label] if label is not None and isinstance(self.dataset, KNN) else None

    def _array(self, part: Part) -> Array:
        in_block, blocks = self.tokens[part], self.blocks
        last_blocks, _, width = self.shape
        of_one = (last_blocks, self.num_patches, width) if part == "patches" else (last_blocks, width)
        pieces = (
            blocks.block(block)[0][:, :, in_block].numpy().reshape(len(blocks.items_of(block)), *of_one)
            for block in range(len(blocks))
        )
        return Array((len(self.dataset), *of_one), str(self.dtype).removeprefix("torch."), pieces)

    def _manifest(self, arrays: Mapping[str, Array], left_out: Sequence[LeftOut]) -> dict[str, Any]:
        model = self.model
        is_native = self.num_patches == model.vit.pos_embed.shape[1] - 1
        return {
            "key": key_of(self.dataset, model, self.wanted),
            "identity": {**_identity(self.dataset, model, self.wanted), "format": self.format},
            **self.notes,
            "weights": str(model.path.resolve()),
            "tensors_left_out": dict(model.left_out),
            "format": self.format,
            "arrays": {name: {"shape": list(array.shape), "dtype": array.dtype} for name, array in arrays.items()},
            "classes": self.dataset.class_names if isinstance(self.dataset, KNN) else None,
            "num_left_out": len(left_out),
            "left_out": [one._asdict() for one in left_out],
            "preprocessing": {
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "tiles": f"shorter side scaled to {self.wanted.side} px, then the middle square",
                "positions": "as learned" if is_native else "resampled to the tile's grid",
            },
            "versions": {name: version(name) for name in ("pathfm", "torch", "numpy", "pillow", "simplejpeg")},
        }


def _reasons(rows: range, tiles: Tiles) -> dict[int, str]:
    """Why rows could not be decoded."""
    readable = {*tiles.rows.tolist()}
    return dict(zip((row for row in rows if row not in readable), tiles.unreadable, strict=True))


def _tokens_of(layer: Features, part: Part) -> Float[Tensor, "n t D"]:
    patches = layer.patches.float()
    if part == "patches":
        return patches
    return layer.cls.float()[:, None] if part == "cls" else patches.mean(1, keepdim=True)

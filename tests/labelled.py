"""A small labelled data set of drawn tiles, in two splits that do not share any."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from pathfm.data.index import IndexRequest, build_index
from pathfm.data.pack import PackRequest, pack
from pathfm.jobs.synthetic_tissue import draw_tile

CLASSES = ("stroma", "tumour", "necrosis")
_TINTS = ((1.0, 1.0, 1.0), (0.75, 0.8, 1.0), (1.0, 0.7, 0.7))


def make_labelled(
    root: Path, query: Sequence[int] = (12, 12, 12), test: Sequence[int] = (7, 7, 7), side: int = 64
) -> Path:
    """So many tiles of each class; returns the root of `KNN:root=...:split=query` and `test`."""
    tiles = root / "labelled_tiles"
    tiles.mkdir(parents=True)
    rows, names = ["filename,label,class"], {"query": [], "test": []}
    for label, numbers in enumerate(zip(query, test, strict=True)):
        for split, number in zip(names, numbers, strict=True):
            for index in range(number):
                name = f"{split}_{label}_{index:02d}.png"
                pixels = draw_tile(label, 1000 * (split == "test") + index, side) * np.array(_TINTS[label])
                cv2.imwrite(str(tiles / name), pixels[:, :, ::-1].astype(np.uint8))
                rows.append(f"{name},{label},{CLASSES[label]}")
                names[split].append(name)
    pack(PackRequest(tiles, "downstream", root / "packed"))
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    for split, kept in names.items():
        (root / f"{split}.txt").write_text("\n".join(kept) + "\n")
        tar = root / "packed" / "downstream_dataset.tar"
        build_index(IndexRequest(tar, root / "packed", split, keep=root / f"{split}.txt", csv=root / "labels.csv"))
    return root / "packed"


def tuning_settings(root: Path) -> list[str]:
    """key=value of a recipe that tunes on it."""
    return [f"tune.{split}_dataset_path=KNN:root={root}:split={split}" for split in ("query", "test")]

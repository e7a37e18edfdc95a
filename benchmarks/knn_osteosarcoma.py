"""Does pretraining teach anything? kNN accuracy of a small ViT before and after a few hundred steps on real H&E.

    python benchmarks/knn_osteosarcoma.py --data ../shared/data/osteosarcoma3 --work build/osteosarcoma [key=value ...]

Tiles with too little tissue are dropped, as they inherit their picture's label. Pictures (`source_image`), not tiles,
are dealt out to the two halves of each class: a tile's neighbours never help to classify it. The network sees all
tiles of the first half without labels; then [CLS] features of the first half classify those of the second.
Both accuracies come from the same code and the same run: step 0's weights and the last teacher's.
"""

import csv
import json
import platform
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from pathfm.data.decode import decode
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import exit_status
from pathfm.evaluate.knn import knn_probabilities
from pathfm.evaluate.metrics import scores
from pathfm.features.frozen import class_token_features
from pathfm.files import write_json
from pathfm.log import progress
from pathfm.models.build import build_backbone
from pathfm.random_streams import derived_seed, stream
from pathfm.recipe import Recipe, find_config, read_recipe

CONFIG = Path(__file__).resolve().parents[1] / "configs"
NEIGHBOURS = (5, 10, 20)


@dataclass(frozen=True)
class Tile:
    path: Path
    label: int
    picture: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels.csv")
    parser.add_argument("--work", type=Path, default=Path("build/osteosarcoma"), help="where the run lies")
    parser.add_argument("--config", default="vittiny16_cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of split and training")
    arguments, overrides = parser.parse_known_args(argv)
    results = [_one_seed(arguments, overrides, seed) for seed in arguments.seeds]
    write_json(arguments.work / "knn.json", results)
    print(json.dumps(results, indent=2))
    return 0


def _one_seed(arguments: Namespace, overrides: Sequence[str], seed: int) -> dict:
    work = arguments.work / f"seed_{seed}"
    first, second = split(read_tiles(arguments.data), seed)
    _pack(first, work)
    config = find_config(arguments.config, CONFIG)
    settings = [f"train.dataset_path=Pathology:root={work / 'data'}", f"train.seed={seed}", *overrides]
    command = [sys.executable, "-m", "pathfm.train", "--config-file", str(config), "--output-dir", str(work / "run")]
    subprocess.run([*command, *settings], check=True)
    recipe = read_recipe(config, settings).recipe
    exported = sorted((work / "run" / "exports").glob("teacher_*.pth"))[-1]
    return {
        "seed": seed,
        "samples": {"query": len(first), "test": len(second)},
        "chance": max(np.bincount([tile.label for tile in second])) / len(second),
        "random_initialisation": _score(recipe, None, first, second),
        "pretrained": _score(recipe, exported, first, second),
        "steps": int(exported.stem.split("_")[1]),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    }


def read_tiles(data: Path, least_tissue: float = 0.2) -> list[Tile]:
    with (data / "labels.csv").open(newline="") as file:
        return [
            Tile(data / "images" / row["filename"], int(row["label"]), row["source_image"])
            for row in csv.DictReader(file)
            if float(row["tissue_fraction"]) >= least_tissue
        ]


def split(tiles: Sequence[Tile], seed: int) -> tuple[list[Tile], list[Tile]]:
    """Every class's pictures in two halves, drawn by seed."""
    pictures = defaultdict(set)
    for tile in tiles:
        pictures[tile.label].add(tile.picture)
    first = set()
    for label, names in pictures.items():
        drawn = stream(seed, label, "split by picture").permutation(sorted(names))
        first.update(drawn[: len(drawn) // 2])
    return [tile for tile in tiles if tile.picture in first], [tile for tile in tiles if tile.picture not in first]


def _pack(tiles: Sequence[Tile], work: Path) -> None:
    folder = work / "tiles"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for tile in tiles:
        (folder / tile.path.name).symlink_to(tile.path.resolve())
    pack(PackRequest(folder, "pretrain", work / "data"))


def _score(recipe: Recipe, weights: Path | None, first: Sequence[Tile], second: Sequence[Tile]) -> dict[str, float]:
    torch.manual_seed(derived_seed(recipe.train.seed, 0, "initial weights"))  # as a run begins
    backbone = build_backbone(recipe.student, recipe.crops.global_crops_size, drop_path=False).eval()
    if weights is not None:
        teacher = torch.load(weights, weights_only=True)["teacher"]
        own = {name.removeprefix("backbone."): value for name, value in teacher.items() if name.startswith("backbone.")}
        backbone.load_state_dict(own)
    side = recipe.crops.global_crops_size
    features = [
        class_token_features(lambda images: backbone([images])[0].cls, _images(tiles, side), torch.device("cpu"))
        for tiles in (first, second)
    ]
    labels = [torch.tensor([tile.label for tile in tiles]) for tiles in (first, second)]
    found = knn_probabilities(features[0], labels[0], features[1], 3, NEIGHBOURS)
    return {f"knn_{k}": round(scores(of_k, labels[1], resamples=0)["acc"].value, 4) for k, of_k in found.items()}


def _images(tiles: Sequence[Tile], side: int) -> Iterator[np.ndarray]:
    """Tiles at the size of the global crops, as evaluations of DINO and DINOv2 do."""
    for tile in progress(tiles, "features", unit="tiles"):
        yield cv2.resize(decode(tile.path.read_bytes()), (side, side), interpolation=cv2.INTER_AREA)


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

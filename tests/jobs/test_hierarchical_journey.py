"""Both levels on real tissue: tiles, patch backbone, features of regions, region backbone, a vector for each region."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.data.datasets import open_dataset
from pathfm.data.region_features import RegionFeatures
from pathfm.hierarchical import compose
from pathfm.models.vit import as_grid
from tests.jobs.journeys import SMALL, assert_same_run, environment, newest_checkpoint, wait_until

CONFIGS = Path(__file__).parents[2] / "configs"
REGION_PX, PATCH_PX, TILES = 1024, 64, 48
SETTINGS = [
    *SMALL,
    "train.num_workers=0",
    "train.log_every_steps=2",
    "crops.local_crops_number=2",
    "checkpoint.every_steps=2",
]
OF_TILES = ["student.arch=vit_tiny", "crops.global_crops_size=64", "crops.local_crops_size=32", "optim.total_steps=4"]
OF_REGIONS = ["student.feature_width=192", "optim.total_steps=8"]


def pathfm(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr


def trained(config: str, run: Path, dataset: str, *settings: str) -> list[str]:
    """The ancestors' command."""
    files = ["--config-file", str(CONFIGS / f"{config}.yaml"), "--output-dir", str(run)]
    return ["pathfm.train", *files, f"train.dataset_path={dataset}", *SETTINGS, *settings]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A few tiles, and the two regions of 4096 px each as two of 1024 px."""
    place = tmp_path_factory.mktemp("hierarchical")
    (place / "tiles").mkdir()
    for tile in sorted((shared_data / "osteosarcoma3").rglob("*.jpg"))[:TILES]:
        (place / "tiles" / tile.name).symlink_to(tile)
    (place / "regions").mkdir()
    for region in sorted((shared_data / "regions4096").glob("*.jpg")):
        with Image.open(region) as picture:
            for left in (0, 2048):
                box = (left, 1024, left + REGION_PX, 1024 + REGION_PX)
                picture.crop(box).save(place / "regions" / f"{region.stem}_{left:04d}.png")
    return place


def test_from_tiles_to_one_vector_for_each_region_with_a_kill_in_the_middle(place: Path) -> None:
    pathfm("pathfm", "pack", str(place / "tiles"), "--name", "pretrain", "--output", str(place / "data"))
    pathfm(*trained("patch", place / "patch", f"Pathology:root={place / 'data'}", *OF_TILES))
    patch_weights = place / "patch" / "exports" / "teacher_00000004.pth"

    sizes = ["--region-size", str(REGION_PX), "--patch-size", str(PATCH_PX)]
    sources = ["--regions", str(place / "regions"), "--weights", str(patch_weights)]
    pathfm("pathfm", "extract", *sources, "--output", str(place / "features"), *sizes)
    features = f"Regions:root={place / 'features'}"

    pathfm(*trained("region", place / "undisturbed", features, *OF_REGIONS))
    command = trained("region", place / "region", features, *OF_REGIONS)
    with subprocess.Popen([sys.executable, "-m", *command], env=environment(), stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: newest_checkpoint(place / "region") >= 2)
        process.send_signal(signal.SIGKILL)
    pathfm(*command)
    assert_same_run(place / "undisturbed", place / "region", 8)

    model = compose(patch_weights, place / "region" / "exports" / "teacher_00000008.pth", patch_size=PATCH_PX)
    extracted = RegionFeatures(open_dataset(features))
    vectors = []
    for number, region in enumerate(sorted((place / "regions").iterdir())):
        with Image.open(region) as picture, torch.inference_mode():
            vectors.append(model(torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
            (by_features,) = model.region([as_grid(extracted[number][None], 16, 16)])
        torch.testing.assert_close(vectors[-1], by_features.cls[0], atol=1e-4, rtol=1e-3)
    assert torch.stack(vectors).shape == (4, 192)
    assert torch.pdist(torch.stack(vectors)).min() > 1e-4

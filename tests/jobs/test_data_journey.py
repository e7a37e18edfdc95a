"""From pictures to a trained run on two cohorts, and on when a tile goes bad: every step as people type it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathfm.data.datasets import open_dataset
from pathfm.data.order import SampleOrder
from pathfm.jobs.synthetic_tissue import draw_tile
from tests.jobs.journeys import TINY, Done, environment, metrics

COHORTS = ("brca", "luad")
NUM_TILES, NUM_KEPT = 24, 16  # of each cohort
STEPS, BATCH = 16, 8
SPOILT = "slide_4_7_0.png"


def pathfm(*words: object) -> list[str]:
    return [sys.executable, "-m", "pathfm", *map(str, words)]


def do(*words: object) -> Done:
    """Run a command to its end, which is to be a good one."""
    done = subprocess.run(pathfm(*words), capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data_journey")


@pytest.fixture(scope="module")
def dataset(place: Path) -> str:
    """Two packed cohorts, concatenated, and the subset `train` of both."""
    data = place / "data"
    for number, cohort in enumerate(COHORTS):
        names = draw_cohort(place / cohort, seed=number)
        do("pack", place / cohort, "--name", cohort, "--cohort", "--output", data)
        (place / f"{cohort}.txt").write_text("\n".join(names[:NUM_KEPT]))
        do("index", "--tarball_path", data / f"{cohort}.tar", "--output_root", data, "--name", cohort,
           "--keep", place / f"{cohort}.txt", "--suffix", "train")  # fmt: skip
    for suffix in ((), ("-s", "train")):
        do("concat", "-r", data, "-o", data, *suffix)
    return f"PathologyFoundation:root={data}:subset=train"


def draw_cohort(folder: Path, seed: int) -> list[str]:
    """Small drawn tiles of three slides; returns their names."""
    folder.mkdir()
    names = [f"slide_{3 * seed + tile % 3}_{tile}_0.png" for tile in range(NUM_TILES)]
    for tile, name in enumerate(names):
        cv2.imwrite(str(folder / name), draw_tile(seed, tile, 64)[:, :, ::-1])
    return names


@pytest.fixture(scope="module")
def verified(dataset: str, place: Path) -> str:
    return do("verify", dataset, "--decode", "all", "--output", place / "whole.json").stdout


@pytest.fixture(scope="module")
def run(dataset: str, verified: str, place: Path) -> Path:
    """A run that left after a few steps, which are in `left.json`, and went on to its end when a tile had gone bad."""
    (place / "tiny.yaml").write_text(TINY)
    directory = place / "run"
    words = ("train", "--config-file", place / "tiny.yaml", "--output-dir", directory)
    words += (f"train.dataset_path={dataset}", f"optim.total_steps={STEPS}", "checkpoint.every_steps=3")
    trainer = subprocess.Popen(pathfm(*words), env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(directory / "checkpoints" / "step_00000003")
    trainer.send_signal(signal.SIGTERM)
    _, said = trainer.communicate(timeout=120)
    assert trainer.returncode == 75, said
    (directory / "exit.json").rename(directory / "left.json")
    damage(place / "data" / "luad.tar", SPOILT)
    do(*words)
    return directory


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come in time"
        time.sleep(0.005)


def damage(tar: Path, name: str) -> None:
    """Overwrite some bytes of a member where it lies."""
    with tar.open("r+b") as file:
        start = file.read().index(name.encode()) + 512  # the data follow the header block
        file.seek(start + 100)
        file.write(bytes(200))


def test_the_subset_of_both_cohorts_is_whole(verified: str):
    assert "32 rows in 2 tars, each the bytes of a file" in verified
    assert "32 of 32 samples read, every one can be decoded" in verified
    assert "all is well" in verified


def test_the_cohorts_are_shown(dataset: str, verified: str, place: Path):
    said = do("data", dataset, "--sheet", place / "sheet.png").stdout
    rows = [line.split()[:2] for line in said.splitlines()]
    assert [row for row in rows if row and row[0] in COHORTS] == [["brca", "16"], ["luad", "16"]]
    assert (place / "sheet.png").stat().st_size > 10_000


def test_training_goes_on_without_the_tile_that_went_bad_and_counts_it(dataset: str, run: Path):
    (line,) = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert (line["cohort"], line["file"]) == ("luad", SPOILT)
    assert json.loads((run / "exit.json").read_text())["verdict"] == "done"
    left_after = json.loads((run / "left.json").read_text())["step"]
    rows_since = SampleOrder(len(open_dataset(dataset)), 0).samples(np.arange(left_after * BATCH, STEPS * BATCH))
    assert metrics(run)[-1]["samples_skipped"] == (rows_since == line["sample"]).sum() > 0


def test_verification_then_names_the_tile(dataset: str, run: Path, place: Path):
    words = pathfm("verify", dataset, "--output", place / "damaged.json")
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 1
    assert "cohort luad: 1 cannot be decoded" in done.stdout
    found = json.loads((place / "damaged.json").read_text())
    (check,) = [check for check in found["checks"][dataset] if check["verdict"] == "damage"]
    (case,) = check["cases"]
    assert case.startswith(f"{SPOILT} (row ")

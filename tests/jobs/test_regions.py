"""Both levels of hierarchical pretraining in the one trainer: DINO on tiles, either method on regions' features."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pathfm.errors import exit_status
from pathfm.jobs.pretrain import main
from tests.jobs.journeys import (
    SMALL,
    assert_same_run,
    environment,
    make_tiles,
    metrics,
    newest_checkpoint,
    train,
    wait_until,
    weights,
)

CONFIGS = Path(__file__).parents[2] / "configs"
WIDTH, SIDE, STEPS = 24, 16, 12
SETTINGS = [*SMALL, "train.log_every_steps=3", f"optim.total_steps={STEPS}", "checkpoint.every_steps=4"]
OF_REGIONS = [*SETTINGS, f"student.feature_width={WIDTH}", "crops.local_crops_number=2", "train.num_workers=1"]


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 12 regions, smooth over their grid as those of tissue are."""
    folder = tmp_path_factory.mktemp("regions")
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        coarse = torch.randn(1, WIDTH, 4, 4, generator=generator)
        grid = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0]
        torch.save(grid.flatten(1).T.contiguous(), folder / f"region_{number:02d}.pt")
    return folder


def words(config: str, run: Path, regions: Path, *overrides: str) -> list[str]:
    """The ancestors' command."""
    start = ["--config-file", str(CONFIGS / f"{config}.yaml"), "--output-dir", str(run)]
    return [*start, f"train.dataset_path=Regions:root={regions}", *OF_REGIONS, *overrides]


def trained(config: str, run: Path, regions: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pathfm.train", *words(config, run, regions, *overrides)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


@pytest.fixture(scope="module")
def undisturbed(regions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = trained("region", run, regions)
    assert done.returncode == 0, done.stderr
    return run


def test_a_region_transformer_is_trained_and_exported(undisturbed: Path) -> None:
    assert [line["step"] for line in metrics(undisturbed)] == [3, 6, 9, 12]
    teacher = torch.load(undisturbed / "exports" / f"teacher_{STEPS:08d}.pth", weights_only=True)["teacher"]
    assert teacher["backbone.phi.0.weight"].shape == (192, WIDTH)
    assert teacher["backbone.pos_embed"].shape == (1, 1 + 14 * 14, 192)
    assert not any("mask_token" in name or "ibot" in name for name in teacher)
    assert (undisturbed / "previews" / "crops.png").stat().st_size > 1000


def test_killed_in_the_middle_it_goes_on_bit_for_bit(undisturbed: Path, regions: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "pathfm.train", *words("region", run, regions)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: newest_checkpoint(run) >= 4)
        process.send_signal(signal.SIGKILL)
    assert newest_checkpoint(run) < STEPS
    done = trained("region", run, regions)
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, run, STEPS)


def test_dinov2_trains_on_regions_too_because_method_and_data_are_chosen_apart(regions: Path, tmp_path: Path) -> None:
    done = trained("region_dinov2", tmp_path / "run", regions, "dino.koleo_group_size=4")
    assert done.returncode == 0, done.stderr
    assert {"ibot_loss", "koleo_loss"} <= metrics(tmp_path / "run")[-1].keys()


def test_a_damaged_region_is_quarantined_by_name(regions: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "regions"
    damaged.mkdir()
    for file in regions.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "region_05.pt").write_bytes(b"not a tensor")
    done = trained("region", tmp_path / "run", damaged)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert line["file"] == "region_05.pt"


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert exit_status(lambda: main(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_features_of_another_width_are_refused_in_one_line(
    regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, words("region", tmp_path / "run", regions, "student.feature_width=384"))
    assert "region_00.pt" in said
    assert "its features are 24 wide, not 384; set student.feature_width" in said


def test_windows_that_are_larger_than_the_grid_are_refused_in_one_line(
    regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, words("region", tmp_path / "run", regions, "crops.global_crops_size=20"))
    assert "its grid of 16 x 16 patches is smaller than a crop of 20 x 20" in said


def test_dino_on_tiles_by_the_ancestors_command(tmp_path: Path) -> None:
    small = ["student.arch=vit_tiny", "crops.global_crops_size=48", "crops.local_crops_size=32", "train.num_workers=0"]
    data = make_tiles(tmp_path)
    done = train(CONFIGS / "patch.yaml", data, tmp_path / "run", *SETTINGS, *small, "crops.local_crops_number=2")
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert {"dino_local_crops_loss", "dino_global_crops_loss"} <= lines[-1].keys()
    assert "ibot_loss" not in lines[-1]


def test_batch_norm_in_the_head_trains_registers_and_stain_jitter_too(tmp_path: Path) -> None:
    options = ["dino.use_bn_in_head=true", "student.num_register_tokens=2", "augment.preset=pathology"]
    small = ["student.arch=vit_tiny", "crops.global_crops_size=48", "crops.local_crops_size=32", "train.num_workers=0"]
    data = make_tiles(tmp_path)
    done = train(
        CONFIGS / "patch.yaml", data, tmp_path / "run", *SETTINGS, *small, *options, "train.centering=sinkhorn_knopp"
    )
    assert done.returncode == 0, done.stderr
    assert any(".mlp.1.weight" in name for name in weights(tmp_path / "run", STEPS))


def test_a_head_with_batch_norm_wants_a_ranks_batch_at_once(
    regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(
        capsys, words("region", tmp_path / "run", regions, "dino.use_bn_in_head=true", "train.micro_batch_size=2")
    )
    assert "needs a rank's 4 samples at once, not in 2 parts" in said

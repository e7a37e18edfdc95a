"""A whole run, as people start it: to the end, interrupted, killed, with broken tiles, disks and numbers."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pathfm.errors import exit_status
from pathfm.jobs.pretrain import main
from tests.jobs.journeys import (
    TINY,
    assert_same_run,
    command,
    environment,
    make_tiles,
    metrics,
    newest_checkpoint,
    segments,
    train,
    wait_until,
    weights,
)

STEPS = 16
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, request) -> Iterator[Path]:
    """For all runs of these tests, which take gigabytes: they go with the last test, unless one failed."""
    folder = tmp_path_factory.mktemp("pretrain")
    yield folder
    if not request.session.testsfailed:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def recipe(place: Path) -> Path:
    (place / "tiny.yaml").write_text(TINY)
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return make_tiles(place)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, data: Path, place: Path) -> Path:
    """A run that nobody interrupted."""
    done = train(recipe, data, place / "undisturbed")
    assert done.returncode == 0, done.stderr
    assert "run undisturbed is finished: 16 steps" in done.stdout
    return place / "undisturbed"


def refusal(capsys, *words: str) -> str:
    """The one line with which a command that cannot work ends."""
    assert exit_status(lambda: main(words)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def test_a_run_leaves_metrics_pictures_checkpoints_and_a_teacher_that_loads(undisturbed: Path):
    assert [line["step"] for line in metrics(undisturbed)] == [3, 6, 9, 12, 15, 16]
    assert all(line["total_loss"] > 0 for line in metrics(undisturbed))
    pictures = {"crops.png", "losses.png", "schedules.png", "tokens_00000016.png"}
    assert {path.name for path in (undisturbed / "previews").iterdir()} == pictures
    assert json.loads((undisturbed / "exit.json").read_text())["verdict"] == "done"
    teacher = torch.load(undisturbed / "exports" / f"teacher_{STEPS:08d}.pth", weights_only=True)["teacher"]
    prefixes = {name.partition(".")[0] for name in teacher}
    assert prefixes == {"backbone", "dino_head", "ibot_head"}
    checkpoint = weights(undisturbed, STEPS)
    assert all(torch.equal(tensor, checkpoint[f"method.teacher.{name}"]) for name, tensor in teacher.items())


def test_a_finished_run_says_so_and_changes_nothing(recipe, data, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_text()
    again = train(recipe, data, undisturbed)
    assert again.returncode == 0
    assert "run undisturbed is finished (16 steps); nothing to do" in again.stdout
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_five_kills_at_random_moments_change_nothing(recipe, data, undisturbed, place):
    kill_until_finished(recipe, data, place / "killed", seed=1)
    assert_same_run(undisturbed, place / "killed", STEPS)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(recipe, data, undisturbed, place):
    for seed in range(6):
        kill_until_finished(recipe, data, place / f"soak{seed}", seed=10 + seed)
        assert_same_run(undisturbed, place / f"soak{seed}", STEPS)


def kill_until_finished(recipe: Path, data: Path, run: Path, seed: int) -> None:
    """Start the same command again and again; SIGKILL it five times at random moments after these checkpoints."""
    draw = random.Random(seed)
    for number, checkpoint in enumerate((0, 4, 4, 8, 12)):
        words = command(recipe, data, run, "train.num_workers=1")
        process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
        wait_until(lambda n=number: segments(run) > n)
        wait_until(lambda step=checkpoint: newest_checkpoint(run) >= step)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = train(recipe, data, run)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_every_process_leaves_a_checkpoint_of_its_step(recipe, data, undisturbed, place, number):
    run = place / f"signal_{number}"
    words = command(recipe, data, run, "train.num_workers=1")
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until((run / "metrics.jsonl").exists)
    os.killpg(process.pid, number)  # trainer, loader workers and their server, as a terminal and Slurm do
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    ended = json.loads((run / "exit.json").read_text())
    assert ended["verdict"] == "interrupted"
    assert (run / "checkpoints" / f"step_{ended['step']:08d}").is_dir()
    assert train(recipe, data, run).returncode == 0
    assert_same_run(undisturbed, run, STEPS)


def test_workers_do_not_change_the_run(recipe, data, undisturbed, place):
    assert train(recipe, data, place / "workers", "train.num_workers=2").returncode == 0
    assert_same_run(undisturbed, place / "workers", STEPS)


def test_two_ranks_train_as_one(recipe, data, place):
    # With LayerScale near zero the first features almost coincide, and rounding would decide who is nearest to whom.
    steady = ["student.drop_path_rate=0", "student.layerscale=1", "optim.total_steps=4", "dino.koleo_group_size=8"]
    steady.append("train.global_batch_size=8")
    alone = train(recipe, data, place / "one_rank", *steady)
    assert alone.returncode == 0, alone.stderr
    together = train(recipe, data, place / "two_ranks", *steady, launcher=TORCHRUN)
    assert together.returncode == 0, together.stderr
    for one, two in zip(metrics(place / "one_rank"), metrics(place / "two_ranks"), strict=True):
        assert one.keys() == two.keys()
        assert two["total_loss"] == pytest.approx(one["total_loss"], abs=1e-5)
        assert two["ibot_loss"] == pytest.approx(one["ibot_loss"], abs=1e-5)
        assert two["grad_norm/backbone"] == pytest.approx(one["grad_norm/backbone"], rel=1e-3)


@pytest.mark.parametrize("what", ["checkpoint", "teacher"])
def test_a_disk_that_is_full_costs_nothing_that_was_there(recipe, data, undisturbed, place, what):
    run = place / f"no_room_for_the_{what}"
    sizes = {"checkpoint": state_file(undisturbed), "teacher": undisturbed / "exports" / f"teacher_{STEPS:08d}.pth"}
    if what == "teacher":  # it is smaller than a checkpoint: let it be the only one that does not fit
        assert train(recipe, data, run).returncode == 0
        shutil.rmtree(run / "exports")
        (run / "exit.json").unlink()
    # A file size limit stands for the full disk: the kernel refuses the write in the middle.
    limit = sizes[what].stat().st_size // 2
    limited = subprocess.run(
        command(recipe, data, run),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    assert limited.returncode == 1
    assert "Traceback" not in limited.stderr
    assert f"its {what} could not be written" in limited.stdout
    assert json.loads((run / "exit.json").read_text())["verdict"] == "failed"
    if what == "checkpoint":
        assert "the checkpoint of step 4 could not be written" in limited.stderr
        assert list((run / "checkpoints").iterdir()) == []
    again = train(recipe, data, run)
    assert again.returncode == 0, again.stderr
    assert_same_run(undisturbed, run, STEPS)
    assert (run / "exports" / f"teacher_{STEPS:08d}.safetensors").is_file()


def state_file(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEPS:08d}" / "__0_0.distcp"


@pytest.fixture(scope="module")
def broken(data, place) -> Path:
    """The tiles, of which one cannot be decoded."""
    shutil.copytree(data, place / "broken_tile")
    damage_a_tile(place / "broken_tile", b"tile_007.png")
    return place / "broken_tile"


@pytest.fixture(scope="module")
def lenient(recipe, broken, place) -> Path:
    """A run on them to its end."""
    done = train(recipe, broken, place / "lenient")
    assert done.returncode == 0, done.stderr
    return place / "lenient"


def test_a_broken_tile_is_passed_over_by_name_and_counted(lenient):
    (line,) = [json.loads(line) for line in (lenient / "quarantine.jsonl").read_text().splitlines()]
    assert (line["cohort"], line["file"]) == ("pretrain", "tile_007.png")
    assert line["reason"]
    assert metrics(lenient)[-1]["samples_skipped"] >= 3  # 16 steps of 8 see each of 40 tiles 3 times


def test_a_run_that_a_broken_tile_stopped_goes_on_with_another_policy(recipe, broken, lenient, place):
    run = place / "strict"
    strict = train(recipe, broken, run, "data.corrupt_samples=raise")
    assert strict.returncode == 2
    *_, header, row, where, error = strict.stderr.strip().splitlines()
    assert header.split() == ["cohort", "undecodable", "most", "often", "because", "files"]
    assert row.split()[:2] == ["pretrain", "1"]
    assert row.endswith("  tile_007.png")
    assert where.endswith("quarantine.jsonl")
    assert error.startswith("error: 1 of the ")
    ended = json.loads((run / "exit.json").read_text())
    assert ended["verdict"] == "failed"
    assert "tile_007.png" in ended["reason"]
    assert newest_checkpoint(run) == ended["step"] > 0
    assert train(recipe, broken, run).returncode == 0
    assert_same_run(lenient, run, STEPS)


def damage_a_tile(root: Path, name: bytes) -> None:
    tar = root / "pretrain_dataset.tar"
    content = bytearray(tar.read_bytes())
    start = content.index(name) + 512  # the data follow the header block
    content[start : start + 200] = bytes(200)
    tar.write_bytes(content)


def test_numbers_that_stay_broken_end_the_run_with_the_evidence(recipe, data, place):
    run = place / "not_finite"
    done = train(recipe, data, run, "optim.base_lr=1e30", "optim.warmup_pct=0", "optim.clip_grad=0")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the loss or gradient was not finite for 5 steps in a row")
    evidence = json.loads(sorted((run / "accidents").iterdir())[0].read_text())
    assert len(evidence["files"]) == 8
    assert evidence["values"]["finite"] == "0.0"
    assert json.loads((run / "exit.json").read_text())["verdict"] == "failed"


def test_a_run_whose_first_steps_were_not_finite_can_be_continued(recipe, data, place):
    run = place / "bad_start"
    bad = ["student.layerscale=1e38", "optim.max_skipped_steps=1000", "optim.total_steps=6", "checkpoint.every_steps=2"]
    process = subprocess.Popen(command(recipe, data, run, *bad), env=environment(), stderr=subprocess.DEVNULL)
    wait_until(lambda: newest_checkpoint(run) >= 2)
    process.kill()
    process.wait()
    done = train(recipe, data, run, *bad)
    assert done.returncode == 0, done.stderr
    assert "goes on from step" in done.stderr


def test_two_ranks_that_are_told_to_leave_wait_for_the_checkpoint(recipe, data, place):
    run = place / "two_ranks_leave"
    process = subprocess.Popen(
        command(recipe, data, run, "optim.total_steps=2000", launcher=TORCHRUN),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((run / "metrics.jsonl").exists)
    for rank in ranks_of(process.pid):
        os.kill(rank, signal.SIGUSR2)
    _, said = process.communicate(timeout=120)
    ended = json.loads((run / "exit.json").read_text())
    assert ended["verdict"] == "interrupted", said
    assert newest_checkpoint(run) == ended["step"]
    assert "exitcode  : 75" in said
    assert "-9" not in said


def ranks_of(launcher: int) -> list[int]:
    """The processes that torchrun itself started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def test_data_that_changed_under_a_run_are_noticed_and_data_that_moved_are_not_missed(recipe, data, undisturbed, place):
    moved, run = place / "moved", place / "on_moved_data"
    shutil.copytree(data, moved)
    shutil.copytree(undisturbed, run)
    assert "nothing to do" in train(recipe, moved, run).stdout
    grown = make_tiles(place / "grown", 41)
    refused = train(recipe, grown, run)
    assert refused.returncode == 2
    assert "the data of run on_moved_data have changed: 40 samples when it was begun, 41 now" in refused.stderr


def test_the_verb_train_too_leaves_on_a_signal(recipe, data, undisturbed, place):
    run = place / "verb"
    words = command(recipe, data, run)
    words[1:3] = ["-m", "pathfm", "train"]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: segments(run) > 0)
    process.send_signal(signal.SIGTERM)  # before or after the first step
    assert process.wait(timeout=120) == 75
    assert train(recipe, data, run).returncode == 0
    assert_same_run(undisturbed, run, STEPS)


def test_no_resume_begins_anew_and_keeps_what_was_there(recipe, data, undisturbed, place):
    run = place / "anew"
    shutil.copytree(undisturbed, run)
    done = subprocess.run(
        [*command(recipe, data, run), "--no-resume"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, run, STEPS)
    assert (run / "earlier_1" / "checkpoints" / f"step_{STEPS:08d}").is_dir()


def test_another_recipe_does_not_continue_a_run(recipe, data, undisturbed, capsys):
    words = command(recipe, data, undisturbed, "optim.base_lr=0.1")[3:]
    line = refusal(capsys, *words)
    assert "run undisturbed was begun with another recipe (optim.base_lr: 0.002 -> 0.1)" in line


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(recipe, data, undisturbed, place, capsys):
    run = place / "all_damaged"
    shutil.copytree(undisturbed, run)
    (run / "exit.json").unlink()
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    line = refusal(capsys, *command(recipe, data, run)[3:])
    assert "none of the 3 checkpoints of run all_damaged can be used" in line


def test_what_is_missing_or_impossible_is_one_line(recipe, data, place, capsys):
    run = ("--config-file", str(recipe), "--output-dir", str(place / "never"))
    assert "train.dataset_path" in refusal(capsys, *run)
    assert "/nowhere" in refusal(capsys, *run, "train.dataset_path=Pathology:root=/nowhere")
    assert "larger than an epoch of 40" in refusal(
        capsys, *run, f"train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=64"
    )
    assert "the nearest known key is 'optim.epochs'" in refusal(capsys, *run, "optim.epoch=3")
    assert "there is no recipe 'tinny'" in refusal(capsys, "--config-file", "tinny")


def test_a_truncated_or_exchanged_tar_is_noticed_before_training(recipe, data, place, capsys):
    for name, spoil in {
        "truncated": lambda tar: tar.truncate(60_000),
        "exchanged": lambda tar: tar.write(bytes(512)),
    }.items():
        root = place / name
        shutil.copytree(data, root)
        with (root / "pretrain_dataset.tar").open("ab") as tar:
            spoil(tar)
        words = command(recipe, root, place / f"never_{name}")[3:]
        assert "pretrain_dataset.tar" in refusal(capsys, *words)

"""A run that tunes while it trains: it trains as if it did not, stops in time, and keeps its best teacher."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.jobs.journeys import (
    RankProcesses,
    assert_same_run,
    command,
    environment,
    metrics,
    newest_checkpoint,
    train,
    wait_until,
    weights,
)
from tests.labelled import make_labelled, tuning_settings

STEPS = 16
EVERY = ("tune.tune_every_samples=32", "tune.num_workers=1", "tune.knn.batch_size=8", "tune.bootstrap=100")  # 4 steps


@pytest.fixture(scope="module")
def tuning(tmp_path_factory) -> list[str]:
    return [*tuning_settings(make_labelled(tmp_path_factory.mktemp("labelled"))), *EVERY]


@pytest.fixture(scope="module")
def tuned(recipe, data, tuning, tmp_path_factory) -> Path:
    """A run that tuned four times."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    done = train(recipe, data, run, *tuning)
    assert done.returncode == 0, done.stderr
    return run


def tunings(run: Path) -> list[dict[str, Any]]:
    """tuning.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "results" / "tuning.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_tuning_has_no_effect_on_training(recipe, data, tuned, tmp_path):
    assert train(recipe, data, tmp_path / "untuned").returncode == 0
    assert metrics(tmp_path / "untuned") == metrics(tuned)
    plain, beside = weights(tmp_path / "untuned", STEPS), weights(tuned, STEPS)
    assert all(plain[name].equal(beside[name]) for name in plain)


def test_nor_has_it_where_two_ranks_hold_half_of_the_weights_each(recipe, data, tuning, tmp_path):
    sharded = ("parallel.strategy=fsdp", "train.batch_size_per_gpu=4", "optim.total_steps=8")
    for name, settings in {"untuned": [], "tuned": tuning}.items():
        ranks = RankProcesses(recipe, data, tmp_path / name, 2, *sharded, *settings)
        assert ranks.wait() == [0, 0], ranks.said()
    assert_same_run(tmp_path / "untuned", tmp_path / "tuned", 8)
    assert [line["step"] for line in tunings(tmp_path / "tuned")] == [4, 8]


def test_every_tuning_is_written_with_both_networks_and_the_best_is_kept(tuned):
    lines = tunings(tuned)
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert [line["samples_seen"] for line in lines] == [32, 64, 96, 128]
    for line in lines:
        assert (
            {"acc_10", "balanced_acc_20", "auc_20", "effective_rank"}
            <= line["teacher"].keys()
            == line["student"].keys()
        )
        low, high = line["intervals"]["teacher"]["acc_10"]
        assert low <= line["teacher"]["acc_10"] <= high
    best = lines[-1]["early_stopping"]
    if best["best"] is None:
        assert all(line["teacher"]["auc_20"] <= line["student"]["auc_20"] for line in lines)
        return
    kept = json.loads((tuned / "checkpoints" / "best.json").read_text())
    assert kept == {"step": best["best_step"], "metric": "auc_20", "value": best["best"]}
    exported = load_file(tuned / "exports" / "teacher_best.safetensors")
    checkpoint = weights(tuned, best["best_step"])
    assert all(tensor.equal(checkpoint[f"method.teacher.{name}"]) for name, tensor in exported.items())


def test_health_and_pictures_are_there(tuned):
    for line in metrics(tuned)[:-1]:  # every third step has a line; the last one comes early
        assert 0 < line["health/teacher_entropy"] <= 4.2
        assert 1 <= line["health/effective_rank"] <= 16
        assert 0 <= line["health/agreement"] <= 1
    for step in (4, 8, 12, 16):
        assert (tuned / "previews" / f"tokens_{step:08d}.png").stat().st_size > 1000


def test_a_run_that_is_told_to_leave_while_it_tunes_tunes_again_when_it_goes_on(recipe, data, tuning, tuned, tmp_path):
    run = tmp_path / "run"
    settings = [*tuning, "tune.bootstrap=100"]
    for killed_by in (signal.SIGUSR2, signal.SIGKILL):
        before = newest_checkpoint(run)
        process = subprocess.Popen(
            command(recipe, data, run, *settings), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        wait_until(lambda before=before: newest_checkpoint(run) > before)
        process.send_signal(killed_by)
        said = process.communicate(timeout=120)[0].decode()
        assert process.returncode in (75, -signal.SIGKILL), said
    assert train(recipe, data, run, *settings).returncode == 0
    assert_same_run(run, tuned, STEPS)
    assert tunings(run) == tunings(tuned)


def test_two_ranks_agree_to_stop_early_and_the_run_is_over(recipe, data, tuning, tmp_path):
    run = tmp_path / "run"
    settings = [*tuning, "tune.early_stopping.enable=true", "tune.early_stopping.patience=1", "optim.base_lr=0.0001"]
    settings += ["tune.early_stopping.min_pct=0.2", "optim.min_lr=0.0", "teacher.momentum_teacher=1.0"]
    fewer = ["train.batch_size_per_gpu=4"]  # of each of two
    ranks = RankProcesses(recipe, data, run, 2, *settings, *fewer)
    assert ranks.wait() == [0, 0], ranks.said()
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["verdict"], ended["stopped_early"]) == ("done", True)
    assert ended["step"] < STEPS
    assert "stopped early, after 1 tunings without a better teacher" in ended["reason"]
    assert (run / "exports" / f"teacher_{ended['step']:08d}.safetensors").exists()

    again = RankProcesses(recipe, data, run, 2, *settings, *fewer)
    assert again.wait() == [0, 0], again.said()
    assert "nothing to do" in again.said()
    longer = RankProcesses(recipe, data, run, 2, *settings, *fewer, "tune.early_stopping.enable=false")
    assert longer.wait() == [0, 0], longer.said()
    assert json.loads((run / "exit.json").read_text())["step"] == STEPS

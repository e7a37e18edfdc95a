"""A run on several ranks: killed, told to leave, stalled, and continued on another number of them."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathfm.checkpoint.manifest import damages, read_manifest
from tests.jobs.journeys import (
    TINY,
    RankProcesses,
    assert_same_run,
    make_tiles,
    metrics,
    newest_checkpoint,
    segments,
    train,
    wait_until,
)

STEPS = 16
SHARDED = ("parallel.strategy=fsdp", "train.precision=bf16", "train.global_batch_size=8", "student.attention=sdpa_fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory, request) -> Iterator[Path]:
    """For all runs of these tests, which take gigabytes: they go with the last test, unless one failed."""
    folder = tmp_path_factory.mktemp("many_ranks")
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
    """Two ranks that share the weights, in bf16, left alone."""
    ranks = RankProcesses(recipe, data, place / "undisturbed", 2, *SHARDED)
    assert ranks.wait() == [0, 0], ranks.said()
    return place / "undisturbed"


def assert_every_checkpoint_is_whole(run: Path) -> None:
    for path in (run / "checkpoints").glob("step_????????"):
        assert list(damages(path, read_manifest(path))) == []


def kill_until_finished(recipe: Path, data: Path, run: Path, seed: int, kills: int) -> None:
    """SIGKILL one rank or both, at random moments and while a checkpoint is being written; then let it finish."""
    draw = random.Random(seed)
    for number in range(kills):
        ranks = RankProcesses(recipe, data, run, 2, *SHARDED, "train.num_workers=1")
        wait_until(lambda n=number: segments(run) > n)
        if number % 2:  # inside a save: of the step-0 rehearsal or any later one
            known = newest_checkpoint(run)
            wait_until(lambda k=known: list((run / "checkpoints").glob(".*.partial")) or newest_checkpoint(run) > k)
        else:
            time.sleep(draw.uniform(0, 3))
        victims = draw.choice(([0], [1], [0, 1]))
        for victim in victims:
            ranks.processes[victim].kill()
        statuses = ranks.wait()
        assert all(statuses[victim] in (-signal.SIGKILL, 0) for victim in victims), ranks.said()
        assert all(statuses[other] in (1, 0) for other in {0, 1} - set(victims)), ranks.said()
        assert_every_checkpoint_is_whole(run)
    ranks = RankProcesses(recipe, data, run, 2, *SHARDED)
    assert ranks.wait() == [0, 0], ranks.said()


def test_five_kills_of_one_rank_or_both_change_nothing(recipe, data, undisturbed, place):
    kill_until_finished(recipe, data, place / "killed", seed=3, kills=5)
    assert_same_run(undisturbed, place / "killed", STEPS)


@pytest.mark.slow
def test_thirty_kills_of_one_rank_or_both_change_nothing(recipe, data, undisturbed, place):
    for seed in range(6):
        kill_until_finished(recipe, data, place / f"soak{seed}", seed=20 + seed, kills=5)
        assert_same_run(undisturbed, place / f"soak{seed}", STEPS)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_other_leaves_with_a_message_that_names_it(recipe, data, place, victim):
    run = place / f"lost_{victim}"
    ranks = RankProcesses(recipe, data, run, 2, *SHARDED, "optim.total_steps=2000")
    wait_until((run / "metrics.jsonl").exists)
    ranks.processes[victim].kill()
    assert ranks.wait(120)[1 - victim] == 1
    said = ranks.said().strip().splitlines()[-1]
    assert said.startswith("lost: ")
    assert f"rank {victim}" in said
    assert "start again to go on from the last checkpoint" in said


def test_a_signal_to_one_rank_makes_all_leave_at_the_same_step_and_the_run_goes_on_with_the_same_bits(
    recipe, data, undisturbed, place
):
    run = place / "told"
    ranks = RankProcesses(recipe, data, run, 2, *SHARDED, "train.num_workers=1")
    wait_until((run / "metrics.jsonl").exists)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):  # the second and third change nothing
        os.kill(ranks.processes[1].pid, number)
        time.sleep(0.02)
    assert ranks.wait() == [75, 75], ranks.said()
    ended = json.loads((run / "exit.json").read_text())
    assert ended["verdict"] == "interrupted"
    assert newest_checkpoint(run) == ended["step"] > 0
    again = RankProcesses(recipe, data, run, 2, *SHARDED)
    assert again.wait() == [0, 0], again.said()
    assert_same_run(undisturbed, run, STEPS)


STEADY = (  # no drop path, and features that differ clearly: rounding must not decide who is nearest to whom
    "student.drop_path_rate=0", "student.layerscale=1", "dino.koleo_group_size=12", "train.global_batch_size=12",
    "train.batch_size_per_gpu=12", "train.log_every_steps=1", "train.centering=sinkhorn_knopp", "optim.total_steps=20",
)  # fmt: skip


def test_a_run_goes_on_with_any_number_of_ranks_in_the_same_batches(recipe, data, place):
    """Four ranks, then three, one, two: interrupted each time; equal to one process that nobody interrupted."""
    alone, run = place / "alone", place / "elastic"
    assert train(recipe, data, alone, *STEADY).returncode == 0
    for number, begun in ((4, 0), (3, 1), (1, 2)):
        strategy = ("parallel.strategy=fsdp",) if number > 1 else ()
        steps_before = newest_checkpoint(run)
        ranks = RankProcesses(recipe, data, run, number, *STEADY, *strategy)
        wait_until(lambda n=begun: segments(run) > n)
        wait_until(lambda n=steps_before: (run / "metrics.jsonl").exists() and len(metrics(run)) > n)
        ranks.processes[-1].send_signal(signal.SIGTERM)
        assert ranks.wait() == [75] * number, ranks.said()
    ranks = RankProcesses(recipe, data, run, 2, *STEADY, "parallel.strategy=ddp", "train.micro_batch_size=3")
    assert ranks.wait() == [0, 0], ranks.said()
    ours, expected = metrics(run), metrics(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for line, oracle in zip(ours, expected, strict=True):
        for name in ("total_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss"):
            assert line[name] == pytest.approx(oracle[name], abs=1e-5), (line["step"], name)


def test_a_number_of_ranks_that_cannot_share_the_batch_of_a_run_is_refused(recipe, data, place):
    refused = RankProcesses(recipe, data, place / "seven", 3, "train.global_batch_size=8")
    assert refused.wait() == [2, 2, 2]
    assert "a global batch of 8 cannot be shared equally by 3 ranks" in refused.said()
    assert "take 1, 2, 4 or 8 ranks" in refused.said()


def test_a_rank_that_stands_still_is_named_with_the_stacks_and_the_run_goes_on(recipe, data, undisturbed, place):
    run = place / "stalled"
    ranks = RankProcesses(recipe, data, run, 2, *SHARDED, "train.stall_after_s=10", "train.lost_after_s=120")
    wait_until((run / "metrics.jsonl").exists)
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "no progress for" in ranks.said())
    finally:
        os.kill(ranks.processes[1].pid, signal.SIGCONT)
    assert ranks.wait() == [0, 0], ranks.said()
    (warning,) = [line for line in ranks.said().splitlines() if "no progress for" in line][:1]
    assert "rank 1" in warning
    assert "stacks" in warning
    stacks = (run / "stacks" / "rank_0.txt").read_text()
    assert "(most recent call first)" in stacks
    assert f"{Path('training', 'loop.py')}" in stacks  # wherever in a step it waits for the other
    assert_same_run(undisturbed, run, STEPS)

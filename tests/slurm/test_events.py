"""On a real Slurm, whatever ends a job, the run comes back by itself and ends with the losses of an undisturbed one.

A short selection; `make slurm-matrix` tries every event.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.events import EVENTS
from tests.slurm.trial import SETTINGS, TOTAL_STEPS, Trial, interrupted, undisturbed

SELECTION = ["USR2, --full", "preemption, REQUEUE, GraceTime 10", "one rank killed", "USR2, then scancel"]


@pytest.mark.parametrize("event", [event for event in EVENTS if event.name in SELECTION], ids=lambda event: event.name)
def test_a_run_survives(
    event: Any, cluster: Cluster, place: Path, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    trial = Trial(cluster, tmp_path, place / "data", "run")
    result = interrupted(trial, event.name, event.happen)
    assert result.state == event.state, trial.told()
    assert result.lost == 0 or event.may_lose, trial.told()
    if event.comes_back:
        assert len(result.starts) == 2, trial.told()
        assert trial.losses() == reference
        assert trial.checkpoint() == TOTAL_STEPS
    else:
        assert len(result.starts) == 1, trial.told()
        assert trial.checkpoint() > 0


def test_the_demo_is_preempted_once_and_ends_with_the_same_losses(
    cluster: Cluster, place: Path, tmp_path: Path
) -> None:
    every_step = ("train.log_every_steps=1", "optim.total_steps=8")
    no_gpu = "train.device=cpu"  # the cluster's GPUs are null devices
    recipe = ("demo", no_gpu, "train.batch_size_per_gpu=2", "train.num_workers=1", *every_step)
    trial = Trial(cluster, tmp_path, place / "data", "demo", recipe=recipe)
    result = interrupted(trial, "preempted", lambda trial: trial.someone_more_important(), at_step=3)
    assert (result.state, len(result.starts), result.lost) == ("COMPLETED", 2, 0), trial.told()
    assert trial.losses() == undisturbed(tmp_path / "reference", place / "data", *recipe)


def test_a_node_that_fails_its_examination_is_avoided_by_the_next_attempt(
    cluster: Cluster, place: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    prolog = tmp_path / "prolog.sh"  # whichever node comes first has a GPU that torch does not see
    prolog.write_text(
        f"#!/bin/sh\n[ -e {bad} ] || echo $SLURMD_NODENAME > {bad}\n"
        f'[ "$(cat {bad})" = $SLURMD_NODENAME ] && gpu=0\necho export CUDA_VISIBLE_DEVICES=$gpu\n'
    )
    prolog.chmod(0o755)
    settings = (*SETTINGS, "train.device=auto")
    recipe = (str(tmp_path / "tiny.yaml"), *settings)
    trial = Trial(
        cluster, tmp_path, place / "data", "ill", recipe, nodes=1, profile=f"srun: ['--task-prolog={prolog}']\n"
    )
    trial.submit()
    assert trial.until_ended() == "COMPLETED", trial.told()
    first, last = trial.outcomes()
    assert (first.decision, first.checkpoint, last.decision) == ("requeue", 0, "done")
    doctor = json.loads((trial.run_dir / "logs" / f"{trial.job}.0" / "doctor.json").read_text())
    assert doctor["failed_nodes"] == [bad.read_text().strip()]
    assert trial.record().nodes not in ("", *doctor["failed_nodes"])
    assert trial.checkpoint() == TOTAL_STEPS


def test_a_crash_loop_ends_with_the_first_traceback_of_the_rank_that_failed(
    cluster: Cluster, place: Path, tmp_path: Path
) -> None:
    trial = Trial(cluster, tmp_path, place / "data", "crashes")
    trial.submit()
    trial.until_step(1)
    trial.break_the_code("raise RuntimeError('a fault in the code')")
    trial.kill_rank(1)
    assert trial.until_ended() == "FAILED"
    *_, last = trial.outcomes()
    assert (last.decision, last.was_crash) == ("fail", True)
    assert len([outcome for outcome in trial.outcomes() if outcome.decision == "requeue"]) == 2
    assert "failed first" in trial.job_log()
    assert "RuntimeError: a fault in the code" in trial.job_log()
    assert "3 crashes in a row" in trial.job_log()

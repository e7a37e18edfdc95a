from typing import Any

import pytest

from pathfm.ssl.config import DinoConfig, TeacherConfig
from pathfm.training.config import EarlyStoppingConfig, GuardConfig, OptimConfig, TrainConfig, TuneConfig
from pathfm.training.early_stopping import TuningState
from pathfm.training.online import Online
from pathfm.training.plan import TrainingPlan, plan_training


def plan() -> TrainingPlan:
    """25 steps in epochs of 10."""
    train, optim = TrainConfig(batch_size_per_gpu=8), OptimConfig(total_steps=25)
    return plan_training(train, optim, TeacherConfig(), DinoConfig(), 1, 80)


def found(go_on: Any) -> dict[str, Any]:
    return {"teacher": {"auc_20": 0.8}, "student": {"auc_20": 0.7}, "seconds": 1.0}


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({}, [10, 20, 25]),
        ({"tune_every_pct": 0.5}, [5, 10, 15, 20, 25]),
        ({"tune_every_pct": 2.0}, [20, 25]),
        ({"tune_every_samples": 60}, [8, 16, 24, 25]),  # to the nearest step
        ({"tune_every_pct": 0.01}, list(range(1, 26))),
    ],
)
def test_tuning_is_due_every_so_often_and_at_the_end(settings: dict[str, Any], due: list[int]):
    online = Online(TuneConfig(**settings), plan(), found)
    assert [step for step in range(26) if online.is_due(step, TuningState())] == due


def test_a_step_is_tuned_once_and_one_that_was_left_out_is_still_due():
    online = Online(TuneConfig(), plan(), found)
    assert not online.is_due(20, TuningState(tuned_at=20))
    assert online.is_due(20, TuningState(tuned_at=10))
    assert not Online(TuneConfig(), plan(), None).is_due(20, TuningState())


def test_the_line_says_where_what_and_how_much_patience_is_left():
    settings = TuneConfig(
        query_dataset_path="KNN:root=a:split=query",
        test_dataset_path="KNN:root=a:split=test",
        early_stopping=EarlyStoppingConfig(enable=True, patience=3),
    )
    judgement, line = Online(settings, plan(), found).score(20, TuningState(), lambda: True)
    assert judgement.improved
    assert (line["step"], line["samples_seen"], line["epoch"], line["by"]) == (20, 160, 2.0, "run")
    assert line["teacher"] == {"auc_20": 0.8}
    standing = {"metric": "auc_20", "best": 0.8, "best_step": 20, "without_improvement": 0, "patience": 3}
    assert line["early_stopping"] == standing


def test_a_guard_wants_a_tuning_before_the_first_step():
    sets = {f"{split}_dataset_path": f"KNN:root=a:split={split}" for split in ("query", "test")}
    online = Online(TuneConfig(**sets, guard=GuardConfig(max_drop=0.1)), plan(), found)
    assert online.is_due(0, TuningState())
    assert not online.is_due(0, TuningState(at_start=0.5))
    assert not Online(TuneConfig(**sets), plan(), found).is_due(0, TuningState())

import pytest

from pathfm.training.config import EarlyStoppingConfig, GuardConfig
from pathfm.training.early_stopping import TuningState, judge

STEPS = 100


def after(pairs: list[tuple[float, float]], **settings: object) -> tuple[TuningState, list[str]]:
    """Tunings at steps 10, 20, ... with these numbers of teacher and student; what each was."""
    config = EarlyStoppingConfig(tracking="auc_20", **settings)
    state, said = TuningState(), []
    for number, (teacher, student) in enumerate(pairs, start=1):
        state, improved, stop, _ = judge(state, 10 * number, {"auc_20": teacher}, {"auc_20": student}, config, STEPS)
        said.append("stop" if stop else "better" if improved else "-")
    return state, said


def test_only_a_teacher_that_beats_its_student_and_the_best_before_is_better():
    state, said = after([(0.7, 0.8), (0.7, 0.7), (0.75, 0.7), (0.75, 0.6), (0.9, 0.95), (0.8, 0.7)])
    assert said == ["-", "-", "better", "-", "-", "better"]
    assert state == TuningState(60, "auc_20", 0.8, 60, 0)


def test_patience_counts_tunings_in_a_row_and_the_run_has_a_youth():
    pairs = [(0.9, 0.5), *[(0.8, 0.5)] * 6]
    assert after(pairs, enable=True, patience=2, min_pct=0.5)[1] == ["better", "-", "-", "-", "stop", "stop", "stop"]
    assert after(pairs, enable=True, patience=2, min_pct=0.0)[1][:3] == ["better", "-", "stop"]
    assert "stop" not in after(pairs, enable=False, patience=2, min_pct=0.0)[1]


def test_another_metric_begins_anew():
    config = EarlyStoppingConfig(tracking="acc_10")
    before = TuningState(40, "auc_20", 0.99, 30, 7)
    judgement = judge(before, 50, {"acc_10": 0.6}, {"acc_10": 0.5}, config, STEPS)
    assert judgement == (TuningState(50, "acc_10", 0.6, 50, 0), True, False, None)


def test_a_number_that_no_tuning_has_is_refused():
    with pytest.raises(ValueError, match=r"must be acc_K, balanced_acc_K or auc_K .* not 'loss'"):
        EarlyStoppingConfig(tracking="loss")


def guarded(values: list[float], action: str) -> list[tuple[float | None, bool]]:
    """Of tunings at steps 0, 10, 20, ...: how far the teacher fell too far, and whether the run ends."""
    config, guard = EarlyStoppingConfig(tracking="auc_20"), GuardConfig(max_drop=0.05, action=action)
    state, said = TuningState(), []
    for number, value in enumerate(values):
        judgement = judge(state, 10 * number, {"auc_20": value}, {"auc_20": 1.0}, config, STEPS, guard)
        state = judgement.state
        said.append((judgement.forgot and round(judgement.forgot, 3), judgement.stop))
    return said


def test_a_teacher_that_forgets_what_it_knew_at_step_0_is_noticed():
    values = [0.9, 0.86, 0.84, 0.95, 0.8]
    assert guarded(values, "alarm") == [(None, False), (None, False), (0.06, False), (None, False), (0.1, False)]
    assert guarded(values[:3], "stop") == [(None, False), (None, False), (0.06, True)]


def test_step_0_is_where_the_guard_compares_from_and_not_the_best():
    guard = GuardConfig(max_drop=0.05)
    state = judge(TuningState(), 0, {"auc_20": 0.9}, {"auc_20": 0.1}, EarlyStoppingConfig(), STEPS, guard).state
    assert (state.at_start, state.best, state.tuned_at) == (0.9, None, 0)

import pytest

from pathfm.training.config import EarlyStoppingConfig
from pathfm.training.early_stopping import TuningState, judge

STEPS = 100


def after(pairs: list[tuple[float, float]], **settings: object) -> tuple[TuningState, list[str]]:
    """Tunings at steps 10, 20, ... with these numbers of teacher and student; what each was."""
    config = EarlyStoppingConfig(tracking="auc_20", **settings)
    state, said = TuningState(), []
    for number, (teacher, student) in enumerate(pairs, start=1):
        state, improved, stop = judge(state, 10 * number, {"auc_20": teacher}, {"auc_20": student}, config, STEPS)
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
    assert judgement == (TuningState(50, "acc_10", 0.6, 50, 0), True, False)


def test_a_number_that_no_tuning_has_is_refused():
    with pytest.raises(ValueError, match=r"must be acc_K, balanced_acc_K or auc_K .* not 'loss'"):
        EarlyStoppingConfig(tracking="loss")

from pathlib import Path

from pathfm.track.wandb_mirror.followed import Picture
from pathfm.track.wandb_mirror.rows import flat, rows_of, tuning_values
from tests.track.runs_to_show import metrics_line

TUNING = {
    "step": 20,
    "samples_seen": 80,
    "epoch": 0.5,
    "by": "run",
    "seconds": 3.5,
    "teacher": {"acc_20": 0.8, "acc_20_5_per_class": 0.6},
    "student": {"acc_20": 0.7},
    "intervals": {"teacher": {"acc_20": [0.75, 0.85]}},
    "early_stopping": {"metric": "auc_20", "best": None, "best_step": 10, "without_improvement": 1, "patience": None},
}


def test_tunings_have_the_ancestors_names():
    assert tuning_values(TUNING) == {
        "step": 20,
        "samples_seen": 80,
        "epoch": 0.5,
        "tune/teacher.acc_20": 0.8,
        "tune/teacher.acc_20_5_per_class": 0.6,
        "tune/teacher.acc_20_low": 0.75,
        "tune/teacher.acc_20_high": 0.85,
        "tune/student.acc_20": 0.7,
        "tune/early_stopping.best_step": 10,
        "tune/early_stopping.without_improvement": 1,
        "tune/seconds": 3.5,
    }
    alone = {"step": 20, "teacher": {"acc_20": 0.8}, "by": "follow", "early_stopping": None}
    assert tuning_values(alone) == {"step": 20, "tune/teacher.acc_20": 0.8}


def test_what_is_of_one_step_is_one_row_and_rows_are_in_order():
    pictures = [Picture(Path("tokens_00000020.png"), "tokens", 20, "a"), Picture(Path("crops.png"), "crops", None, "b")]
    rows = list(rows_of([metrics_line(30), metrics_line(20)], [TUNING], pictures, at=25, samples_per_step=4))
    assert [(row.step, sorted(row.shown)) for row in rows] == [
        (20, ["left_out", "metrics", "picture", "tuning"]),
        (25, ["picture"]),
        (30, ["left_out", "metrics"]),
    ]
    assert rows[0].values["total_loss"] == 1 / 20
    assert rows[0].values["tune/teacher.acc_20"] == 0.8
    assert rows[1].values == {"step": 25, "samples_seen": 100}


def test_groups_become_prefixes_and_what_has_no_value_is_left_out():
    assert flat({"lr": 1.0, "koleo": None, "timing": {"mfu": None, "x": {"y": 2}}}) == {"lr": 1.0, "timing/x/y": 2}

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pathfm.track import pictures
from pathfm.track.pictures import RunCurves, draw_losses, draw_runs, draw_schedules, tuned_at

RECORDED = Path(__file__).parent / "recorded" / "demo_metrics.jsonl"


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # matplotlib's
            warnings.simplefilter("error", kind)
        yield


def tuning(step: int, *keys: str, **more: Any) -> dict[str, Any]:
    teacher = dict.fromkeys(keys, 0.5 + step / 1000)
    intervals = {"teacher": {key: [value - 0.1, value + 0.1] for key, value in teacher.items()}}
    return {"step": step, "samples_seen": 16 * step, "teacher": teacher, "intervals": intervals, **more}


def demo(name: str = "demo") -> RunCurves:
    lines = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    tunings = [tuning(step, "acc_10", "auc_10", "auc_20", "effective_rank") for step in (20, 40, 60)]
    return RunCurves(name, lines, tunings, "auc_20", 5.545, starts=[640.0], alarms={"data-bound": [960.0]})


def panels(monkeypatch: pytest.MonkeyPatch, *runs: RunCurves) -> list[str]:
    """The titles of the panels that would be drawn."""
    drawn: list[str] = []
    monkeypatch.setattr(pictures, "_draw_panels", lambda of_runs, *_: drawn.extend(panel.title for panel in of_runs))
    draw_runs(runs, Path("nowhere"), "title")
    return drawn


def has_colour(picture: Path, hexadecimal: str) -> bool:
    wanted = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(np.asarray(Image.open(picture).convert("RGB")).astype(int) - wanted).sum(-1) < 6).any())


def test_losses_are_drawn_also_with_gaps_and_with_nothing(tmp_path: Path):
    lines = [{"step": s, "samples_seen": 8 * s, "total_loss": None if s == 2 else 1 / s} for s in range(1, 5)]
    for name, what in {"gap": lines, "none": []}.items():
        draw_losses(what, tmp_path / f"{name}.png", name)
        assert Image.open(tmp_path / f"{name}.png").size[1] > 50


def test_one_panel_per_schedule(tmp_path: Path):
    draw_schedules({"lr": [0, 1, 0], "momentum": [1, 1, 1]}, [0, 1, 2], tmp_path / "a.png", "two")
    draw_schedules({"lr": [0, 1, 0]}, [0, 1, 2], tmp_path / "b.png", "one")
    assert Image.open(tmp_path / "a.png").size[0] > Image.open(tmp_path / "b.png").size[0]


def test_a_run_is_drawn_with_its_tunings_starts_and_alarms(tmp_path: Path):
    draw_runs([demo()], tmp_path / "all.png", "demo")
    draw_runs([replace(demo(), alarms={})], tmp_path / "well.png", "demo")
    assert Image.open(tmp_path / "all.png").size[0] > 1200
    assert has_colour(tmp_path / "all.png", pictures._ALARM)
    assert not has_colour(tmp_path / "well.png", pictures._ALARM)


def test_several_runs_share_the_panels_each_in_its_colour(tmp_path: Path):
    shorter = replace(demo("shorter"), lines=demo().lines[:10], tunings=())
    draw_runs([demo(), shorter], tmp_path / "two.png", "two")
    for colour in pictures._COLOURS[:2]:
        assert has_colour(tmp_path / "two.png", colour)
    draw_runs([replace(shorter, name=f"run_{i}") for i in range(8)], tmp_path / "many.png", "many")
    assert not has_colour(tmp_path / "many.png", pictures._COLOURS[0])  # too many to be told apart: dark to light


def test_a_run_of_one_line_is_drawn(tmp_path: Path):
    draw_runs([RunCurves("new", demo().lines[:1], demo().tunings[:1])], tmp_path / "one.png", "new")
    draw_runs([RunCurves("new", [{"step": 0, "samples_seen": 0, "total_loss": None}])], tmp_path / "none.png", "new")


def test_no_panel_is_empty(monkeypatch: pytest.MonkeyPatch):
    run = demo()
    whole = panels(monkeypatch, run)
    assert whole[:2] == ["total loss", "DINO loss, global crops"]
    assert "AUC, k = 20" in whole
    assert "accuracy, k = 20" not in whole  # which was not found
    assert {"entropy, nats", "gradient norm", "samples per second"} <= set(whole)
    assert panels(monkeypatch, replace(run, tunings=())) == [title for title in whole if "k = 20" not in title]
    old = [{key: value for key, value in line.items() if "health" not in key} for line in run.lines]
    assert "effective rank of the teacher" in whole
    assert "effective rank of the teacher" not in panels(monkeypatch, replace(run, lines=old))
    nothing = [{"step": 1, "samples_seen": 8, "timing": None, "health/agreement": None}]
    assert panels(monkeypatch, RunCurves("x", nothing)) == []


def test_runs_are_compared_at_the_tracked_k_or_else_the_largest_that_all_have():
    def run(*keys: str, tracked: str = "auc_20") -> RunCurves:
        return RunCurves("x", [], [tuning(10, *keys, "effective_rank")], tracked)

    assert tuned_at([run("auc_10", "auc_20", "auc_100")]) == "20"
    assert tuned_at([run("auc_10", "auc_100")]) == "100"
    assert tuned_at([run("auc_10", "auc_20", "auc_100"), run("auc_20", "auc_100", tracked="acc_100")]) == "100"
    assert tuned_at([run("auc_20", tracked="auc_20_5_per_class"), run("auc_20")]) == "20"
    assert tuned_at([run("acc_20", "acc_20_5_per_class", tracked="acc_20_5_per_class")]) == "20_5_per_class"
    assert tuned_at([run("auc_20", "acc_20_5_per_class", tracked="acc_7")]) == "20"
    assert tuned_at([run("auc_10"), run("auc_20")]) == ""
    assert tuned_at([run("auc_10"), RunCurves("never tuned", [])]) == "10"
    assert tuned_at([RunCurves("odd", [], [{"step": 1, "samples_seen": 1, "teacher": None}])]) == ""


def test_the_best_tuning_is_the_one_that_early_stopping_holds_for_it():
    falling = [tuning(step, "auc_20") for step in (60, 40, 20)]
    assert pictures._best(RunCurves("x", [], falling, "auc_20")) == 0
    held = [*falling[:2], {**falling[2], "early_stopping": {"metric": "auc_20", "best": 0.54, "best_step": 40}}]
    assert pictures._best(RunCurves("x", [], held, "auc_20")) == 1
    assert pictures._best(RunCurves("x", [], falling, "auc_7")) is None
    assert pictures._best(RunCurves("x", [])) is None


def test_a_long_run_is_averaged_in_groups_and_its_spikes_stay_in_the_shade():
    groups = pictures._grouped(range(10_000))
    assert len(groups) == pictures._MOST_POINTS
    assert [value for group in groups for value in group] == list(range(10_000))
    nan = float("nan")
    assert pictures._mean_of_finite([1.0, nan, 2.0]) == 1.5
    assert pictures._range_of_finite([1.0, nan, 90.0]) == (1.0, 90.0)
    assert pictures._mean_of_finite([nan]) != pictures._mean_of_finite([nan])
    assert pictures._grouped([]) == []


def test_odd_tunings_are_no_obstacle(tmp_path: Path):
    odd: list[dict[str, Any]] = [
        {"intervals": {"teacher": {"auc_20": [None, None]}}},
        {"intervals": {"teacher": {"auc_20": 7}}},
        {"intervals": None, "early_stopping": None},
        {"student": None, "teacher": {"auc_20": None, "auc_x": 1}},
        {"early_stopping": 7},
    ]
    tunings = [*demo().tunings, *({**tuning(80 + i, "auc_20"), **changes} for i, changes in enumerate(odd))]
    draw_runs([replace(demo(), lines=demo().lines[:1], tunings=tunings)], tmp_path / "odd.png", "odd")

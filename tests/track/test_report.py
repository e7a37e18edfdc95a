import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from pathfm.track import report as reports
from pathfm.track.alarms import Alarm
from pathfm.track.console import Console
from pathfm.track.json_lines import JsonLines
from pathfm.track.report import Judge, Report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return opened(tmp_path)


def opened(folder: Path) -> Report:
    lines = [JsonLines(folder / name) for name in ("metrics.jsonl", "results/tuning.jsonl", "alarms.jsonl")]
    return Report(lines[0], Console(10, 0, speak=False), None, *lines[1:])


def test_metrics_and_tunings_after_a_step_are_dropped_when_the_run_goes_back(report, tmp_path: Path):
    for step in (1, 2, 3):
        report.interval({"step": step, "total_loss": 1.0, "lr": 0.1, "timing": {"samples_per_second": 1.0}})
        report.tuning({"step": step, "teacher": {"acc_20": 0.5}})
    report.go_back(2)
    for name in ("metrics.jsonl", "results/tuning.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]


def test_an_alarm_is_written_and_of_each_kind_at_most_once_an_hour_also_over_starts(
    tmp_path: Path, monkeypatch, caplog
):
    begin = reports._now()
    for minutes, alarm in ((0, "collapse"), (1, "collapse"), (2, "diverging"), (59, "collapse"), (61, "collapse")):
        now = begin + timedelta(minutes=minutes)
        monkeypatch.setattr(reports, "_now", lambda now=now: now)
        opened(tmp_path).alarm(minutes, alarm, "look at it")
    lines = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(line["step"], line["alarm"]) for line in lines] == [(0, "collapse"), (2, "diverging"), (61, "collapse")]
    assert lines[0]["time"] == begin.isoformat(timespec="seconds")
    assert lines[0]["text"] == "look at it"
    assert caplog.text.count("look at it") == 3


def test_other_ranks_say_nothing(tmp_path: Path):
    report = Report(None, Console(10, 0, speak=False), None)
    report.interval({"step": 1})
    report.tuning({"step": 1})
    report.alarm(1, "collapse", "look at it")
    report.go_back(0)
    report.flush()
    report.finish()
    assert not list(tmp_path.iterdir())


def test_the_last_lines_are_judged_also_those_of_an_earlier_start(tmp_path: Path):
    def told(judge: Judge) -> Report:
        return Report(
            JsonLines(tmp_path / "m.jsonl"), Console(99, 0, False), None, None, JsonLines(tmp_path / "a.jsonl"), judge
        )

    def after_three(lines: Sequence[Mapping[str, object]]) -> list[Alarm]:
        return [Alarm("collapse", f"{len(lines)} lines")] if len(lines) >= 3 else []

    for step in (1, 2, 3):
        told(after_three).interval({"step": step, "total_loss": 1.0, "lr": 0.1, "timing": {"samples_per_second": 1.0}})
    (line,) = JsonLines(tmp_path / "a.jsonl").read()
    assert (line["step"], line["alarm"], line["text"]) == (3, "collapse", "3 lines")

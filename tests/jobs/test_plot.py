"""A run as a picture, from its files as they stand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pathfm.__main__ import main as pathfm
from pathfm.jobs.plot import curves_of
from pathfm.lifecycle.run import Run

RECORDED = Path(__file__).parents[1] / "track" / "recorded" / "demo_metrics.jsonl"  # 25 lines, 16 samples a step


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    begun = Run(Path("runs/demo"))
    begun.tuning.parent.mkdir(parents=True)
    shutil.copy(RECORDED, begun.metrics)
    begun.recipe.write_text("dino: {head_n_prototypes: 256}\ntune: {early_stopping: {tracking: acc_10}}\n")
    return begun


def test_a_run_becomes_a_picture_beside_its_others(run: Run, capsys: pytest.CaptureFixture[str]):
    assert pathfm(["plot", "demo"]) == 0
    assert capsys.readouterr().out == "drawn: runs/demo/previews/plot.png\n"
    assert Image.open(run.previews / "plot.png").format == "PNG"


def test_several_runs_become_one_picture_wherever_it_is_asked_for(run: Run, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run.directory, "runs/other")
    shutil.copytree(run.directory, "elsewhere/demo")
    (Path("runs/new")).mkdir()
    (Path("runs/new/exit.json")).write_text("{}")
    assert pathfm(["plot", "demo", "other", "elsewhere/demo", "new", "--output", "pictures/all.png"]) == 0
    assert "note: 1 of the 4 runs have no line of metrics yet" in capsys.readouterr().err
    assert Image.open("pictures/all.png").format == "PNG"
    assert pathfm(["plot", "demo", "other"]) == 0
    assert Path("plot.png").is_file()


def test_without_any_line_there_is_one_line_that_helps(run: Run, capsys: pytest.CaptureFixture[str]):
    for content in (None, b"", b'{"step": 4, "tot', b"[1]\n7\n", b'{"step": 5}\n'):
        run.metrics.unlink(missing_ok=True)
        if content is not None:
            run.metrics.write_bytes(content)
        assert pathfm(["plot", "demo"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: there is no line of metrics in runs/demo/metrics.jsonl yet")
        assert told.count("\n") == 1
    assert not run.previews.exists()


def test_a_run_may_be_going_on_while_it_is_drawn(run: Run):
    for file in (run.metrics, run.tuning, run.alarms):
        with file.open("a") as growing:
            growing.write('{"step": 104, "samples_seen": 16')
    assert len(curves_of(run, "demo").lines) == 25
    assert pathfm(["plot", "demo"]) == 0


def test_files_are_read_as_they_are_meant(run: Run):
    run.tuning.write_text(
        "".join(json.dumps({"step": s, "samples_seen": 16 * s, "teacher": {"acc_10": 0.5}}) + "\n" for s in (40, 20))
    )
    run.alarms.write_text(
        '{"step": 60, "time": "2026-11-26T12:00:00+00:00", "alarm": "data-bound", "text": "."}\n{"step": null}\n'
    )
    (run.directory / "provenance.json").write_text('[{"from_step": 0}, {"from_step": 40}, {"from_step": null}, 7]')
    with run.metrics.open("a") as metrics:
        metrics.write('{"step": 100, "something": "else"}\n')
    curves = curves_of(run, "demo")
    assert len(curves.lines) == 25
    assert [tuning["step"] for tuning in curves.tunings] == [20, 40]
    assert curves.tracked == "acc_10"
    assert curves.log_k == pytest.approx(5.545, abs=1e-3)
    assert curves.starts == [640]
    assert curves.alarms == {"data-bound": [960]}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0\x01", b"[1, 2]", b"7", b"{}", b"null", b"a: [b"])
def test_damaged_files_are_no_obstacle(run: Run, content: bytes):
    for file in (run.tuning, run.alarms, run.recipe, run.directory / "provenance.json"):
        file.write_bytes(content)
    curves = curves_of(run, "demo")
    assert (len(curves.lines), curves.tunings, curves.tracked, curves.log_k) == (25, [], "auc_20", None)
    assert (curves.starts, curves.alarms) == ([], {})


def test_a_login_node_needs_no_torch(run: Run):
    code = "import sys; from pathfm.__main__ import main; sys.exit(main(['plot', 'demo']) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0

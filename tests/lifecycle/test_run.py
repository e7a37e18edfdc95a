import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pathfm
from pathfm.errors import UserError
from pathfm.lifecycle.run import Run

HOLD = "import sys; from pathlib import Path; from pathfm.lifecycle.run import Run\n"
HOLD += "with Run(Path(sys.argv[1])).claimed(): print('held', flush=True); sys.stdin.read()"


def test_a_run_has_one_writer_at_a_time_and_names_the_other(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    written_by = rf"run a is being written by process {holder.pid} on "
    with pytest.raises(UserError, match=written_by), Run(tmp_path / "a").claimed():
        pass
    holder.kill()
    holder.wait()
    with Run(tmp_path / "a").claimed():  # a killed writer leaves no stale lock
        pass


def test_how_a_run_ended_is_kept(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run = Run(tmp_path)
    assert run.how_it_ended() is None
    assert not run.is_done(5)
    run.write_exit("done", 5)
    assert run.how_it_ended() == {"verdict": "done", "step": 5, "reason": "", "job": "17", "restart": 2}
    assert run.is_done(5)
    assert not run.is_done(6)


def test_beginning_anew_keeps_what_was_there(tmp_path: Path):
    run = Run(tmp_path)
    assert run.keep_aside() is None
    for number in (1, 2):
        run.metrics.write_text(str(number))
        assert run.keep_aside() == tmp_path / f"earlier_{number}"
    assert not run.metrics.exists()
    assert (tmp_path / "earlier_2" / "metrics.jsonl").read_text() == "2"


def test_beginning_anew_leaves_the_jobs_of_a_run_their_files(tmp_path: Path):
    run = Run(tmp_path)
    for name in ("code", "logs", "checkpoints"):
        (tmp_path / name).mkdir()
    for name in ("jobs.jsonl", "attempts.jsonl", ".submission.lock", "metrics.jsonl"):
        (tmp_path / name).touch()
    kept = run.keep_aside()
    assert kept is not None
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert run.keep_aside() is None


def test_provenance_grows_by_one_segment_each_start(tmp_path: Path):
    run = Run(tmp_path)
    run.add_provenance({"ranks": 1})
    run.add_provenance({"ranks": 2})
    segments = json.loads((tmp_path / "provenance.json").read_text())
    assert [segment["ranks"] for segment in segments] == [1, 2]
    assert segments[0]["versions"]["torch"]
    assert segments[0]["commit"]


@pytest.mark.parametrize(
    ("origin", "kind"),
    [
        ({"commit": "abc", "diff": "", "checkout": "/home/me/pathfm"}, "snapshot"),
        ({"commit": "abc", "diff": None}, "image"),
        (None, "installed"),
    ],
)
def test_provenance_says_whether_a_snapshot_ran_or_the_images_own_code(
    origin: dict[str, str | None] | None, kind: str, tmp_path: Path
):
    package = Path(pathfm.__file__).parent
    shutil.copytree(package, tmp_path / "code" / "pathfm", ignore=shutil.ignore_patterns("__pycache__"))
    if origin is not None:
        (tmp_path / "code" / "origin.json").write_text(json.dumps(origin))
    note = "from pathlib import Path; from pathfm.lifecycle.run import Run; Run(Path('run')).add_provenance({})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PATHFM_IMAGE": "/images/pathfm.sif"}
    subprocess.run([sys.executable, "-P", "-c", note], cwd=tmp_path, env=environment, check=True)
    (segment,) = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert (segment["code_is"], segment["image"]) == (kind, "/images/pathfm.sif")
    assert segment["commit"] == (origin or {}).get("commit")


def test_the_teacher_to_use_is_the_best_or_the_newest_and_safetensors_go_first(tmp_path: Path):
    run = Run(tmp_path)
    assert run.teacher_to_use() is None
    run.exports.mkdir()
    names = ("teacher_00000004.pth", "teacher_00000004.safetensors", "teacher_00000012.pth", "teacher_old.safetensors")
    for name in names:
        (run.exports / name).touch()
    assert run.teacher_to_use() == run.exports / "teacher_00000012.pth"
    (run.exports / "teacher_00000012.safetensors").touch()
    assert run.teacher_to_use() == run.exports / "teacher_00000012.safetensors"
    assert [path.name for path in run.exported_teachers()] == [
        "teacher_00000004.safetensors",
        "teacher_00000012.safetensors",
    ]
    (run.exports / "teacher_best.pth").touch()
    assert run.teacher_to_use() == run.exports / "teacher_best.pth"

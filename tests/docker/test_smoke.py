"""The smoke test of the image, in the environment of development."""

import json
import os
import subprocess
import sys
from pathlib import Path

import locks
import pytest
import smoke

ROOT = Path(__file__).parents[2]


def test_every_check_is_made_also_after_one_that_failed(capsys: pytest.CaptureFixture[str]):
    def broken() -> str:
        raise OSError("no such\nlibrary")

    def wrong() -> str:
        raise smoke.Failed("numbers differ")

    status = smoke.run({"first": broken, "second": wrong, "third": lambda: "fine"})
    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert [line.split()[0] for line in lines] == ["fail", "fail", "ok"]
    assert lines[0].endswith("first         OSError: no such library")
    assert lines[1].endswith("second        numbers differ")


def test_all_checks_that_are_well_give_status_0(capsys: pytest.CaptureFixture[str]):
    assert smoke.run({"first": lambda: "fine"}) == 0
    assert capsys.readouterr().out.startswith("ok ")


def test_without_root_home_or_a_working_folder_of_ones_own_one_can_decode_reduce_attend_and_train(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("HOME", None)
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "smoke.py", "--only", "decode", "all-reduce", "attention", "training"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 4
    assert "3 steps on the CPU, 2 loader workers, losses " in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_unknown_check_is_one_clear_line():
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "smoke.py", "--only", "gpu"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: no check 'gpu'; there are: packages, compiler, decode, all-reduce, attention, NCCL, training\n"
    )


def test_packages_that_are_not_as_locked_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = tmp_path / "image.json"
    facts.write_text(json.dumps(locks.facts("cpu", "abc")))
    monkeypatch.setattr(smoke, "version", locks.pins_of("cpu").__getitem__)
    assert f"torch {locks.pins_of('cpu')['torch']}; all " in smoke.packages(facts)
    monkeypatch.setattr(smoke, "version", lambda name: "0.1" if name == "numpy" else locks.pins_of("cpu")[name])
    with pytest.raises(smoke.Failed, match=r"^numpy 0\.1 in place of [\d.]+$"):
        smoke.packages(facts)


def test_an_image_of_other_lock_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = tmp_path / "image.json"
    facts.write_text(json.dumps({**locks.facts("cpu", "abc"), "lock": "1234"}))
    monkeypatch.setattr(smoke, "version", locks.pins_of("cpu").__getitem__)
    with pytest.raises(smoke.Failed, match="lock is 1234, not "):
        smoke.packages(facts)

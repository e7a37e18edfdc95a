import json
import os
from pathlib import Path

import pytest

from pathfm.files import directory_written_aside, remove_leftovers, sha256, write_json, write_text, written_aside


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "sub" / "a.txt"
    with written_aside(target) as aside:
        aside.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path: Path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with written_aside(target) as aside:
            aside.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_directory_appears_with_all_its_files_or_not_at_all(tmp_path: Path):
    def write(name: str, *, fail: bool) -> None:
        with directory_written_aside(tmp_path / name) as aside:
            (aside / "state").write_bytes(b"1")
            assert not (tmp_path / name).exists()
            if fail:
                raise RuntimeError("killed by the test")

    write("step", fail=False)
    assert (tmp_path / "step" / "state").read_bytes() == b"1"
    with pytest.raises(RuntimeError):
        write("other", fail=True)
    assert os.listdir(tmp_path) == ["step"]


def test_leftovers_of_a_killed_writer_are_found_and_removed(tmp_path: Path):
    (tmp_path / ".step_1.123.partial").mkdir()
    (tmp_path / ".step_1.123.partial" / "half").write_text("x")
    (tmp_path / ".a.txt.9.partial").write_text("x")
    (tmp_path / "step_2").mkdir()
    assert remove_leftovers(tmp_path) == 2
    assert os.listdir(tmp_path) == ["step_2"]
    assert remove_leftovers(tmp_path / "absent") == 0


def test_json_and_checksum(tmp_path: Path):
    write_json(tmp_path / "a.json", {"ü": "a name that is no UTF-8: \udcff"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="ascii")) == {"ü": "a name that is no UTF-8: \udcff"}
    write_text(tmp_path / "empty", "")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

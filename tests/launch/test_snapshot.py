"""A copy of the code has a name that follows from its content, and knows where it came from."""

import json
import subprocess
from pathlib import Path

import pytest

from pathfm.launch.snapshot import frozen_recipe, snapshot_of, write_recipe, write_snapshot
from pathfm.lifecycle.run import commit_and_diff


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name in ("pathfm/jobs/submit.py", "configs/tiny.yaml", "pathfm/__pycache__/x.pyc", "pathfm/.a.swp", "runs/big"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def _git(folder: Path, *words: str) -> str:
    me = ["-c", "user.name=me", "-c", "user.email=me@here"]
    return subprocess.run(["git", *me, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_package_and_its_recipes_are_copied_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    copy = write_snapshot(snapshot_of(checkout), tmp_path / "code")
    files = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    assert files == ["configs/tiny.yaml", "origin.json", "pathfm/jobs/submit.py"]
    assert (copy / "pathfm/jobs/submit.py").read_text() == "content of pathfm/jobs/submit.py"


def test_the_same_content_is_the_same_copy(checkout: Path, tmp_path: Path) -> None:
    first = write_snapshot(snapshot_of(checkout), tmp_path / "code")
    (checkout / "runs" / "big").write_text("no part of it")
    assert write_snapshot(snapshot_of(checkout), tmp_path / "code") == first
    (checkout / "configs" / "tiny.yaml").write_text("other")
    second = write_snapshot(snapshot_of(checkout), tmp_path / "code")
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, second.name])


def test_a_moved_file_is_other_code(checkout: Path) -> None:
    before = snapshot_of(checkout).name
    (checkout / "configs" / "tiny.yaml").rename(checkout / "configs" / "small.yaml")
    assert snapshot_of(checkout).name != before


def test_what_is_copied_is_what_was_named(checkout: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(checkout)
    (checkout / "configs" / "tiny.yaml").write_text("saved meanwhile by an editor")
    copy = write_snapshot(snapshot, tmp_path / "code")
    assert snapshot_of(copy).name == copy.name


def test_a_copy_knows_the_commit_and_the_changes_of_its_checkout(checkout: Path, tmp_path: Path) -> None:
    _git(checkout, "init", "-q")
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-q", "-m", "first")
    (checkout / "configs" / "tiny.yaml").write_text("changed")
    copy = write_snapshot(snapshot_of(checkout), tmp_path / "code")
    told = commit_and_diff(copy)
    assert told == commit_and_diff(checkout)
    assert told["commit"] == _git(checkout, "rev-parse", "HEAD")
    assert "+changed" in str(told["diff"])
    assert json.loads((copy / "origin.json").read_text())["checkout"] == str(checkout)
    assert write_snapshot(snapshot_of(copy), tmp_path / "again").name == copy.name
    assert commit_and_diff(tmp_path / "again" / copy.name) == told


def test_without_git_a_copy_says_that_it_knows_no_commit(checkout: Path, tmp_path: Path) -> None:
    copy = write_snapshot(snapshot_of(checkout), tmp_path / "code")
    assert commit_and_diff(copy) == {"commit": None, "diff": None}


def test_a_recipe_is_kept_under_a_name_that_follows_from_it(tmp_path: Path) -> None:
    path = write_recipe("method: dinov2\n", tmp_path)
    assert path == frozen_recipe("method: dinov2\n", tmp_path) == write_recipe("method: dinov2\n", tmp_path)
    assert path.read_text() == "method: dinov2\n"
    assert write_recipe("method: dinov3\n", tmp_path) != path

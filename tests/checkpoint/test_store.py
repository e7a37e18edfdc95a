"""Checkpoints are published whole, kept as long as the recipe says, and read back only when nothing is damaged."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.manifest import DamagedCheckpoint, describe, key_differences, read_manifest
from pathfm.checkpoint.reading import load_into, read_tensors
from pathfm.checkpoint.saver import Saver, Snapshot
from pathfm.checkpoint.store import Store


def snapshot(step: int, *, is_good: bool = True) -> Snapshot:
    tensors = {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step), "h": torch.ones(4, dtype=torch.bfloat16)}
    return Snapshot(step, tensors, {"skipped": step, "third": 1 / 3}, is_good)


def store(tmp_path: Path, **settings: int) -> Store:
    return Store(tmp_path / "checkpoints", CheckpointConfig(**settings))


def save(a_store: Store, *steps: int, is_good: bool = True) -> Path:
    """Published; the last one's path."""
    saver = Saver(a_store)
    for step in steps:
        saver.start(snapshot(step, is_good=is_good))
        saver.wait()
    assert [outcome.error for outcome in saver.outcomes()] == [None] * len(steps)
    return a_store.path_of(steps[-1])


def names(a_store: Store) -> list[str]:
    return [path.name for path in a_store.paths()]


def test_what_is_read_is_what_was_saved(tmp_path: Path):
    path = save(store(tmp_path), 7)
    assert all(torch.equal(read_tensors(path)[name], tensor) for name, tensor in snapshot(7).tensors.items())
    targets = {name: torch.zeros_like(tensor) for name, tensor in snapshot(7).tensors.items()}
    manifest = load_into(targets, path)
    assert (manifest.step, manifest.ranks, manifest.values) == (7, 1, {"skipped": 7, "third": 1 / 3})
    assert targets["h"].dtype == torch.bfloat16
    assert torch.equal(targets["w"], torch.full((3, 2), 7.0))


def test_training_may_change_the_state_while_it_is_written(tmp_path: Path):
    saver, state = Saver(store(tmp_path)), snapshot(1)
    saver.start(state)
    state.tensors["w"].zero_()
    assert saver.wait()
    assert torch.equal(read_tensors(saver.store.path_of(1))["w"], torch.ones(3, 2))


def flip_a_byte(path: Path):
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def change(file: Path, old: str, new: str):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DAMAGES = {
    "__0_0.distcp differs from its checksum": flip_a_byte,
    "__0_0.distcp has 20 bytes": lambda path: os.truncate(path / "__0_0.distcp", 20),
    "__0_0.distcp is missing": lambda path: (path / "__0_0.distcp").unlink(),
    ".metadata is missing": lambda path: (path / ".metadata").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is not readable": lambda path: (path / "manifest.json").write_text('{"format"'),
    "manifest.json is of another format": lambda path: (path / "manifest.json").write_text('{"format": 99}'),
    "manifest.json differs from its checksum": lambda path: change(path / "manifest.json", '"step": 2', '"step": 6'),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_reason_and_changes_nothing(tmp_path, reason):
    damaged = save(store(tmp_path), 2)
    DAMAGES[reason](damaged)
    targets = {name: torch.zeros_like(tensor) for name, tensor in snapshot(2).tensors.items()}
    with pytest.raises(DamagedCheckpoint, match=reason):
        load_into(targets, damaged)
    assert not any(tensor.any() for tensor in targets.values())


def test_a_checkpoint_of_other_keys_is_refused_by_name(tmp_path):
    path = save(store(tmp_path), 1)
    tensors = dict(snapshot(1).tensors)
    del tensors["w"]
    with pytest.raises(DamagedCheckpoint, match=r"2 keys differ: x is missing, w is not part of this run"):
        load_into({**tensors, "x": torch.zeros(1)}, path)


def test_checkpoints_that_were_gone_back_behind_make_room_for_their_steps(tmp_path):
    checkpoints = store(tmp_path)
    flip_a_byte(save(checkpoints, 1, 2))
    checkpoints.set_aside_after(1)
    assert names(checkpoints) == ["step_00000001"]
    assert torch.equal(read_tensors(save(checkpoints, 2))["n"], torch.tensor(2))


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses longer files in the middle of the write, like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failing_write_leaves_what_was_published_and_the_next_one_works(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    saver = Saver(checkpoints)
    with no_file_larger_than(10):
        saver.start(snapshot(2))
        saver.wait()
    (outcome,) = saver.outcomes()
    assert outcome.step == 2
    assert outcome.error
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_00000001"]
    saver.start(snapshot(3))
    saver.wait()
    assert [outcome.error for outcome in saver.outcomes()] == [None]
    assert names(checkpoints) == ["step_00000001", "step_00000003"]


def test_a_save_that_takes_too_long_is_not_waited_for_and_not_published(tmp_path, monkeypatch):
    checkpoints, disk = store(tmp_path), Event()
    publish = checkpoints.publish

    def publish_late(aside: Path, step: int) -> Path:
        disk.wait(60)
        return publish(aside, step)

    monkeypatch.setattr(checkpoints, "publish", publish_late)
    saver = Saver(checkpoints)
    saver.start(snapshot(1))
    assert not saver.wait(0.05)
    assert names(checkpoints) == []
    assert saver.outcomes() == []
    disk.set()
    assert saver.wait()
    assert names(checkpoints) == ["step_00000001"]


def test_retention_keeps_the_last_ones_every_kth_and_the_best(tmp_path):
    checkpoints = store(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 10):
        save(checkpoints, step)
        if step == 3:
            checkpoints.mark_best(3, {"metric": "acc_20", "value": 0.9})
    assert names(checkpoints) == [f"step_{step:08d}" for step in (3, 4, 8, 9)]
    assert checkpoints.why_it_stays(checkpoints.path_of(8)) == ["one of the last 2", "every 4 steps"]
    checkpoints.mark_best(9, {"metric": "acc_20", "value": 0.95})
    save(checkpoints, 10, 11)
    assert names(checkpoints) == [f"step_{step:08d}" for step in (4, 8, 9, 10, 11)]


def test_the_last_checkpoint_before_an_accident_stays(tmp_path):
    checkpoints = store(tmp_path, keep_last=2)
    save(checkpoints, 1, 2)
    save(checkpoints, 3, 4, 5, is_good=False)
    assert checkpoints.why_it_stays(checkpoints.path_of(2)) == ["what a run goes back to after an accident"]
    assert names(checkpoints) == [f"step_{step:08d}" for step in (2, 4, 5)]


def test_checkpoints_are_ordered_by_step_beyond_eight_digits(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 99_999_999, 100_000_000)
    assert checkpoints.newest_step() == 100_000_000


def test_the_manifest_lists_every_key_and_every_file(tmp_path):
    path = save(store(tmp_path), 3)
    manifest = read_manifest(path)
    assert manifest.tensors == {"w": ["float32", [3, 2]], "n": ["int64", []], "h": ["bfloat16", [4]]}
    assert set(manifest.files) == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert json.loads((path / "manifest.json").read_text())["files"][".metadata"]["bytes"] > 0


def test_key_differences_are_said_in_words():
    expected = describe({"a": torch.zeros(2), "b": torch.zeros(1)})
    found = describe({"b": torch.zeros(3), "c": torch.zeros(1)})
    assert list(key_differences(expected, found)) == [
        "a is missing",
        "c is not part of this run",
        "b is ['float32', [3]], this run has ['float32', [1]]",
    ]

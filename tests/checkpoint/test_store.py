import json
import os
import resource
from pathlib import Path

import pytest
import torch

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.store import DamagedCheckpoint, Snapshot, Store, key_differences, read_checkpoint


def snapshot(step: int) -> Snapshot:
    tensors = {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step), "h": torch.ones(4, dtype=torch.bfloat16)}
    return Snapshot(step, tensors, {"skipped": step, "third": 1 / 3})


def store(tmp_path: Path, **settings: int) -> Store:
    return Store(tmp_path / "checkpoints", CheckpointConfig(**settings))


def newest_step(a_store: Store) -> int | None:
    return next((found.step for found in a_store.whole()), None)


def test_what_is_read_is_what_was_saved(tmp_path: Path):
    read = read_checkpoint(store(tmp_path).save(snapshot(7)))
    assert read.step == 7
    assert read.values == {"skipped": 7, "third": 1 / 3}
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in snapshot(7).tensors.items())
    assert read.tensors["h"].dtype == torch.bfloat16


def flip_a_byte(path: Path):
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(bytes(data))


def cut_short(path: Path):
    os.truncate(path / "state.safetensors", 20)


DAMAGES = {
    "differs from its checksum": flip_a_byte,
    "has 20 bytes": cut_short,
    "state.safetensors is missing": lambda path: (path / "state.safetensors").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is not readable": lambda path: (path / "manifest.json").write_text('{"format"'),
    "another format": lambda path: (path / "manifest.json").write_text('{"format": 99}'),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, reason, caplog):
    checkpoints = store(tmp_path)
    checkpoints.save(snapshot(1))
    damaged = checkpoints.save(snapshot(2))
    DAMAGES[reason](damaged)
    with pytest.raises(DamagedCheckpoint, match=reason):
        read_checkpoint(damaged)
    assert newest_step(checkpoints) == 1
    assert "step_00000002 is passed over" in caplog.text
    assert reason in caplog.text


def test_a_damaged_checkpoint_makes_room_for_the_step_to_be_written_again(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.save(snapshot(1))
    flip_a_byte(checkpoints.save(snapshot(2)))
    checkpoints.set_aside_after(1)
    checkpoints.save(snapshot(2))
    assert newest_step(checkpoints) == 2


def test_a_failing_write_leaves_what_was_published(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.save(snapshot(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # the kernel refuses longer files, like a full disk
    try:
        with pytest.raises(OSError, match=r"large|full|File"):
            checkpoints.save(snapshot(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_step(checkpoints) == 1
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_00000001"]


def test_retention_keeps_the_last_ones_and_every_kth(tmp_path):
    checkpoints = store(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 10):
        checkpoints.save(snapshot(step))
    assert [path.name for path in checkpoints.paths()] == [f"step_{step:08d}" for step in (4, 8, 9)]


def test_checkpoints_are_ordered_by_step_beyond_eight_digits(tmp_path):
    checkpoints = store(tmp_path)
    for step in (99_999_999, 100_000_000):
        checkpoints.save(snapshot(step))
    assert newest_step(checkpoints) == 100_000_000


def test_the_manifest_lists_every_key_with_its_shape(tmp_path):
    manifest = json.loads((store(tmp_path).save(snapshot(3)) / "manifest.json").read_text())
    assert manifest["tensors"] == {"w": ["float32", [3, 2]], "n": ["int64", []], "h": ["bfloat16", [4]]}


def test_key_differences_are_said_in_words():
    expected = {"a": torch.zeros(2), "b": torch.zeros(1)}
    found = {"b": torch.zeros(3), "c": torch.zeros(1)}
    assert sorted(key_differences(expected, found)) == [
        "a is missing",
        "b is ['float32', [3]], this run has ['float32', [1]]",
        "c is not part of this run",
    ]

"""A checkpoint belongs to no number of ranks: saved by some, read by others; and it fails, or is refused, for all."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.manifest import DamagedCheckpoint
from pathfm.checkpoint.reading import load_into, read_tensors
from pathfm.checkpoint.saver import Saver, Snapshot
from pathfm.checkpoint.store import Store
from pathfm.dist.env import Ranks
from pathfm.parallel.apply import mesh_of
from pathfm.parallel.tensors import whole_from_all
from tests.several_ranks import DEVICES, on_ranks, ranks_for

ROWS = 10  # which no number of ranks here divides, but two


def whole_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weights": torch.randn(ROWS, 3, generator=generator),
        "token": torch.randn(1, 4, generator=generator),  # of which all ranks but one hold nothing
        "half": torch.randn(ROWS, generator=generator).bfloat16(),
        "centre": torch.randn(1, 5, generator=generator),  # on every rank
        "steps": torch.tensor(7.0),
    }


def spread(tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """As this rank holds them; a process that is alone holds all."""
    if not dist.is_initialized():
        return tensors
    world_size, place = dist.get_world_size(), torch.device(device)
    mesh = mesh_of(world_size, world_size, place)
    shared = ("weights", "token", "half")
    return {
        name: distribute_tensor(tensor.to(place), mesh, [Shard(0)]) if mesh and name in shared else tensor.to(place)
        for name, tensor in tensors.items()
    }


def this_rank() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


def saver_of(folder: Path) -> Saver:
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    return Saver(Store(folder, CheckpointConfig()), this_rank(), group)


def save(folder: Path, device: str) -> str | None:
    saver = saver_of(folder)
    saver.start(Snapshot(1, spread(whole_tensors(), device), {"skipped": 3}))
    assert saver.wait(60)
    (outcome,) = saver.outcomes()
    return outcome.error


def differing_after_reading(folder: Path, device: str) -> list[str]:
    """Which tensors are not what was saved."""
    targets = spread({name: torch.zeros_like(tensor) for name, tensor in whole_tensors().items()}, device)
    manifest = load_into(targets, folder / "step_00000001", this_rank())
    assert manifest.values == {"skipped": 3}
    expected = whole_tensors()
    return [name for name, tensor in targets.items() if not torch.equal(whole_from_all(tensor).cpu(), expected[name])]


@pytest.mark.parametrize("device", DEVICES)
def test_what_some_ranks_saved_other_numbers_of_ranks_read(tmp_path, device):
    four = ranks_for(device, 4)
    assert on_ranks(four, save, tmp_path / "by_many", device, device=device) == [None] * four
    assert save(tmp_path / "by_one", "cpu") is None
    for folder in (tmp_path / "by_many", tmp_path / "by_one"):
        assert differing_after_reading(folder, "cpu") == []
        for readers in {ranks_for(device, wanted) for wanted in (2, 3)}:
            found = on_ranks(readers, differing_after_reading, folder, device, device=device)
            assert found == [[]] * readers
    whole = read_tensors(tmp_path / "by_many" / "step_00000001")
    assert all(torch.equal(whole[name], tensor) for name, tensor in whole_tensors().items())
    assert not any(isinstance(tensor, DTensor) for tensor in whole.values())


def save_where_one_disk_is_full(folder: Path) -> list[str | None]:
    """Rank 1's, the first time."""
    saver, errors = saver_of(folder), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, limit in ((1, 10), (2, limits[0])):
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        saver.start(Snapshot(step, spread(whole_tensors(), "cpu"), {}))
        assert saver.wait(60)
        errors += [outcome.error for outcome in saver.outcomes()]
    return errors


def test_when_one_rank_cannot_write_nothing_is_published_and_all_know(tmp_path):
    first, second = on_ranks(2, save_where_one_disk_is_full, tmp_path / "checkpoints")
    assert first == second
    assert "rank 1" in first[0]
    assert first[1] is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def refusal(folder: Path) -> str:
    with pytest.raises(DamagedCheckpoint) as refused:
        load_into(spread(whole_tensors(), "cpu"), folder / "step_00000001", this_rank())
    return str(refused.value)


def test_what_one_rank_finds_damaged_all_refuse(tmp_path):
    assert on_ranks(2, save, tmp_path, "cpu") == [None, None]
    file = tmp_path / "step_00000001" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(bytes(content))
    assert on_ranks(2, refusal, tmp_path) == ["__1_0.distcp differs from its checksum"] * 2

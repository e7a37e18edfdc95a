import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pathfm.batch import Batch
from pathfm.data.datasets import Pathology
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.loader import Sample, load_batches
from pathfm.data.order import BatchPlan, SampleOrder
from pathfm.errors import UserError


def assemble(samples: list[Sample], step: int) -> Batch:
    """The images themselves, and the step where masks would be."""
    images = torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples])
    return Batch(
        global_crops=images,
        local_crops=images[:0],
        masks=torch.zeros(len(images), 1, dtype=torch.bool),
        mask_indices=torch.tensor([step]),
        mask_weights=torch.ones(1),
        positions=torch.tensor([sample.position for sample in samples]),
        samples=torch.tensor([sample.sample for sample in samples]),
    )


def assemble_and_die_at_step_3(samples: list[Sample], step: int) -> Batch:
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return assemble(samples, step)


def assemble_counting_threads(samples: list[Sample], step: int) -> Batch:
    return replace(assemble(samples, step), mask_indices=torch.tensor([cv2.getNumThreads()]))


def assemble_missing_a_file(samples: list[Sample], step: int) -> Batch:
    raise FileNotFoundError("a bug in assemble")


def assemble_with_a_bug(samples: list[Sample], step: int) -> Batch:
    raise ZeroDivisionError("a bug in assemble")


def batches(root: Path, plan=None, assemble=assemble, steps=(0, 9), **options) -> list[Batch]:
    dataset = Pathology(root)
    plan = plan or BatchPlan(4)
    start, stop = steps
    order = SampleOrder(len(dataset), 5)
    return list(load_batches(dataset, order, plan, assemble, numbers=range(start, stop), **options))


def tensors(batch: Batch) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor)]


@pytest.fixture
def damaged_root(tmp_path, write_tar, tile) -> Path:
    """23 tiles of which 4, 5 and 22 cannot be decoded."""
    contents = {f"{n:02}.png": tile(n)[:60] if n in (4, 5, 22) else tile(n) for n in range(23)}
    write_tar(tmp_path / "pretrain_dataset.tar", contents)
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    return tmp_path


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_stream_is_the_same_with_any_number_of_workers(damaged_root, num_workers):
    alone = batches(damaged_root)
    helped = batches(damaged_root, num_workers=num_workers)
    assert [tensors(batch) for batch in helped] == [tensors(batch) for batch in alone]
    assert [batch.skipped for batch in helped] == [batch.skipped for batch in alone]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_read_what_one_rank_reads(damaged_root, world_size):
    shares = [batches(damaged_root, BatchPlan(4, rank, world_size)) for rank in range(world_size)]
    for whole, *parts in zip(batches(damaged_root), *shares, strict=True):
        assert torch.equal(whole.global_crops, torch.cat([part.global_crops for part in parts]))
        assert torch.equal(whole.positions, torch.cat([part.positions for part in parts]))
        assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
        assert whole.skipped == sum((part.skipped for part in parts), ())


def test_resume_continues_with_the_very_next_batch(tiles_root):
    whole = batches(tiles_root)
    rest = batches(tiles_root, steps=(4, 9))
    assert [tensors(batch) for batch in rest] == [tensors(batch) for batch in whole[4:]]


def test_images_are_those_of_the_sample_order(tiles_root, tile):
    from pathfm.data.decode import decode

    (batch,) = batches(tiles_root, steps=(3, 4))
    assert batch.positions.tolist() == [12, 13, 14, 15]
    assert batch.samples.tolist() == SampleOrder(23, 5).samples(np.arange(12, 16)).tolist()
    for image, sample in zip(batch.global_crops, batch.samples.tolist(), strict=True):
        assert (image.permute(1, 2, 0).numpy() == decode(tile(sample))).all()


def test_an_undecodable_sample_is_replaced_by_the_next_row_and_reported_by_name(damaged_root):
    epoch = batches(damaged_root, BatchPlan(23), steps=(0, 1))[0]
    place = {sample: position for position, sample in enumerate(SampleOrder(23, 5).samples(np.arange(23)).tolist())}
    assert [epoch.samples[place[n]].item() for n in (4, 5, 22, 6)] == [6, 6, 0, 6]
    reported = {(skipped.position, skipped.sample, skipped.cohort, skipped.file) for skipped in epoch.skipped}
    assert reported == {
        (place[4], 4, "pretrain", "04.png"),
        (place[4], 5, "pretrain", "05.png"),
        (place[5], 5, "pretrain", "05.png"),
        (place[22], 22, "pretrain", "22.png"),
    }
    assert all(skipped.reason for skipped in epoch.skipped)


def test_however_many_are_damaged_the_neighbour_that_is_not_is_found(tmp_path, write_tar, tile):
    contents = {f"{n}.png": tile(n) if n == 49 else b"damaged" for n in range(50)}
    write_tar(tmp_path / "pretrain_dataset.tar", contents)
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    (epoch,) = batches(tmp_path, BatchPlan(50), steps=(0, 1), max_neighbours=50)
    assert epoch.samples.tolist() == [49] * 50
    assert len({skipped.position for skipped in epoch.skipped}) == 49


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_damaged_neighbours_end_in_one_line(damaged_root, num_workers):
    message = r"^\S*_dataset.tar: 2 samples in a row, from 4 on, cannot be decoded \(04.png, 05.png\);.+max_neighbours$"
    with pytest.raises(UserError, match=message):
        batches(damaged_root, max_neighbours=1, num_workers=num_workers)


def test_where_every_sample_is_damaged_no_more_neighbours_are_asked_for(tmp_path, write_tar):
    write_tar(tmp_path / "pretrain_dataset.tar", {f"{n}.png": b"damaged" for n in range(5)})
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    with pytest.raises(UserError, match=r": 5 samples in a row, .*Mend the tar; the cohort has no other samples$"):
        batches(tmp_path, BatchPlan(5))


def test_a_batch_larger_than_the_data_set_is_refused(tiles_root):
    with pytest.raises(UserError, match="a batch of 24 is larger than an epoch of 23"):
        batches(tiles_root, BatchPlan(24))


def test_a_worker_that_is_killed_is_explained_in_one_line(tiles_root):
    with pytest.raises(UserError, match=r"^a data-loading worker was killed[^\n]+train.num_workers[^\n]+$"):
        batches(tiles_root, assemble=assemble_and_die_at_step_3, num_workers=1)


def test_a_worker_that_died_before_its_batch_was_pinned_is_explained_too(tiles_root, monkeypatch):
    """What torch raises then, as memory can be pinned only where there is a GPU."""

    def dead(_):
        raise RuntimeError("Pin memory thread exited unexpectedly")
        yield

    monkeypatch.setattr(DataLoader, "__iter__", dead)
    with pytest.raises(UserError, match=r"^a data-loading worker was killed"):
        batches(tiles_root, num_workers=1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_that_vanished_is_named_and_no_worker_blamed(tiles_root, num_workers):
    dataset = Pathology(tiles_root)
    (tiles_root / "pretrain_dataset.tar").unlink()
    stream = load_batches(dataset, SampleOrder(23, 0), BatchPlan(4), assemble, numbers=[0], num_workers=num_workers)
    with pytest.raises(UserError, match=r"^cannot read .*pretrain_dataset.tar: No such file"):
        next(stream)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("assemble", "error"), [(assemble_with_a_bug, ZeroDivisionError), (assemble_missing_a_file, FileNotFoundError)]
)
def test_a_bug_stays_a_bug(tiles_root, num_workers, assemble, error):
    with pytest.raises(error, match="a bug in assemble"):
        batches(tiles_root, assemble=assemble, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_opencv_works_in_the_thread_that_asks(tiles_root, num_workers):
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        loaded = batches(tiles_root, assemble=assemble_counting_threads, num_workers=num_workers)
    finally:
        cv2.setNumThreads(before)
    assert {batch.mask_indices.item() for batch in loaded} == {1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(tiles_root, num_workers):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(tiles_root, num_workers=num_workers)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


FOR_EVER = """
import sys, time
from pathlib import Path
from pathfm.data.loader import load_batches
from pathfm.data.order import BatchPlan, SampleOrder
from pathfm.data.datasets import Pathology
from pathfm.batch import Batch

def assemble(samples, step):
    import os, torch
    Path(sys.argv[0]).with_name(f"worker_{os.getpid()}").touch()
    return Batch(*[torch.zeros(1)] * 7)

if __name__ == "__main__":
    dataset = Pathology(Path(sys.argv[1]))
    order, plan = SampleOrder(len(dataset), 0), BatchPlan(4)
    stream = load_batches(dataset, order, plan, assemble, numbers=range(10**6), num_workers=2)
    next(stream), next(stream)
    time.sleep(600)
"""


def test_no_worker_outlives_a_trainer_that_is_killed(tiles_root, tmp_path):
    (tmp_path / "trainer.py").write_text(FOR_EVER)
    trainer = subprocess.Popen([sys.executable, tmp_path / "trainer.py", tiles_root])
    workers = wait_for(
        lambda: [int(path.name[7:]) for path in tmp_path.glob("worker_*")], lambda found: len(found) == 2
    )
    trainer.kill()
    trainer.wait()
    assert not wait_for(lambda: [pid for pid in workers if is_running(pid)], lambda running: not running)


def wait_for(look, enough, seconds=60):
    """What `look` sees once it is enough, or at the end of the time."""
    until = time.monotonic() + seconds
    while not enough(seen := look()) and time.monotonic() < until:
        time.sleep(0.05)
    return seen


def is_running(pid: int) -> bool:
    """A process that nobody has waited for yet (a zombie) does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_loader_may_be_left_in_the_middle(tiles_root):
    dataset = Pathology(tiles_root)
    stream = load_batches(dataset, SampleOrder(23, 0), BatchPlan(4), assemble, numbers=range(10**6), num_workers=1)
    next(stream)
    stream.close()


@pytest.mark.parametrize("usable", [True, False], ids=["there is a shorter one", "there is none"])
def test_a_temporary_folder_whose_path_is_too_long_for_sockets(tiles_root: Path, tmp_path: Path, usable: bool):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    no_other = "import tempfile; tempfile.mkdtemp = lambda **_: (_ for _ in ()).throw(PermissionError())\n"
    code = "import sys; from pathlib import Path; from tests.data.test_loader import batches\n"
    code += ("" if usable else no_other) + "print(len(batches(Path(sys.argv[1]), num_workers=1)))"
    environment = {**os.environ, "TMPDIR": str(long), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, tiles_root], env=environment, capture_output=True, text=True)
    if usable:
        assert done.stdout == "9\n", done.stderr
    else:
        assert "is too long a path for the sockets of data-loading workers" in done.stderr

"""How long does a checkpoint stop training, and how long is it until it is safe on the disk?

    python benchmarks/checkpoint.py --work build/bench_checkpoint --gigabytes 1.5 [--ranks 2]

Three contestants take turns in one run: a raw write of as many bytes to the same disk (one file, then fsync of it and
its folder), a save that training waits for, and one in the background while training goes on: matrix products of a few
milliseconds, one after the other. Before every turn the files of the last one are removed and everything is flushed, so
that nobody pays for another's dirty pages. With several ranks each holds a share of every tensor; of the ranks the
slowest counts, and the raw write stays one file, by rank 0.

The aims: a stall of at most a tenth of a save that is waited for; durable within twice the raw write.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measuring import command, machine, spread, taking_turns
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.saver import Saver, Snapshot
from pathfm.checkpoint.store import Store
from pathfm.dist.env import Ranks

_PIECE_BYTES = 16 * 2**20  # of the raw write
_PRODUCT_SIDE = 640  # a product of two such matrices takes a core a few ms
_PRODUCTS_ALONE = 100
_STALL_AIM, _DURABLE_AIM = 0.1, 2.0
_BLOCK = (  # a block of ViT-B
    *((2304, 768), (768, 768), (3072, 768), (768, 3072)),  # qkv, projection, MLP
    *((2304,), (768,), (3072,), (768,)),  # their biases
    *((768,),) * 6,  # two norms, two layer scales
)


@dataclass(frozen=True)
class Save:
    """Seconds that training stood still, seconds until the checkpoint was durable, and what else went on meanwhile."""

    stall: float
    durable: float
    product: float = 0.0  # seconds that one takes when nothing is written
    slowdown: float = 1.0  # how many times as long it takes while the checkpoint is


class Trainer:
    """One rank, its share of a state of some size, and three ways to put it on the disk."""

    def __init__(self, work: Path, gigabytes: float, ranks: Ranks) -> None:
        self.work = work
        self.ranks = ranks
        group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        keep_all = CheckpointConfig(keep_last=10**9)  # `settle` removes them, when nobody is timed
        self.saver = Saver(Store(work / "checkpoints", keep_all), ranks, group)
        self.tensors = state_like_vit_b(gigabytes, ranks.world_size)
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())  # of all ranks
        self.step = 0
        self.in_background: list[Save] = []
        self._piece = torch.randint(256, (_PIECE_BYTES,), dtype=torch.uint8).numpy()
        self._matrix = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE)

    def settle(self) -> None:
        """All ranks together: remove what the last turn wrote, flush everything, start at the same time."""
        self._meet()
        if self.ranks.is_first:
            for path in self.work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
        self._meet()

    def write_raw(self) -> None:
        if not self.ranks.is_first:
            return
        file = os.open(self.work / "raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for written in range(0, self.bytes, _PIECE_BYTES):
            piece = memoryview(self._piece)[: self.bytes - written]
            assert os.write(file, piece) == len(piece)
        os.fsync(file)
        os.close(file)
        folder = os.open(self.work, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def save_and_wait(self) -> Save:
        started = time.perf_counter()
        stall = self._start()
        self.saver.wait()
        self._seconds_in_background()
        return Save(stall, time.perf_counter() - started)

    def save_in_background(self) -> None:
        """Kept in `in_background`: a turn also holds the products that nothing disturbs, to compare with."""
        alone = statistics.mean(self._product_s() for _ in range(_PRODUCTS_ALONE))
        self._meet()
        stall = self._start()
        meanwhile = [self._product_s()]
        while not self.saver.wait(within_s=0):
            meanwhile.append(self._product_s())
        durable = stall + self._seconds_in_background()
        self.in_background.append(Save(stall, durable, alone, statistics.mean(meanwhile) / alone))

    def _start(self) -> float:
        self.step += 1
        return self.saver.start(Snapshot(self.step, self.tensors, {}))

    def _seconds_in_background(self) -> float:
        (outcome,) = self.saver.outcomes()
        assert outcome.error is None, outcome.error
        return outcome.seconds

    def _product_s(self) -> float:
        started = time.perf_counter()
        self._matrix @ self._matrix
        return time.perf_counter() - started

    def _meet(self) -> None:
        if self.ranks.world_size > 1:
            dist.barrier()


def state_like_vit_b(gigabytes: float, world_size: int) -> dict[str, Tensor]:
    """Blocks of ViT-B until they are as large, and a step counter for every parameter, as Adam keeps them."""
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    num_blocks = max(1, round(gigabytes * 1e9 / (4 * sum(map(_num_elements, _BLOCK)))))
    tensors: dict[str, Tensor] = {}
    for block in range(num_blocks):
        for number, shape in enumerate(_BLOCK):
            own = torch.randn(shape[0] // world_size, *shape[1:])
            tensors[f"{block}.{number}"] = own if mesh is None else DTensor.from_local(own, mesh, [Shard(0)])
            tensors[f"{block}.{number}.step"] = torch.tensor(1.0)
    return tensors


def _num_elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure; what is in it stays")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of all ranks together")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4, 8))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, {disk(arguments.work)}, {date.today()}\n\n```\n{command()}\n```\n", flush=True)
    with TemporaryDirectory(dir=arguments.work) as folder:
        common = (Path(folder), arguments.ranks, arguments.gigabytes, arguments.rounds)
        if arguments.ranks == 1:
            contest(0, *common)
        else:
            multiprocessing.spawn(one_of_several, common, nprocs=arguments.ranks)


def one_of_several(rank: int, folder: Path, world_size: int, gigabytes: float, rounds: int) -> None:
    meet = f"file://{folder.resolve()}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    contest(rank, folder, world_size, gigabytes, rounds)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads can trip over a peer that closes its connections at the same moment


def contest(rank: int, folder: Path, world_size: int, gigabytes: float, rounds: int) -> None:
    torch.set_num_threads(1)
    (work := folder / "files").mkdir(exist_ok=True)
    trainer = Trainer(work, gigabytes, Ranks(rank, world_size))
    trainer.settle()
    first = trainer.save_and_wait()  # takes the memory that the later ones use again
    contestants: Mapping[str, Callable[[], object]] = {
        "raw": trainer.write_raw,
        "waited for": trainer.save_and_wait,
        "in background": trainer.save_in_background,
    }
    seconds = taking_turns(contestants, rounds, before=trainer.settle)
    saves = trainer.in_background[-rounds:]  # without the one that warms up
    raw, waited = slowest(seconds["raw"]), slowest(seconds["waited for"])
    stalls, durables, products, slowdowns = map(slowest, zip(*map(astuple, saves), strict=True))
    cold_stall, cold_durable = slowest([first.stall, first.durable])
    if rank != 0:
        return
    print(
        f"| {trainer.bytes / 1e9:.2f} GB in {len(trainer.tensors):,} tensors, ranks: {world_size} "
        f"| training stands still, s | of a save that is waited for | durable after, s | of the raw write |\n"
        f"| --- | --- | --- | --- | --- |\n"
        f"| raw write and fsync | | | {spread(raw, '.2f')} | 1 |\n"
        f"| save, waited for | {spread(waited, '.2f')} | 1 | {spread(waited, '.2f')} | {ratio(waited, raw)} |\n"
        f"| save in the background | {spread(stalls, '.3f')} | {ratio(stalls, waited)} "
        f"| {spread(durables, '.2f')} | {ratio(durables, raw)} |\n"
        f"| first save of a process | {cold_stall:.3f} | | {cold_durable:.2f} | |\n\n"
        f"Medians of {rounds} rounds, with the least and the most; ratios are taken round by round.\n"
        f"Stall at most {_STALL_AIM:g} of a save that is waited for: {verdict(stalls, waited, _STALL_AIM)}. "
        f"Durable within {_DURABLE_AIM:g} times the raw write: {verdict(durables, raw, _DURABLE_AIM)}.\n"
        f"While it is written in the background, a matrix product of {1e3 * statistics.median(products):.1f} ms "
        f"takes {spread(slowdowns, '.2f')} times as long."
    )


def slowest(own: Sequence[float]) -> list[float]:
    """Of all ranks, number by number. All ranks call this together."""
    numbers = torch.tensor(own, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def ratios(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    return [number / other for number, other in zip(numbers, others, strict=True)]


def ratio(numbers: Sequence[float], others: Sequence[float]) -> str:
    return spread(ratios(numbers, others), ".3g")


def verdict(numbers: Sequence[float], others: Sequence[float], aim: float) -> str:
    return "met" if statistics.median(ratios(numbers, others)) <= aim else "NOT MET"


def disk(folder: Path) -> str:
    words = ["findmnt", "--noheadings", "--output", "SOURCE,FSTYPE,OPTIONS", "--target", str(folder)]
    return " ".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


if __name__ == "__main__":
    main()

"""What does it cost a step that all ranks agree whether to go on?

    python benchmarks/agreement.py [--ranks 2 4]

Ranks are gloo processes of this machine, a step is a sleep: so the processors are not what they wait for. Three kinds
of step take turns: without any agreement, with ours (said at one step, heard at the next), and with an all_reduce that
is waited for at once. The cost is the time inside the call, of the rank that spends the most there, and by how much the
steps of the slowest rank became longer. Nothing else keeps these ranks together, as gradients do in training: who waits
at once waits for the slowest sleeper too.

The aim: under 0.5 % of a step of 100 ms.
"""

import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measuring import command, machine, spread, taking_turns

from pathfm.dist.agreement import Agreement

_STEPS_S = (0.1, 0.005)
_NUMBERS = [0, 0, 0]  # as many as a trainer says: told to leave, a corrupt sample, save again
_OURS = "said now, heard at the next step (ours)"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-seconds", type=float, default=3.0, help="steps of one turn (default: 3 s of them)")
    arguments = parser.parse_args()
    print(f"{machine()}, {date.today()}\n\n```\n{command()}\n```\n")
    print("| ranks | sleep, ms | agreement | step, ms | inside the call, ms | of the sleep | step longer by, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for world_size in arguments.ranks:
        with TemporaryDirectory() as folder:
            common = (world_size, folder, arguments.rounds, arguments.turn_seconds)
            multiprocessing.spawn(one_rank, common, nprocs=world_size)
    print(f"\nMedians of {arguments.rounds} turns of {arguments.turn_seconds:g} s, with the least and the most.")


def one_rank(rank: int, world_size: int, folder: str, rounds: int, turn_s: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    agreement = Agreement(dist.new_group(backend="gloo"))
    at_once = partial(all_reduced, group=dist.new_group(backend="gloo"))
    for step_s in _STEPS_S:
        kinds = {
            "none": Steps(step_s, turn_s, lambda: None),
            _OURS: Steps(step_s, turn_s, lambda: agreement.exchange(_NUMBERS)),
            "all_reduce, waited for": Steps(step_s, turn_s, at_once),
        }
        turns = taking_turns({name: steps.run for name, steps in kinds.items()}, rounds, before=dist.barrier)
        step_ms = {name: most([1e3 * s / kinds[name].number for s in seconds]) for name, seconds in turns.items()}
        inside_ms = {name: most([1e3 * s for s in steps.inside_s[-rounds:]]) for name, steps in kinds.items()}
        if rank == 0:
            print_rows(world_size, step_s, inside_ms, step_ms)
    dist.barrier()
    os._exit(0)  # gloo's threads can trip over a peer that closes its connections at the same moment


class Steps:
    """A turn of equal steps, each with an agreement at its end."""

    def __init__(self, step_s: float, turn_s: float, agree: Callable[[], object]) -> None:
        self.step_s = step_s
        self.number = max(1, round(turn_s / step_s))
        self.agree = agree
        self.inside_s: list[float] = []  # per step, of every turn

    def run(self) -> None:
        inside = 0.0
        for _ in range(self.number):
            time.sleep(self.step_s)
            started = time.perf_counter()
            self.agree()
            inside += time.perf_counter() - started
        self.inside_s.append(inside / self.number)


def all_reduced(group: dist.ProcessGroup) -> list[int]:
    numbers = torch.tensor(_NUMBERS)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers.tolist()


def most(own: Sequence[float]) -> list[float]:
    """Of all ranks, number by number. All ranks call this together."""
    numbers = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def print_rows(
    world_size: int, step_s: float, inside_ms: dict[str, list[float]], step_ms: dict[str, list[float]]
) -> None:
    for name, inside in inside_ms.items():
        longer = [ms - without for ms, without in zip(step_ms[name], step_ms["none"], strict=True)]
        shares = [ms / (1e3 * step_s) for ms in inside]
        costs = [spread(inside, ".3f"), spread(shares, ".2%"), spread(longer, ".3f")] if name != "none" else [""] * 3
        print(f"| {world_size} | {1e3 * step_s:g} | {name} | {spread(step_ms[name], '.2f')} | {' | '.join(costs)} |")


if __name__ == "__main__":
    main()

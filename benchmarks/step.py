"""How fast is a training step, how near to what the machine can do, and where does its time go?

    python benchmarks/step.py vits14 train.batch_size_per_gpu=4 train.precision=fp32 --threads 1 --plain
    python benchmarks/step.py vitl14 parallel.compile=true                              # on a GPU

Real tiles, the real loader, the real step. Arithmetic is counted from the crops, the masked patches and the heads of
the batches that were timed, the teacher's included, what drop path leaves out not. The peak is the GPU's data sheet, or
on a CPU the rate of a large fp32 matrix product, measured before and after every repeat. `--plain` lets the step of
`plain.py` take turns with ours, in fp32; that both give the same losses and gradients is a test. Where the time goes
is found in steps of their own, in which the host waits for the device at every border.
"""

import os
import platform
import resource
import statistics
import time
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from loader import packed
from measuring import command, machine, spread
from plain import plain_step
from torch.optim import AdamW

from pathfm.batch import Batch
from pathfm.data.datasets import Dataset
from pathfm.dist.env import ALONE
from pathfm.dist.groups import demand_same_numbers, device_of
from pathfm.errors import exit_status
from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.attention_choice import with_attention
from pathfm.jobs.networks import fresh_state, method_of
from pathfm.jobs.training_data import TrainingData
from pathfm.jobs.training_set import order_of
from pathfm.lifecycle.host_memory import keep_freed_memory
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe, find_config, read_recipe
from pathfm.ssl.dinov2 import DINOv2
from pathfm.training import step as training_step
from pathfm.training.plan import TrainingPlan, plan_training
from pathfm.training.prefetch import made_ready
from pathfm.training.step import compute_dtype, train_step
from pathfm.training.throughput import Crops, flops_per_sample, peak_flops

PHASES = (
    "waiting for data", "copy, crops, normalisation", "teacher", "student forward", "heads and losses", "backward",
    "clipping", "optimiser", "moving average", "the rest, logging",
)  # fmt: skip
_GEMM_SIDE = 2048


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe's path, or its name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/osteosarcoma3/images"), help="JPEG tiles")
    parser.add_argument("--work", type=Path, default=Path("build/bench_loader"), help="where the packed tiles lie")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in each repeat")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=0, help="of this process; 0: as many as torch takes")
    parser.add_argument("--plain", action="store_true", help="the plain step in fp32 takes turns with ours")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = read_recipe(find_config(arguments.recipe, CONFIGS), arguments.overrides).recipe
    dataset = packed(arguments.data, arguments.work, copies=40)
    device = device_of(ALONE, recipe.train.device)
    demand_same_numbers(device, recipe.train.deterministic)
    bench = Bench(recipe, dataset, device)
    bench.steps(arguments.warm_up)
    plain = Plain(bench) if arguments.plain else None
    rounds = [bench.round(arguments.steps, plain) for _ in range(arguments.repeats)]
    print(table(bench, rounds, arguments.threads), end="\n\n")
    print(where_the_time_goes(bench.timed_by_phase(max(2, arguments.steps))))
    return 0


@dataclass
class Round:
    """One repeat: seconds of a step, samples of the batch, FLOPs of the batches seen, and the machine's own rate."""

    seconds: float
    flops: float  # of a step
    peak: float | None  # FLOP/s
    memory_gib: float
    plain_seconds: float | None = None


class Bench:
    """A run's state, its batches and a clock."""

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.device, self.plan = device, _plan(recipe, dataset)
        with TemporaryDirectory() as nowhere:
            recipe = with_attention(recipe, self.plan, Run(Path(nowhere)), ALONE, device)
        self.recipe = recipe
        self.method = method_of(recipe, self.plan.koleo_group_size)
        self.state = fresh_state(self.method, recipe, ALONE, device)
        self.method.train()
        self.data = TrainingData(recipe, self.plan, dataset, device)
        self.loaded = self._loaded()
        self.ready = made_ready(self.loaded, self._on_device, device)
        self.train = recipe.train.model_copy(update={"log_every_steps": 2**31})  # health is looked at before a report
        self.phases = Phases(device)

    def steps(self, number: int) -> list[list[Batch]]:
        """Train; returns the batches."""
        return [self.step() for _ in range(number)]

    def step(self) -> list[Batch]:
        """As training takes it: copies and crops come from beside the step before, unless phases are looked at."""
        if self.phases.is_on:
            loaded = next(self.loaded)
            self.phases.mark("waiting for data")
            parts = self._on_device(loaded)
        else:
            parts = next(self.ready)
        values = self.plan.schedules.at(self.state.step)
        train_step(self.state, parts, values, self.train, self.recipe.optim, ALONE)
        self.state.meter.clear()
        self.phases.mark("the rest, logging")
        return parts

    def _loaded(self) -> Iterator[list[Batch]]:
        batches = iter(self.data.batches(ALONE, 0))
        while True:
            yield [next(batches) for _ in range(self.plan.parts)]

    def _on_device(self, parts: list[Batch]) -> list[Batch]:
        return [self.data.cropped(part.to(self.device)) for part in parts]

    def round(self, number: int, plain: "Plain | None") -> Round:
        peak = self._peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds, batches = self._timed(lambda: self.steps(number))
        memory = self._most_memory_gib()
        plain_seconds = self._timed(lambda: plain.steps(batches))[0] / number if plain else None
        peaks = [rate for rate in (peak, self._peak()) if rate]
        flops = statistics.fmean(self.flops_of(parts) for parts in batches)
        return Round(seconds / number, flops, statistics.fmean(peaks) if peaks else None, memory, plain_seconds)

    def flops_of(self, parts: Sequence[Batch]) -> float:
        return sum(_flops_of(self.recipe, self.method, part) for part in parts)

    def timed_by_phase(self, number: int) -> dict[str, list[float]]:
        """Seconds of each step's phases."""
        found: dict[str, list[float]] = {phase: [] for phase in PHASES}
        with marked(self):
            for _ in range(number):
                self.phases.begin()
                self.step()
                for phase in PHASES:
                    found[phase].append(self.phases.seconds[phase])
        return found

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        _wait_for(self.device)
        start = time.perf_counter()
        result = run()
        _wait_for(self.device)
        return time.perf_counter() - start, result

    def _most_memory_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _peak(self) -> float | None:
        if self.device.type == "cuda":
            return peak_flops(self.device, compute_dtype(self.recipe.train))
        matrix = torch.rand(_GEMM_SIDE, _GEMM_SIDE)
        torch.mm(matrix, matrix)
        products = 3
        seconds, _ = self._timed(lambda: [torch.mm(matrix, matrix) for _ in range(products)])
        return products * 2 * _GEMM_SIDE**3 / seconds


class Plain:
    """The plain step on a copy of the bench's weights, in fp32."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.method = bench, deepcopy(bench.method)
        trained = [parameter for parameter in self.method.student.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(trained, foreach=False)

    def steps(self, batches: Sequence[Sequence[Batch]]) -> None:
        values, clip = self.bench.plan.schedules.at(0), self.bench.recipe.optim.clip_grad
        for parts in batches:
            for part in parts:
                plain_step(self.method, self.optimizer, part, values.teacher_temp, values.momentum, clip)


@dataclass
class Phases:
    """A step as a line of phases: what came since the last mark belongs to the one that is named."""

    device: torch.device
    is_on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    last: float = 0.0

    def begin(self) -> None:
        self.is_on = True
        self.seconds.clear()
        _wait_for(self.device)
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        if not self.is_on:
            return
        _wait_for(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


@contextmanager
def marked(bench: Bench) -> Iterator[None]:
    """The borders of the phases, marked from outside."""
    method, mark = bench.method, bench.phases.mark
    student, teacher = method.student, method.teacher

    def before(phase: str) -> Callable[..., None]:
        return lambda *_: mark(phase)

    def around(function: Callable[..., Any], ends: str, does: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            mark(ends)
            result = function(*arguments, **options)
            mark(does)
            return result

        return run

    with ExitStack() as stack:
        for module, ends, does in (
            (teacher, "copy, crops, normalisation", "teacher"),
            (student.backbone, "heads and losses", "student forward"),
        ):
            stack.callback(module.register_forward_pre_hook(before(ends)).remove)
            stack.callback(module.register_forward_hook(before(does)).remove)
        backward = around(torch.Tensor.backward, "heads and losses", "backward")
        stack.enter_context(patch.object(torch.Tensor, "backward", backward))
        clip = around(training_step._clip, "the rest, logging", "clipping")
        stack.enter_context(patch.object(training_step, "_clip", clip))
        optimizer = bench.state.optimizer
        stack.enter_context(patch.object(optimizer, "step", around(optimizer.step, "the rest, logging", "optimiser")))
        update = around(method.update_teacher, "the rest, logging", "moving average")
        stack.enter_context(patch.object(method, "update_teacher", update))
        yield
    bench.phases.is_on = False


def table(bench: Bench, rounds: Sequence[Round], threads: int) -> str:
    samples = bench.plan.global_batch_size
    ours = [r.seconds for r in rounds]
    lines = [
        f"{date.today()}, {_hardware(bench.device)}, {threads or torch.get_num_threads()} threads. `{command()}`",
        f"{samples} samples a step, {statistics.fmean(r.flops for r in rounds) / 1e12:.2f} TFLOP a step.",
        "",
        "| | median (range) |\n| --- | --- |",
        f"| a step, s | {spread(ours, '.3f')} |",
        f"| samples/s | {spread([samples / seconds for seconds in ours], ',.2f')} |",
    ]
    rates = [r.flops / r.seconds / r.peak for r in rounds if r.peak]
    if rates:
        of = "the data sheet's peak (MFU)" if bench.device.type == "cuda" else "the rate of fp32 matrix products"
        lines.append(f"| share of {of} | {spread(rates, '.1%')} |")
    if bench.device.type != "cuda":
        lines.append(f"| matrix products, GFLOP/s | {spread([(r.peak or 0) / 1e9 for r in rounds], ',.0f')} |")
    memory = [r.memory_gib for r in rounds]
    what = "most memory" if bench.device.type == "cuda" else "most memory of the process, all contestants"
    lines.append(f"| {what}, GiB | {spread(memory, '.2f')} |")
    plain = [r.plain_seconds for r in rounds if r.plain_seconds]
    if plain:
        shares = [r.flops / r.plain_seconds / r.peak for r in rounds if r.plain_seconds and r.peak]
        lines += [
            f"| the plain step in fp32, s | {spread(plain, '.3f')} |",
            f"| its share of the same | {spread(shares, '.1%')} |",
            f"| plain / ours | {spread([p / o for p, o in zip(plain, ours, strict=True)], '.2f')} |",
        ]
    return "\n".join(lines)


def where_the_time_goes(phases: dict[str, list[float]]) -> str:
    whole = sum(statistics.median(seconds) for seconds in phases.values())
    lines = [
        f"| {phase} | {spread([1e3 * s for s in seconds], ',.1f')} | {statistics.median(seconds) / whole:.1%} |"
        for phase, seconds in phases.items()
    ]
    return "\n".join(["| where the time goes | ms | of a step |\n| --- | --- | --- |", *lines])


def _plan(recipe: Recipe, dataset: Dataset) -> TrainingPlan:
    epoch = order_of(recipe.train, dataset).epoch_size
    return plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, 1, epoch)


def _flops_of(recipe: Recipe, method: DINOv2, batch: Batch) -> float:
    """Of a batch as it is: its crops, and the patches that were masked in it."""
    asked = len(batch.mask_indices) / batch.num_samples

    def tokens(crops: torch.Tensor) -> int:
        return recipe.student.tokens_of(crops.shape[-1])

    of_teacher = Crops((tokens(batch.global_crops),) * batch.num_global_crops, asked)
    local = (tokens(batch.local_crops),) * batch.num_local_crops
    return batch.num_samples * flops_per_sample(method.student, Crops(of_teacher.tokens + local, asked), of_teacher)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, torch {torch.__version__}, {os.cpu_count()} cores"
    return f"{machine()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

"""Which attention a run computes with: the fastest that works on its device, measured once and kept in the run.

A choice that flipped between two starts would change the run's numbers in their last bits. So what was measured is
written into the run's directory, and later starts on the same kind of device take it from there.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pathfm.dist.collect import decided_by_first, gather_lists
from pathfm.dist.env import Ranks
from pathfm.errors import UserError
from pathfm.files import write_json
from pathfm.lifecycle.run import Run, processor, version_of
from pathfm.log import get_logger
from pathfm.models.attention import Backend, Layout, attend, candidates, check_backend, what_stops
from pathfm.models.build import SIZES, drop_path_rates
from pathfm.models.drop_path import share_computed
from pathfm.recipe import Recipe
from pathfm.training.plan import TrainingPlan
from pathfm.training.step import compute_dtype

_log = get_logger(__name__)
_ROUNDS = 5
_CALLS_IN_A_ROW = {"cpu": 1, "cuda": 10}  # so that a GPU is not waiting for its next order
# Times on a CPU go with the number of crops: some tell as much as all, in a second.
_TOKENS_TIMES_HEADS_ON_CPU = 6_000
_AS_GOOD_AS_FASTEST = 1.05  # so that noise seldom decides between two


@dataclass(frozen=True)
class Work:
    """What the attention of a block is given."""

    layout: Layout
    num_heads: int
    head_width: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Place:
    """Where a measurement holds; as soon as one of these is another, it is made anew."""

    device: str
    torch: str | None
    xformers: str | None
    dtype: str
    deterministic: bool


Timer = Callable[[Sequence[Backend], Work], dict[Backend, float]]


def with_attention(
    recipe: Recipe, plan: TrainingPlan, run: Run, ranks: Ranks, device: torch.device, timed: Timer | None = None
) -> Recipe:
    """The recipe with the backend for both networks in place of `auto`. All ranks call this together.

    Rank 0 measures, with `timed`, what works on every rank. A backend that the recipe names is taken as it is; raises
    `UserError` when it does not work here. On a CPU nothing is measured unless `timed` is given: fp32 was several times
    as fast wherever it was measured, and cores that are shared measure badly.
    """
    named, dtype = recipe.student.attention, compute_dtype(recipe.train)
    if named != "auto":
        check_backend(named, device, dtype)
        return recipe
    working = [backend for backend in candidates(device, dtype) if what_stops(backend, device, dtype) is None]
    on_all_ranks = _in_all(working, gather_lists([working]))
    if len(candidates(device, dtype)) == 1 or (device.type == "cpu" and timed is None):
        return _with(recipe, on_all_ranks[0])
    work = work_of(recipe, plan.global_batch_size // ranks.world_size // plan.parts, device)
    place = _place(work)
    return _with(recipe, decided_by_first(lambda: _choose(run.attention, place, on_all_ranks, work, timed or time_all)))


def work_of(recipe: Recipe, num_samples: int, device: torch.device) -> Work:
    """Of the student's blocks on average, for so many samples at once: those that drop path leaves."""
    student, crops = recipe.student, recipe.crops
    size = SIZES[student.arch]
    rate = statistics.mean(drop_path_rates(student, size.depth))

    def group(number: int, side: int) -> tuple[int, int]:
        return max(1, int(number * num_samples * share_computed(rate))), student.tokens_of(side)

    groups = [group(2, crops.global_crops_size)]
    if crops.local_crops_number:
        groups.append(group(crops.local_crops_number, crops.local_crops_size))
    return Work(tuple(groups), size.num_heads, size.width // size.num_heads, compute_dtype(recipe.train), device)


def time_all(backends: Sequence[Backend], work: Work) -> dict[Backend, float]:
    """Milliseconds of a forward and backward pass by each: the median of some rounds, in which they take turns."""
    if work.device.type == "cpu":
        work = _smaller(work)
    seconds = _in_turns({backend: passes(backend, work) for backend in backends})
    if work.device.type == "cuda":
        torch.cuda.empty_cache()  # training begins on an empty GPU
    return {backend: 1e3 * statistics.median(taken[1:]) for backend, taken in seconds.items()}  # the first warms up


def _in_turns(runs: Mapping[Backend, Callable[[], int]]) -> dict[Backend, list[float]]:
    """Seconds of a pass, in every round."""
    seconds: dict[Backend, list[float]] = {backend: [] for backend in runs}
    for _ in range(1 + _ROUNDS):
        for backend, run in runs.items():
            begun = time.perf_counter()
            calls = run()
            seconds[backend].append((time.perf_counter() - begun) / calls)
    return seconds


def passes(backend: Backend, work: Work) -> Callable[[], int]:
    """Goes forward and backward, several times on a GPU, until all is done; returns how often. Draws no random numbers.

    Query, key and value lie as the linear layer before them leaves them.
    """
    tokens = sum(crops * length for crops, length in work.layout)
    shape = (tokens, 3, work.num_heads, work.head_width)
    own = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=own).to(work.device, work.dtype).requires_grad_()
    gradient = torch.randn((tokens, *shape[2:]), generator=own).to(work.device, work.dtype)
    calls = _CALLS_IN_A_ROW.get(work.device.type, 1)

    def run() -> int:
        for _ in range(calls):
            inputs.grad = None
            query, key, value = inputs.unbind(1)
            attend(query, key, value, work.layout, backend).backward(gradient)
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        return calls

    return run


def fastest(ms: Mapping[Backend, float]) -> Backend:
    """The first of those that are as good as equal to the fastest."""
    limit = _AS_GOOD_AS_FASTEST * min(ms.values())
    return next(backend for backend, taken in ms.items() if taken <= limit)


def as_text(ms: Mapping[Backend, float]) -> str:
    """`varlen 1.02 ms, xformers 1.10 ms`, the fastest first."""
    return ", ".join(f"{backend} {ms[backend]:.3g} ms" for backend in sorted(ms, key=lambda backend: ms[backend]))


def name_of(device: torch.device) -> str:
    """Of a GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def _choose(path: Path, place: Place, working: Sequence[Backend], work: Work, timed: Timer) -> Backend:
    records = _read(path)
    for record in reversed(records):
        if record["place"] == asdict(place) and record["choice"] in working:
            _log.info("attention by %s on %s, as measured at an earlier start", record["choice"], place.device)
            return record["choice"]
    ms = timed(working, work)
    choice = fastest(ms)
    record = {"place": asdict(place), "layout": work.layout, "heads": work.num_heads, "head_width": work.head_width}
    write_json(path, [*records, {**record, "forward_and_backward_ms": ms, "choice": choice}])
    _log.info("attention by %s on %s; a block's forward and backward: %s", choice, place.device, as_text(ms))
    return choice


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to measure anew") from error


def _in_all(order: Sequence[Backend], of_ranks: Sequence[Sequence[Backend]]) -> list[Backend]:
    return [backend for backend in order if all(backend in working for working in of_ranks)]


def _with(recipe: Recipe, backend: Backend) -> Recipe:
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"attention": backend})})


def _place(work: Work) -> Place:
    return Place(
        device=name_of(work.device),
        torch=version_of("torch"),
        xformers=version_of("xformers"),
        dtype=str(work.dtype).removeprefix("torch."),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _smaller(work: Work) -> Work:
    """With fewer crops of the same lengths."""
    size = work.num_heads * sum(crops * tokens for crops, tokens in work.layout)
    share = min(1.0, _TOKENS_TIMES_HEADS_ON_CPU / size)
    layout = tuple((max(1, round(crops * share)), tokens) for crops, tokens in work.layout)
    return Work(layout, work.num_heads, work.head_width, work.dtype, work.device)

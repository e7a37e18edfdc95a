"""What a step takes, forecast and measured, and what the shipped recipes are forecast to take.

    python benchmarks/memory.py measure              # on this machine: a GPU where there is one, else the CPU
    python benchmarks/memory.py forecast --gpus 8    # of every recipe for GPUs of 24, 40 and 80 GB

On a GPU, measured is what `torch.cuda.max_memory_allocated` says after a step; on the CPU, the highest sum of what
torch's allocator gave and took back, as its profiler reports it. Both steps, that which is forecast and that which is
measured, are on batches of the same shapes.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import torch
from measuring import command, machine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from pathfm.augment.assemble import mask_weights
from pathfm.batch import Batch
from pathfm.dist.env import ALONE
from pathfm.errors import exit_status
from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.memory_forecast import GIB, Forecast
from pathfm.jobs.networks import fresh_state, method_of
from pathfm.recipe import Recipe, read_recipe
from pathfm.training.plan import TrainingPlan
from pathfm.training.state import TrainingState
from pathfm.training.step import train_step

ON_A_CPU = (  # in fp32 where the network is not tiny: a CPU is slow in bf16
    ("vittiny14", "train.batch_size_per_gpu=8"),
    ("vittiny14", "train.batch_size_per_gpu=8", "train.micro_batch_size=4"),
    ("vittiny14", "train.batch_size_per_gpu=8", "parallel.recompute=selective"),
    ("vits14", "train.batch_size_per_gpu=4", "train.precision=fp32"),
    ("vits14", "train.batch_size_per_gpu=8", "train.precision=fp32", "parallel.recompute=blocks"),
    ("vits14_reg4", "train.batch_size_per_gpu=8", "train.precision=fp32", "train.micro_batch_size=4"),
    ("vits14", "train.batch_size_per_gpu=4", "train.precision=fp32", "train.centering=sinkhorn_knopp"),
    ("patch", "train.batch_size_per_gpu=4", "train.precision=fp32"),
    ("region_dinov2", "train.batch_size_per_gpu=64", "train.precision=fp32"),
)
ON_A_GPU = (
    ("small_gpu",),
    ("vits14",),
    ("vits14", "parallel.recompute=blocks"),
    ("vitb14",),
    ("vitl14", "train.micro_batch_size=32"),
    ("vitl14", "train.micro_batch_size=64", "parallel.recompute=selective"),
)
FORECAST = ("vits14", "vitb14", "vitl14", "vitg14", "patch", "region", "region_dinov2")
SIZES = (24, 40, 80)  # GB


def measured_bytes(recipe: Recipe, parts: Sequence[Batch], plan: TrainingPlan, device: torch.device) -> int:
    """The most that was allocated at once in a real step on batches of these shapes, the next step's beside them."""
    measure = _most_on_a_gpu if device.type == "cuda" else _most_on_a_cpu
    return measure(recipe, parts, plan, device)


def _most_on_a_gpu(recipe: Recipe, parts: Sequence[Batch], plan: TrainingPlan, device: torch.device) -> int:
    state, batches = _prepared(recipe, parts, plan, device)
    torch.cuda.reset_peak_memory_stats(device)
    train_step(state, batches[0], plan.schedules.at(0), recipe.train, recipe.optim, ALONE)
    return torch.cuda.max_memory_allocated(device)


def _most_on_a_cpu(recipe: Recipe, parts: Sequence[Batch], plan: TrainingPlan, device: torch.device) -> int:
    """The profiler is on before the first weight is there, so that it knows what all were given."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        state, batches = _prepared(recipe, parts, plan, device)
        with record_function("the step"):
            train_step(state, batches[0], plan.schedules.at(0), recipe.train, recipe.optim, ALONE)
    return most_alive(profiled, since="the step")


def most_alive(profiled: profile, since: str | None = None) -> int:
    """The most bytes that were allocated at once, from the record of this name on."""
    events = profiled.profiler.kineto_results.events()
    began = next((event.start_ns() for event in events if event.name() == since), 0)
    alive = most = 0
    for moment, num_bytes in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        alive += num_bytes
        most = max(most, alive) if moment >= began else most
    return most


def _prepared(
    recipe: Recipe, parts: Sequence[Batch], plan: TrainingPlan, device: torch.device
) -> tuple[TrainingState, list[list[Batch]]]:
    """As training stands before its first step, with this step's batch and the next one's."""
    state = fresh_state(method_of(recipe, plan.koleo_group_size), recipe, ALONE, device)
    return state, [[with_contents(part).to(device) for part in parts] for _ in range(2)]


def with_contents(part: Batch) -> Batch:
    """Noise of these shapes, with as many masked patches."""
    masks = torch.zeros(part.masks.shape, dtype=torch.bool)
    masks.view(-1)[torch.randperm(masks.numel())[: len(part.mask_indices)]] = True
    return replace(
        part,
        global_crops=_noise(part.global_crops),
        local_crops=_noise(part.local_crops),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=mask_weights(masks),
        positions=torch.arange(part.num_samples),
        samples=torch.arange(part.num_samples),
    )


def _noise(crops: Tensor) -> Tensor:
    return torch.randn(crops.shape) if crops.is_floating_point() else torch.randint(255, crops.shape, dtype=crops.dtype)


def measure(device: torch.device) -> None:
    print("| recipe | forecast, GiB | measured, GiB | error |\n| --- | --- | --- | --- |", flush=True)
    for name, *words in ON_A_GPU if device.type == "cuda" else ON_A_CPU:
        recipe = read_recipe(CONFIGS / f"{name}.yaml", [*words, "student.attention=sdpa"]).recipe
        with Forecast(recipe, device_type=device.type) as forecast:
            found, parts = forecast.found(forecast.setting), forecast.parts(forecast.setting)
        measured = measured_bytes(recipe, parts, forecast.plan, device)
        error = found.peak.total_bytes / measured - 1
        numbers = f"{found.peak.total_bytes / GIB:.3f} | {measured / GIB:.3f} | {error:+.2%}"
        print(f"| {' '.join([name, *words])} | {numbers} |", flush=True)


def forecast_all(gpus: int) -> None:
    print(f"| recipe | as it is, GiB | {' | '.join(f'first that fits {size} GB' for size in SIZES)} |")
    print(f"| --- | --- |{' --- |' * len(SIZES)}", flush=True)
    for name in FORECAST:
        with Forecast(read_recipe(CONFIGS / f"{name}.yaml").recipe, gpus) as forecast:
            given = forecast.found(forecast.setting)
            firsts = [_first(forecast, size) for size in SIZES]
        print(f"| {name} | {given.peak.total_bytes / GIB:.1f} | {' | '.join(firsts)} |", flush=True)


def _first(forecast: Forecast, gigabytes: float) -> str:
    """As it is where that fits; else what is proposed first."""
    given = forecast.found(forecast.setting)
    proposals = [given] if given.fits(gigabytes) else forecast.proposals(gigabytes)
    if not proposals:
        return "none"
    setting, size = proposals[0].setting, proposals[0].peak.total_bytes / GIB
    return "as it is" if setting == given.setting else f"{setting.words()}: {size:.1f} GiB"


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "forecast"))
    parser.add_argument("--gpus", type=int, default=8, help="of the forecasts")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{machine()}, {on}, {date.today()}\n\n```\n{command()}\n```\n", flush=True)
    measure(device) if arguments.what == "measure" else forecast_all(arguments.gpus)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

"""Losses of one small run in fp32, in bf16 and with the blocks' linear layers in 8 bits: does fp8 learn as bf16 does?

    python benchmarks/float8.py --data ../shared/data/osteosarcoma3/images --picture docs/float8_losses.png

The three see the same crops and masks from the same initial weights. fp8 is emulated: torchao rounds to 8 bits and
multiplies with ordinary arithmetic, so this tells of losses on any machine, and of speed nothing.
Prints a table in Markdown and draws the losses over each other.
"""

import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from measuring import command, machine

from pathfm.data.pack import PackRequest, pack
from pathfm.dist.env import ALONE
from pathfm.errors import exit_status
from pathfm.files import written_aside
from pathfm.jobs.networks import fresh_state, method_of
from pathfm.jobs.training_data import TrainingData
from pathfm.jobs.training_set import open_training_set
from pathfm.parallel.float8 import use_float8
from pathfm.recipe import Recipe, find_config, read_recipe
from pathfm.training.plan import plan_training
from pathfm.training.state import TrainingState
from pathfm.training.step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")
SETTINGS = ("optim.total_steps=150", "train.batch_size_per_gpu=4", "train.num_workers=0")  # minutes on one core
CONTESTANTS = {"fp32": "#000000", "bf16": "#e69f00", "fp8, emulated": "#6b2c7e"}
TERMS = {
    "total_loss": "total",
    "dino_global_crops_loss": "DINO, global crops",
    "dino_local_crops_loss": "DINO, local crops",
    "ibot_loss": "iBOT",
    "koleo_loss": "KoLeo",
    "grad_norm/backbone": "gradient norm of the backbone",
}
AVERAGED = 10  # steps, in the table

Series = dict[str, list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of tiles")
    parser.add_argument("--picture", type=Path, required=True, help="where the losses are drawn")
    parser.add_argument("--config", default="vittiny16_cpu")
    arguments, overrides = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pack(PackRequest(arguments.data, "pretrain", Path(folder)))
        settings = [*SETTINGS, *overrides, f"train.dataset_path=Pathology:root={folder}"]
        series = {name: train(arguments.config, settings, name) for name in CONTESTANTS}
    draw(series, arguments.picture)
    print(f"{machine()}, one thread\n\n```\n{command()}\n```\n\n{table(series)}")
    return 0


def train(config: str, settings: Sequence[str], contestant: str) -> Series:
    """Losses and gradient norms of every step."""
    precision = "bf16" if contestant.startswith("fp8") else contestant
    recipe = read_recipe(find_config(config, CONFIGS), [*settings, f"train.precision={precision}"]).recipe
    dataset = open_training_set(recipe.train.dataset_path, recipe.student)
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, 1, len(dataset))
    state = state_of(recipe, plan.koleo_group_size, emulate_float8=contestant.startswith("fp8"))
    for batch in TrainingData(recipe, plan, dataset, CPU).batches(ALONE, from_step=0):
        train_step(state, [batch], plan.schedules.at(state.step), recipe.train, recipe.optim, ALONE)
    return state.meter.read()


def state_of(recipe: Recipe, koleo_group_size: int, *, emulate_float8: bool) -> TrainingState:
    method = method_of(recipe, koleo_group_size)
    if emulate_float8:
        use_float8([*method.student.layers(), *method.teacher.layers()], CPU, emulate=True)
    return fresh_state(method, recipe, ALONE, CPU)


def table(series: dict[str, Series]) -> str:
    """Means over a few steps around some, and how far the curves lie apart."""
    total = {name: values["total_loss"] for name, values in series.items()}
    steps = len(total["fp32"])
    ends = [round(steps * part / 5) for part in range(1, 6)]
    rows = [["steps", *series], ["---"] * (1 + len(series))]
    for end in ends:
        window = slice(end - AVERAGED, end)
        rows.append([f"{end - AVERAGED + 1} to {end}", *(f"{fmean(losses[window]):.4f}" for losses in total.values())])
    apart = [
        f"Total loss, mean difference over all steps: {first} and {second} {distance(total[first], total[second]):.4f}"
        for first, second in (("bf16", "fp32"), ("fp8, emulated", "bf16"), ("fp8, emulated", "fp32"))
    ]
    skipped = ", ".join(f"{name} {values['finite'].count(0.0)}" for name, values in series.items())
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *apart, f"Steps passed over: {skipped}"])


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(first, second, strict=True))


def draw(series: dict[str, Series], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for panel, (term, title) in zip(panels.flat, TERMS.items(), strict=True):
        for name, values in series.items():
            panel.plot(values[term], label=name, color=CONTESTANTS[name], linewidth=1, alpha=0.8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.grid(alpha=0.2)
    panels.flat[0].legend(frameon=False)
    with written_aside(picture) as aside:
        figure.savefig(aside, dpi=80, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

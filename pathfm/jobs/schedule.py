"""`pathfm schedule NAME [key=value ...]`: every schedule over the whole run, before any GPU hour is spent."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.recipe import Recipe, find_config, read_recipe
from pathfm.track.pictures import draw_schedules
from pathfm.training.plan import TrainingPlan, plan_training

_ROWS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9, 1)  # parts of the run that the table shows
_POINTS = 1000  # of each drawn curve
_USUAL_EPOCH_LENGTH = 1250  # DINOv2's own, in steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("pathfm schedule", description="Print and draw all schedules of a run.")
    parser.add_argument("config", help="a recipe's name in configs/, or a path")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the run (the batch is per GPU)")
    parser.add_argument("--samples", type=int, metavar="N", help="samples in an epoch, when the data are not at hand")
    parser.add_argument("--output", type=Path, help="the picture (default: schedule_NAME.png)")
    arguments = parse_with_overrides(parser, argv)
    path = find_config(arguments.config, CONFIGS)
    read = read_recipe(path, arguments.overrides)
    plan = _plan(read.recipe, arguments.gpus, arguments.samples)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    print(_table(plan))
    picture = arguments.output or Path(f"schedule_{path.stem}.png")
    draw_plan(plan, picture, path.stem)
    print(f"drawn: {picture}")
    return 0


def draw_plan(plan: TrainingPlan, picture: Path, title: str) -> None:
    """All schedules as one PNG."""
    steps = sorted({round(index * (plan.total_steps - 1) / _POINTS) for index in range(_POINTS + 1)})
    values = [vars(plan.schedules.at(step)) for step in steps]
    draw_schedules({name: [value[name] for value in values] for name in values[0]}, steps, picture, title)


def _plan(recipe: Recipe, gpus: int, samples: int | None) -> TrainingPlan:
    train = recipe.train
    if samples is None and train.epoch_length is None and recipe.optim.total_steps is None:
        print(
            f"note: the epoch length is not known here (--samples or train.epoch_length); "
            f"drawn for {_USUAL_EPOCH_LENGTH:,} steps an epoch",
            file=sys.stderr,
        )
    if samples is None and train.epoch_length is None:
        train = train.model_copy(update={"epoch_length": _USUAL_EPOCH_LENGTH})
    return plan_training(train, recipe.optim, recipe.teacher, recipe.dino, gpus, samples)


def _table(plan: TrainingPlan) -> str:
    lines = [
        f"{plan.total_steps:,} steps, {plan.epoch_length:,} an epoch, global batch {plan.global_batch_size:,}, "
        f"{plan.total_steps * plan.global_batch_size:,} samples, peak lr {plan.peak_lr:.3g}",
        f"{'step':>10} {'epoch':>8} {'lr':>10} {'last layer':>10} {'w. decay':>9} {'momentum':>9} {'temp':>6}",
    ]
    for part in _ROWS:
        step = round(part * (plan.total_steps - 1))
        value = plan.schedules.at(step)
        lines.append(
            f"{step:>10,} {step / plan.epoch_length:>8.2f} {value.lr:>10.3e} {value.last_layer_lr:>10.3e} "
            f"{value.weight_decay:>9.4f} {value.momentum:>9.5f} {value.teacher_temp:>6.4f}"
        )
    return "\n".join(lines)

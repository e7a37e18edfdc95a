"""`pathfm evaluate --follow RUN`: tune a run by its exported teachers, beside the job that trains it."""

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathfm.dist.collect import agree_any, decided_by_first
from pathfm.dist.env import Ranks, ranks_from_environment
from pathfm.dist.groups import device_of, joined, run_rank
from pathfm.errors import EXIT_INTERRUPTED
from pathfm.jobs.arguments import add_options_to_follow, parse_with_overrides
from pathfm.jobs.find_run import find_run
from pathfm.jobs.run_reports import mirror_of
from pathfm.jobs.tuning import build_tuner
from pathfm.jobs.tuning_sets import recipe_to_follow
from pathfm.lifecycle.run import Run, step_of_export
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger, start_logging
from pathfm.models.pretrained import load_backbone
from pathfm.models.vit import ViT
from pathfm.recipe import Recipe
from pathfm.ssl.network import Output
from pathfm.track.json_lines import JsonLines
from pathfm.training.tuning import ToldToLeave, Tuner

_log = get_logger(__name__)
_SECONDS_BETWEEN_LOOKS = 10.0
_STALL_AFTER_S, _LOST_AFTER_S = 1800.0, 120.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        "pathfm evaluate",
        description="Tune a run from outside: every teacher that it exports (checkpoint.export_every_steps) is scored "
        "once, into the run's results/tuning.jsonl and W&B run, until the run is over. Settings as tune.KEY=VALUE.",
        allow_abbrev=False,
    )
    add_options_to_follow(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parse_with_overrides(parser, argv)
    ranks = ranks_from_environment()
    start_logging(speak=ranks.is_first)
    run = find_run(arguments.follow, arguments.runs_dir)
    recipe = recipe_to_follow(run, arguments.overrides)
    follow = partial(_follow, run, recipe, ranks, device_of(ranks, arguments.device), once=arguments.once)
    if ranks.world_size > 1:
        run_rank(follow)
    return follow()


@dataclass(frozen=True)
class Follower:
    """Which exports of a run are still to be scored, and what was found."""

    run: Run
    global_batch_size: int

    def next_export(self) -> Path | None:
        """The oldest that was not scored, by this or by the run itself."""
        scored = {line["step"] for line in JsonLines(self.run.tuning).read()}
        return next((path for path in self.run.exported_teachers() if step_of_export(path) not in scored), None)

    def is_over(self) -> bool:
        """Whether the run will export nothing more."""
        ended = self.run.how_it_ended()
        return ended is not None and ended.get("verdict") == "done"

    def write(self, export: Path, found: dict[str, Any]) -> None:
        line = {**self._place(step_of_export(export)), "by": "follow", **found, "early_stopping": None}
        JsonLines(self.run.tuning).append(line)
        teacher = {name: value for name, value in found["teacher"].items() if name.startswith(("acc", "auc"))}
        _log.info("%s: %s", export.name, ", ".join(f"{name} {value:.4f}" for name, value in teacher.items()))

    def _place(self, step: int) -> dict[str, Any]:
        """Epochs as the run's own lines count them."""
        lines = JsonLines(self.run.metrics).read()
        epochs_per_step = lines[-1]["epoch"] / lines[-1]["step"] if lines else 0.0
        return {"step": step, "samples_seen": step * self.global_batch_size, "epoch": step * epochs_per_step}


def _follow(run: Run, recipe: Recipe, ranks: Ranks, device: torch.device, *, once: bool) -> int:
    """The same exit status on every rank."""
    with joined(ranks, device, _STALL_AFTER_S, _LOST_AFTER_S) as team:
        tuner = build_tuner(recipe, ranks, device)
        assert recipe.train.global_batch_size is not None  # settled when the run was begun
        follower = Follower(run, recipe.train.global_batch_size)
        while True:
            is_over = once or decided_by_first(follower.is_over)  # first: what is exported later is not missed
            export = decided_by_first(follower.next_export)
            if agree_any(noted() is not None):
                return EXIT_INTERRUPTED
            if export is None and is_over:
                break
            team.watch.at(0 if export is None else step_of_export(export), "tuning")
            if export is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            elif not _score(tuner, follower, export, ranks):
                return EXIT_INTERRUPTED
        if ranks.is_first:
            _show(run, recipe)
    return 0


def _score(tuner: Tuner, follower: Follower, export: Path, ranks: Ranks) -> bool:
    """False: told to leave before it was scored."""
    network = _Headless(load_backbone(export).vit.to(tuner.device))
    try:
        found = tuner.run({"teacher": network}, lambda: noted() is None)
    except ToldToLeave:
        return False
    if ranks.is_first:
        follower.write(export, found)
    return True


class _Headless(nn.Module):
    """A backbone, called as the trainer's networks are."""

    def __init__(self, backbone: ViT) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, crops: Sequence[Tensor], heads: bool = False) -> Output:
        return Output(torch.cat([group.cls for group in self.backbone(crops)]), None, None)


def _show(run: Run, recipe: Recipe) -> None:
    """What the run's own W&B process has not seen, when it has ended before this did."""
    ended = run.how_it_ended()
    if ended is not None and ended.get("verdict") != "running":
        mirror_of(recipe, run).finish()

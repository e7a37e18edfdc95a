"""Checkpoints of a run: each a directory that appears by one rename, with a manifest that proves it complete.

checkpoints/step_00012000/__0_0.distcp, __1_0.distcp ...   every tensor, as torch.distributed.checkpoint lays them out
checkpoints/step_00012000/.metadata                        its own table of which tensor lies where
checkpoints/step_00012000/manifest.json                    step, plain values, keys, sizes, checksums
checkpoints/best.json                                      which step is the best so far, and by what
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.manifest import DamagedCheckpoint, read_manifest
from pathfm.files import aside_of, publish_directory, write_json

_NAME = re.compile(r"step_(\d{8,})")


class Store:
    """The `checkpoints/` directory of one run. Rank 0 changes it, holding the run's lock; every rank reads."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self.config = config

    def path_of(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def paths(self) -> list[Path]:
        """Published checkpoints, oldest first, damaged ones included."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)

    def newest_step(self) -> int | None:
        return step_of(paths[-1]) if (paths := self.paths()) else None

    def new(self, step: int) -> Path:
        """An empty folder beside the published ones, in which a checkpoint may be written. Raises `OSError`."""
        aside = aside_of(self.path_of(step))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return aside

    def publish(self, aside: Path, step: int) -> Path:
        """Give a complete checkpoint its name, by one rename. Raises `OSError`; what was published stays as it was."""
        published = self.path_of(step)
        publish_directory(aside, published)
        return published

    def mark_best(self, step: int, by: dict[str, Any]) -> None:
        """This step's checkpoint stays, until another is the best. `by`: the metric and its value."""
        write_json(self.directory / "best.json", {"step": step, **by})

    def best_step(self) -> int | None:
        try:
            return int(json.loads((self.directory / "best.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step`: a run that went back to it is about to write their steps again."""
        for path in self.paths():
            if step_of(path) > step:
                kept = path.with_name(f"{path.name}.passed_over")
                shutil.rmtree(kept, ignore_errors=True)
                path.rename(kept)

    def drop_old(self) -> None:
        """Delete the checkpoints that need not stay. Raises `OSError`."""
        for path in [path for path in self.paths() if not self.why_it_stays(path)]:
            unnamed = path.rename(aside_of(path))  # first: half a checkpoint must not bear a published name
            shutil.rmtree(unnamed)

    def why_it_stays(self, path: Path) -> list[str]:
        """In words, for people; empty when the next checkpoint makes it go."""
        reasons = []
        if path in self.paths()[-self.config.keep_last :]:
            reasons.append(f"one of the last {self.config.keep_last}")
        if self.config.keep_every_steps and step_of(path) % self.config.keep_every_steps == 0:
            reasons.append(f"every {self.config.keep_every_steps} steps")
        if step_of(path) == self.best_step():
            reasons.append("best")
        if not reasons and path == next(filter(is_good, reversed(self.paths())), None):
            reasons.append("what a run goes back to after an accident")
        return reasons


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match.group(1))


def is_good(path: Path) -> bool:
    """Whether a checkpoint was written apart from any accident; a damaged one was not."""
    try:
        return read_manifest(path).is_good
    except DamagedCheckpoint:
        return False

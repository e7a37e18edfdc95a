"""`pathfm checkpoints RUN`: what a run could go on from, whether it is whole, and why it stays. Changes nothing."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, damages, read_manifest
from pathfm.checkpoint.store import Store, step_of
from pathfm.config import build, read_layer
from pathfm.errors import UserError, listed
from pathfm.jobs.find_run import find_run
from pathfm.lifecycle.run import Run
from pathfm.log import progress, start_logging
from pathfm.recipe import Recipe
from pathfm.tables import amount, text_table

_HEADER = ["step", "written", "size", "ranks", "whole?", "stays because"]
_MAX_SHOWN = 3  # damages of a checkpoint
_OTHERS = {  # patterns that match no published checkpoint
    "*.passed_over": "set aside by a run that went back to an earlier one (*.passed_over)",
    ".*.partial": "being written now, or left by a process that ended; a start removes the latter (.*.partial)",
}


@dataclass(frozen=True)
class Found:
    """A published checkpoint. `damage` is empty for one that is whole, or was not verified."""

    path: Path
    manifest: Manifest | None
    damage: str

    @property
    def megabytes(self) -> float:
        return self.manifest.bytes / 1e6 if self.manifest else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging()
    run, verify = find_run(arguments.run), not arguments.no_verify
    store = Store(run.checkpoints, _retention_of(run))
    found = [_read(path) for path in store.paths()]
    if verify and found:
        found = list(_verified(found))
    # A run that is training may have removed some of them, which are then no damage.
    found = [checkpoint for checkpoint in found if checkpoint.path.exists()]
    if not found:
        raise UserError(f"run {run.name} has no checkpoints in {run.checkpoints}; it has not come to its first one")
    print(text_table(_HEADER, [_row(store, checkpoint, verified=verify) for checkpoint in found]))
    for pattern, what in _OTHERS.items():
        if number := len(list(run.checkpoints.glob(pattern))):
            print(f"  {number:,} more {what}")
    print(_what_a_start_does(run, found, verified=verify))
    return 1 if any(checkpoint.damage for checkpoint in found) else 0


def _retention_of(run: Run) -> CheckpointConfig:
    """What the run's recipe says about which checkpoints stay; where it cannot be read, the defaults, and a note."""
    try:
        return build(Recipe, [read_layer(run.recipe)]).checkpoint
    except (UserError, OSError) as error:
        print(f"note: why checkpoints stay is told by the default settings, as {error}", file=sys.stderr)
        return CheckpointConfig()


def _read(path: Path) -> Found:
    try:
        return Found(path, read_manifest(path), "")
    except DamagedCheckpoint as damage:
        return Found(path, None, str(damage))


def _verified(found: Sequence[Found]) -> Iterator[Found]:
    behind = accumulate(checkpoint.megabytes for checkpoint in found)
    total = sum(checkpoint.megabytes for checkpoint in found)
    pairs = zip(found, behind, strict=True)
    for checkpoint, _ in progress(pairs, "verifying", total, unit="MB", done=itemgetter(1)):
        if checkpoint.manifest is None:
            yield checkpoint
        else:
            damage = listed(damages(checkpoint.path, checkpoint.manifest), _MAX_SHOWN)
            yield Found(checkpoint.path, checkpoint.manifest, damage)


def _row(store: Store, checkpoint: Found, *, verified: bool) -> list[object]:
    state = f"NO: {checkpoint.damage}" if checkpoint.damage else "whole" if verified else "not verified"
    reasons = ", ".join(store.why_it_stays(checkpoint.path)) or "-"
    if (manifest := checkpoint.manifest) is None:
        return [step_of(checkpoint.path), "-", "-", "-", state, reasons]
    written = datetime.fromtimestamp((checkpoint.path / MANIFEST).stat().st_mtime)
    size = amount(manifest.bytes)
    return [step_of(checkpoint.path), f"{written:%Y-%m-%d %H:%M}", size, manifest.ranks, state, reasons]


def _what_a_start_does(run: Run, found: Sequence[Found], *, verified: bool) -> str:
    """The same that `resume` does: the newest that is whole is taken up, newer ones are set aside."""
    if (run.how_it_ended() or {}).get("verdict") == "done":
        return f"run {run.name} is finished: a start has nothing to do"
    usable = [checkpoint for checkpoint in found if not checkpoint.damage]
    if not usable:
        return (
            f"a start of run {run.name} stops: none of its checkpoints is whole; "
            "restore one from a backup, or begin anew with --no-resume (what is there is kept)"
        )
    newer = len(found) - 1 - found.index(usable[-1])
    aside = f", and sets {newer:,} newer aside" if newer else ""
    condition = "" if verified else ", if its files are whole"
    return f"a start of run {run.name} goes on from step {step_of(usable[-1].path):,}{aside}{condition}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm checkpoints",
        description="List the checkpoints of a run, compare every file with its checksum, "
        "and say which one a start of the run would go on from. Nothing on disk is changed.",
        epilog="Exit status: 1 when a checkpoint is damaged; 0 otherwise.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory, or its name in runs/")
    parser.add_argument("--no-verify", action="store_true", help="read the manifests alone, not the files")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

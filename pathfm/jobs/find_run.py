"""Which run a command means: a run's directory, or its name below runs/. Without torch: login nodes look."""

from pathlib import Path

from pathfm.errors import UserError, nearest
from pathfm.lifecycle.run import Run

RUNS = Path("runs")
_MARKS = ("recipe.yaml", "exit.json", "metrics.jsonl", "jobs.jsonl", "checkpoints", "logs")


def find_run(name: str, runs_dir: Path = RUNS) -> Run:
    """The directory wins over a name below `runs_dir`, if it is a run's. Raises `UserError` when neither is there."""
    places = [place for place in (Path(name), runs_dir / name) if place.is_dir()]
    if not places:
        near = nearest(name, (place.name for place in runs_dir.glob("*")))
        hint = f"did you mean '{near[0]}'?" if near else f"give a run's directory, or its name in {runs_dir}/"
        raise UserError(f"there is no run '{name}', here or in {runs_dir.absolute()}; {hint}")
    return next((run for run in map(Run, places) if is_run(run)), Run(places[0]))


def all_runs(runs_dir: Path = RUNS) -> list[Run]:
    """By name; folders of something else are left out. Raises `UserError` when there is no such directory."""
    if not runs_dir.is_dir():
        raise UserError(
            f"there is no directory {runs_dir.absolute()}; go to where runs/ lies, or name it by --runs-dir"
        )
    return [run for run in map(Run, sorted(runs_dir.iterdir())) if is_run(run)]


def is_run(run: Run) -> bool:
    return any((run.directory / mark).exists() for mark in _MARKS)

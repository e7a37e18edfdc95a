"""`pathfm plot RUN [RUN ...]`: losses, tuning, health and throughput of a run as one picture; several runs overlaid."""

import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathfm.errors import UserError
from pathfm.jobs.find_run import RUNS, find_run
from pathfm.jobs.run_progress import group, is_of_training, settings_of, tracked_of
from pathfm.lifecycle.run import Run
from pathfm.track.json_lines import JsonLines
from pathfm.track.pictures import RunCurves, draw_runs


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    runs = [find_run(name, arguments.runs_dir) for name in arguments.runs]
    are_apart = len({run.name for run in runs}) == len(runs)
    drawn = [curves for run in runs if (curves := curves_of(run, run.name if are_apart else str(run.directory))).lines]
    if not drawn:
        raise UserError(
            f"there is no line of metrics in {runs[0].metrics} yet; one comes every train.log_every_steps steps, "
            f"and 'pathfm status {runs[0].name}' says where the run stands"
        )
    if left_out := len(runs) - len(drawn):
        print(f"note: {left_out} of the {len(runs)} runs have no line of metrics yet", file=sys.stderr)
    picture = arguments.output or (runs[0].previews / "plot.png" if len(runs) == 1 else Path("plot.png"))
    draw_runs(drawn, picture, _title(drawn))
    print(f"drawn: {picture}")
    return 0


def curves_of(run: Run, name: str) -> RunCurves:
    """As its files stand at this moment; lines that are half written are left out."""
    settings = settings_of(run)
    lines = [line for line in _objects(run.metrics) if is_of_training(line) and _has_numbers(line, "samples_seen")]
    tunings = [line for line in _objects(run.tuning) if _has_numbers(line, "step", "samples_seen")]
    return RunCurves(
        name,
        lines,
        tunings=sorted(tunings, key=lambda tuning: tuning["samples_seen"]),
        tracked=tracked_of(settings),
        log_k=_log_k(settings),
        starts=_starts(run, lines),
        alarms=_alarms(run, lines),
    )


def _title(runs: Sequence[RunCurves]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    last = runs[0].lines[-1]
    return f"{runs[0].name}: step {last['step']:,}, {last['samples_seen']:,} samples"


def _log_k(settings: Mapping[str, Any]) -> float | None:
    prototypes = group(settings, "dino").get("head_n_prototypes")
    return math.log(prototypes) if isinstance(prototypes, int) and prototypes > 1 else None


def _starts(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where segments began, but for the first."""
    try:
        segments = json.loads((run.directory / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = segments if isinstance(segments, list) else []
    steps = [segment.get("from_step") for segment in found if isinstance(segment, dict)]
    return [step * _batch(lines) for step in steps if isinstance(step, int) and step > 0]


def _alarms(run: Run, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for alarm in _objects(run.alarms):
        if _has_numbers(alarm, "step"):
            found.setdefault(str(alarm.get("alarm")), []).append(alarm["step"] * _batch(lines))
    return found


def _batch(lines: Sequence[Mapping[str, Any]]) -> float:
    """The global batch, which is the same at every step."""
    return lines[-1]["samples_seen"] / lines[-1]["step"] if lines and lines[-1]["step"] else 0


def _objects(path: Path) -> list[dict[str, Any]]:
    return [line for line in JsonLines(path).read() if isinstance(line, dict)]


def _has_numbers(line: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(line.get(key), int | float) for key in keys)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm plot",
        description="Draw a run as one PNG over samples seen: losses, tuning with 95 % intervals, health of the "
        "representation, throughput. Several runs share the panels. It may be done while a run is going.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or its name in runs/")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.png",
        help="default: previews/plot.png of the run; of several, plot.png here",
    )
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs lie (default: runs)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""Every way in which a cluster ends a job, on a real Slurm of two nodes on this machine: what becomes of the run?

    python benchmarks/slurm_matrix.py [EVENT ...] > benchmarks/results/slurm_matrix.md

Each row is a run of its own, 2 nodes x 2 ranks of a tiny model over gloo, submitted by the launcher, which is gone
before anything happens. Exit status 1 when a row is not as it should be.
"""

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import machine

from tests.jobs.journeys import make_tiles
from tests.slurm.cluster import SEARCH_PATH, Cluster, missing_programs
from tests.slurm.events import EVENTS, Event
from tests.slurm.trial import SAVED_EVERY, TOTAL_STEPS, Result, Trial, interrupted, undisturbed

COLUMNS = ["event", "ends as", "attempts from step", "lost", "checkpoint", "requeued", "next step", "losses", ""]
_HEAD = """# What becomes of a run when its job is ended

{machine}, {version}, {today}

```
python benchmarks/slurm_matrix.py
```

Each row is a run of {steps} steps on 2 nodes x 2 ranks, saved every {every} steps, disturbed at about step 17. Columns
of seconds: from the event to the checkpoint, from the event to the requeue, and from there to the next step; most of
that is Slurm's wait and four processes that import torch. Losses are compared bit for bit with a run left alone.
"""


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("events", nargs="*", metavar="EVENT", help="parts of their names (default: all)")
    arguments = parser.parse_args()
    if missing := missing_programs():
        parser.error(f"no {', '.join(missing)} here")
    wanted = [event for event in EVENTS if not arguments.events or any(word in event.name for word in arguments.events)]
    version = subprocess.run(
        ["slurmctld", "-V"], capture_output=True, text=True, env={"PATH": SEARCH_PATH}
    ).stdout.strip()
    print(_HEAD.format(machine=machine(), version=version, today=date.today(), steps=TOTAL_STEPS, every=SAVED_EVERY))
    print(f"| {' | '.join(COLUMNS)} |\n| {' | '.join('---' for _ in COLUMNS)} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = make_tiles(Path(folder))
        reference = undisturbed(Path(folder) / "reference", data)
        good = [_row(event, Path(folder) / str(number), data, reference) for number, event in enumerate(wanted)]
    print(f"\n{sum(good)} of {len(good)} as they should be.")
    return int(not all(good))


def _row(event: Event, folder: Path, data: Path, reference: list[dict[str, Any]]) -> bool:
    started = time.monotonic()
    result, losses = tried(event, folder, data)
    result.same = losses == reference
    print(f"| {' | '.join([event.name, *cells(event, result)])} |", flush=True)
    print(f"{event.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return is_as_it_should_be(event, result)


def tried(event: Event, folder: Path, data: Path, profile: str = "") -> tuple[Result, list[dict[str, Any]]]:
    """What became of a run on a cluster of its own, and what it logged. `profile`: more lines of the profile."""
    with Cluster(folder / "cluster", **event.cluster) as cluster:
        trial = Trial(cluster, folder, data, "run", profile=profile)
        try:
            result = interrupted(trial, event.name, event.happen)
        except AssertionError as error:  # something did not come to pass; the other rows are still worth having
            print(f"{event.name}: {error}", file=sys.stderr)
            result = Result(event.name, "(not in time)")
        return result, trial.losses()


def cells(event: Event, result: Result) -> list[str]:
    """A row of the table, without the event's name."""
    steps = ", ".join(map(str, result.starts))
    times = [_seconds(result.to_checkpoint_s), _seconds(result.to_requeue_s), _seconds(result.to_next_step_s)]
    losses = "equal" if result.same else "-" if not event.comes_back else "DIFFER"
    verdict = "" if is_as_it_should_be(event, result) else "NOT AS IT SHOULD BE"
    return [result.state, steps, str(result.lost), *times, losses, verdict]


def is_as_it_should_be(event: Event, result: Result) -> bool:
    came_back = len(result.starts) > 1 and result.same
    kept_all = result.lost == 0 or event.may_lose
    return result.state == event.state and came_back == event.comes_back and kept_all


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())

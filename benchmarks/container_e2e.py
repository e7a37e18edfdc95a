"""A two-node Slurm job inside an Apptainer image, whose job is ended in several ways: what becomes of the run?

    python benchmarks/container_e2e.py --archive FILE [EVENT ...]

For a host that has Slurm, Apptainer and a Python without torch, and an ordinary user there; `make container-e2e` makes
all that. The ranks run the code of the run's snapshot, not the image's. Exit status 1 when a row is not as it should
be.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import machine
from slurm_matrix import COLUMNS, cells, is_as_it_should_be, tried

from tests.jobs.journeys import make_tiles
from tests.slurm.cluster import SEARCH_PATH, missing_programs
from tests.slurm.events import EVENTS, Event
from tests.slurm.trial import SAVED_EVERY, TOTAL_STEPS

_TO_SIF = Path(__file__).resolve().parents[1] / "docker" / "to_sif.sh"
_LEFT_ALONE = Event("none", lambda trial: None, comes_back=False)
_EVENTS = (_LEFT_ALONE.name, "USR2 to the tasks", "preemption, REQUEUE, GraceTime 10", "scancel", "one rank killed")
_HEAD = """# What becomes of a run in an Apptainer image when its job is ended

{machine}; {slurm} with proctrack/linuxproc, {apptainer} without setuid; {today}

```
make container-e2e
```

The host, an ordinary user's on Debian sid, has Slurm, Apptainer and Python {host_python} without torch; torch and its
Python {image_python} are in the image. Each row is a run of {steps} steps on 2 nodes x 2 ranks, saved every {every},
disturbed at about step 17, with the code of the run's own snapshot. Columns of seconds: from the event to the
checkpoint, from the event to the requeue, and from there to the next step. Losses are compared bit for bit with the
first row.

A `.sif` that Apptainer mounts without setuid is served by a process beside the rank, squashfuse. proctrack/linuxproc
sends it the signals of the rank, and it dies of USR2 and of TERM. The rank goes on with what it has in memory, which
may be enough, as every run has written a checkpoint at its first step; what it needs for the first time ends it
(SIGBUS). Unpacked, be it once (a sandbox) or by each rank (`--unsquash`), the image needs no such process.
"""


@dataclass(frozen=True)
class Image:
    """One way to give the image to a job, and the events that are tried with it."""

    name: str
    path: Path
    events: tuple[str, ...]
    options: tuple[str, ...] = ()
    dies_of_signals: bool = False

    @property
    def profile(self) -> str:
        """Lines of it."""
        return f"container: {{runtime: apptainer, image: {self.path}, options: [{', '.join(self.options)}]}}\n"


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, required=True, metavar="FILE", help="of docker/build.sh --archive")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="keep what is made of it there, and use it again")
    parser.add_argument("events", nargs="*", metavar="EVENT", help="parts of their names (default: all)")
    arguments = parser.parse_args()
    if problem := next(_problems(arguments.archive), None):
        parser.error(problem)
    with tempfile.TemporaryDirectory() as folder:
        images = _images(arguments.archive.absolute(), (arguments.images or Path(folder, "images")).absolute())
        print(_head(images[0].path))
        print(f"| image | {' | '.join(COLUMNS)} |\n| --- | {' | '.join('---' for _ in COLUMNS)} |", flush=True)
        good = _table(_trials(images, arguments.events), Path(folder))
    print(f"\n{sum(good)} of {len(good)} as they should be.")
    return int(not all(good))


def _problems(archive: Path) -> Iterator[str]:
    if missing := [*missing_programs(), *([] if shutil.which("apptainer") else ["apptainer"])]:
        yield f"no {', '.join(missing)} here"
    if os.getuid() == 0:
        yield "this is for an ordinary user, as people on a cluster are"
    if find_spec("torch"):
        yield "this Python has torch, so it would prove nothing; the one of the host is to have none"
    if not archive.is_file():
        yield f"there is no {archive}; docker/build.sh --archive writes it"


def _images(archive: Path, folder: Path) -> list[Image]:
    sif, sandbox = folder / "pathfm.sif", folder / "pathfm"
    folder.mkdir(exist_ok=True)
    if not sif.is_file() or sif.stat().st_mtime < archive.stat().st_mtime:
        sif.unlink(missing_ok=True)
        _build(str(_TO_SIF), "--archive", str(archive), str(sif), "--", "--fakeroot")
        shutil.rmtree(sandbox, ignore_errors=True)
    if not sandbox.is_dir():
        _build("apptainer", "build", "--sandbox", str(sandbox), str(sif))
    return [
        Image("sandbox", sandbox, _EVENTS),
        Image(".sif", sif, _EVENTS, dies_of_signals=True),
        Image(".sif, `--unsquash`", sif, _EVENTS[1:3], options=("--unsquash",)),
    ]


def _build(*words: str) -> None:
    started = time.monotonic()
    done = subprocess.run(words, stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"error: this did not work: {' '.join(words)}")
    print(f"{' '.join(words)}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def _trials(images: Sequence[Image], wanted: Sequence[str]) -> Iterator[tuple[Image, Event]]:
    """Every image with its events; first the run that nothing happens to."""
    for event in (_LEFT_ALONE, *EVENTS):
        if event is _LEFT_ALONE or not wanted or any(word in event.name for word in wanted):
            for image in images:
                if event.name in image.events:
                    yield image, replace(event, may_lose=event.may_lose or image.dies_of_signals)


def _table(trials: Iterable[tuple[Image, Event]], folder: Path) -> list[bool]:
    """Print a row for each. Returns which are as they should be."""
    data, reference, good = make_tiles(folder), None, []
    for number, (image, event) in enumerate(trials):
        started = time.monotonic()
        result, losses = tried(event, folder / str(number), data, image.profile)
        reference = reference or losses
        result.same = losses == reference
        print(f"| {' | '.join([image.name, event.name, *cells(event, result)])} |", flush=True)
        print(f"{image.name}, {event.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        good.append(is_as_it_should_be(event, result) and (result.same or event.state != "COMPLETED"))
    return good


def _head(sif: Path) -> str:
    ask = "import json, platform, torch; print(json.dumps([platform.python_version(), torch.__version__]))"
    image_python, torch = json.loads(_said("apptainer", "exec", str(sif), "python", "-c", ask).splitlines()[-1])
    return _HEAD.format(
        machine=machine(torch),
        slurm=_said("slurmctld", "-V"),
        apptainer=_said("apptainer", "--version"),
        today=date.today(),
        host_python=platform.python_version(),
        image_python=image_python,
        steps=TOTAL_STEPS,
        every=SAVED_EVERY,
    )


def _said(*words: str) -> str:
    environment = {**os.environ, "PATH": SEARCH_PATH}
    return subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

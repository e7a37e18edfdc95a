"""A run is a name with a directory: its files, its lock, where it came from and why it last ended.

Nothing about a run depends on the clock, the job id or the world size, and nothing deletes a run.
"""

import fcntl
import itertools
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pathfm.errors import UserError
from pathfm.files import remove_leftovers, write_json
from pathfm.log import get_logger

_log = get_logger(__name__)

ORIGIN = "origin.json"  # in a copy of the code: where it was copied from
# What a run has of its jobs, whatever they train: a job that waits may need it.
_STAY = (".lock", ".submission.lock", "logs", "code", "jobs.jsonl", "attempts.jsonl")
_WEIGHTS = (".safetensors", ".pth")
_PACKAGES = ("pathfm", "torch", "numpy", "pillow", "opencv-python-headless", "xformers", "submitit", "wandb")


@dataclass(frozen=True)
class Run:
    """The paths of a run."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def recipe(self) -> Path:
        return self.directory / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.directory / "data.json"

    @property
    def attention(self) -> Path:
        """How fast every way to compute attention was, and which one was taken."""
        return self.directory / "attention.json"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def tuning(self) -> Path:
        """What every tuning found."""
        return self.directory / "results" / "tuning.jsonl"

    @property
    def alarms(self) -> Path:
        return self.directory / "alarms.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.directory / "quarantine.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.directory / "exports"

    def exported_teachers(self) -> list[Path]:
        """Of steps, oldest first, as safetensors, which are written last."""
        return self._teachers_of_steps(".safetensors")

    def teacher_to_use(self) -> Path | None:
        """The one that tuning liked best, or else the newest; safetensors before .pth. None: nothing is exported."""
        best = [self.exports / f"teacher_best{suffix}" for suffix in _WEIGHTS]
        newest = max((self._teachers_of_steps(suffix)[-1:] for suffix in _WEIGHTS), key=_steps_of)
        return next((path for path in [*best, *newest] if path.is_file()), None)

    def _teachers_of_steps(self, suffix: str) -> list[Path]:
        found = (
            path for path in self.exports.glob(f"teacher_*{suffix}") if path.stem.removeprefix("teacher_").isdigit()
        )
        return sorted(found, key=step_of_export)

    @property
    def previews(self) -> Path:
        return self.directory / "previews"

    @property
    def accidents(self) -> Path:
        return self.directory / "accidents"

    @property
    def stacks(self) -> Path:
        return self.directory / "stacks"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the run for this process alone. Raises `UserError` when another process of this file system has it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                writer = lock.read().strip() or "another process"
                raise UserError(
                    f"run {self.name} is being written by {writer}; wait for it, end it, or choose another run name"
                ) from None
            except OSError as error:
                _log.warning("this file system has no locks (%s): see to it that one process alone writes here", error)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield

    def keep_aside(self) -> Path | None:
        """Move everything in the directory into `earlier_N/`, the first N that is free. The caller holds the lock."""
        contents = [entry for entry in self.directory.iterdir() if not _stays(entry)]
        if not contents:
            return None
        number = next(n for n in itertools.count(1) if not (self.directory / f"earlier_{n}").exists())
        kept = self.directory / f"earlier_{number}"
        kept.mkdir()
        # Checkpoints first: should this be cut off, none may be left for a run that is not theirs.
        for entry in sorted(contents, key=lambda entry: entry != self.checkpoints):
            entry.rename(kept / entry.name)
        return kept

    def remove_leftovers(self) -> None:
        """Delete what killed writers left aside. The caller holds the lock."""
        for directory in (self.directory, self.checkpoints, self.exports, self.previews, self.accidents):
            remove_leftovers(directory)

    def how_it_ended(self) -> dict[str, Any] | None:
        """What `write_exit` wrote last, or None."""
        try:
            ended = json.loads((self.directory / "exit.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or not JSON, or not even text
            return None
        return ended if isinstance(ended, dict) else None

    def is_done(self, total_steps: int, *, may_stop_early: bool = False) -> bool:
        """True when an earlier segment finished all steps, or stopped early, and wrote all that it should."""
        ended = self.how_it_ended()
        if ended is None or ended.get("verdict") != "done":
            return False
        return ended.get("step") == total_steps or (may_stop_early and bool(ended.get("stopped_early")))

    def write_exit(self, verdict: str, step: int, reason: str = "", *, stopped_early: bool = False) -> None:
        """`running`, or why this segment ended: `done`, `interrupted`, `failed`; read by whoever started it."""
        write_json(
            self.directory / "exit.json",
            {
                "verdict": verdict,
                "step": step,
                "reason": reason,
                **({"stopped_early": True} if stopped_early else {}),
                "job": os.environ.get("SLURM_JOB_ID"),
                "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            },
        )

    def add_provenance(self, facts: dict[str, Any]) -> None:
        """Append this segment (code, versions, host, command, and `facts`) to provenance.json."""
        path = self.directory / "provenance.json"
        segments = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        write_json(path, [*segments, {**_where_and_what(), **facts}])


def step_of_export(path: Path) -> int:
    """`teacher_00012000.pth` -> 12000."""
    return int(path.stem.removeprefix("teacher_"))


def _steps_of(paths: Sequence[Path]) -> list[int]:
    return [step_of_export(path) for path in paths]


def commit_of_this_code() -> str | None:
    """Where it is known."""
    return commit_and_diff(Path(__file__).resolve().parents[2])["commit"]


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The model of this machine's, or its architecture where the system does not tell."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _stays(entry: Path) -> bool:
    return entry.name in _STAY or entry.name.startswith("earlier_")


def _where_and_what() -> dict[str, Any]:
    code = Path(__file__).resolve().parents[2]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "host": socket.gethostname(),
        "code": str(code),
        "code_is": _kind_of_code(code),
        "image": os.environ.get("PATHFM_IMAGE"),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in _PACKAGES},
        **commit_and_diff(code),
    }


def _kind_of_code(code: Path) -> str:
    """Whether a copy made at submission runs, the image's own, a checkout, or an installed package."""
    if (code / ORIGIN).is_file():
        return "snapshot" if "checkout" in json.loads((code / ORIGIN).read_text(encoding="utf-8")) else "image"
    return "checkout" if (code / ".git").exists() else "installed"


def commit_and_diff(code: Path) -> dict[str, str | None]:
    """Of a folder that holds the package: a checkout, or a copy that was told its origin; None where it is neither."""
    if (code / ORIGIN).is_file():
        origin = json.loads((code / ORIGIN).read_text(encoding="utf-8"))
        return {"commit": origin["commit"], "diff": origin["diff"]}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=code, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    if not (code / ".git").exists():
        return {"commit": None, "diff": None}
    commit = git("rev-parse", "HEAD")
    return {"commit": commit.strip() if commit else None, "diff": git("diff", "HEAD", "--", "pathfm", "configs")}

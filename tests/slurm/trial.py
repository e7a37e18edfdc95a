"""A tiny run on the test cluster, something that happens to it, and what became of it: for tests and the matrix."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfm.launch.attempts import Outcome, newest_checkpoint, outcomes, submissions
from pathfm.launch.scontrol import JobRecord, parse_job
from tests.jobs.journeys import TINY, RankProcesses, metrics
from tests.slurm.cluster import NODES, TASKS_PER_NODE, Cluster, wait_for

LAUNCHER = Path(__file__).parents[2] / "launchers" / "pretrain.py"
TOTAL_STEPS = 40
SAVED_EVERY = 10
STEADY = ("train.batch_size_per_gpu=2", "train.log_every_steps=1", f"optim.total_steps={TOTAL_STEPS}")
SETTINGS = (*STEADY, f"checkpoint.every_steps={SAVED_EVERY}", "checkpoint.keep_last=10")
_PROFILE = f"""
partition: low
time_limit_hours: 1
signal_lead_s: 30
gpus_per_node: {TASKS_PER_NODE}
cpus_per_task: 1
environment: {{WANDB_MODE: disabled, GLOO_SOCKET_IFNAME: lo}}
"""
_PATIENCE_S = 240.0


class Trial:
    """One run, submitted by the launcher, which is gone before anything happens."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        data: Path,
        name: str,
        recipe: Sequence[str] = (),
        nodes: int = len(NODES),
        profile: str = "",
    ) -> None:
        """`recipe`: another one and its settings, in place of the tiny model. `profile`: further lines of YAML."""
        self.cluster, self.name = cluster, name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tiny.yaml").write_text(TINY)
        (folder / "here.yaml").write_text(_PROFILE + profile)
        self.run_dir = folder / "runs" / name
        config, *settings = recipe or (str(folder / "tiny.yaml"), *SETTINGS)
        files = ["--config", config, "--profile", str(folder / "here.yaml")]
        where = ["--runs-dir", str(folder / "runs"), "--run", name, "--nodes", str(nodes), "--cluster", "slurm"]
        self.words = [sys.executable, str(LAUNCHER), *files, *where]
        self.words += [f"train.dataset_path=Pathology:root={data}", *settings]
        self.job = ""

    def submit(self) -> None:
        done = subprocess.run(
            self.words,
            env=self.cluster.environment,
            cwd=self.run_dir.parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split("submitted job ")[1].split(":")[0]

    # ---- what is to be seen

    def record(self) -> JobRecord:
        return parse_job(self.cluster.scontrol("-o", "show", "job", self.job).splitlines()[0])

    def step(self) -> int:
        """The last one that was logged."""
        lines = self.metrics()
        return int(lines[-1]["step"]) if lines else 0

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # just being written
                break
        return found

    def losses(self) -> list[dict[str, Any]]:
        """All that was logged, without what depends on the clock."""
        return metrics(self.run_dir)

    def starts(self) -> list[int]:
        """The step at which each segment of the run began."""
        path = self.run_dir / "provenance.json"
        return [segment["from_step"] for segment in json.loads(path.read_text())] if path.exists() else []

    def outcomes(self) -> list[Outcome]:
        return outcomes(self.run_dir)

    def checkpoint(self) -> int:
        return newest_checkpoint(self.run_dir)

    def ranks(self) -> dict[int, int]:
        """Process ids of the trainers, by rank."""
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                of_a_trainer = b"pathfm.train" in Path(f"/proc/{parent}/cmdline").read_bytes()
            except OSError:
                continue
            if b"pathfm.train" in command and b"srun" not in command and not of_a_trainer:
                values = dict(part.split("=", 1) for part in environment if "=" in part)
                if values.get("SLURM_JOB_ID") == self.job and "SLURM_PROCID" in values:
                    found[int(values["SLURM_PROCID"])] = int(entry.name)
        return found

    def told(self) -> str:
        """Everything that the job and its ranks logged, the end of it."""
        logs = sorted(self.run_dir.rglob("*.log")) + sorted(self.run_dir.rglob("*.out"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def job_log(self) -> str:
        """What the supervisor said, in all attempts."""
        return (self.run_dir / "logs" / "submitit" / f"{self.job}_0_log.out").read_text()

    # ---- waiting

    def until_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, _PATIENCE_S, self.told)

    def until_ended(self, seconds: float = _PATIENCE_S) -> str:
        """The state in which Slurm has the job then."""
        wait_for(lambda: self.record().has_ended, seconds, self.told)
        return self.record().state

    def goes_on_in_another_job(self) -> bool:
        """True when the supervisor has submitted a follow-up, which this trial looks at from then on."""
        followed = [submission.job for submission in submissions(self.run_dir) if submission.follows == self.job]
        self.job = followed[0] if followed else self.job
        return bool(followed)

    # ---- what may happen

    def scancel(self, *options: str) -> None:
        self.cluster.run("scancel", *options, self.job)

    def pathfm(self, *words: str) -> str:
        """What a person types on the login node."""
        command = [sys.executable, "-m", "pathfm", *words]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks()[rank], signal.SIGKILL)

    def break_the_code(self, line: str) -> None:
        """In the snapshot that this run's ranks import."""
        for loop in self.run_dir.glob("code/*/pathfm/training/loop.py"):
            loop.write_text(f"{line}\n")

    def someone_more_important(self, seconds: int = 3) -> None:
        """A job of partition `high` that needs all GPUs."""
        size = ["--nodes", str(len(NODES)), f"--gres=gpu:{TASKS_PER_NODE}", "--output=/dev/null"]
        self.cluster.run("sbatch", "--partition=high", *size, f"--wrap=sleep {seconds}")

    def lower_time_limit(self) -> None:
        self.cluster.scontrol("update", f"JobId={self.job}", "TimeLimit=1")

    def raise_time_limit(self) -> None:
        self.cluster.scontrol("update", f"JobId={self.job}", "TimeLimit=60")


@dataclass
class Result:
    """What a line of the matrix says. Times are seen by looking five times a second."""

    event: str
    state: str = ""
    starts: tuple[int, ...] = ()  # the step at which each attempt began
    lost: int = 0  # steps that had been logged and had to be taken again
    to_checkpoint_s: float | None = None  # from the event to the checkpoint that it led to
    to_requeue_s: float | None = None  # from the event until Slurm has the job waiting again
    to_next_step_s: float | None = None  # from there to the next step
    same: bool = False  # losses as in the run that nothing happened to


def interrupted(trial: Trial, event: str, happen: Callable[[Trial], None], at_step: int = 17) -> Result:
    """Submit, let something happen at a step, see the job come back, or not, and end."""
    result = Result(event)
    trial.submit()
    trial.until_step(at_step)
    before, happened = trial.checkpoint(), time.time()
    happen(trial)
    seen, requeued, deadline = trial.step(), 0.0, time.monotonic() + _PATIENCE_S
    while len(trial.starts()) < 2 and not (record := trial.record()).has_ended:
        assert time.monotonic() < deadline, trial.told()
        seen = max(seen, trial.step())
        requeued = requeued or (time.time() if record.restarts or record.is_waiting else 0.0)
        time.sleep(0.2)
    result.to_checkpoint_s = _age_of_newer(trial, before, happened)
    if len(trial.starts()) > 1:
        result.lost = max(seen - trial.starts()[1], 0)
        wait_for(lambda: trial.step() > trial.starts()[-1], _PATIENCE_S, trial.told)
        result.to_requeue_s, result.to_next_step_s = requeued - happened, time.time() - requeued
    result.state = trial.until_ended()
    result.starts = tuple(trial.starts())
    return result


def _age_of_newer(trial: Trial, before: int, since: float) -> float | None:
    """How long after `since` the first checkpoint appeared that is newer than the step `before`."""
    later = [path for path in (trial.run_dir / "checkpoints").glob("step_????????") if int(path.name[5:]) > before]
    return min((path.stat().st_mtime for path in later), default=since) - since if later else None


def undisturbed(folder: Path, data: Path, *recipe: str) -> list[dict[str, Any]]:
    """The same run on as many ranks without Slurm: what every other must have logged."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    config, *settings = recipe or (str(folder / "tiny.yaml"), *SETTINGS)
    ranks = RankProcesses(Path(config), data, folder / "alone", len(NODES) * TASKS_PER_NODE, *settings)
    assert set(ranks.wait()) == {0}, ranks.said()
    return metrics(folder / "alone")

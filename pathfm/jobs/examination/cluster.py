"""Slurm, the container and W&B, as the machine sees them from which a run is submitted."""

import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from pathfm.jobs.before_queue import problems_of_container
from pathfm.jobs.examination.finding import Finding
from pathfm.launch.profile import Profile
from pathfm.track.config import WandbConfig
from pathfm.track.weights_and_biases import wandb_mode

_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
_SECONDS_TO_CONNECT = 5.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


def slurm(*, is_needed: bool) -> Finding:
    """The programs of Slurm are on PATH and the controller answers."""
    missing = [program for program in _PROGRAMS if not shutil.which(program)]
    if missing == list(_PROGRAMS) and not is_needed:
        return Finding("Slurm", "ok", "no Slurm here", "train on this machine with --cluster local")
    if missing:
        found = f"not on PATH: {', '.join(missing)}"
        return Finding("Slurm", "fail", found, "load Slurm's module, or submit from a login node")
    said, is_up = _ping()
    if is_up:
        return Finding("Slurm", "ok", said)
    advice = "ask the administrator" if is_needed else "train on this machine with --cluster local"
    return Finding("Slurm", "fail" if is_needed else "warn", f"no controller answers: {said}", advice)


def _ping() -> tuple[str, bool]:
    """What `scontrol ping` says, and whether a controller is up."""
    done = _run(["scontrol", "ping"])
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines() or ["scontrol ping says nothing"]
    up = [line for line in lines if re.search(r"\bUP\b", line)]
    return (up or lines)[-1].removeprefix("scontrol: "), bool(up)


def container(profile: Profile) -> Finding:
    """The image and the binds are there, and so is the program that starts the image."""
    image, runtime = profile.container, profile.container.runtime
    if runtime == "none":
        return Finding("container", "ok", "none; every task runs this python")
    if problems := list(problems_of_container(image)):
        return Finding("container", "fail", "; ".join(problems), "mend the profile, or put them there")
    if not shutil.which(runtime):
        if profile.setup:
            advice = f"fine if the profile's set-up brings it: {'; '.join(profile.setup)}"
            return Finding("container", "warn", f"{runtime} is not on PATH here", advice)
        return Finding("container", "fail", f"{runtime} is not on PATH", "load its module in the profile's 'setup'")
    if runtime == "apptainer" and _dies_of_signals(image.image):
        found = f"{image.image} is mounted by a process of the task, which proctrack/linuxproc signals with the task"
        advice = "a checkpoint may be cut off: unpack the image (apptainer build --sandbox), or use proctrack/cgroup"
        return Finding("container", "warn", found, advice)
    return Finding("container", "ok", f"{runtime}, {image.image}")


def _dies_of_signals(image: str) -> bool:
    """A .sif, Apptainer without setuid, and a Slurm that signals all descendants of a task, met together."""
    if not image.endswith(".sif") or not shutil.which("scontrol"):
        return False
    config = _run(["scontrol", "show", "config"]).stdout
    return re.search(r"^ProctrackType\s*=\s*proctrack/linuxproc", config, re.M) is not None and not _has_setuid()


def _has_setuid() -> bool:
    folder = re.search(r"^LIBEXECDIR=(.+)$", _run(["apptainer", "buildcfg"]).stdout, re.M)
    starter = Path(folder[1] if folder else "/usr/libexec", "apptainer", "bin", "starter-suid")
    return starter.exists() and bool(starter.stat().st_mode & stat.S_ISUID)


def weights_and_biases(config: WandbConfig, environment: Mapping[str, str] = os.environ) -> Finding:
    """The server of W&B can be reached, if something is to be sent."""
    mode = wandb_mode(config, environment)
    if mode != "online":
        return Finding("W&B", "ok", "offline, nothing is sent" if mode == "offline" else "off")
    host, port = _server(environment)
    try:
        socket.create_connection((host, port), timeout=_SECONDS_TO_CONNECT).close()
    except OSError as error:
        found = f"{host}:{port} cannot be reached: {error.strerror or error}"
        return Finding("W&B", "warn", found, "set wandb.mode=offline and send later with 'wandb sync'")
    return Finding("W&B", "ok", f"{host}:{port} can be reached from here")


def _server(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port that are connected to: those of the proxy, where there is one."""
    base = environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    scheme = urlsplit(base).scheme
    url = urlsplit(getproxies().get(scheme) or base)
    return url.hostname or "api.wandb.ai", url.port or _DEFAULT_PORTS.get(url.scheme, 443)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=15)

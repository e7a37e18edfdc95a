"""Slurm and W&B, as the machine sees them from which a run is submitted."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies

from pathfm.jobs.examination.finding import Finding
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
        return Finding("W&B", "warn", found, "set wandb.mode=offline and send later with 'pathfm wandb-sync RUN'")
    return Finding("W&B", "ok", f"{host}:{port} can be reached from here")


def _server(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port that are connected to: those of the proxy, where there is one."""
    base = environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    scheme = urlsplit(base).scheme
    url = urlsplit(getproxies().get(scheme) or base)
    return url.hostname or "api.wandb.ai", url.port or _DEFAULT_PORTS.get(url.scheme, 443)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=15)

"""W&B as a view of a run's files: shown by a process of its own (`wandb_mirror`), so that training never waits for it.

A thread would not do: W&B's client waits for its uploads when its process ends, and a client that hangs would keep the
trainer from ending.
"""

import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from pathfm.log import get_logger
from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.processes import end_with_children

_log = get_logger(__name__)
_SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_PIPE_BYTES = 1 << 20  # a recipe must fit, since a pipe that is full is not waited for
_NOT_ITS_OWN = ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR")  # would make it another run, elsewhere
EXIT_INCOMPLETE = 3  # of a mirror that could not send everything
Mode = Literal["online", "offline", "disabled"]


class WeightsAndBiases:
    """The trainer's end: a pipe to the mirror, or to none."""

    def __init__(self, mirror: "subprocess.Popen[bytes] | None" = None, finish_within_s: float = 0.0) -> None:
        self._mirror = mirror
        self._finish_within_s = finish_within_s

    def nudge(self) -> None:
        """There is something new in the run's files. The mirror would see it by itself, a little later."""
        if self._mirror is not None and self._mirror.stdin is not None:
            _tell(self._mirror.stdin, b"\n")

    def finish(self, at_most_s: float = math.inf) -> None:
        """Let the mirror send what is left, for `finish_within_s` or this at most; then it ends in any case."""
        mirror, self._mirror = self._mirror, None
        if mirror is None:
            return
        if mirror.stdin is not None:
            with contextlib.suppress(OSError):
                mirror.stdin.close()
        try:
            is_complete = mirror.wait(min(self._finish_within_s, at_most_s)) == 0
        except subprocess.TimeoutExpired:
            is_complete = False
            end_with_children(mirror.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                mirror.wait(1)
        if not is_complete:
            _log.warning("W&B was not told everything; the next start does so, or 'pathfm wandb-sync RUN'")


def start_wandb(
    config: WandbConfig, run_directory: Path, recipe: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> WeightsAndBiases:
    """A mirror of `run_directory`, or none when W&B is not wanted. Never prompts, never waits."""
    mode = wandb_mode(config, environment)
    if mode == "disabled":
        return WeightsAndBiases()
    if mode == "online" and not has_key(environment):
        _log.warning(
            "W&B has no key here (WANDB_API_KEY or ~/.netrc); it writes offline files, "
            "and 'pathfm wandb-sync RUN' sends the run later"
        )
        mode = "offline"
    try:
        mirror = _start_mirror(run_directory, environment)
    except OSError as error:
        _log.warning("W&B could not be started (%s); training goes on, metrics.jsonl has everything", error)
        return WeightsAndBiases()
    settings = {"mode": mode, "wandb": config.model_dump(mode="json"), "recipe": dict(recipe)}
    if mirror.stdin is not None:
        _tell(mirror.stdin, json.dumps(settings).encode() + b"\n")
    return WeightsAndBiases(mirror, config.finish_within_s)


def wandb_mode(config: WandbConfig, environment: Mapping[str, str]) -> Mode:
    """`online`, `offline` or `disabled`: the environment's WANDB_MODE, else the recipe."""
    match environment.get("WANDB_MODE"):
        case None | "":
            return config.mode if config.enable else "disabled"
        case "online":
            return "online"
        case "offline" | "dryrun":
            return "offline"
        case _:
            return "disabled"


def has_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    import netrc

    host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_mirror(run_directory: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Its command line says nothing but where the run lies; all else goes through the pipe.

    A session of its own keeps a terminal's Ctrl-C away. Slurm signals every process of a step: what means "save and
    leave" to a trainer is blocked from the mirror's birth, as its trainer has still something to show.
    """
    package = Path(__file__).resolve().parents[2]
    kept = {name: value for name, value in environment.items() if name not in _NOT_ITS_OWN}
    kept.setdefault("WANDB_ERROR_REPORTING", "false")  # its own telemetry, which has nothing to do with the run
    search = os.pathsep.join(filter(None, (str(package), environment.get("PYTHONPATH"))))
    with _log_file(run_directory) as log:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
        try:
            mirror = subprocess.Popen(
                [sys.executable, "-m", "pathfm.track.wandb_mirror", str(run_directory.resolve())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                env={**kept, "PYTHONPATH": search},
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if mirror.stdin is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(mirror.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(mirror.stdin.fileno(), False)
    return mirror


def _log_file(run_directory: Path) -> IO[bytes]:
    folder = run_directory / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "mirror.log").open("ab")


def _tell(pipe: IO[bytes], message: bytes) -> None:
    """A mirror that is gone, or does not listen, hears nothing."""
    with contextlib.suppress(OSError):
        pipe.write(message)

"""W&B as a view of metrics.jsonl: one W&B run for a run's whole life, and never a reason for training to stop."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pathfm.files import write_text
from pathfm.log import get_logger
from pathfm.track.config import WandbConfig

_log = get_logger(__name__)
_SECONDS_TO_START = 60
Mode = Literal["online", "offline", "disabled"]


class WeightsAndBiases:
    """Every call may fail (no network, no key, a dead wandb process); then it warns once and falls silent."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, line: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(_flat(line), step=line["step"])
        except Exception as error:
            self._fall_silent(error)

    def alert(self, title: str, text: str) -> None:
        """A message to the people who follow the run."""
        if self._run is None:
            return
        try:
            self._run.alert(title=title, text=text, level="ERROR")
        except Exception as error:
            self._fall_silent(error)

    def finish(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._fall_silent(error)

    def _fall_silent(self, error: Exception) -> None:
        _log.warning("W&B stopped working (%s); training goes on, metrics.jsonl has everything", _one_line(error))
        self._run = None


def start_wandb(
    config: WandbConfig, run_directory: Path, recipe: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> WeightsAndBiases:
    """A W&B run for `run_directory`, or one that does nothing when W&B is not wanted or cannot start. Never prompts."""
    mode = wandb_mode(config, environment)
    if mode == "disabled":
        return WeightsAndBiases(None)
    if mode == "online" and not _has_key(environment):
        _log.warning("W&B has no key here (WANDB_API_KEY or ~/.netrc); it writes offline files for 'wandb sync'")
        mode = "offline"
    try:
        return WeightsAndBiases(_init(config, run_directory, recipe, mode))
    except Exception as error:
        _log.warning("W&B did not start (%s); training goes on, metrics.jsonl has everything", _one_line(error))
        return WeightsAndBiases(None)


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


def run_id(config: WandbConfig, run_directory: Path) -> str:
    """The same id whenever the same run is started: drawn at the first start and kept in the run."""
    kept = run_directory / "wandb_id"
    if config.resume_id:
        return config.resume_id
    if not kept.is_file():
        write_text(kept, secrets.token_hex(8))
    return kept.read_text(encoding="utf-8").strip()


def _init(config: WandbConfig, run_directory: Path, recipe: Mapping[str, Any], mode: Mode) -> Any:
    import wandb

    return wandb.init(
        project=config.project,
        entity=config.username,
        name=config.exp_name or run_directory.resolve().name,
        group=config.group,
        tags=list(config.tags),
        id=run_id(config, run_directory),
        resume="allow" if mode == "online" else None,
        dir=str(run_directory),
        config=dict(recipe),
        mode=mode,
        settings=wandb.Settings(init_timeout=_SECONDS_TO_START, silent=True, console="off", x_disable_stats=True),
    )


def _has_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    import netrc

    host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

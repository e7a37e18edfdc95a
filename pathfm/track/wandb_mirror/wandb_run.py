"""The one room that talks to W&B's client, in a process that nobody waits for."""

import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pathfm.files import write_text
from pathfm.log import get_logger
from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.followed import Export, Line
from pathfm.track.wandb_mirror.processes import end_children
from pathfm.track.wandb_mirror.rows import X_AXIS, Row
from pathfm.track.wandb_mirror.sent import Mode

_log = get_logger(__name__)
_SECONDS_TO_START = 60
_SECONDS_BETWEEN_ALERTS = 60  # of one title
_MILD = ("data-bound", "quarantine")  # alarms that do not threaten the run


class WandbRun:
    """A W&B run that is open. Every call may raise whatever the client raises."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def last_row(self) -> int:
        """That the server had when the run was opened; -1 for none."""
        return int(self._run.starting_step) - 1

    @property
    def folder(self) -> str:
        return Path(self._run.dir).parent.name

    @property
    def url(self) -> str | None:
        url: str | None = self._run.url
        return url

    def log(self, number: int, row: Row) -> None:
        pictures = {f"previews/{one.name}": image for one in row.pictures if (image := _image(one.path)) is not None}
        self._run.log(row.values | pictures, step=number, commit=True)

    def alert(self, alarm: Line) -> None:
        kind = alarm.get("alarm", "alarm")
        level = "WARN" if kind in _MILD else "ERROR"
        title = f"{self._run.name}: {kind}"
        text = f"step {alarm['step']:,}: {alarm.get('text', '')}"
        self._run.alert(title=title, text=text, level=level, wait_duration=_SECONDS_BETWEEN_ALERTS)

    def refer_to(self, export: Export) -> None:
        """As a version of the run's teacher: where the files lie, not what is in them."""
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-teacher", type="model", metadata={"of": export.alias})
        for file in export.files:
            artifact.add_reference(file.resolve().as_uri(), name=file.name, checksum=False)
        self._run.log_artifact(artifact, aliases=[export.alias])

    def describe(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def finish(self, exit_code: int) -> None:
        """Returns when everything was sent."""
        self._run.finish(exit_code=exit_code)


def open_run(config: WandbConfig, directory: Path, mode: Mode, back_to: int | None = None) -> WandbRun:
    """The one W&B run of a run's directory. `back_to`: the server is to forget the rows after this one."""
    import wandb

    number = run_id(config, directory)
    going_on: dict[str, Any] = {"resume": "allow"} if mode == "online" else {}
    if back_to is not None:
        going_on = {"resume_from": f"{number}?_step={back_to}"}
    _wait_for_a_new_name(directory / "wandb", number)
    run = wandb.init(
        project=config.project,
        entity=config.username,
        name=config.exp_name or directory.resolve().name,
        group=config.group,
        tags=list(config.tags),
        id=number,
        dir=str(directory),
        mode=mode,
        settings=wandb.Settings(
            init_timeout=_SECONDS_TO_START,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,  # of this process; the trainer's is in provenance.json
            x_disable_stats=True,
        ),
        **going_on,
    )
    run.define_metric("step")
    run.define_metric(X_AXIS)
    run.define_metric("*", step_metric=X_AXIS)
    return WandbRun(run)


def _image(picture: Path) -> Any:
    """None for a file that is none, or is gone."""
    import wandb

    try:
        return wandb.Image(str(picture), caption=picture.name)
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be shown: %s", picture, error)
        return None


def _wait_for_a_new_name(folder: Path, number: str) -> None:
    """The client names its folder by the second, and would write over that of a segment that was over at once."""
    while any(folder.glob(f"*{datetime.now():%Y%m%d_%H%M%S}-{number}")):
        time.sleep(0.1)


def abandon_client() -> None:
    """End the client's own process, whatever it waits for, so that a new one can be started."""
    import wandb

    end_children()
    try:
        wandb.teardown()
    except Exception:  # it says that the process is gone
        return


def run_id(config: WandbConfig, directory: Path) -> str:
    """The same id whenever the same run is started: drawn at the first start and kept in the run."""
    kept = directory / "wandb_id"
    if config.resume_id:
        return config.resume_id
    if not kept.is_file():
        write_text(kept, secrets.token_hex(8))
    return kept.read_text(encoding="utf-8").strip()

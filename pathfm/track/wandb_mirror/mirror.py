"""Shows a run's files to W&B while they grow, and what was missed before: `python -m pathfm.track.wandb_mirror RUN`.

The trainer starts it and holds its stdin: one line of settings, then a line whenever there is something new. The end
of stdin is the end of the segment, also when the trainer was killed. Nothing here can harm the run: it reads its files.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pathfm.log import get_logger, start_logging
from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.followed import FollowedExports, FollowedLines, FollowedPictures, Line
from pathfm.track.wandb_mirror.offline_files import rows_in
from pathfm.track.wandb_mirror.processes import end_children
from pathfm.track.wandb_mirror.rows import Row, left_out, rows_of, tuning_key
from pathfm.track.wandb_mirror.sent import Mode, Sent
from pathfm.track.wandb_mirror.wandb_run import WandbRun, abandon_client, open_run
from pathfm.track.weights_and_biases import EXIT_INCOMPLETE

_log = get_logger(__name__)
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_OF_REST = 0.2  # after a look, however often it is nudged
_SECONDS_TO_NEXT_START = (60.0, 600.0)  # after a failure, doubled up to the second
_SHARE_OF_TIME = 0.9  # of what the trainer waits at the end, so that it need not kill
Shown = Callable[[Sequence[Row]], Iterable[Row]]  # passes the rows on, and may say how far it is


class Mirror:
    """Sends what W&B does not have of a run's files."""

    def __init__(self, directory: Path, mode: Mode, config: WandbConfig, recipe: Mapping[str, Any]) -> None:
        self._directory = directory
        self._mode = mode
        self._config = config
        self._recipe = recipe
        self._wandb: WandbRun | None = None
        self._folder = directory / "wandb"
        self._place = _place_of(self._folder)

    @property
    def url(self) -> str | None:
        return self._wandb.url if self._wandb else None

    def look(self, shown: Shown = iter) -> None:
        """Send what is new. Raises what W&B's client raises; `abandon` then, and the next look begins anew."""
        if self._wandb is None:
            self._open()
        self._describe()
        metrics, tunings = self._metrics.look(), self._tunings.look()
        self._go_back_with(metrics)
        self._send_rows(metrics, tunings, shown)
        self._send_alarms()
        self._send_exports()

    def finish(self) -> None:
        """Returns when W&B has everything."""
        if self._wandb is not None:
            self._wandb.finish(0 if self._ended_well() else 1)
            self._sent.end()

    def is_of_another_run(self) -> bool:
        """The directory was emptied since, for a run that begins anew: what is in it now is not to be shown here."""
        return self._place is not None and self._place != _place_of(self._folder)

    def abandon(self) -> None:
        self._wandb = None
        abandon_client()

    def _open(self, back_to: int | None = None) -> None:
        sent = Sent(self._folder / "sent.jsonl")
        wandb = open_run(self._config, self._directory, self._mode, back_to)
        if back_to is not None:
            sent.forget_rows_after(back_to)
        elif self._mode == "online":
            sent.only_what_the_server_has(wandb.last_row)
        elif folder := sent.unfinished_folder():
            rows = rows_in(self._folder / folder)
            if rows is not None:
                sent.only_what_was_written(rows)
        sent.begin(self._mode, wandb.folder)
        self._sent, self._wandb = sent, wandb
        self._last_step = -1  # of the last line of metrics, in the order of the file
        self._described = -1  # the time of the provenance that W&B was told
        self._metrics = FollowedLines(self._directory / "metrics.jsonl")
        self._tunings = FollowedLines(self._directory / "results" / "tuning.jsonl")
        self._alarms = FollowedLines(self._directory / "alarms.jsonl")
        self._pictures = FollowedPictures(self._directory / "previews")
        self._exports = FollowedExports(self._directory / "exports")

    def _describe(self) -> None:
        assert self._wandb is not None
        path = self._directory / "provenance.json"
        if (written := _time_of(path)) != self._described:
            self._wandb.describe({**self._recipe, "provenance": _without_diffs(_read(path))})
            self._described = written

    def _go_back_with(self, metrics: Sequence[Line]) -> None:
        """After an accident a run goes back, and lines of steps that were sent come anew: W&B is to go back too."""
        step = gone_back_to(metrics, self._last_step, self._sent.metrics_to, self._sent.left_out)
        if step is None:
            return
        row = self._sent.row_of(step)
        if self._mode == "offline" or row is None or not self._goes_back_to(row):
            self._sent.keep_as_it_is(max(map(left_out, metrics)))
            _log.warning("the run went back to step %d; W&B keeps what it has of the steps after it", step)

    def _goes_back_to(self, row: int) -> bool:
        """Whether W&B could forget the rows after this one. What it was sent is then looked at from the beginning."""
        assert self._wandb is not None
        self._wandb.finish(0)
        try:
            self._open(back_to=row)
        except Exception as error:
            _log.warning("W&B cannot go back (%s)", one_line(error))
            abandon_client()
            self._open()
            return False
        return True

    def _send_rows(self, metrics: Sequence[Line], tunings: Sequence[Line], shown: Shown) -> None:
        if metrics:
            self._last_step = metrics[-1]["step"]
        sent, samples_per_step = self._sent, (self._recipe.get("train") or {}).get("global_batch_size")
        new_metrics = [line for line in metrics if line["step"] > sent.metrics_to]
        new_tunings = [
            line for line in tunings if line["step"] > sent.all_to and not sent.has("tuning", tuning_key(line))
        ]
        pictures = [
            picture
            for picture in self._pictures.look()
            if not sent.has("picture", picture.key) and (picture.step is None or picture.step > sent.all_to)
        ]
        rows = rows_of(new_metrics, new_tunings, pictures, max(self._last_step, 0), samples_per_step)
        for row in shown(list(rows)):
            self._send(row)

    def _send(self, row: Row) -> None:
        """Written down before it is given away: whether it arrived is asked when it matters."""
        assert self._wandb is not None
        number = max(row.step, self._sent.last_row + 1)
        self._sent.add(number, row.shown)
        self._wandb.log(number, row)

    def _send_alarms(self) -> None:
        assert self._wandb is not None
        for line in self._alarms.look():
            key = f"{line.get('time')} {line.get('alarm')}"
            if not self._sent.has("alarm", key):
                self._sent.add(self._sent.last_row, {"alarm": [key]})
                self._wandb.alert(line)

    def _send_exports(self) -> None:
        assert self._wandb is not None
        for export in self._exports.look() if self._config.log_teacher else ():
            if not self._sent.has("export", export.key):
                self._sent.add(self._sent.last_row, {"export": [export.key]})
                self._wandb.refer_to(export)

    def _ended_well(self) -> bool:
        ended = _read(self._directory / "exit.json")
        return isinstance(ended, dict) and ended.get("verdict") in ("done", "interrupted")


def gone_back_to(lines: Iterable[Line], last_step: int, sent_to: int, sent_left_out: int | None) -> int | None:
    """The step that a run went back to, when lines of steps that were sent have come anew.

    Such lines count more batches that are left out. `last_step`: that of the line before `lines`, -1 for none.
    """
    for line in lines:
        if sent_left_out is not None and left_out(line) > sent_left_out:
            return last_step if line["step"] <= sent_to else None
        last_step = line["step"]
    return None


@contextmanager
def only_mirror(directory: Path) -> Iterator[bool]:
    """Whether this process alone mirrors the run, as far as its file system has locks."""
    (directory / "wandb").mkdir(parents=True, exist_ok=True)
    with (directory / "wandb" / "mirror.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield True
        else:
            yield True


class _Trainer:
    """Whoever holds the other end of stdin."""

    def __init__(self, finish_within_s: float) -> None:
        self._finish_within_s = finish_within_s
        self._spoke, self._over = Event(), Event()
        Thread(target=self._listen, daemon=True).start()

    def is_over(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        """Until there may be something new."""
        self._spoke.wait(_SECONDS_BETWEEN_LOOKS)
        self._spoke.clear()
        self._over.wait(_SECONDS_OF_REST)

    def _listen(self) -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 4096):
                self._spoke.set()
        self._over.set()
        self._spoke.set()
        self._leave_in_time()

    def _leave_in_time(self) -> None:
        """Whatever the client waits for then: a server, a disk, its own process."""
        time.sleep(self._finish_within_s * _SHARE_OF_TIME)
        _log.warning("not everything was sent in time; the next start does so, or 'pathfm wandb-sync RUN'")
        end_children()
        os._exit(EXIT_INCOMPLETE)


def main(argv: Sequence[str] | None = None) -> int:
    (directory,) = map(Path, sys.argv[1:] if argv is None else argv)
    start_logging()
    try:
        settings = json.loads(_first_line())
    except ValueError:
        return EXIT_INCOMPLETE  # the trainer was gone before it said anything
    config = WandbConfig.model_validate(settings["wandb"])
    trainer = _Trainer(config.finish_within_s)
    while True:
        with only_mirror(directory) as alone:
            if alone:
                return _follow(Mirror(directory, settings["mode"], config, settings["recipe"]), trainer)
        time.sleep(_SECONDS_OF_REST)  # the mirror of a segment that was killed has still something to send


def _follow(mirror: Mirror, trainer: _Trainer) -> int:
    """Until the segment is over. A client that fails is started anew, after a while."""
    pause, _ = _SECONDS_TO_NEXT_START
    begin_at = -float("inf")
    while True:
        is_over = trainer.is_over()
        is_failing = time.monotonic() < begin_at
        try:
            if mirror.is_of_another_run():
                end_children()
                return EXIT_INCOMPLETE
            if not is_failing:
                mirror.look()
            if is_over:
                mirror.finish()
                return EXIT_INCOMPLETE if is_failing else 0
        except Exception as error:
            _log.warning("W&B failed (%s)", one_line(error))
            mirror.abandon()
            if is_over:
                return EXIT_INCOMPLETE
            begin_at, pause = time.monotonic() + pause, min(2 * pause, _SECONDS_TO_NEXT_START[1])
        trainer.wait()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _first_line() -> bytes:
    """Byte by byte: what follows is for who listens later."""
    line = b""
    while (byte := os.read(0, 1)) and byte != b"\n":
        line += byte
    return line


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _place_of(folder: Path) -> int | None:
    """A number that another folder of the same name does not have; None for none."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _time_of(path: Path) -> int:
    """0 for a file that is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _without_diffs(provenance: Any) -> Any:
    """Of every segment; a diff may be as long as the code."""
    if not isinstance(provenance, list):
        return []
    return [{key: value for key, value in segment.items() if key != "diff"} for segment in provenance]

"""Where what a run tells goes: JSON lines first, then whoever looks on (console, W&B)."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pathfm.log import get_logger
from pathfm.track.alarms import MOST_LINES, Alarm
from pathfm.track.console import Console
from pathfm.track.json_lines import JsonLines
from pathfm.track.weights_and_biases import WeightsAndBiases

_log = get_logger(__name__)
Judge = Callable[[Sequence[Mapping[str, Any]]], Iterable[Alarm]]  # the last lines of metrics, the newest last
_BETWEEN_ALARMS = timedelta(hours=1)  # of one kind


class Report:
    """Rank 0's reports; the other ranks are handed one that says nothing."""

    def __init__(
        self,
        lines: JsonLines | None,
        console: Console,
        wandb: WeightsAndBiases | None,
        tunings: JsonLines | None = None,
        alarms: JsonLines | None = None,
        judge: Judge = lambda lines: (),
    ) -> None:
        self._lines = lines
        self._console = console
        self._wandb = wandb or WeightsAndBiases()
        self._tunings = tunings
        self._alarms = alarms
        self._judge = judge
        self._last = self._last_lines()

    def step(self, completed: int) -> None:
        self._console.step(completed)

    def interval(self, line: Mapping[str, Any]) -> None:
        if self._lines is None:
            return
        self._lines.append(line)
        self._console.summary(line)
        self._wandb.nudge()
        self._last.append(line)
        for alarm in self._judge([*self._last]):
            self.alarm(int(line["step"]), alarm.kind, alarm.text)

    def tuning(self, line: Mapping[str, Any]) -> None:
        """What a tuning found."""
        if self._tunings is not None:
            self._tunings.append(line)
            self._console.tuning(line)
            self._wandb.nudge()

    def alarm(self, step: int, alarm: str, text: str) -> None:
        """Something that a person must hear of; of one kind at most once an hour, however often the run was started."""
        if self._alarms is None or not self._is_due(alarm):
            return
        _log.error("%s: %s", alarm, text)
        self._alarms.append({"step": step, "time": _now().isoformat(timespec="seconds"), "alarm": alarm, "text": text})
        self._wandb.nudge()

    def go_back(self, step: int) -> None:
        """Drop what was logged after `step`, which is about to be logged anew."""
        for lines in (self._lines, self._tunings):
            if lines is not None:
                lines.forget_after(step)
        self._last = self._last_lines()

    def flush(self) -> None:
        """Before a checkpoint: what it remembers must not be ahead of what was logged."""
        for lines in (self._lines, self._tunings):
            if lines is not None:
                lines.flush()

    def finish(self, at_most_s: float = math.inf) -> None:
        """The end of this process; W&B may take so long to hear the rest."""
        self._wandb.finish(at_most_s)

    def _last_lines(self) -> deque[Mapping[str, Any]]:
        return deque(self._lines.read()[-MOST_LINES:] if self._lines else (), MOST_LINES)

    def _is_due(self, alarm: str) -> bool:
        assert self._alarms is not None
        times = [line["time"] for line in self._alarms.read() if line.get("alarm") == alarm]
        try:
            return not times or _now() - datetime.fromisoformat(times[-1]) >= _BETWEEN_ALARMS
        except (TypeError, ValueError):  # not a time that we wrote
            return True


def _now() -> datetime:
    return datetime.now(UTC)

"""Where the metrics of a run go: JSON lines first, then whoever looks on (console, W&B)."""

from collections.abc import Mapping
from typing import Any

from pathfm.log import get_logger
from pathfm.track.console import Console
from pathfm.track.json_lines import JsonLines
from pathfm.track.weights_and_biases import WeightsAndBiases

_log = get_logger(__name__)


class Report:
    """Rank 0's reports; the other ranks are handed one that says nothing."""

    def __init__(self, lines: JsonLines | None, console: Console, wandb: WeightsAndBiases | None) -> None:
        self._lines = lines
        self._console = console
        self._wandb = wandb

    def step(self, completed: int) -> None:
        self._console.step(completed)

    def interval(self, line: Mapping[str, Any]) -> None:
        if self._lines is None:
            return
        self._lines.append(line)
        self._console.summary(line)
        if self._wandb is not None:
            self._wandb.log(line)

    def alarm(self, title: str, text: str) -> None:
        """Something that a person must hear of."""
        _log.error("%s: %s", title, text)
        if self._wandb is not None:
            self._wandb.alert(title, text)

    def go_back(self, step: int) -> None:
        """Drop what was logged after `step`, which is about to be logged anew."""
        if self._lines is not None:
            self._lines.forget_after(step)

    def flush(self) -> None:
        """Before a checkpoint: what it remembers must not be ahead of what was logged."""
        if self._lines is not None:
            self._lines.flush()

    def finish(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()

"""What a person sees while it trains: a live bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Step, loss, samples/s and time left. Silent on ranks other than the first."""

    def __init__(self, total_steps: int, first_step: int, speak: bool) -> None:
        self._total_steps = total_steps
        self._last_line = 0.0
        self._bar = _bar() if speak and sys.stderr.isatty() else None
        self._speak = speak
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step, summary="")

    def __enter__(self) -> "Console":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, completed: int) -> None:
        """After every step: moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=completed)

    def summary(self, line: Mapping[str, Any]) -> None:
        """After every log interval: the newest metrics."""
        text = _summary(line)
        if self._bar is not None:
            self._bar.update(self._task, summary=text)
        elif self._speak and (self._is_due() or line["step"] >= self._total_steps):
            print(f"step {line['step']:,}/{self._total_steps:,}  {text}  {self._time_left(line)}", file=sys.stderr)

    def tuning(self, line: Mapping[str, Any]) -> None:
        """After every tuning: the number that is tracked, and what else there is of its k."""
        if not self._speak:
            return
        text = f"step {line['step']:,}: {tuning_summary(line)}"
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if due := now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
        return due

    def _time_left(self, line: Mapping[str, Any]) -> str:
        seconds = (self._total_steps - line["step"]) * line["timing"]["seconds_per_step"]
        hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
        return f"{hours}h{minutes:02d} left" if hours else f"{minutes}m{int(seconds % 60):02d}s left"


def tuning_summary(line: Mapping[str, Any]) -> str:
    """`auc_20 0.8912 (teacher) 0.8877 (student), the best so far`."""
    standing = line["early_stopping"]
    metric = standing["metric"]
    values = " ".join(f"{line[network][metric]:.4f} ({network})" for network in ("teacher", "student"))
    if standing["best"] is None:
        return f"{metric} {values}; the teacher has not beaten its student yet"
    if standing["best_step"] == line["step"]:
        return f"{metric} {values}, the best so far"
    best = f"{metric} {values}; the best is {standing['best']:.4f}, of step {standing['best_step']:,}"
    patience = standing["patience"]
    return best + (f", {standing['without_improvement']} of {patience} tunings ago" if patience else "")


def _summary(line: Mapping[str, Any]) -> str:
    loss = f"{line['total_loss']:.4f}" if line["total_loss"] is not None else "not finite"
    return f"loss {loss}  lr {line['lr']:.2e}  {line['timing']['samples_per_second']:.1f} samples/s"


def _bar() -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[summary]}"),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
    )

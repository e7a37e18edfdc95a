"""Exactly what a checkpoint holds. What is not listed here is not resumed.

Random state is not: every draw follows from the seed and a position or step. Nor is the schedules' position, the
samples seen, the loader's place or W&B's step: they are the step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pathfm.data.order import BatchRange
from pathfm.ssl.method import Method
from pathfm.training.early_stopping import TuningState
from pathfm.training.loss_scale import LossScale
from pathfm.training.meter import Meter


class TrainingState:
    """Both networks with their centres, the optimiser's moments, the loss scale, and how far the run has come."""

    def __init__(self, method: Method, optimizer: Optimizer, loss_scale: LossScale) -> None:
        self.method = method
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.step = 0  # optimiser steps done
        self.passed_over: list[BatchRange] = []  # batches that are left out, after an accident
        self.times_gone_back = 0  # to a checkpoint, after an accident
        self.samples_skipped = 0
        self.accidents_in_a_row = 0  # steps without a finite loss or gradient
        self.steps_judged = 0  # of which it is known whether they were accidents
        self.tuning = TuningState()
        self.meter = Meter()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: the live ones, whole or this rank's share, to be copied from or filled in place."""
        return {
            **{f"method.{name}": tensor for name, tensor in self.method.state_dict().items()},
            **self._moments(),
            **{f"loss_scale.{name}": tensor for name, tensor in self.loss_scale.tensors().items()},
        }

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON knows it. All ranks call this together (the meter is read).

        Steps are judged before they are saved.
        """
        assert self.steps_judged == self.step, (self.steps_judged, self.step)
        return {
            "passed_over": [list(batches) for batches in self.passed_over],
            "times_gone_back": self.times_gone_back,
            "samples_skipped": self.samples_skipped,
            "accidents_in_a_row": self.accidents_in_a_row,
            "tuning": asdict(self.tuning),
            "meter": self.meter.state_dict(),
        }

    def take_up(self, step: int, values: Mapping[str, Any]) -> None:
        """What belongs to the tensors, which were filled before."""
        self.step = self.steps_judged = step
        self.passed_over = [(first, behind) for first, behind in values["passed_over"]]
        self.times_gone_back = values["times_gone_back"]
        self.samples_skipped = values["samples_skipped"]
        self.accidents_in_a_row = values["accidents_in_a_row"]
        self.tuning = TuningState(**values["tuning"])
        self.meter.load_state_dict(values["meter"])

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.method.student.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name, never by position."""
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self._named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

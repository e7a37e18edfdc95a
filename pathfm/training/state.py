"""Exactly what a checkpoint holds. What is not listed here is not resumed."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pathfm.checkpoint.store import DamagedCheckpoint, Snapshot, key_differences
from pathfm.errors import listed
from pathfm.ssl.method import Method
from pathfm.training.meter import Meter


class TrainingState:
    """Both networks with their centres, the optimiser's moments, the scaler, and how far the run has come."""

    def __init__(self, method: Method, optimizer: Optimizer, scaler: GradScaler) -> None:
        self.method = method
        self.optimizer = optimizer
        self.scaler = scaler
        self.step = 0  # optimiser steps done; the next batch is this one, so it is the loader's state too
        self.samples_skipped = 0
        self.steps_skipped_in_a_row = 0
        self.meter = Meter()

    def snapshot(self) -> Snapshot:
        """All ranks call this together (the meter is read)."""
        values = {
            "samples_skipped": self.samples_skipped,
            "steps_skipped_in_a_row": self.steps_skipped_in_a_row,
            "meter": self.meter.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return Snapshot(self.step, {**self._method_tensors(), **self._moments()}, values)

    def restore(self, snapshot: Snapshot) -> None:
        """Raises `DamagedCheckpoint` when the keys are not those of this state, naming the first few."""
        expected = {**self._method_tensors(), **self._moments()}
        if mistakes := sorted(key_differences(expected, snapshot.tensors)):
            raise DamagedCheckpoint(f"{len(mistakes)} keys differ: {listed(mistakes)}")
        self.method.load_state_dict(_below("method.", snapshot.tensors))
        self._load_moments(snapshot.tensors)
        self.step = snapshot.step
        self.samples_skipped = snapshot.values["samples_skipped"]
        self.steps_skipped_in_a_row = snapshot.values["steps_skipped_in_a_row"]
        self.meter.load_state_dict(snapshot.values["meter"])
        self.scaler.load_state_dict(snapshot.values["scaler"])

    def _method_tensors(self) -> dict[str, Tensor]:
        return {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}

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

    def _load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        moments = {
            index: _below(f"optimizer.{name}.", tensors) for index, (name, _) in enumerate(self._named_parameters())
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

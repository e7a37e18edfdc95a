"""Metrics of the steps since the last report: they stay on the device until someone wants to read them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pathfm.dist.collect import sum_over_ranks


class Meter:
    """Collects scalar tensors step by step; `read` costs one synchronisation, whatever the number of metrics."""

    def __init__(self) -> None:
        self._read: dict[str, list[float]] = {}
        self._own: list[dict[str, float]] = []
        self._on_device: list[dict[str, Tensor]] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        self._on_device.append(dict(metrics))

    def read(self) -> dict[str, list[float]]:
        """Every metric's value at each step since `clear`, the mean over ranks. All ranks call this together."""
        if self._on_device:
            names = list(self._on_device[0])
            rows = torch.stack([torch.stack([step[name].float() for name in names]) for step in self._on_device])
            for name, column in zip(names, _mean_over_ranks(rows).cpu().double().T.tolist(), strict=True):
                self._read.setdefault(name, []).extend(column)
            self._own += [dict(zip(names, row, strict=True)) for row in rows.cpu().double().tolist()]
            self._on_device.clear()
        return self._read

    def own(self, steps_ago: int) -> dict[str, float]:
        """This rank's values of a step that was read, 0 being the last one; {} when an earlier process took it."""
        return self._own[-1 - steps_ago] if steps_ago < len(self._own) else {}

    def clear(self) -> None:
        self._read = {}
        self._own = []
        self._on_device.clear()

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.read().items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.clear()
        self._read = {name: list(values) for name, values in state.items()}


def _mean_over_ranks(rows: Tensor) -> Tensor:
    ranks = sum_over_ranks(rows.new_ones(()))
    return sum_over_ranks(rows) / ranks

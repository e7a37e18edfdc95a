"""Metrics of the steps since the last report: they stay on the device until someone wants to read them."""

import math
from collections.abc import Mapping, Sequence

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
        """Every metric's value at each step since `clear`, the mean over ranks; nan where a step had none.

        All ranks call this together.
        """
        if self._on_device:
            names = list(dict.fromkeys(name for step in self._on_device for name in step))
            rows = torch.stack([_row(step, names) for step in self._on_device])
            of_all = dict(zip(names, _mean_over_ranks(rows).cpu().double().T.tolist(), strict=True))
            self._append(of_all, len(rows))
            self._own += [dict(zip(names, row, strict=True)) for row in rows.cpu().double().tolist()]
            self._on_device.clear()
        return self._read

    def _append(self, columns: Mapping[str, list[float]], number: int) -> None:
        before = max(map(len, self._read.values()), default=0)
        for name in dict.fromkeys([*self._read, *columns]):
            column = self._read.setdefault(name, [math.nan] * before)
            column.extend(columns.get(name, [math.nan] * number))

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


def _row(step: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    absent = torch.full_like(next(iter(step.values())), math.nan, dtype=torch.float32)
    return torch.stack([step.get(name, absent).float() for name in names])


def _mean_over_ranks(rows: Tensor) -> Tensor:
    ranks = sum_over_ranks(rows.new_ones(()))
    return sum_over_ranks(rows) / ranks

"""The tasks that frozen features are judged by: neighbours, a linear probe, logistic regression, and a few shots.

n samples   T test samples   b last blocks, the last one last   D width   C classes   A tries
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathfm.evaluate.folds import folds_by_group
from pathfm.evaluate.knn import few_shot_rows, knn_probabilities
from pathfm.evaluate.linear import LinearSettings, fit_linear_probe
from pathfm.evaluate.logistic import LogisticSettings, choose_c, fit_and_predict

Task = Literal["knn", "linear", "logistic"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class Split:
    """Features and labels of the samples that could be decoded."""

    cls: Float[np.ndarray, "n b D"]
    mean_patch: Float[np.ndarray, "n p D"]  # of the last block at least, the last one last
    labels: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]  # what may not be torn apart: a slide or a patient, or else each sample


@dataclass(frozen=True)
class TaskSettings:
    """What is judged, and how."""

    tasks: tuple[Task, ...] = TASKS
    ks: tuple[int, ...] = (10, 20, 100, 200)  # DINOv2's evaluation
    temperature: float = 0.07  # DINO, arXiv 2104.14294, appendix F
    n_per_class: tuple[int, ...] = ()  # few shots: so many labelled samples of each class, by kNN and logistic
    tries: int = 10  # drawings of them
    linear: LinearSettings = field(default_factory=LinearSettings)
    logistic: LogisticSettings = field(default_factory=LogisticSettings)
    folds: int = 5  # one of them is held out where settings are chosen
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What a task says of every test sample, and which settings it chose without looking at one."""

    tries: Float[np.ndarray, "A T C"]
    chosen: Mapping[str, Any]


def judge(
    query: Split, test: Split, num_classes: int, settings: TaskSettings, device: torch.device
) -> Iterator[tuple[str, Found]]:
    """(name, what was found) of one task after the other: knn_20, linear, logistic, knn_5_1_per_class, ..."""
    bench = _Bench(query, test, num_classes, settings, device)
    if "knn" in settings.tasks:
        yield from bench.knn()
    if "linear" in settings.tasks:
        yield "linear", bench.linear()
    if "logistic" in settings.tasks:
        yield "logistic", bench.logistic()
    for n_per_class in settings.n_per_class:
        yield from bench.few_shot(n_per_class)


@dataclass(frozen=True)
class _Bench:
    query: Split
    test: Split
    num_classes: int
    settings: TaskSettings
    device: torch.device

    def knn(self) -> Iterator[tuple[str, Found]]:
        for k, probabilities in self._neighbours(np.arange(len(self.query.labels))).items():
            yield f"knn_{k}", Found(probabilities[None], {})

    def linear(self) -> Found:
        labels = torch.from_numpy(self.query.labels).to(self.device)
        held_out = torch.from_numpy(self._folds() == 0).to(self.device)
        query, test = (_Kinds(split, self.device) for split in (self.query, self.test))
        probe = fit_linear_probe(query, labels, held_out, self.num_classes, self.settings.linear, self.settings.seed)
        return Found(probe.probabilities(test).cpu().numpy()[None], asdict(probe.choice))

    def logistic(self) -> Found:
        settings, query = self.settings.logistic, self.query
        chosen = choose_c(query.cls[:, -1], query.labels, self._folds(), settings)
        return Found(self._by_logistic(np.arange(len(query.labels)), chosen.c)[None], asdict(chosen))

    def few_shot(self, n_per_class: int) -> Iterator[tuple[str, Found]]:
        """By a few labelled samples of each class, drawn `tries` times; the same for every backbone."""
        settings = self.settings
        labels = torch.from_numpy(self.query.labels)
        drawn = [rows.numpy() for rows in few_shot_rows(labels, n_per_class, settings.tries, settings.seed)]
        if "knn" in settings.tasks:
            of_tries = [self._neighbours(rows) for rows in drawn]
            for k in of_tries[0]:
                tries = np.stack([of_try[k] for of_try in of_tries])
                yield f"knn_{k}_{n_per_class}_per_class", Found(tries, {})
        if "logistic" in settings.tasks:
            c = settings.logistic.few_shot_c
            tries = np.stack([self._by_logistic(rows, c, standardise_by=self.query.cls[:, -1]) for rows in drawn])
            yield f"logistic_{n_per_class}_per_class", Found(tries, {"c": c})

    def _neighbours(self, rows: Int[np.ndarray, " n"]) -> dict[int, Float[np.ndarray, "T C"]]:
        """Of every k that there are enough query samples for, or else of the nearest alone."""
        query, labels, test = (
            torch.from_numpy(array).to(self.device)
            for array in (self.query.cls[rows, -1], self.query.labels[rows], self.test.cls[:, -1].copy())
        )
        ks = [k for k in self.settings.ks if k <= len(rows)] or [1]
        found = knn_probabilities(query, labels, test, self.num_classes, ks, self.settings.temperature)
        return {k: probabilities.cpu().numpy() for k, probabilities in found.items()}

    def _by_logistic(
        self, rows: Int[np.ndarray, " n"], c: float, *, standardise_by: Float[np.ndarray, "n D"] | None = None
    ) -> Float[np.ndarray, "T C"]:
        found = fit_and_predict(
            self.query.cls[rows, -1],
            self.query.labels[rows],
            self.test.cls[:, -1],
            self.num_classes,
            c,
            standardise_by=standardise_by,
            max_iterations=self.settings.logistic.max_iterations,
        )
        return found.astype(np.float32)

    def _folds(self) -> Int[np.ndarray, " n"]:
        return folds_by_group(self.query.labels, self.query.groups, self.settings.folds, self.settings.seed)


class _Kinds(Mapping[str, Tensor]):
    """The features that a linear probe chooses from, each put together when it is looked at.

    DINOv2's: [CLS] of the last block or of the last four side by side, and with or without the mean patch of the last.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        self._split, self._device = split, device
        blocks = list(dict.fromkeys((1, split.cls.shape[1])))
        self._kinds = {
            f"cls_{number}{'+mean_patch' if has_patch else ''}": (number, has_patch)
            for number in blocks
            for has_patch in (False, True)
        }

    def __getitem__(self, name: str) -> Float[Tensor, "n width"]:
        number, has_patch = self._kinds[name]
        parts = [self._split.cls[:, -number:].reshape(len(self._split.labels), -1)]
        parts += [self._split.mean_patch[:, -1]] if has_patch else []
        return torch.from_numpy(np.concatenate(parts, axis=1)).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

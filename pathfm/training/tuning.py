"""kNN tuning: labelled tiles through student and teacher as they stand, on all ranks, between two steps.

Nothing of it reaches training: no gradient, no global random number, and every network is left as it was found.

N query samples   T test samples   D width   C classes
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pathfm.batch import normalise_crops
from pathfm.data.datasets import KNN
from pathfm.data.labelled import load_tiles, share_of
from pathfm.dist.collect import agree_any, decided_by_first, gather_lists, gather_uneven_rows
from pathfm.dist.env import Ranks
from pathfm.errors import listed
from pathfm.evaluate.bootstrap import Score
from pathfm.evaluate.knn import few_shot_rows, knn_probabilities
from pathfm.evaluate.metrics import scores
from pathfm.log import get_logger
from pathfm.parallel.apply import left_as_found
from pathfm.ssl.health import effective_rank
from pathfm.training.config import ALL_OF_A_CLASS, TuneConfig

_log = get_logger(__name__)


class ToldToLeave(Exception):
    """A rank was told to leave while all tuned; nothing was found."""


@dataclass(frozen=True)
class Rows:
    """Features of a split's samples. Of `query` every rank has all, of `test` its own."""

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, " N"]


@dataclass(frozen=True)
class Tuner:
    """Scores networks on `test` by their neighbours in `query`. All ranks have the same one."""

    query: KNN
    test: KNN
    config: TuneConfig
    side: int  # px
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype  # of matrix products
    seed: int
    max_pixels: int

    def run(self, networks: Mapping[str, nn.Module], go_on: Callable[[], bool]) -> dict[str, Any]:
        """What `tuning.jsonl` keeps: every network's numbers and their 95 % intervals, by name.

        `go_on` is asked on every rank before every batch. Raises `ToldToLeave` on all as soon as it is False on one.
        All ranks call this together.
        """
        started = time.perf_counter()
        with ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(left_as_found(network))
            query, left_out_of_query = self._features(networks, self.query, go_on, on_all=True)
            test, left_out_of_test = self._features(networks, self.test, go_on, on_all=False)
        found = {name: self._scores(query.pop(name), test.pop(name)) for name in networks}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what it took in other sizes than steps do goes back to the device
        return {
            "seconds": time.perf_counter() - started,
            **{name: {key: score.value for key, score in numbers.items()} for name, numbers in found.items()},
            "intervals": {
                name: {key: [score.low, score.high] for key, score in numbers.items() if score.low != score.high}
                for name, numbers in found.items()
            },
            "query": {"samples": len(self.query), "left_out": left_out_of_query},
            "test": {"samples": len(self.test), "left_out": left_out_of_test},
        }

    @torch.no_grad()  # not inference mode: weights that are gathered in it could not be trained with later
    def _features(
        self, networks: Mapping[str, nn.Module], dataset: KNN, go_on: Callable[[], bool], *, on_all: bool
    ) -> tuple[dict[str, Rows], int]:
        """[CLS] of every sample by each network, which see it together; and how many could not be decoded."""
        share = share_of(len(dataset), self.config.knn.batch_size, self.ranks.rank, self.ranks.world_size)
        tiles = load_tiles(dataset, share, self.side, num_workers=self.config.num_workers, max_pixels=self.max_pixels)
        features: dict[str, list[Tensor]] = {name: [] for name in networks}
        rows: list[Tensor] = []
        unreadable: list[str] = []
        for batch in tiles:
            if agree_any(not go_on()):
                raise ToldToLeave
            for name, network in networks.items():
                features[name].append(self._class_tokens(network, batch.images))
            rows.append(batch.rows)
            unreadable += batch.unreadable
        place = torch.device("cpu") if self.config.knn.gather_on_cpu else self.device
        gathered = gather_uneven_rows if on_all else _own
        of_all = gathered(torch.cat(rows).to(place))
        in_order = of_all.argsort()
        labels = torch.from_numpy(dataset.labels).to(place)[of_all[in_order]]
        found = {name: Rows(gathered(torch.cat(parts).to(place))[in_order], labels) for name, parts in features.items()}
        return found, self._left_out(dataset, unreadable)

    def _class_tokens(self, network: nn.Module, images: Tensor) -> Float[Tensor, "n D"]:
        """Where a rank has no sample left it sends one blank: sharded weights are gathered by all ranks or none."""
        sent = images if len(images) else images.new_zeros((1, 3, self.side, self.side))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = network([normalise_crops(sent.to(self.device, non_blocking=True))], heads=False)
        return output.cls[: len(images)].float()

    def _left_out(self, dataset: KNN, unreadable: list[str]) -> int:
        of_all = gather_lists(unreadable)
        if of_all and self.ranks.is_first:
            _log.warning(
                "tuning leaves out %d samples of split %s: %s", len(of_all), dataset.split, listed(of_all, at_most=3)
            )
        return len(of_all)

    def _scores(self, query: Rows, test: Rows) -> dict[str, Score]:
        """Every rank classifies its own samples; rank 0 scores them all, each once."""
        labels = gather_uneven_rows(test.labels)
        found: dict[str, Score] = {}
        for n_per_class in self.config.knn.n_per_class_list:
            tries = [
                self._scored(Rows(query.features[rows], query.labels[rows]), test, labels)
                for rows in self._drawings(query, n_per_class)
            ]
            for name, of_tries in _by_name(tries):
                found[f"{name}{self.config.knn.suffix(n_per_class)}"] = _mean(of_tries)
        rank = float(effective_rank(query.features))
        return {**found, "effective_rank": Score(rank, rank, rank)}

    def _drawings(self, query: Rows, n_per_class: int) -> Sequence[Tensor]:
        if n_per_class == ALL_OF_A_CLASS:
            return [torch.arange(len(query.labels), device=query.labels.device)]
        drawn = few_shot_rows(query.labels.cpu(), n_per_class, self.config.knn.n_tries, self.seed)
        return [rows.to(query.labels.device) for rows in drawn]

    def _scored(self, query: Rows, test: Rows, labels: Tensor) -> dict[str, Score]:
        knn = self.config.knn
        ks = knn.ks(len(query.labels))
        own = knn_probabilities(
            query.features, query.labels, test.features, len(self.query.class_names), ks, knn.temperature
        )
        of_all = {k: gather_uneven_rows(probabilities) for k, probabilities in own.items()}
        return decided_by_first(
            lambda: {
                f"{metric}_{k}": score
                for k, probabilities in of_all.items()
                for metric, score in scores(
                    probabilities, labels, resamples=self.config.bootstrap, seed=self.seed
                ).items()
            }
        )


def _own(rows: Tensor) -> Tensor:
    return rows


def _by_name(tries: Sequence[Mapping[str, Score]]) -> Iterator[tuple[str, list[Score]]]:
    for name in tries[0]:
        yield name, [found[name] for found in tries]


def _mean(tries: Sequence[Score]) -> Score:
    """Of several drawings: the mean of their values and of the ends of their intervals."""
    number = len(tries)
    return Score(
        sum(score.value for score in tries) / number,
        sum(score.low for score in tries) / number,
        sum(score.high for score in tries) / number,
    )

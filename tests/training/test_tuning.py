"""Tuning against scikit-learn, on one rank and several, and what it leaves behind: nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from pathfm.batch import normalise_crops
from pathfm.data.datasets import KNN
from pathfm.data.decode import decode
from pathfm.dist.env import Ranks
from pathfm.parallel.apply import mesh_of, parallelise
from pathfm.parallel.config import ParallelConfig, shard_size
from pathfm.ssl.dinov2 import DINOv2
from pathfm.training.config import KnnConfig, TuneConfig
from pathfm.training.tuning import ToldToLeave, Tuner
from tests.labelled import make_labelled
from tests.several_ranks import DEVICES, on_ranks, ranks_for
from tests.ssl.small import small_dinov2

SIDE = 84
KS = (1, 5, 20)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """37 query and 23 test samples, of another size than they are seen at."""
    return make_labelled(tmp_path_factory.mktemp("labelled"), query=(13, 14, 10), test=(9, 8, 6), side=100)


def method_of() -> DINOv2:
    method = small_dinov2(drop_path_rate=0.5)
    with torch.no_grad():
        for parameter in method.student.parameters():  # so that the two differ
            parameter.add_(0.02 * torch.randn_like(parameter))
    return method


def tuner_of(root: Path, ranks: Ranks, device: str = "cpu", **knn: Any) -> Tuner:
    config = TuneConfig(num_workers=0, bootstrap=100, knn=KnnConfig(**{"nb_knn": KS, "batch_size": 4, **knn}))
    sets = (KNN(root, "query"), KNN(root, "test"))
    return Tuner(*sets, config, SIDE, ranks, torch.device(device), torch.float32, seed=0, max_pixels=10**8)


def tune(root: Path, device: str = "cpu", strategy: str = "ddp", knn: dict[str, Any] | None = None) -> dict[str, Any]:
    several = dist.is_initialized()
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank()) if several else Ranks()
    method, place = method_of().to(device), torch.device(device)
    config = ParallelConfig(strategy=strategy)
    mesh = mesh_of(ranks.world_size, shard_size(config, ranks.world_size, 1), place)
    networks = {"teacher": method.teacher, "student": method.student}
    for name, network in networks.items():
        parallelise(network, network.layers(), config, mesh, torch.float32, trained=name == "student")
    return without_time(tuner_of(root, ranks, device, **(knn or {})).run(networks, lambda: True))


def without_time(found: dict[str, Any]) -> dict[str, Any]:
    assert found.pop("seconds") > 0
    return found


def tune_all(root: Path, device: str) -> list[dict[str, Any]]:
    return [tune(root, device, strategy) for strategy in ("ddp", "fsdp")]


def scored_by_scikit_learn(root: Path) -> dict[str, float]:
    """The teacher's numbers, by another way for each step: decode, resize, network, classifier, metrics."""
    from pathfm.data.labelled import at_side

    teacher = method_of().teacher.eval()
    features, labels = {}, {}
    for split in ("query", "test"):
        dataset = KNN(root, split)
        tiles = np.stack([at_side(decode(dataset.read_bytes(row)), SIDE) for row in range(len(dataset))])
        with torch.no_grad():
            crops = normalise_crops(torch.from_numpy(tiles).permute(0, 3, 1, 2))
            features[split] = teacher.backbone([crops])[0].cls.numpy()
        labels[split] = dataset.labels
    expected = {}
    for k in KS:
        knn = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        probabilities = knn.fit(features["query"], labels["query"]).predict_proba(features["test"])
        named = probabilities.argmax(1)
        expected[f"acc_{k}"] = accuracy_score(labels["test"], named)
        expected[f"balanced_acc_{k}"] = balanced_accuracy_score(labels["test"], named)
        expected[f"auc_{k}"] = roc_auc_score(labels["test"], probabilities, multi_class="ovr")
    return expected


def test_the_numbers_are_those_of_scikit_learn_each_sample_scored_once(root: Path):
    found, expected = tune(root), scored_by_scikit_learn(root)
    numbers = {name: value for name, value in found["teacher"].items() if name != "effective_rank"}
    assert numbers == pytest.approx(expected, abs=1e-6)
    assert found["student"] != found["teacher"]
    assert (found["query"], found["test"]) == ({"samples": 37, "left_out": 0}, {"samples": 23, "left_out": 0})
    for name, (low, high) in found["intervals"]["teacher"].items():
        assert low <= found["teacher"][name] <= high


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_finds_the_same_with_whole_and_with_sharded_weights(root: Path, ranks: int, device: str):
    alone = tune(root)
    for of_rank in on_ranks(ranks_for(device, ranks), tune_all, root, device, device=device):
        for found in of_rank:
            for network in ("teacher", "student"):
                assert found[network] == pytest.approx(alone[network], abs=1e-4)
            assert found["test"] == alone["test"]


def test_classes_that_one_split_lacks_are_never_predicted_or_not_scored(tmp_path):
    root = make_labelled(tmp_path, query=(13, 14, 0), test=(9, 0, 6), side=SIDE)
    found = tune(root, knn={"nb_knn": (5,)})["teacher"]
    test = KNN(root, "test")
    assert found["acc_5"] <= np.mean(test.labels == 0)  # a sample of the class that is not in query cannot be right
    assert found["balanced_acc_5"] == pytest.approx(found["acc_5"] * len(test) / 9 / 2)  # the mean of two classes
    assert 0 <= found["auc_5"] <= 1


def test_few_labelled_samples_are_drawn_several_times_and_averaged(root: Path):
    found = tune(root, knn={"nb_knn": (1, 5, 20), "n_per_class_list": (-1, 3), "n_tries": 4})["teacher"]
    assert {"acc_1_3_per_class", "auc_5_3_per_class"} <= found.keys()
    assert "acc_20_3_per_class" not in found  # nine samples in all
    tries = [value * 4 * 23 for name, value in found.items() if name == "acc_1_3_per_class"]
    assert tries[0] == pytest.approx(round(tries[0]))
    assert tune(root, knn={"nb_knn": (1,), "n_per_class_list": (3,), "n_tries": 4})["teacher"]["acc_1_3_per_class"] == (
        pytest.approx(found["acc_1_3_per_class"])
    )


def test_neighbours_can_be_sought_in_the_hosts_memory(root: Path):
    assert tune(root, knn={"gather_on_cpu": True}) == tune(root)


def test_random_numbers_modes_and_weights_are_as_they_were(root: Path):
    method = method_of()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    modes = {name: module.training for name, module in method.named_modules()}
    drawn = torch.get_rng_state()
    tuner_of(root, Ranks()).run({"teacher": method.teacher, "student": method.student}, lambda: True)
    assert torch.get_rng_state().equal(drawn)
    assert {name: module.training for name, module in method.named_modules()} == modes
    assert all(tensor.equal(before[name]) for name, tensor in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def left_when_told(root: Path) -> str:
    rank = dist.get_rank()
    asked = []

    def go_on() -> bool:
        asked.append(1)
        return not (rank == 1 and len(asked) == 2)

    try:
        tuner_of(root, Ranks(rank, 2, rank)).run({"teacher": method_of().teacher}, go_on)
    except ToldToLeave:
        return f"left after {len(asked)}"
    return "stayed"


def test_all_ranks_leave_as_soon_as_one_is_told_to(root: Path):
    assert on_ranks(2, left_when_told, root) == ["left after 2"] * 2


def test_a_damaged_tile_is_left_out_of_the_score_and_counted(root: Path, monkeypatch, caplog):
    whole = KNN.read_bytes
    monkeypatch.setattr(
        KNN, "read_bytes", lambda self, row: whole(self, row)[: 30 if (self.split, row) == ("test", 3) else None]
    )
    found = tune(root)
    assert found["test"] == {"samples": 23, "left_out": 1}
    assert found["teacher"]["acc_5"] * 22 == pytest.approx(round(found["teacher"]["acc_5"] * 22))
    assert "tuning leaves out 1 samples of split test: " in caplog.text

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pathfm.errors import UserError
from pathfm.evaluate.knn import few_shot_rows, knn_probabilities

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@given(
    st.sets(st.integers(1, 20), min_size=1, max_size=4), st.integers(2, 4), st.integers(1, 8), st.integers(0, 10_000)
)
@settings(max_examples=30, deadline=None)
def test_probabilities_of_every_k_equal_scikit_learns_weighted_neighbours(
    ks: set[int], classes: int, chunk: int, seed: int
):
    rng = np.random.default_rng(seed)
    query, test = rng.normal(size=(20, 6)), rng.normal(size=(7, 6))
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 20 - classes)])
    found = knn_probabilities(*map(torch.tensor, (query, labels, test)), classes, list(ks), chunk=chunk)
    assert list(found) == list(ks)
    for k in ks:
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = oracle.fit(query, labels).predict_proba(test)
        np.testing.assert_allclose(found[k].numpy(), expected, atol=1e-5)


def test_many_samples_equal_scikit_learns_too():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    labels, true = rng.integers(0, 5, 700), rng.integers(0, 5, 150)
    query, test = centres[labels] + rng.normal(size=(700, 16)), centres[true] + rng.normal(size=(150, 16))
    found = knn_probabilities(*map(torch.tensor, (query, labels, test)), 5, (10, 20, 200), temperature=0.5, chunk=64)
    for k, probabilities in found.items():
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.5))
        expected = oracle.fit(query, labels).predict_proba(test)
        np.testing.assert_allclose(probabilities.numpy(), expected, atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_of_equally_similar_samples_the_earlier_row_is_nearer(k: int, chunk: int, seed: int):
    """A brute-force oracle over vectors of which many are copies: similarities are 1, 0 or -1."""
    rng = np.random.default_rng(seed)
    kinds = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    query, test, labels = kinds[rng.integers(0, 4, 12)], kinds[rng.integers(0, 4, 5)], rng.integers(0, 3, 12)
    found = knn_probabilities(*map(torch.tensor, (query, labels, test)), 3, [k], chunk=chunk)[k]
    for given_one, probabilities in zip(test, found, strict=True):
        similarity = query @ given_one
        nearest = sorted(range(12), key=lambda row: (-similarity[row], row))[:k]
        votes = np.bincount(labels[nearest], np.exp(similarity[nearest] / 0.07), minlength=3)
        np.testing.assert_allclose(probabilities.numpy(), votes / votes.sum(), atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_copies_of_an_image_tie_wherever_they_stand(device: str):
    """Rows of a matrix product may differ in their last bits by their place in it; neighbours do not."""
    random = torch.Generator().manual_seed(0)
    one, test = torch.randn(1, 383, generator=random), torch.randn(37, 383, generator=random)
    labels = torch.tensor([2] + [1] * 300)
    found = knn_probabilities(one.expand(301, -1).to(device), labels.to(device), test.to(device), 3, [1], chunk=1)
    assert (found[1][:, 2] == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_what_the_cpu_finds():
    random = torch.Generator().manual_seed(0)
    query, test = torch.randn(500, 64, generator=random), torch.randn(200, 64, generator=random)
    labels = torch.randint(0, 4, (500,), generator=random)
    on_cpu = knn_probabilities(query, labels, test, 4, (1, 10, 50))
    torch.use_deterministic_algorithms(True)
    try:
        on_gpu = knn_probabilities(query.cuda(), labels.cuda(), test.cuda(), 4, (1, 10, 50))
        again = knn_probabilities(query.cuda(), labels.cuda(), test.cuda(), 4, (1, 10, 50))
    finally:
        torch.use_deterministic_algorithms(False)
    for k in on_cpu:
        torch.testing.assert_close(on_gpu[k].cpu(), on_cpu[k], atol=1e-5, rtol=0)
        assert on_gpu[k].equal(again[k])


def test_half_precision_features_and_autocast_change_nothing_but_the_features():
    random = torch.Generator().manual_seed(0)
    query, test = (torch.randn(n, 8, generator=random).bfloat16() for n in (30, 10))
    labels = torch.randint(0, 3, (30,), generator=random)
    expected = knn_probabilities(query.double(), labels, test.double(), 3, [5])[5]
    with torch.autocast("cpu", torch.bfloat16):
        assert knn_probabilities(query, labels, test, 3, [5])[5].equal(expected)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_broken_feature_resembles_none_and_disturbs_none(broken: float):
    query = torch.tensor([[1.0, 0.0], [broken, broken], [0.0, 1.0]])
    test = torch.tensor([[1.0, 0.1], [broken, broken]])
    found = knn_probabilities(query, torch.tensor([0, 1, 2]), test, 3, (1, 3))
    assert found[1].tolist() == [[1, 0, 0], [1, 0, 0]]  # the second is as near to all: the first row
    assert found[3][1].tolist() == pytest.approx([1 / 3] * 3)


def test_a_rank_without_test_samples_has_no_probabilities():
    found = knn_probabilities(torch.eye(3), torch.arange(3), torch.zeros(0, 3), 3, (1, 2))
    assert {k: tuple(probabilities.shape) for k, probabilities in found.items()} == {1: (0, 3), 2: (0, 3)}


def test_a_tiny_temperature_leaves_the_nearest_alone():
    found = knn_probabilities(torch.eye(2), torch.arange(2), torch.tensor([[1.0, 0.5]]), 2, [2], temperature=1e-6)
    assert found[2].tolist() == [[1, 0]]


@pytest.mark.parametrize("k", [0, 5])
def test_more_neighbours_than_samples_are_refused(k: int):
    with pytest.raises(UserError, match=f"k={k} neighbours are asked of 4 query samples"):
        knn_probabilities(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(1, 2), 2, (1, k))


LABELS = torch.tensor([2, 0, 0, 2, 5, 0, 2, 2, 0, 0])


def _counts(rows: Tensor) -> dict[int, int]:
    return {label: int((LABELS[rows] == label).sum()) for label in (0, 2, 5)}


def test_few_shots_have_some_rows_of_each_class_and_all_of_a_smaller_one():
    drawings = few_shot_rows(LABELS, 3, tries=20, seed=1)
    assert len(drawings) == 20
    for rows in drawings:
        assert _counts(rows) == {0: 3, 2: 3, 5: 1}
        assert rows.tolist() == sorted(set(rows.tolist()))
    assert len({tuple(rows.tolist()) for rows in drawings}) > 5
    assert torch.cat(drawings).unique().tolist() == list(range(10))  # every row has its turn


def test_few_shots_are_the_same_again_and_others_with_another_seed():
    def drawn(seed: int, tries: int) -> list[list[int]]:
        return [rows.tolist() for rows in few_shot_rows(LABELS, 2, tries, seed)]

    assert drawn(0, 9) == drawn(0, 9)
    assert drawn(0, 3) == drawn(0, 9)[:3]
    assert drawn(0, 9) != drawn(1, 9)


def test_a_larger_draw_has_the_samples_of_a_smaller_one():
    for few, many in zip(few_shot_rows(LABELS, 1, 5, 0), few_shot_rows(LABELS, 4, 5, 0), strict=True):
        assert set(few.tolist()) < set(many.tolist())


def test_the_draw_of_a_class_does_not_depend_on_other_classes():
    without_two = torch.where(LABELS == 2, 5, LABELS)
    for rows, others in zip(few_shot_rows(LABELS, 2, 5, 0), few_shot_rows(without_two, 2, 5, 0), strict=True):
        assert rows[LABELS[rows] == 0].equal(others[without_two[others] == 0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: few_shot_rows(LABELS, 2, 3, 0),
        lambda: knn_probabilities(torch.eye(3), torch.arange(3), torch.eye(3), 3, [2]),
    ],
)
def test_no_global_random_number_is_drawn(draw: Callable[[], object]):
    of_torch, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw()
    assert torch.get_rng_state().equal(of_torch)
    assert (np.random.get_state()[1] == of_numpy).all()

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from pathfm.errors import UserError
from pathfm.evaluate.knn import accuracy, knn_probabilities


@given(st.integers(1, 20), st.integers(2, 4), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_probabilities_equal_scikit_learns_weighted_neighbours(k: int, classes: int, seed: int):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(20, 6)), rng.normal(size=(7, 6))
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 20 - classes)])
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = oracle.fit(train, labels).predict_proba(test)
    found = knn_probabilities(*map(torch.tensor, (train, labels, test)), classes, k, chunk=3)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_accuracy_is_the_share_of_hits():
    assert accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_more_neighbours_than_samples_are_refused():
    with pytest.raises(UserError, match="k=5 neighbours are asked of 4"):
        knn_probabilities(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(1, 2), 2, 5)

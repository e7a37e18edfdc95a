import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.errors import UserError
from pathfm.evaluate.folds import folds_by_group


@given(st.integers(2, 40), st.integers(1, 4), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_group_lies_in_one_fold_and_no_fold_is_empty(num_groups: int, classes: int, folds: int, seed: int):
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(num_groups), rng.integers(0, num_groups, 100)])
    labels = rng.integers(0, classes, len(groups))
    found = folds_by_group(labels, groups, folds, seed)
    assert all(len(set(found[groups == group])) == 1 for group in range(num_groups))
    assert set(found) == set(range(min(folds, num_groups)))


def test_folds_have_even_shares_of_every_class():
    labels = np.repeat([0, 1, 2], [500, 100, 25])
    found = folds_by_group(labels, np.arange(len(labels)), 5, seed=0)
    assert [np.bincount(labels[found == fold]).tolist() for fold in range(5)] == [[100, 20, 5]] * 5


def test_slides_of_one_class_each_are_spread():
    labels = np.repeat(np.arange(10) % 2, 20)
    found = folds_by_group(labels, np.arange(10).repeat(20), 5, seed=0)
    assert [np.bincount(labels[found == fold]).tolist() for fold in range(5)] == [[20, 20]] * 5


def test_the_same_seed_deals_the_same_folds():
    labels = np.zeros(50, int)
    deal = [folds_by_group(labels, np.arange(50), 5, seed) for seed in (1, 1, 2)]
    assert (deal[0] == deal[1]).all()
    assert (deal[0] != deal[2]).any()


def test_one_group_cannot_be_held_out():
    with pytest.raises(UserError, match="all query samples are of one group"):
        folds_by_group(np.array([0, 1]), np.array([7, 7]), 5, seed=0)

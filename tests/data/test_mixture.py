from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.data.mixture import MixedOrder, Share, shares_of
from pathfm.data.order import SampleOrder
from pathfm.errors import UserError

COHORTS = {"alz": range(40), "gtex": range(40, 50), "tcga": range(50, 150)}


def stretches(sizes):
    ends = np.cumsum(sizes).tolist()
    return {f"cohort_{n}": range(end - size, end) for n, (size, end) in enumerate(zip(sizes, ends, strict=True))}


def mixed(weights, cap=None, seed=3, cohorts=COHORTS):
    return MixedOrder(shares_of(cohorts, weights, cap), seed)


def epochs_of(order, number):
    return order.samples(np.arange(number * order.epoch_size)).reshape(number, order.epoch_size)


@st.composite
def mixtures(draw):
    """Cohorts, weights of some of them, and a cap or none; at least one draw in an epoch."""
    cohorts = stretches(draw(st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any)))
    weight = st.one_of(st.just(0.0), st.floats(0.5, 4), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
    weights = draw(st.dictionaries(st.sampled_from(sorted(cohorts)), weight))
    cap = draw(st.none() | st.integers(1, 80))
    expected = {
        name: min(round(weights.get(name, 1.0) * len(rows)), len(rows) * 9 if cap is None else cap)
        for name, rows in cohorts.items()
    }
    valid = all(expected[name] or not rows or not weights.get(name, 1.0) for name, rows in cohorts.items())
    return cohorts, weights, cap, expected, valid and any(expected.values())


@given(mixtures(), st.integers(0, 2**63 - 1), st.integers(1, 7))
def test_every_epoch_takes_its_share_of_every_cohort_and_rows_are_drawn_equally_often(mixture, seed, num_epochs):
    cohorts, weights, cap, expected, valid = mixture
    if not valid:
        with pytest.raises(UserError, match=r"train\.cohorts"):
            shares_of(cohorts, weights, cap)
        return
    order = mixed(weights, cap, seed, cohorts)
    assert order.epoch_size == sum(expected.values())
    epochs = epochs_of(order, num_epochs)
    for name, rows in cohorts.items():
        assert all(np.isin(epoch, rows).sum() == expected[name] for epoch in epochs)
        drawn = Counter(epochs.ravel().tolist())
        counts = [drawn[row] for row in rows]
        assert sum(counts) == num_epochs * expected[name]
        assert not counts or max(counts) - min(counts) <= 1


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**63 - 1),
    positions=st.lists(st.integers(0, 10**12), max_size=30),
)
def test_with_weights_of_one_it_is_the_order_without_weights(sizes, seed, positions):
    positions = np.array(positions, np.int64)
    order = mixed(dict.fromkeys(stretches(sizes), 1.0), None, seed, stretches(sizes))
    assert order.samples(positions).tolist() == SampleOrder(sum(sizes), seed).samples(positions).tolist()


@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_a_position_means_the_same_sample_alone_and_in_any_company(positions):
    order = mixed({"alz": 0.3, "gtex": 2.5})
    alone = [int(order.samples(np.array([position]))[0]) for position in positions]
    assert order.samples(np.array(positions, np.int64)).tolist() == alone


def test_weights_say_how_often_each_sample_comes():
    order = mixed({"alz": 0.5, "gtex": 2, "tcga": 0})
    assert order.epoch_size == 20 + 20
    counts = np.bincount(epochs_of(order, 2).ravel(), minlength=150)
    assert counts[:40].tolist() == [1] * 40
    assert counts[40:50].tolist() == [4] * 10
    assert not counts[50:].any()


def test_a_cap_bounds_what_a_cohort_gives():
    epochs = epochs_of(mixed({"gtex": 3.0}, cap=25), 4)
    assert [[int(np.isin(epoch, rows).sum()) for rows in COHORTS.values()] for epoch in epochs] == [[25, 25, 25]] * 4
    assert np.bincount(epochs.ravel(), minlength=150)[50:].tolist() == [1] * 100


def test_what_an_epoch_takes_is_spread_over_the_cohort():
    """Tenths of a cohort of 10,000 rows that is read in order would be ten of its slides, not all of them."""
    first = epochs_of(mixed({"a": 0.1}, cohorts={"a": range(10_000)}), 1)[0]
    assert np.histogram(first, bins=10, range=(0, 10_000))[0].min() > 60


def test_cohorts_come_shuffled_together():
    epoch = epochs_of(mixed({"alz": 2.0}), 1)[0]
    parts = [int(np.isin(part, COHORTS["alz"]).sum()) for part in np.array_split(epoch, 4)]
    assert min(parts) > 8
    assert sum(parts) == 80


def test_cohorts_and_seeds_are_drawn_independently():
    twins = {"a": range(1000), "b": range(1000, 2000)}
    order = mixed(dict.fromkeys(twins, 0.5), cohorts=twins)
    epoch = epochs_of(order, 1)[0]
    of_a, of_b = epoch[epoch < 1000], epoch[epoch >= 1000] - 1000
    assert abs(len(set(of_a.tolist()) & set(of_b.tolist())) - 250) < 60
    other = epochs_of(mixed(dict.fromkeys(twins, 0.5), seed=4, cohorts=twins), 1)[0]
    assert abs(len(set(epoch.tolist()) & set(other.tolist())) - 500) < 90


def test_the_order_of_a_mixture_never_changes():
    """Recorded: a new order would silently restart every run that is under way."""
    order = mixed({"a": 0.5, "b": 1.5}, cohorts={"a": range(6), "b": range(6, 10)}, seed=0)
    assert order.samples(np.arange(18)).tolist() == [5, 7, 9, 6, 4, 8, 3, 9, 7, 8, 6, 7, 9, 1, 8, 0, 2, 6]


def test_a_thousand_million_samples_of_many_cohorts_cost_no_more_than_a_few():
    """A table of all rows would be 8 GB; positions up to 2^62 do not overflow."""
    cohorts = {f"cohort_{n}": range(n * 10**7, (n + 1) * 10**7) for n in range(100)}
    order = mixed({"cohort_3": 0.3, "cohort_7": 12.5}, cap=10**8, cohorts=cohorts)
    assert order.epoch_size == 98 * 10**7 + 3 * 10**6 + 10**8
    samples = order.samples(np.arange(2**62, 2**62 + 3000))
    assert samples.min() >= 0
    assert samples.max() < 10**9
    assert len(set((samples // 10**7).tolist())) > 90


def test_the_stretches_of_cohorts_without_samples_are_left_out():
    assert shares_of({"a": range(3), "none": range(3, 3), "b": range(3, 5)}, {"b": 0}) == (Share("a", 0, 3, 3),)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"tgca": 2.0}, r"has no cohort 'tgca'; did you mean 'tcga'\?; there are: alz, gtex, tcga"),
        ({"alz": 0, "gtex": 0, "tcga": 0}, "leaves no cohort"),
        ({"gtex": 0.01}, r"weight 0.01, cohort gtex gives none of its 10 samples to an epoch; weigh it 0.1 or more"),
    ],
)
def test_mistakes_in_the_weights_are_named(weights, message):
    with pytest.raises(UserError, match=message):
        shares_of(COHORTS, weights)

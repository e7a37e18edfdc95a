from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.data.order import BatchPlan, SampleOrder, batch_of_step, merged
from pathfm.errors import UserError


@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_every_sample_once(num_samples, seed, epoch):
    positions = np.arange(num_samples) + epoch * num_samples
    assert sorted(SampleOrder(num_samples, seed).samples(positions)) == list(range(num_samples))


@pytest.mark.parametrize(("num_samples", "num_orders"), [(1, 1), (2, 2), (3, 6), (4, 24)])
def test_the_smallest_sets_come_in_all_their_orders(num_samples, num_orders):
    order = SampleOrder(num_samples, 0).samples(np.arange(num_samples * 200)).reshape(200, num_samples)
    assert len({tuple(epoch) for epoch in order}) == num_orders


@given(positions=st.lists(st.integers(0, 5000), max_size=50), num_samples=st.integers(1, 700))
def test_a_position_means_the_same_sample_alone_and_in_any_company(positions, num_samples):
    order = SampleOrder(num_samples, 3)
    alone = [int(order.samples(np.array([position]))[0]) for position in positions]
    assert order.samples(np.array(positions, dtype=np.int64)).tolist() == alone


def test_resume_continues_with_the_very_next_sample():
    whole = SampleOrder(1000, 7).samples(np.arange(2500))
    assert (SampleOrder(1000, 7).samples(np.arange(1234, 2500)) == whole[1234:]).all()


def test_a_thousand_million_samples_need_no_memory():
    samples = SampleOrder(10**9, 0).samples(np.arange(3 * 10**9 - 5000, 3 * 10**9 + 5000))
    assert samples.min() >= 0
    assert samples.max() < 10**9
    assert len(set(samples[:5000])) == len(set(samples[5000:])) == 5000


def test_seeds_and_epochs_give_other_orders():
    positions = np.arange(1000)
    first = SampleOrder(1000, 0).samples(positions)
    for other in (SampleOrder(1000, 1).samples(positions), SampleOrder(1000, 0).samples(positions + 1000)):
        assert (first == other).sum() < 10  # one fixed match is expected of two random orders


def test_the_order_looks_shuffled():
    """Against what independent uniform permutations give, in standard deviations of 400 epochs."""
    num_samples, num_epochs = 257, 400
    order = SampleOrder(num_samples, 11).samples(np.arange(num_samples * num_epochs)).reshape(num_epochs, num_samples)
    place = np.arange(num_samples)
    correlations = np.array([np.corrcoef(place, epoch)[0, 1] for epoch in order])
    assert abs(correlations.mean()) < 4 / np.sqrt(num_samples * num_epochs)
    rises = (np.diff(order, axis=1) > 0).mean()
    assert abs(rises - 0.5) < 4 * np.sqrt(1 / 12 / num_samples / num_epochs)
    neighbours = (np.abs(np.diff(order, axis=1)) == 1).sum(axis=1).mean()  # 2 (N - 1) / N expected, variance about 2
    assert abs(neighbours - 2) < 4 * np.sqrt(2 / num_epochs)
    fixed_points = (order == place).sum(axis=1).mean()  # 1 expected, variance 1
    assert abs(fixed_points - 1) < 4 / np.sqrt(num_epochs)
    quarters = np.histogram2d(np.tile(place, num_epochs) * 4 // 257, order.ravel() * 4 // 257, bins=4)[0]
    expected = num_samples * num_epochs / 16
    assert np.abs(quarters / expected - 1).max() < 0.05


def test_the_order_of_a_seed_never_changes():
    """Recorded: a new order would silently restart every run that is under way."""
    recorded = [0, 6, 8, 4, 1, 5, 2, 3, 7, 9, 6, 7, 5, 8, 1, 4, 9, 0, 3, 2]
    assert SampleOrder(10, 0).samples(np.arange(20)).tolist() == recorded


@given(rank_batch=st.integers(1, 16), world_size=st.integers(1, 8), step=st.integers(0, 10**12))
def test_ranks_share_the_global_batch_in_order(rank_batch, world_size, step):
    batch = rank_batch * world_size
    shares = [BatchPlan(batch, rank, world_size).positions(step) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == list(range(step * batch, (step + 1) * batch))


@given(rank_batch=st.integers(1, 4), parts=st.integers(1, 4), world_size=st.integers(1, 4), number=st.integers(0, 99))
def test_the_parts_of_a_ranks_share_are_the_share_in_order(rank_batch, parts, world_size, number):
    whole = BatchPlan(rank_batch * parts * world_size, world_size - 1, world_size)
    in_parts = BatchPlan(whole.global_batch_size, whole.rank, world_size, parts)
    joined = np.concatenate([in_parts.positions(number, part) for part in range(parts)])
    assert joined.tolist() == whole.positions(number).tolist()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=5))
def test_steps_take_every_batch_that_is_not_left_out_in_order(ranges):
    left_out = [(first, first + length) for first, length in ranges]
    expected = [batch for batch in range(80) if not any(first <= batch < behind for first, behind in left_out)]
    assert [batch_of_step(step, left_out) for step in range(len(expected))] == expected
    apart = merged(left_out)
    assert all(one[1] < other[0] for one, other in pairwise(apart))


@pytest.mark.parametrize(("batch", "nearest"), [(100, "99 or 102"), (2, "3"), (0, "3")])
def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can(batch, nearest):
    with pytest.raises(UserError, match=f"batch of {batch} cannot be shared equally by 3 ranks; take {nearest}$"):
        BatchPlan(batch, 0, 3)


def test_nothing_cannot_be_ordered():
    with pytest.raises(UserError, match="no samples"):
        SampleOrder(0, 0)

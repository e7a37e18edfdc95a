import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pathfm.data.permutation import keys_of, permuted, stepped


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 2**63 - 1))
def test_every_domain_is_permuted_by_its_own_key_whatever_else_is_asked_for(sizes, seed):
    """All values of several domains at once, in any mixture, against each domain alone."""
    keys = keys_of(seed, [("domain", number) for number in range(len(sizes))])
    which = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate([np.arange(size, dtype=np.uint64) for size in sizes])
    shuffled = np.random.default_rng(0).permutation(len(values))
    together = np.empty_like(values)
    together[shuffled] = permuted(
        values[shuffled], np.array(sizes, np.uint64)[which[shuffled]], keys[:, which[shuffled]]
    )
    for number, size in enumerate(sizes):
        alone = permuted(np.arange(size, dtype=np.uint64), np.array([size], np.uint64), keys[:, [number]])
        assert sorted(alone.tolist()) == list(range(size))
        assert together[which == number].tolist() == alone.tolist()


@given(st.integers(2**60, 2**62), st.integers(0, 100))
def test_the_largest_domains_stay_within_their_bounds_and_collide_nowhere(size, seed):
    places = np.arange(size - 500, size, dtype=np.uint64)
    found = permuted(places, np.array([size], np.uint64), keys_of(seed, [("domain", 0)]))
    assert found.max() < size
    assert len(set(found.tolist())) == 500


def test_seeds_names_and_numbers_give_keys_of_their_own():
    columns = [keys_of(seed, [(name, number)]).tobytes() for seed in (0, 1) for name in "ab" for number in (0, 1)]
    assert len(set(columns)) == 8


def test_each_step_of_a_series_is_another_permutation():
    keys = keys_of(0, [("series", 0)])
    size, places = np.array([1000], np.uint64), np.arange(1000, dtype=np.uint64)
    series = [permuted(places, size, stepped(keys, np.array([step], np.uint64))) for step in range(20)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in series)
    agreements = [(one == other).sum() for one in series for other in series if one is not other]
    assert max(agreements) < 10  # one is expected of two random orders

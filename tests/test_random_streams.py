import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pathfm.random_streams import derived_seed, stream

positions = st.integers(0, 2**62)


@given(st.integers(0, 2**40), positions, st.text(max_size=10))
def test_the_same_name_draws_the_same_numbers(seed: int, position: int, name: str):
    assert np.array_equal(stream(seed, position, name).random(5), stream(seed, position, name).random(5))


@given(st.integers(0, 2**40), positions)
def test_neighbouring_positions_seeds_and_names_draw_other_numbers(seed: int, position: int):
    draws = [
        stream(seed, position, "crop").random(),
        stream(seed, position + 1, "crop").random(),
        stream(seed + 1, position, "crop").random(),
        stream(seed, position, "mask").random(),
    ]
    assert len(set(draws)) == 4


def test_a_stream_does_not_run_into_the_next_position():
    long = stream(0, 7, "crop").random(100_000)
    assert not np.isin(stream(0, 8, "crop").random(1000), long).any()


def test_draws_over_positions_are_uniform():
    values = np.array([stream(3, position, "crop").random() for position in range(4000)])
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


def test_the_numpy_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    stream(0, 0, "crop").random(10)
    derived_seed(0, 0, "x")
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_a_derived_seed_fits_what_torch_takes():
    seeds = {derived_seed(0, step, "drop path") for step in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)

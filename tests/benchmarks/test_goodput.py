"""The formula against a simulation, the simulation against a run that is walked through step by step."""

import math

import numpy as np
import pytest
from goodput import (
    Conditions,
    after_interruption,
    best_every_steps,
    daly_interval_s,
    exponential_draws,
    goodput,
    nearly_best,
    seconds_to,
    simulated_goodput,
    simulated_walls,
    young_interval_s,
)
from hypothesis import given, settings
from hypothesis import strategies as some

from pathfm.random_streams import stream

HOUR = 3600.0
QUIET = Conditions(step_s=0.36, stall_s=0.5, durable_s=20, start_s=180)
SETTINGS = {
    "never interrupted": (QUIET, 300),
    "sudden, one node": (Conditions(0.36, 0.5, 20, 180, sudden_per_s=1 / (24 * HOUR)), 500),
    "sudden, many nodes, a queue": (Conditions(0.4, 0.5, 20, 180, 600, sudden_per_s=32 / (24 * HOUR)), 150),
    "sudden, seldom saved": (Conditions(0.4, 2, 60, 300, sudden_per_s=1 / 900), 1500),
    "sudden, saved before the last save is durable": (Conditions(0.5, 1, 40, 60, sudden_per_s=1 / 1200), 20),
    "sudden, before the first save more often than not": (Conditions(1, 5, 30, 100, sudden_per_s=1 / 200), 120),
    "with notice": (Conditions(0.36, 0.5, 20, 180, 300, warned_per_s=32 / (24 * HOUR)), 1000),
    "with notice, large stall": (Conditions(2.0, 30, 60, 180, warned_per_s=1 / (4 * HOUR)), 200),
    "both, large stall": (Conditions(2.0, 30, 60, 180, 0, 1 / (4 * HOUR), 1 / (4 * HOUR)), 200),
    "both": (Conditions(0.4, 0.5, 20, 180, 60, 1 / (8 * HOUR), 1 / HOUR), 400),
}
rates = some.floats(1e-7, 1e-2)
seconds = some.floats(0, 200)
runs = some.builds(Conditions, some.floats(0.05, 5), seconds, seconds, seconds, seconds, rates, rates | some.just(0.0))
intervals = some.integers(1, 3000)


@pytest.mark.parametrize("name", SETTINGS)
def test_formula_and_simulation_agree(name):
    run, every_steps = SETTINGS[name]
    found = simulated_goodput(run, every_steps, stream(0, 0, name))
    exact = goodput(run, every_steps)
    assert found.half_width <= 0.01
    is_mixed = run.sudden_per_s > 0 < run.warned_per_s
    left_out = (run.interruptions_per_s * run.period_s(every_steps)) ** 2 / 12 if is_mixed else 1e-12
    assert (
        abs(found.mean - exact) <= 1.6 * found.half_width + left_out
    )  # 1.6 x 1.96 deviations: one in 600 goes past it


def test_an_interval_of_the_simulation_holds_the_formula_19_times_in_20():
    run, every_steps = SETTINGS["sudden, many nodes, a queue"]
    exact = goodput(run, every_steps)
    held = [
        simulated_goodput(run, every_steps, stream(0, number, "trial"), num_runs=100, interruptions=50).holds(exact)
        for number in range(200)
    ]
    assert 0.88 <= np.mean(held) <= 0.99


@given(runs, intervals)
def test_goodput_is_a_share(run, every_steps):
    assert 0 <= goodput(run, every_steps) <= 1


@given(some.floats(0.05, 5), seconds, seconds, seconds, rates, some.floats(1.01, 100), intervals)
def test_more_frequent_losses_never_help(step, stall, durable, start, rate, times, every_steps):
    seldom = Conditions(step, stall, durable, start, sudden_per_s=rate)
    often = Conditions(step, stall, durable, start, sudden_per_s=rate * times)
    assert goodput(often, every_steps) <= goodput(seldom, every_steps) * (1 + 1e-9)


@given(runs, intervals, some.sampled_from(["stall_s", "durable_s", "start_s", "queue_s"]))
def test_nothing_that_takes_longer_helps_a_run_without_notice(run, every_steps, what):
    sudden = {**vars(run), "warned_per_s": 0.0}
    slower = {**sudden, what: sudden[what] + 10}
    assert goodput(Conditions(**slower), every_steps) <= goodput(Conditions(**sudden), every_steps) * (1 + 1e-9)


@pytest.mark.parametrize("every_steps", [50, 500, 5000])
def test_notice_helps(every_steps):
    sudden = Conditions(0.36, 0.5, 20, 180, 300, sudden_per_s=1 / HOUR)
    warned = Conditions(0.36, 0.5, 20, 180, 300, warned_per_s=1 / HOUR)
    assert goodput(warned, every_steps) > goodput(sudden, every_steps)


@given(runs, intervals)
def test_rare_interruptions_come_near_to_none(run, every_steps):
    rare = Conditions(run.step_s, run.stall_s, run.durable_s, run.start_s, run.queue_s, 1e-10, 1e-10)
    none = Conditions(run.step_s, run.stall_s, run.durable_s, run.start_s, run.queue_s)
    assert goodput(rare, every_steps) == pytest.approx(goodput(none, every_steps), rel=1e-4)


def test_without_queue_notice_and_time_to_durable_it_is_dalys_complete_model():
    step, stall, start, mean = 0.5, 300.0, 600.0, 6 * HOUR
    for every_steps in (100, 1000, 10000):
        work = every_steps * step
        times_as_long = mean / work * math.exp(start / mean) * (math.exp((work + stall) / mean) - 1)
        run = Conditions(step, stall, 0, start, sudden_per_s=1 / mean)
        assert goodput(run, every_steps) == pytest.approx(1 / times_as_long)


@pytest.mark.parametrize(("mean_hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_dalys_interval_is_that_of_his_figures(mean_hours, minutes):
    assert daly_interval_s(5 * 60, mean_hours * HOUR) / 60 == pytest.approx(minutes, rel=0.01)


def test_a_save_that_costs_more_than_a_run_lives_is_not_worth_it():
    assert daly_interval_s(100, 50) == 50


@pytest.mark.parametrize("durable", [0, 10])
@pytest.mark.parametrize("mean_hours", [1, 10, 1000])
def test_the_best_interval_is_near_dalys(mean_hours, durable):
    run = Conditions(0.1, 2.0, durable, 180, 600, sudden_per_s=1 / (mean_hours * HOUR))
    best = best_every_steps(run) * run.step_s
    assert best == pytest.approx(daly_interval_s(2.0, mean_hours * HOUR), rel=0.01)
    assert best == pytest.approx(young_interval_s(2.0, mean_hours * HOUR), rel=0.05)


@settings(max_examples=30)
@given(runs)
def test_no_interval_is_better_than_the_best(run):
    best = best_every_steps(run, most=20_000)
    assert goodput(run, np.arange(1, 20_001)).max() <= goodput(run, best) * (1 + 1e-9)


def test_restart_and_queue_do_not_move_the_best_interval():
    quick = Conditions(0.36, 0.5, 20, 10, 0, sudden_per_s=1 / HOUR)
    slow = Conditions(0.36, 0.5, 20, 900, 7200, sudden_per_s=1 / HOUR)
    assert best_every_steps(quick) == best_every_steps(slow)


def test_whoever_always_gets_notice_need_not_save():
    assert best_every_steps(Conditions(0.36, 0.5, 20, 180, warned_per_s=1 / HOUR), most=100_000) == 100_000


def test_around_the_best_interval_little_is_lost():
    run = Conditions(0.36, 0.5, 20, 180, sudden_per_s=1 / HOUR)
    fewest, most = nearly_best(run, lost=0.005)
    best = best_every_steps(run)
    assert fewest < best < most
    for steps, inside in {fewest: True, most: True, fewest * 0.9: False, most * 1.1: False}.items():
        assert (goodput(run, steps) >= 0.995 * goodput(run, best)) == inside


# ---- the simulation


def walked(run, every_steps, first_step, until):
    """Step by step with a stopwatch: when which step was durable; when every step began and ended."""
    now, step, on_its_way, durable, steps = run.start_s, first_step, -math.inf, [(-math.inf, first_step)], []
    while now <= until:
        steps.append((now, now + run.step_s, step + 1))
        now, step = now + run.step_s, step + 1
        if step % every_steps == 0:
            now = max(now, on_its_way) + run.stall_s
            on_its_way = now + run.durable_s
            durable.append((on_its_way, step))
    return durable, steps


lives = {
    "step_s": some.floats(0.3, 2),
    "stall_s": some.floats(0, 5),
    "durable_s": some.floats(0, 30),
    "start_s": some.floats(0, 5),
}
some_lives = some.builds(Conditions, **lives)


@given(some_lives, some.integers(1, 12), some.integers(0, 40), some.floats(0, 60))
def test_a_lost_node_leaves_the_newest_durable_checkpoint(run, every_steps, first_step, lived):
    durable, _ = walked(run, every_steps, first_step, lived)
    kept, leaving = after_interruption(run, every_steps, np.array([first_step]), np.array([lived]), np.array([False]))
    at = [time for time, _ in durable]
    if min(abs(lived - time) for time in at) < 1e-6:
        return  # too near to tell
    assert kept[0] == max(step for time, step in durable if time <= lived)
    assert leaving[0] == 0


@given(some_lives, some.integers(1, 12), some.integers(0, 40), some.floats(0, 60))
def test_notice_keeps_the_step_that_is_under_way(run, every_steps, first_step, lived):
    durable, steps = walked(run, every_steps, first_step, lived)
    kept, leaving = after_interruption(run, every_steps, np.array([first_step]), np.array([lived]), np.array([True]))
    if any(abs(lived - time) < 1e-6 for begin, end, _ in steps for time in (begin, end)):
        return
    begun = [(end, step) for begin, end, step in steps if begin <= lived]
    assert kept[0] == (begun[-1][1] if begun else first_step)
    if not begun:
        assert leaving[0] == 0
        return
    done = max(lived, begun[-1][0])
    until_written = max([0.0, *(time - done for time, step in durable if step < kept[0] and time > done)])
    at_least = done - lived + until_written + run.durable_s + run.stall_s
    assert leaving[0] <= run.leaving_s + 1e-9
    assert leaving[0] == pytest.approx(at_least, abs=1e-6)


@given(some_lives, some.integers(1, 12), some.integers(0, 40), some.integers(1, 40))
def test_a_step_is_done_when_all_before_it_are_done_and_saved(run, every_steps, first_step, further):
    _, steps = walked(run, every_steps, first_step, until=1500)
    ends = {step: end for _, end, step in steps}
    needed = run.start_s + seconds_to(run, every_steps, np.array([first_step]), first_step + further)[0]
    assert needed == pytest.approx(ends[first_step + further])


def test_a_run_that_nothing_interrupts_takes_one_start_and_its_steps():
    walls = simulated_walls(QUIET, 100, 0, 250, exponential_draws(QUIET, stream(0, 0, "none"), 3), num_runs=3)
    assert walls == pytest.approx([180 + 250 * 0.36 + 2 * max(0.5, 0.5)] * 3)


def test_a_run_is_replayed_from_when_it_was_interrupted():
    run = Conditions(step_s=1, stall_s=2, durable_s=3, start_s=10, queue_s=100)
    lives = iter([5, 10 + 10 + 2 + 2, 10 + 10 + 2 + 4, math.inf])  # in start-up, before the save is durable, after it
    walls = simulated_walls(run, 10, 0, 25, lambda: (np.array([next(lives)]), np.array([False])))
    assert walls[0] == (5 + 100) + (24 + 100) + (26 + 100) + 10 + 15 + 2


def test_a_long_run_has_the_goodput_of_one_without_an_end():
    run, steps = Conditions(0.5, 1, 5, 20, sudden_per_s=1 / 300), 40_000
    walls = simulated_walls(run, 60, 0, steps, exponential_draws(run, stream(0, 0, "long"), 400), num_runs=400)
    assert steps * run.step_s / walls.mean() == pytest.approx(goodput(run, 60), rel=0.01)

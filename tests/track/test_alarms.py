"""What the last lines of metrics say that a person must hear of."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.track.alarms import MOST_LINES, RunFacts, alarms

LARGE = RunFacts(
    log_k=math.log(131072), width=1024, global_batch=2048, warmup_steps=1000, quarantine="quarantine.jsonl"
)
DEMO = RunFacts(log_k=math.log(256), width=192, global_batch=16, warmup_steps=10, quarantine="quarantine.jsonl")
RECORDED = Path(__file__).parent / "recorded" / "demo_metrics.jsonl"  # of configs/demo.yaml with 100 steps


def line(number: int, **changes: Any) -> dict[str, Any]:
    """Of a large run in its best years; `number` counts from its 20,000th step on."""
    step = 20_000 + 10 * number
    timing = {"seconds_per_step": 1.0, "samples_per_second": 2048.0, "data_wait_fraction": 0.02}
    return {
        "step": step,
        "samples_seen": 2048 * step,
        "total_loss": 12.9,
        "dino_local_crops_loss": 8.1,
        "dino_global_crops_loss": 0.5,
        "grad_norm/backbone": 0.9,
        "grad_norm/dino_head": 0.3,
        "health/prototype_entropy": 11.2,
        "health/effective_rank": 310.0,
        "steps_skipped": 0,
        "samples_skipped": 12,
        "timing": {**timing, **changes.pop("timing", {})},
        **changes,
    }


def lines(number: int = MOST_LINES, last: int = 5, **changes: Any) -> list[dict[str, Any]]:
    """Healthy ones, of which the last few are changed."""
    return [line(i, **(changes if i >= number - last else {})) for i in range(number)]


def texts(of: list[dict[str, Any]], facts: RunFacts = LARGE) -> dict[str, str]:
    return {alarm.kind: alarm.text for alarm in alarms(of, facts)}


def uniform(share: float = 1.0) -> dict[str, float]:
    """Losses whose sum is that share of log K."""
    return {
        "dino_local_crops_loss": share * LARGE.log_k * 16 / 18,
        "dino_global_crops_loss": share * LARGE.log_k * 2 / 18,
    }


def test_a_healthy_run_is_left_in_peace():
    assert texts(lines()) == {}


def test_a_small_run_is_left_in_peace_from_its_first_line_on():
    real = [json.loads(text) for text in RECORDED.read_text().splitlines()]
    assert len(real) == 25
    for facts in (DEMO, replace(DEMO, warmup_steps=0)):
        for end in range(len(real) + 1):
            assert texts(real[:end], facts) == {}
        grown = [{**line, "step": 100 * line["step"], "samples_seen": 100 * line["samples_seen"]} for line in real]
        assert texts(grown, facts) == {}


def test_a_flat_loss_and_a_small_rank_are_a_collapse():
    changes = {**uniform(), "health/effective_rank": 3.0}
    assert "flat at log K = 11.78 and the effective rank is 3 of 1024" in texts(lines(**changes))["collapse"]
    assert texts(lines(last=4, **changes)) == {}


def test_a_healthy_run_may_begin_at_log_k():
    beginning = [{**line, "step": 10 * i} for i, line in enumerate(lines(**uniform()), start=1)]
    for rank in (1.0, 3.0, 300.0):
        assert texts([{**line, "health/effective_rank": rank} for line in beginning]) == {}  # in warm-up
    assert texts(lines(**uniform())) == {}  # and may stay there for long, as its rank shows that it learns


def test_a_run_of_a_few_steps_may_give_all_samples_one_answer():
    young = [{**line, "step": i, "health/effective_rank": 1.0} for i, line in enumerate(lines(**uniform()))]
    assert texts(young, replace(LARGE, warmup_steps=5)) == {}


def test_features_in_one_direction_are_a_collapse_whatever_the_loss():
    assert "rank of the features is 2.4 of 1024" in texts(lines(**{"health/effective_rank": 2.4}))["collapse"]
    assert "rank of the features is 1.02 of 16" in texts(lines(**{"health/effective_rank": 1.02}), DEMO)["collapse"]
    assert "collapse" not in texts(lines(**{"health/effective_rank": 5.0}), replace(LARGE, global_batch=8))


def test_one_prototype_for_all_samples_is_a_collapse():
    assert "the same prototype" in texts(lines(**{"health/prototype_entropy": 0.01}))["collapse"]
    assert texts(lines(**{"health/prototype_entropy": 0.01}), replace(LARGE, global_batch=1)).keys() == set()
    assert texts(lines(**{"health/prototype_entropy": 2.0})) == {}


def test_a_loss_above_that_of_a_uniform_answer_diverges():
    assert "is 13.55, above the 11.78 of a uniform answer" in texts(lines(**uniform(1.15)))["diverging"]
    assert texts(lines(last=4, **uniform(1.15))) == {}
    assert texts(lines(**uniform(1.05))) == {}


def test_in_warm_up_a_loss_diverges_when_it_was_below_before():
    slow = replace(LARGE, warmup_steps=100_000)
    assert "diverging" in texts(lines(**uniform(1.15)), slow)
    assert texts(lines(last=MOST_LINES, **uniform(1.15)), slow) == {}  # a small head begins there


def test_gradients_far_beyond_their_usual_size_diverge():
    told = texts(lines(**{"grad_norm/backbone": 10.8}))["diverging"]
    assert "gradient norm of backbone is 10.8, 12 times its median of 0.9" in told
    assert texts(lines(**{"grad_norm/backbone": 8.0})) == {}
    assert texts(lines(last=2, **{"grad_norm/backbone": 100.0})) == {}
    assert texts(lines(number=12, **{"grad_norm/backbone": 100.0})) == {}  # too few before to know what is usual


def test_steps_that_are_passed_over_again_and_again_diverge():
    assert "9 steps in 3 of the last 5 lines" in texts(lines(last=3, steps_skipped=3))["diverging"]
    assert texts(lines(last=2, steps_skipped=10)) == {}


def test_gpus_that_wait_for_data_are_told_with_what_to_do():
    told = texts(lines(timing={"data_wait_fraction": 0.42, "samples_per_second": 210.4}))["data-bound"]
    assert told.startswith("the GPUs wait for data 42 % of the time (210 samples/s): raise train.num_workers")
    assert texts(lines(last=4, timing={"data_wait_fraction": 0.9})) == {}


def test_the_start_of_a_loader_is_no_alarm():
    assert texts([line(0, timing={"data_wait_fraction": 0.99}), *(line(i) for i in range(1, 5))]) == {}


def test_broken_tiles_are_told_when_they_become_many():
    assert texts([line(i, samples_skipped=12 + 30 * i) for i in range(10)]) == {}  # 0.15 %
    burst = [line(i, samples_skipped=12 + 300 * i) for i in range(10)]
    assert "2,700 of the last 184,320 samples (1.5 %)" in texts(burst)["quarantine"]
    assert "quarantine.jsonl names them" in texts(burst)["quarantine"]


def test_broken_tiles_are_told_when_they_are_many_in_all_and_it_goes_on():
    many = 50_000  # of 41 million
    assert "so far (0.12 %)" in texts([line(i, samples_skipped=many + i) for i in range(10)])["quarantine"]
    assert texts([line(i, samples_skipped=many) for i in range(10)]) == {}
    few = [{**line(i), "samples_seen": 80 * i, "samples_skipped": i} for i in range(1, 6)]
    assert texts(few) == {}  # five tiles are no pattern


@pytest.mark.parametrize("number", [MOST_LINES, MOST_LINES + 1, 3 * MOST_LINES])
def test_no_earlier_line_changes_an_alarm(number: int):
    changes = {
        "grad_norm/backbone": 10.8,
        "samples_skipped": 100_000,
        "timing": {"data_wait_fraction": 0.5},
        **uniform(1.2),
    }
    all_of_them = lines(number, **changes)
    assert alarms(all_of_them, LARGE) == alarms(all_of_them[-MOST_LINES:], LARGE) != []


values = (
    st.none()
    | st.booleans()
    | st.floats(width=32)
    | st.integers(-10, 10**9)
    | st.text(max_size=3)
    | st.lists(st.none())
)
keys = st.sampled_from([*line(0), "grad_norm/ibot_head", "else"])
timings = st.dictionaries(st.sampled_from(["data_wait_fraction", "samples_per_second"]), values)
odd_lines = st.lists(st.dictionaries(keys, values | timings), max_size=2 * MOST_LINES)


@given(odd_lines, st.integers(0, 5))
def test_lines_that_lack_something_are_no_obstacle(odd: list[dict[str, Any]], warmup_steps: int):
    mixed = [{**line(number), **changes} for number, changes in enumerate(odd)]
    for found in (odd, mixed):
        assert {alarm.kind for alarm in alarms(found, replace(LARGE, warmup_steps=warmup_steps))} <= {
            "collapse", "diverging", "data-bound", "quarantine",
        }  # fmt: skip


def test_every_alarm_is_one_line_that_a_person_can_read():
    changes = {"samples_skipped": 10**6, "steps_skipped": 2, "timing": {"data_wait_fraction": 0.5}}
    found = texts(lines(**changes, **{"health/effective_rank": 1.0}))
    assert list(found) == ["collapse", "diverging", "data-bound", "quarantine"]
    assert not any("\n" in text or len(text) > 300 for text in found.values())

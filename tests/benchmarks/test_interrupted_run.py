"""What is seen of a trainer's process, what numbers that makes, and that no trainer outlives its end."""

import os
import re
import sys
import time

import numpy as np
import pytest
from goodput import Conditions, exponential_draws, simulated_walls
from interrupted_run import (
    EVERY_STEPS,
    Interrupted,
    Start,
    Trainer,
    conditions_of,
    measured_section,
    replayed_steps,
    section,
    times,
)

from pathfm.errors import UserError
from pathfm.random_streams import stream

RUN = Conditions(step_s=0.5, stall_s=1.0, durable_s=2.0, start_s=8.0, sudden_per_s=1 / 60)


def played(first_step, lived, run=RUN, last_step=10**9):
    """A start as a watcher would see it, of a trainer that does what `Conditions` say."""
    seen, now, step = Start(), run.start_s, first_step
    while step < last_step and now + run.step_s <= lived:
        now, step = now + run.step_s, step + 1
        seen.steps[step] = now
        if step % EVERY_STEPS == 0:
            now += run.stall_s
            if now + run.durable_s <= lived:
                seen.saves[step] = now + run.durable_s
    seen.now = seen.steps.get(last_step, lived)
    return seen


def played_run(last_step, seed=0, run=RUN):
    lives, starts, step = stream(seed, 0, "lives"), [], EVERY_STEPS
    while not starts or starts[-1].last_step < last_step:
        starts.append(played(step, lives.exponential(1 / run.sudden_per_s), run, last_step))
        step = max([step, *starts[-1].saves])
    return Interrupted(EVERY_STEPS, last_step, starts)


def test_seconds_are_told_from_what_was_seen():
    seen = times([played(EVERY_STEPS, 60), played(3 * EVERY_STEPS, 45)])
    assert (seen.step_s, seen.stall_s, seen.durable_s, seen.start_s) == pytest.approx((0.5, 1.0, 2.0, 8.0))


def test_what_a_start_and_a_save_slow_down_is_counted_there():
    seen = played(EVERY_STEPS, 60)
    slow = {step: at + (3 if step >= 21 else 0) + (4 if step >= 43 else 0) for step, at in seen.steps.items()}
    found = times([Start(slow, {40: slow[40] + 6}, 60)])
    assert (found.step_s, found.start_s) == pytest.approx((0.5, 11.0))
    assert found.stall_s == pytest.approx((4 * 1 + 4) / 4)  # four saves, one of which slowed what came after


def test_a_replay_keeps_the_steps_that_the_run_kept():
    interrupted = played_run(1500)
    assert len(interrupted.starts) > 10
    assert replayed_steps(RUN, interrupted) == pytest.approx(1500 - EVERY_STEPS, abs=1)
    assert replayed_steps(Conditions(**{**vars(RUN), "step_s": 0.6}), interrupted) < 1400


def test_many_runs_by_chance_surround_the_played_ones():
    played_walls = [played_run(300, seed).wall_s for seed in range(60)]
    draws = exponential_draws(RUN, stream(0, 0, "chance"), 4000)
    by_chance = simulated_walls(RUN, EVERY_STEPS, EVERY_STEPS, 300, draws, 4000)
    inside = np.mean([np.mean(by_chance < wall) for wall in played_walls])
    assert abs(inside - 0.5) < 3 * 12**-0.5 / 60**0.5  # three deviations of a mean of 60 uniform numbers


def test_the_section_tells_predicted_and_measured():
    interrupted = played_run(800)
    text = section(interrupted, [played(EVERY_STEPS, 60)], 60, 0)
    assert f"| measured | {780 * 0.5 / interrupted.wall_s:.3f} |" in text
    assert "lies within the band" in text
    assert re.search(r"kept 0\.[01]% (more|fewer) steps than is predicted from 1 starts", text)


def test_conditions_are_those_that_were_seen():
    assert vars(conditions_of(times([played(EVERY_STEPS, 60)]), 60)) == pytest.approx(vars(RUN))


_FAKE = """
import json, pathlib, time
run = pathlib.Path("{run}")
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
saved = max([0, *(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))])
with (run / "metrics.jsonl").open("w") as file:
    for step in range(1, 10000):
        file.write(json.dumps(dict(step=step)) + "\\n")
        if step > saved:
            file.write('{{"step": ')  # half a line
            file.flush()
            time.sleep(0.03)
            file.seek(file.tell() - 9)
        if step % 5 == 0:
            (run / "checkpoints" / f"step_{{step:08d}}").mkdir(exist_ok=True)
            (run / "checkpoints" / f".step_{{step + 1:08d}}.partial").mkdir(exist_ok=True)
"""


def test_a_trainer_is_watched_ended_and_started_again(tmp_path):
    trainer = Trainer(tmp_path / "run", [sys.executable, "-c", _FAKE.format(run=tmp_path / "run")])
    first = trainer.start(lambda start: 5 in start.saves and start.last_step >= 7)
    second = trainer.start(lambda start: start.last_step >= first.last_step + 3)
    assert first.last_step >= 7
    assert set(first.saves) >= {5}
    assert all(step % 5 == 0 for step in [*first.saves, *second.saves])
    assert list(first.steps.values()) == sorted(first.steps.values())
    assert first.now >= first.steps[first.last_step]


def test_no_trainer_outlives_its_end(tmp_path):
    note = tmp_path / "pids"
    program = (
        "import os, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(60)"
    )
    Trainer(tmp_path / "run", [sys.executable, "-c", program]).start(
        lambda start: note.exists() and note.stat().st_size > 0
    )
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2
    gives_up = time.monotonic() + 20
    while any(map(_is_running, pids)):  # the kernel ends a killed process a little later
        assert time.monotonic() < gives_up
        time.sleep(0.01)


def _is_running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_trainer_that_ends_by_itself_is_an_error_that_names_its_log(tmp_path):
    with pytest.raises(UserError, match=r"ended with 3 by itself; see .*run\.log"):
        Trainer(tmp_path / "run", [sys.executable, "-c", "raise SystemExit(3)"]).start(lambda start: False)


def test_work_that_is_there_is_not_written_into(tmp_path):
    with pytest.raises(UserError, match="is there already"):
        measured_section(tmp_path, tmp_path, 3, None, 0)

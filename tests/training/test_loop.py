"""Samples that cannot be decoded, disks that fail and time that runs out, as the loop meets them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.distributed as dist

from pathfm.batch import Batch, Skipped
from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.reading import load_into
from pathfm.checkpoint.saver import Saver
from pathfm.checkpoint.store import Store
from pathfm.data.config import CorruptPolicy
from pathfm.dist.agreement import Agreement
from pathfm.dist.env import Ranks
from pathfm.ssl.config import DinoConfig, TeacherConfig
from pathfm.training.config import OptimConfig, TrainConfig, TuneConfig
from pathfm.training.loop import Loop, Surroundings, TooManyCorrupt
from pathfm.training.online import Online
from pathfm.training.plan import plan_training
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer
from tests.several_ranks import on_ranks
from tests.ssl.small import random_batch, small_dinov2

CPU = torch.device("cpu")
RANK_BATCH, STEPS = 4, 6
Broken = Mapping[int, int]  # step -> how many rows were tried before one could be decoded


class Segment:
    """One process of a run: it takes up the newest checkpoint in `folder`, and keeps what it reported."""

    def __init__(
        self,
        folder: Path,
        policy: str,
        *,
        leave_after: int = STEPS,
        ranks: Ranks | None = None,
        log_every: int = 1,
        **checkpoint: float,
    ) -> None:
        self.ranks = ranks or Ranks(0, 1, 0)
        self.quarantined: list[tuple[int, str]] = []
        self.alarms: list[str] = []
        self.lines: list[Mapping[str, object]] = []
        method = small_dinov2()
        self.state = TrainingState(method, build_optimizer(method, OptimConfig()), build_loss_scale(TrainConfig(), CPU))
        settings = CheckpointConfig(**{"every_steps": 1000, **checkpoint})
        self.store = Store(folder, settings)
        if self.store.paths():
            manifest = load_into(self.state.tensors(), self.store.paths()[-1], self.ranks)
            self.state.take_up(manifest.step, manifest.values)
        several = self.ranks.world_size > 1
        groups = [dist.new_group(backend="gloo") if several else None for _ in range(2)]
        train = TrainConfig(precision="fp32", batch_size_per_gpu=RANK_BATCH, log_every_steps=log_every, num_workers=0)
        optim = OptimConfig(total_steps=STEPS)
        plan = plan_training(train, optim, TeacherConfig(), DinoConfig(), self.ranks.world_size, 1000)
        around = Surroundings(
            saver=Saver(self.store, self.ranks, groups[0]),
            report=self,
            agreement=Agreement(groups[1]),
            leave=lambda: "told to" if self.state.step >= leave_after else None,
            seconds_since_told=lambda: 0.0,
            quarantine=lambda step, skipped: self.quarantined.append((step, skipped.file)),
            accident=lambda accident: None,
            export=lambda step: True,
        )
        corrupt = CorruptPolicy.parse(policy)
        online = Online(TuneConfig(), plan, None)
        self.loop = Loop(self.state, plan, train, optim, settings, corrupt, self.ranks, CPU, around, online)

    def step(self, completed: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def alarm(self, step: int, alarm: str, text: str) -> None:
        self.alarms.append(text)

    def interval(self, line: Mapping[str, object]) -> None:
        self.lines.append({key: value for key, value in line.items() if key != "timing"})

    def run(self, broken: Broken) -> "Segment":
        self.loop.run(batches(self.state.step, broken, self.ranks))
        return self


def batches(first_step: int, broken: Broken, ranks: Ranks) -> Iterator[Batch]:
    """A rank's batches; the last position of the global batch holds what is broken."""
    for step in range(first_step, STEPS):
        skipped = ()
        if ranks.rank == ranks.world_size - 1:
            position = (step + 1) * RANK_BATCH * ranks.world_size - 1
            tried = range(broken.get(step, 0))
            skipped = tuple(Skipped(position, 10 * step + row, "brca", f"{step}_{row}.png", "cut") for row in tried)
        yield replace(random_batch(RANK_BATCH, seed=step * ranks.world_size + ranks.rank), skipped=skipped)


def test_the_policy_raise_stops_after_the_very_step_and_skip_goes_on_from_there(tmp_path):
    undisturbed = Segment(tmp_path / "undisturbed", "skip").run({2: 1, 4: 1})

    stopped = Segment(tmp_path / "run", "raise")
    with pytest.raises(TooManyCorrupt, match=r"^1 of the 12 samples so far could not be decoded.*=raise allows[^\n]+$"):
        stopped.run({2: 1, 4: 1})
    assert stopped.quarantined == [(3, "2_0.png")]
    again = Segment(tmp_path / "run", "raise")
    with pytest.raises(TooManyCorrupt, match=r"^1 of the 12 samples"):
        again.run({})
    continued = Segment(tmp_path / "run", "skip").run({2: 1, 4: 1})
    assert stopped.lines + again.lines + continued.lines == undisturbed.lines
    assert continued.state.samples_skipped == 2


def test_a_limit_is_judged_by_the_count_of_the_whole_run(tmp_path):
    first = Segment(tmp_path, "limit:0.003", leave_after=3).run({0: 1, 1: 1, 2: 1})  # three of a thousand are allowed
    assert first.state.samples_skipped == 3
    second = Segment(tmp_path, "limit:0.003")
    with pytest.raises(TooManyCorrupt, match=r"^4 of the 20 samples so far .* data.corrupt_samples=limit:0.003 allows"):
        second.run({4: 1})
    assert second.state.step == 5
    assert second.store.paths()[-1].name == "step_00000005"


def test_rows_that_were_tried_in_place_of_one_count_once_and_are_all_quarantined(tmp_path):
    segment = Segment(tmp_path, "limit:0.001").run({1: 3})
    assert segment.state.samples_skipped == segment.lines[-1]["samples_skipped"] == 1
    assert segment.quarantined == [(2, "1_0.png"), (2, "1_1.png"), (2, "1_2.png")]


def test_the_policy_skip_counts_and_never_stops(tmp_path):
    segment = Segment(tmp_path, "skip").run(dict.fromkeys(range(STEPS), 5))
    assert [line["samples_skipped"] for line in segment.lines] == [1, 2, 3, 4, 5, 6]


def stops_of_this_rank(folder: Path) -> list[tuple[str, int, int]]:
    """What is said, after which step, and how many files are quarantined, under two policies."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0)
    stops = []
    for policy, broken, log_every in (("raise", {2: 1}, 100), ("limit:0.001", {0: 1, 3: 2}, 1)):
        segment = Segment(folder / policy, policy, ranks=ranks, log_every=log_every)
        with pytest.raises(TooManyCorrupt) as stop:
            segment.run(broken)
        stops.append((str(stop.value).partition(" samples")[0], segment.state.step, len(segment.quarantined)))
    return stops


def test_all_ranks_stop_at_the_same_step_for_what_one_of_them_met(tmp_path):
    first, second = on_ranks(2, stops_of_this_rank, tmp_path)
    # Under `raise` all hear one step later of what one met; a limit is judged at a report.
    assert first == [("1 of the 32", 4, 1), ("2 of the 32", 4, 3)]
    assert second == [("1 of the 32", 4, 0), ("2 of the 32", 4, 0)]


def test_a_checkpoint_that_could_not_be_written_is_tried_again_and_enough_failures_alarm(tmp_path, caplog):
    undisturbed = Segment(tmp_path / "undisturbed", "skip").run({})
    segment = Segment(tmp_path / "run", "skip", every_steps=2, retry_after_s=0, alarm_after_failures=2)
    publish, tried = segment.store.publish, []

    def disk_that_is_full_three_times(aside: Path, step: int) -> Path:
        tried.append(step)
        if len(tried) <= 3:
            raise OSError(28, "No space left on device")
        return publish(aside, step)

    segment.store.publish = disk_that_is_full_three_times
    segment.run({})
    assert segment.lines == undisturbed.lines
    assert segment.store.newest_step() == STEPS
    assert "failure 3 in a row" in caplog.text
    (alarm,) = segment.alarms
    assert alarm.startswith(
        "they cannot be written: 2 failures in a row, the last one: [Errno 28] No space left on device"
    )
    assert not segment.loop.last_save_failed
    assert [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".partial")] == []


def test_when_the_time_to_leave_runs_out_the_newest_complete_checkpoint_is_what_stays(tmp_path, caplog):
    segment = Segment(tmp_path, "skip", leave_after=3, every_steps=2, leave_within_s=0.5)
    publish, disk = segment.store.publish, Event()

    def disk_that_becomes_slow(aside: Path, step: int) -> Path:
        if step == 3:
            disk.wait(60)
        return publish(aside, step)

    segment.store.publish = disk_that_becomes_slow
    assert segment.loop.run(batches(0, {}, segment.ranks)) == "interrupted"
    assert segment.store.newest_step() == 2
    assert "was not complete within checkpoint.leave_within_s=0.5" in caplog.text
    assert "the run goes on from step 2" in caplog.text
    disk.set()
    assert segment.loop.around.saver.wait(60)


def test_waiting_for_data_is_the_loaders_time_and_not_that_of_the_crops(tmp_path, monkeypatch):
    clock, timings = [0.0], []
    monkeypatch.setattr("pathfm.training.loop.time.perf_counter", lambda: clock[0])
    segment = Segment(tmp_path, "skip", log_every=STEPS)
    segment.interval = lambda line: timings.append(line["timing"])

    def takes(seconds: float, batch: Batch) -> Batch:
        clock[0] += seconds
        return batch

    segment.loop.around = replace(segment.loop.around, crop=partial(takes, 3.0))
    segment.loop.run(takes(1.0, batch) for batch in batches(0, {}, segment.ranks))
    assert timings[0]["data_wait_fraction"] == pytest.approx(1 / 4)
    assert timings[0]["seconds_per_step"] == pytest.approx(4)

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from pathfm.dist.watch import (
    Beat,
    Heard,
    Watch,
    WatchSettings,
    all_have_heard,
    culprits,
    sentence_of_loss,
    sentence_of_stall,
    suspects,
)
from pathfm.files import write_text
from pathfm.log import start_logging, warnings_kept

PATIENT_S = 60.0  # how long a test waits for what it expects; only a failure takes as long
ASKED = WatchSettings(beat_every_s=0.1, lost_after_s=600.0, stall_after_s=600.0)  # silent for 1 s is lost
UNASKED = WatchSettings(beat_every_s=0.1, lost_after_s=2.0, stall_after_s=600.0)
LOST_RANK_1 = r"rank 1 \(host \S+\) gave no sign of life for \d+ s, last seen in step 37, waiting for data"
LOST_STORE = r"rank 0, or the node that keeps the store, is gone \(host \S+, last seen in step 37, waiting for data\)"


def alive(**beat) -> Heard:
    return Heard(Beat(**{"number": 9, "step": 37, "doing": "agreement", "host": "n1"} | beat))


def silent(seconds: float, store_s: float = 0.0, **beat) -> Heard:
    return Heard(alive(**beat).beat, seconds, store_s)


@pytest.mark.parametrize(
    ("heard", "asked", "blamed"),
    [
        ({1: alive(), 2: silent(5)}, True, []),
        ({1: alive(), 2: silent(6)}, True, [2]),
        ({1: alive(), 2: silent(6)}, False, []),  # as long as no collective has failed there is time
        ({1: alive(), 2: silent(60)}, False, [2]),
        ({1: silent(6), 2: silent(4.5), 3: silent(2.5)}, True, [1, 2]),  # 1 and 2 may have died together
        ({1: silent(99, fate="done"), 2: silent(99, fate="done")}, False, []),
        ({1: alive(fate="failed"), 2: alive()}, True, [1]),
        ({1: alive(fate="failed"), 2: alive()}, False, []),  # the others have a moment to fail by themselves
        ({1: silent(60, fate="failed"), 2: alive()}, False, [1]),
        ({1: alive(fate="failed"), 2: silent(99, fate="cut off")}, True, [1]),
        ({1: silent(7), 2: silent(99, fate="cut off")}, True, [1]),
        ({2: silent(99, fate="cut off")}, True, []),
        ({2: silent(99, fate="cut off")}, False, [2]),
    ],
)
def test_who_failed_or_fell_silent_is_to_blame_and_a_victim_is_not(heard, asked, blamed):
    settings = WatchSettings(beat_every_s=2.0, lost_after_s=60.0)
    assert culprits(heard, settings, asked) == blamed


@pytest.mark.parametrize(
    ("heard", "sentence"),
    [
        (
            {1: silent(4.2, doing="waiting for data", host="n2")},
            "rank 1 (host n2) gave no sign of life for 4 s, last seen in step 37, waiting for data",
        ),
        (
            {1: alive(fate="failed", why="ValueError: no", host="n2")},
            "rank 1 (host n2) failed in step 37: ValueError: no",
        ),
        (
            {2: silent(6, host="n2"), 3: silent(5, host="n2"), 4: silent(6, host="n3")},
            "ranks 2, 3 (host n2) gave no sign of life for 6 s, last seen in step 37, agreement; "
            "rank 4 (host n3) gave no sign of life for 6 s, last seen in step 37, agreement",
        ),
        ({1: Heard(Beat(), 6)}, "rank 1 gave no sign of life for 6 s, and none before"),
        (
            {1: silent(60, fate="cut off", why="Connection reset by peer")},
            "rank 1 (host n1) left in step 37, cut off from the others: Connection reset by peer",
        ),
        ({0: silent(6)}, "rank 0 (host n1) gave no sign of life for 6 s, last seen in step 37, agreement"),
        (
            {0: silent(6, store_s=6)},
            "rank 0, or the node that keeps the store, is gone (host n1, last seen in step 37, agreement)",
        ),
        ({0: Heard(Beat(), 6, 6)}, "rank 0, or the node that keeps the store, is gone"),
        (
            {0: silent(6, store_s=6, fate="failed", why="OSError: no")},
            "rank 0 (host n1) failed in step 37: OSError: no",
        ),
    ],
)
def test_a_sentence_says_who_is_lost_and_where_it_was_seen_last(heard, sentence):
    assert sentence_of_loss(heard, list(heard)) == sentence


@pytest.mark.parametrize(
    ("places", "who"),
    [
        ([(40, "agreement", 9), (40, "waiting for data", 9), (40, "agreement", 9)], [1]),
        ([(40, "agreement", 9), (39, "agreement", 9), (40, "step", 9)], [1]),
        ([(40, "agreement", 9), (40, "waiting for data", 10)], [1]),  # rank 0 came later: it is the one that waits
        ([(40, "waiting for data", 10), (40, "agreement", 9)], [0]),
        ([(40, "agreement", 9), (41, "step", 9), (40, "agreement", 9)], [1]),  # ran ahead of what the others wait for
        ([(40, "agreement", 9)] * 3, []),
        ([(40, "step", 9)], []),
    ],
)
def test_suspect_is_who_is_behind_or_does_not_wait_where_the_others_do(places, who):
    beats = {rank: Beat(1, step, doing, since_s) for rank, (step, doing, since_s) in enumerate(places)}
    assert suspects(beats)[0] == who


@pytest.mark.parametrize(
    ("doing", "sentence"),
    [
        (
            ["agreement", "waiting for data", "agreement", "agreement"],
            "no progress for 300 s: rank 1 (host n1) in step 37, waiting for data; 3 others in step 37, agreement; "
            "the stacks of all ranks are in stacks",
        ),
        (
            ["agreement", "waiting for data", "waiting for data", "agreement", "agreement"],
            "no progress for 300 s: ranks 1, 2 (host n1) in step 37, waiting for data; "
            "3 others in step 37, agreement; the stacks of all ranks are in stacks",
        ),
        (
            ["agreement"] * 2,
            "no progress for 300 s: all 2 ranks in step 37, agreement; the stacks of all ranks are in stacks",
        ),
        (["step"], "no progress for 300 s: rank 0 in step 37, step; the stacks of all ranks are in stacks"),
    ],
)
def test_a_sentence_says_who_holds_the_others_up(doing, sentence):
    beats = {rank: alive(doing=what).beat for rank, what in enumerate(doing)}
    assert sentence_of_stall(beats, 300.4, Path("stacks")) == sentence


def test_rank_0_waits_for_readers_that_live():
    settings = WatchSettings(beat_every_s=2.0)
    gone = {3: alive(fate="done"), 4: silent(6)}
    assert all_have_heard({1: alive(heard=7), 2: alive(heard=8)} | gone, 7, settings)
    assert not all_have_heard({1: alive(heard=6), 2: alive(heard=8)} | gone, 7, settings)


class RealRanks:
    """Processes that meet in a store of rank 0; what they print goes to `said_RANK`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[multiprocessing.process.BaseProcess] = []

    def start(self, world_size: int, life: Callable, settings: WatchSettings) -> None:
        """Each runs `life(watch, rank, folder)`, step 37 being what it says at first."""
        spawn = multiprocessing.get_context("spawn")
        for rank in range(world_size):
            process = spawn.Process(target=_one_rank, args=(rank, world_size, self.folder, life, settings))
            self.processes.append(process)
            process.start()
        for rank in range(world_size):
            wait_for(self.folder / f"met_{rank}")

    def send(self, number: signal.Signals, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)
        if number == signal.SIGKILL:
            self.join(rank)

    def tell(self, *ranks: int) -> None:
        """Those that wait for a word go on."""
        for rank in ranks:
            write_text(self.folder / f"go_{rank}", "")

    def join(self, rank: int) -> int | None:
        self.processes[rank].join(PATIENT_S)
        return self.processes[rank].exitcode

    def said(self, rank: int) -> str:
        """What a rank printed until its end, without what torch's store says when it is gone."""
        assert self.join(rank) is not None, f"rank {rank} did not come to its end"
        return "".join(re.findall(r"^(?:heard|error): .*\n", (self.folder / f"said_{rank}").read_text(), re.M))


@pytest.fixture
def ranks(tmp_path):
    ranks = RealRanks(tmp_path)
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.join()


def _one_rank(rank: int, world_size: int, folder: Path, life: Callable, settings: WatchSettings) -> None:
    output = os.open(folder / f"said_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    start_logging(speak=rank == 0)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        write_text(folder / "port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(wait_for(folder / "port")), timeout=timedelta(seconds=PATIENT_S))
    all_are_here(store, world_size)
    watch = Watch(store, rank, world_size, settings)
    watch.at(37, "waiting for data")
    watch.start()
    heard_of_all(store, world_size)
    write_text(folder / f"met_{rank}", "")
    life(watch, rank, folder)
    os._exit(0)


def wait_for(file: Path, pattern: str = "") -> str:
    """The text of a file, once it is there and contains this."""
    deadline = time.monotonic() + PATIENT_S
    while not (file.exists() and re.search(pattern, file.read_text(), re.DOTALL)):
        assert time.monotonic() < deadline, f"{file.name}: {file.read_text() if file.exists() else 'not there'}"
        time.sleep(0.02)
    return file.read_text()


def all_are_here(store: dist.Store, world_size: int) -> None:
    store.add("here", 1)
    while store.add("here", 0) < world_size:
        time.sleep(0.02)


def heard_of_all(store: dist.Store, world_size: int) -> None:
    """Wait until every rank has spoken, and has heard rank 0."""
    for rank in range(world_size):
        while True:
            beat = Beat(**json.loads(store.get(f"watch/beat/{rank}")))
            if beat.number and (rank == 0 or beat.heard):
                break
            time.sleep(0.02)


def ask_when_told(watch: Watch, rank: int, folder: Path) -> None:
    """As after a collective that failed."""
    wait_for(folder / f"go_{rank}")
    lost = watch.who_is_lost(within_s=PATIENT_S)
    print(f"heard: {lost}", flush=True)
    watch.leaving(lost or "nobody", victim=True)


@pytest.mark.parametrize("order", [[[2], [0, 3]], [[0], [2, 3]]], ids=["rank 2 leaves first", "rank 0 leaves first"])
def test_a_killed_rank_is_named_by_all_others_and_those_that_leave_because_of_it_are_not(ranks, order):
    ranks.start(4, ask_when_told, ASKED)
    ranks.send(signal.SIGKILL, 1)
    for together in order:
        ranks.tell(*together)
        for rank in together:
            assert ranks.join(rank) == 0
    assert re.fullmatch(f"heard: {LOST_RANK_1}\n", ranks.said(0))
    assert {ranks.said(rank) for rank in (2, 3)} == {ranks.said(0)}


def test_when_rank_0_is_killed_all_others_say_so_though_the_store_went_with_it(ranks):
    ranks.start(3, ask_when_told, ASKED)
    ranks.send(signal.SIGKILL, 0)
    ranks.tell(1, 2)
    assert re.fullmatch(f"heard: {LOST_STORE}\n", ranks.said(1))
    assert ranks.said(2) == ranks.said(1)


def fail_or_ask(failing: int, watch: Watch, rank: int, folder: Path) -> None:
    fail(watch) if rank == failing else ask_when_told(watch, rank, folder)


def fail(watch: Watch) -> None:
    watch.leaving("ValueError: the image\n is too large")
    watch.leaving("what happened later")
    watch.stop()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_is_named_with_its_error(ranks, failing):
    ranks.start(3, partial(fail_or_ask, failing), ASKED)
    assert ranks.join(failing) == 0
    others = [rank for rank in range(3) if rank != failing]
    ranks.tell(*others)
    expected = rf"heard: rank {failing} \(host \S+\) failed in step 37: ValueError: the image is too large\n"
    assert re.fullmatch(expected, ranks.said(others[0]))
    assert ranks.said(others[1]) == ranks.said(others[0])


def wait_for_ever(watch: Watch, rank: int, folder: Path) -> None:
    """As in a collective of a backend that does not notice."""
    time.sleep(10 * PATIENT_S)


@pytest.mark.parametrize(("lost", "sentence"), [(1, LOST_RANK_1), (0, LOST_STORE)], ids=["1", "0"])
def test_a_rank_that_vanishes_without_closing_its_connections_ends_the_others(ranks, lost, sentence):
    ranks.start(3, wait_for_ever, UNASKED)
    ranks.send(signal.SIGSTOP, lost)
    for rank in {0, 1, 2} - {lost}:
        assert ranks.join(rank) == 1
        assert re.fullmatch(f"error: {sentence}\n", ranks.said(rank))


def stop_first_as_rank_1(watch: Watch, rank: int, folder: Path) -> None:
    wait_for(folder / f"go_{rank}")
    if rank == 1:
        watch.stop()
        return
    time.sleep(1.5 * UNASKED.lost_after_s)
    print(f"heard: {watch.who_is_lost(within_s=1.5)}", flush=True)
    watch.stop()
    print(f"heard: {watch.who_is_lost(within_s=PATIENT_S)}", flush=True)


def test_a_rank_that_has_ended_as_it_should_is_missed_by_nobody(ranks):
    ranks.start(2, stop_first_as_rank_1, UNASKED)
    ranks.tell(1)
    assert ranks.join(1) == 0
    ranks.tell(0)
    assert ranks.said(0) == "heard: None\nheard: None\n"


def stop_first_as_rank_0(watch: Watch, rank: int, folder: Path) -> None:
    wait_for(folder / f"go_{rank}")
    if rank == 1:
        time.sleep(1.5 * UNASKED.lost_after_s)
        print(f"heard: {watch.who_is_lost(within_s=1.5)}", flush=True)
    watch.stop()


def test_rank_0_may_end_before_the_others_and_take_the_store_with_it(ranks):
    ranks.start(2, stop_first_as_rank_0, UNASKED)
    ranks.tell(0)
    assert ranks.join(0) == 0
    ranks.tell(1)
    assert ranks.said(1) == "heard: None\n"
    assert ranks.join(1) == 0


def live_until_told(watch: Watch, rank: int, folder: Path) -> None:
    wait_for(folder / f"go_{rank}")
    watch.stop()


def test_after_a_job_was_suspended_nobody_is_missed(ranks):
    ranks.start(2, live_until_told, UNASKED)
    for number, seconds in ((signal.SIGSTOP, 1.5 * UNASKED.lost_after_s), (signal.SIGCONT, 1.0)):
        ranks.send(number, 1)
        ranks.send(number, 0)
        time.sleep(seconds)
    ranks.tell(0, 1)
    assert (ranks.join(0), ranks.join(1)) == (0, 0)


STALLS = WatchSettings(beat_every_s=0.1, lost_after_s=600.0, stall_after_s=0.6)


def stuck_in_the_loader_as_rank_1(watch: Watch, rank: int, folder: Path) -> None:
    watch.keep_stacks_in(folder / "stacks")
    if rank == 1:
        watch.at(40, "waiting for data")
        decode_a_huge_image(folder)
    while not (folder / "stuck").exists():
        watch.at(40, "step")
        time.sleep(0.01)
    watch.at(40, "agreement")
    wait_for(folder / "progress")
    watch.at(41, "step")
    wait_for(folder / "go_0")
    watch.stop()


def decode_a_huge_image(folder: Path) -> None:
    time.sleep(0.5)
    write_text(folder / "stuck", "")
    time.sleep(10 * PATIENT_S)


def test_a_stalled_rank_is_named_once_and_the_stacks_of_all_are_kept(ranks, tmp_path):
    ranks.start(2, stuck_in_the_loader_as_rank_1, STALLS)
    stalled = wait_for(tmp_path / "stacks" / "rank_1.txt", "in step 40.*in decode_a_huge_image")
    assert re.search(r"^\d{4}-\d\d-\d\d \S+ rank 1 on \S+: \d+ s in step 40, waiting for data$", stalled, re.M)
    waiting = wait_for(tmp_path / "stacks" / "rank_0.txt", "in step 40, agreement.*in stuck_in_the_loader_as_rank_1")
    time.sleep(3 * STALLS.stall_after_s)
    write_text(tmp_path / "progress", "")
    log = wait_for(tmp_path / "said_0", "step 40.*training goes on")
    ranks.tell(0)
    assert ranks.join(0) == 0
    named = r"no progress for \d+ s: rank 1 \(host \S+\) in step 40, waiting for data; rank 0 in step 40, agreement; "
    assert len(re.findall(f"{named}the stacks of all ranks are in {tmp_path}/stacks\n", log)) == 1
    assert waiting.count("in step 40, agreement") == 1


def alone(folder: Path) -> Watch:
    watch = Watch(None, 0, 1, STALLS)
    watch.keep_stacks_in(folder)
    watch.start()
    return watch


def test_a_process_alone_keeps_its_stacks_and_misses_nobody(tmp_path):
    with warnings_kept() as warnings:
        watch = alone(tmp_path)
        watch.at(40, "step")
        wait_for(tmp_path / "rank_0.txt", "in step 40, step.*in wait_for")
        assert watch.who_is_lost(within_s=PATIENT_S) is None
        watch.stop()
    assert any("rank 0 in step 40, step; the stacks of all ranks are in" in warning for warning in warnings)


def test_nothing_is_written_after_the_end(tmp_path):
    with warnings_kept() as warnings:
        watch = alone(tmp_path)
        watch.at(40, "step")
        watch.stop()
        before = [file.read_text() for file in tmp_path.iterdir()]
        warnings.clear()
        time.sleep(3 * STALLS.stall_after_s)
    assert [file.read_text() for file in tmp_path.iterdir()] == before
    assert warnings == []

"""Signs of life: each rank says that it lives and what it does, and hears which ranks are lost or hold the others up.

Every rank posts a beat into the store where the ranks met. Rank 0 alone reads all of them, and says in its own beat who
is lost; the others read that one only. So the store answers a few small requests of each rank per beat.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from torch.distributed.distributed_c10d import PrefixStore, Store

from pathfm.errors import listed
from pathfm.log import get_logger

_log = get_logger(__name__)
_HURRY_S = 0.1  # between two beats while somebody waits for the outcome
_LINGER_S = 3.0  # at most, so that the others read what a rank says last
_LONGEST_REASON = 1000  # characters
Fate = Literal["", "done", "failed", "cut off"]  # "": it lives; "cut off": it leaves because of others


@dataclass(frozen=True)
class WatchSettings:
    beat_every_s: float = 2.0
    lost_after_s: float = 60.0  # without a sign of life, while no collective has failed
    stall_after_s: float = 300.0  # without progress
    stacks: Path | None = None  # the folder for the stacks of ranks that stall

    def silence_s(self, asked: bool) -> float:
        """After how long a rank counts as lost. Short once somebody asks: a collective has failed, so one is."""
        return min(self.lost_after_s, max(3 * self.beat_every_s, 1.0)) if asked else self.lost_after_s


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int = 0  # grows with every beat; 0: it has not said anything yet
    step: int = 0
    doing: str = ""
    since_s: float = 0.0  # how long it has been doing this
    host: str = ""
    fate: Fate = ""
    why: str = ""  # it failed or was cut off
    asking: bool = False  # who is lost
    heard: int = 0  # the number of the last beat of rank 0 that it has read
    verdict: str = ""  # of rank 0: who is lost, in one sentence
    overdue: bool = False  # of rank 0: lost for so long that all must leave, though no collective fails


@dataclass(frozen=True)
class Heard:
    """The last beat of another rank, how long ago it came, and for how much of that time the store was silent too."""

    beat: Beat
    silent_s: float = 0.0
    store_silent_s: float = 0.0

    def beat_now(self) -> Beat:
        return replace(self.beat, since_s=self.beat.since_s + self.silent_s)


def culprits(heard: Mapping[int, Heard], settings: WatchSettings, asked: bool) -> list[int]:
    """The ranks to blame: those that failed, and those that have been silent for too long without a word of leave.

    A node dies with all its ranks, so whoever fell silent up to a beat after the first is named with it.
    A rank that was cut off is a victim, named only if nobody else is to blame and others wait for it in vain.
    """
    limit_s = settings.silence_s(asked)
    lost = {rank for rank, of in heard.items() if of.beat.fate == "failed" and (asked or of.silent_s >= limit_s)}
    silent_s = {rank: of.silent_s for rank, of in heard.items() if not of.beat.fate}
    if max(silent_s.values(), default=0.0) >= limit_s:
        lost |= {rank for rank in silent_s if silent_s[rank] > limit_s - settings.beat_every_s}
    if not lost and not asked:
        lost = {rank for rank, of in heard.items() if of.beat.fate == "cut off" and of.silent_s >= limit_s}
    return sorted(lost)


def sentence_of_loss(heard: Mapping[int, Heard], lost: list[int]) -> str:
    """`rank 1 (host n2) gave no sign of life for 4 s, last seen in step 37, waiting for data`."""
    if lost == [0] and not (first := heard[0]).beat.fate and 2 * first.store_silent_s > first.silent_s:
        known = f" (host {first.beat.host}, last seen in {_place_of(first.beat)})" if first.beat.number else ""
        return f"rank 0, or the node that keeps the store, is gone{known}"
    silent_s = max(heard[rank].silent_s for rank in lost)
    return _together({rank: (heard[rank].beat, _end_of(heard[rank].beat, silent_s)) for rank in lost})


def all_have_heard(heard: Mapping[int, Heard], number: int, settings: WatchSettings) -> bool:
    """Whether every rank that can still read has read rank 0's beat of this number."""
    silence_s = settings.silence_s(asked=True)
    return all(of.beat.fate or of.beat.heard >= number or of.silent_s >= silence_s for of in heard.values())


def suspects(beats: Mapping[int, Beat]) -> tuple[list[int], list[int]]:
    """Who may hold the others up; and those who wait in the same place, which are the most.

    Suspects are the ranks in an earlier step; if there are none, all that do something else.
    """
    at: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, beat in beats.items():
        at[beat.step, beat.doing].append(rank)
    # Of two equally full places the one that was entered last: who waits came later than who is waited for.
    place = max(at, key=lambda place: (len(at[place]), place[0], -max(beats[rank].since_s for rank in at[place])))
    behind = [rank for rank, beat in beats.items() if beat.step < place[0]]
    return behind or [rank for rank in beats if rank not in at[place]], at[place]


def sentence_of_stall(beats: Mapping[int, Beat], stalled_s: float, stacks: Path | None) -> str:
    """`no progress for 300 s: rank 1 (host n2) in step 40, waiting for data; 3 others in step 40, agreement; ...`"""
    blamed, waiting = suspects(beats)
    several = f"{len(waiting)} others" if blamed else f"all {len(waiting)} ranks"
    parts = [_together({rank: (beats[rank], f"in {_place_of(beats[rank])}") for rank in blamed})] if blamed else []
    parts.append(f"{_ranks(waiting) if len(waiting) == 1 else several} in {_place_of(beats[waiting[0]])}")
    if stacks is not None:
        parts.append(f"the stacks of all ranks are in {stacks}")
    return f"no progress for {stalled_s:.0f} s: {'; '.join(parts)}"


def say_and_exit(sentence: str) -> None:
    """The end of this process, whatever its other threads wait for."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_of(beat: Beat, silent_s: float) -> str:
    if beat.fate == "failed":
        return f"failed in step {beat.step}: {beat.why}"
    if beat.fate == "cut off":
        return f"left in step {beat.step}, cut off from the others: {beat.why}"
    seen = f", last seen in {_place_of(beat)}" if beat.number else ", and none before"
    return f"gave no sign of life for {silent_s:.0f} s{seen}"


def _place_of(beat: Beat) -> str:
    return f"step {beat.step}, {beat.doing}"


def _together(said: Mapping[int, tuple[Beat, str]]) -> str:
    """What holds for several ranks of one host is said once."""
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, (beat, words) in said.items():
        groups[f" (host {beat.host})" if beat.host else "", words].append(rank)
    return "; ".join(f"{_ranks(ranks)}{host} {words}" for (host, words), ranks in groups.items())


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(map(str, ranks))}"


class _Place(NamedTuple):
    step: int
    doing: str
    since: float  # on the monotonic clock


class Watch:
    """This rank's part; all ranks start theirs when they have met. A process that is alone needs no store."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        settings: WatchSettings,
        on_lost: Callable[[str], None] = say_and_exit,
    ) -> None:
        """`on_lost`: called by a thread once ranks are lost for `lost_after_s`, with a sentence that names them."""
        assert store is not None or world_size == 1, world_size
        self._rank, self._settings, self._on_lost = rank, settings, on_lost
        self._host = socket.gethostname()
        self._place = _Place(0, "starting", time.monotonic())
        self._stalled: _Place | None = None
        self._fate: Fate = ""
        self._why = ""
        self._asking = False
        self._verdict = ""
        self._overdue = False
        self._concluding = threading.Lock()
        self._stacks = _Stacks(rank)
        # Not one thread but two: the one that talks may wait for ever for a store whose node vanished.
        self._talk = None
        if store is not None and world_size > 1:
            self._talk = _Talk(store, rank, world_size, settings, self._answer)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._over = threading.Event()

    def start(self) -> None:
        if self._settings.stacks is not None:
            self.keep_stacks_in(self._settings.stacks)
        if self._talk is not None:
            self._talk.start()
        self._thread.start()

    def keep_stacks_in(self, folder: Path) -> None:
        """From now on, when this rank stalls, its stacks are appended to `rank_N.txt` in `folder`."""
        self._stacks.keep_in(folder)

    def at(self, step: int, doing: str) -> None:
        """Say what this rank does from now on. It costs next to nothing, so say it at every change."""
        self._place = _Place(step, doing, time.monotonic())

    def stop(self) -> None:
        """This rank has ended as it should: nothing is written or called any more. Takes 4 s at most; never raises."""
        self._leave("done")

    def leaving(self, reason: str, *, victim: bool = False) -> None:
        """Instead of `stop`, before the connections to the others close: this rank ends early, and why.

        `victim`: it is not to blame, as a collective failed under it. Takes 4 s at most; never raises.
        """
        self._leave("cut off" if victim else "failed", " ".join(reason.split())[:_LONGEST_REASON])

    def who_is_lost(self, within_s: float) -> str | None:
        """After a failed collective: a sentence that names the ranks that are lost or failed, the same on all ranks.

        None if all still live after `within_s`, which should be five beats or more. Rank 0 may take 3 s longer.
        """
        if self._talk is None or self._fate:
            return self._verdict or None
        self._asking = True  # from now on the caller ends this process, not `on_lost`
        deadline = time.monotonic() + within_s
        self._talk.wake()
        while not self._verdict and time.monotonic() < deadline:
            time.sleep(_HURRY_S / 2)
            self._judge(self._talk.heard())
        self._asking = bool(self._verdict)
        if self._rank == 0 and self._verdict:
            self._talk.have_last_word()
        return self._verdict or None

    def _leave(self, fate: Fate, why: str = "") -> None:
        if self._fate:
            return  # the first reason is the reason
        self._why = why
        self._fate = fate
        self._over.set()
        if self._talk is not None:
            self._talk.have_last_word()
            self._talk.end()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
        self._stacks.close()

    def _answer(self, heard: Mapping[int, Heard]) -> Beat:
        self._judge(heard)
        place = self._place
        return Beat(
            step=place.step,
            doing=place.doing,
            since_s=time.monotonic() - place.since,
            host=self._host,
            fate=self._fate,
            why=self._why,
            asking=self._asking and not self._fate,
            heard=heard[0].beat.number if self._rank else 0,
            verdict=self._verdict,
            overdue=self._overdue,
        )

    def _judge(self, heard: Mapping[int, Heard]) -> None:
        """Rank 0 judges all others; they judge rank 0 and believe what it says."""
        if self._rank:
            self._conclude(heard[0].beat.verdict, heard[0].beat.overdue)
        asked = self._asking or any(of.beat.asking for of in heard.values())
        if asked and (lost := culprits(heard, self._settings, asked)):
            self._conclude(sentence_of_loss(heard, lost))
        if lost := culprits(heard, self._settings, asked=False):
            self._conclude(sentence_of_loss(heard, lost), overdue=True)

    def _conclude(self, verdict: str, overdue: bool = False) -> None:
        """The first verdict is the verdict, so that all ranks name the same."""
        with self._concluding:
            self._verdict = self._verdict or verdict
            self._overdue = self._overdue or overdue

    def _run(self) -> None:
        is_over = False
        while not is_over:
            try:
                self._look_for_losses()
                self._look_for_stalls()
            except Exception as error:  # a full disk, say: training goes on, and so does the watch
                _log.warning("the watch over the ranks could not do all its work: %r", error)
            is_over = self._over.wait(self._settings.beat_every_s)

    def _look_for_losses(self) -> None:
        if self._talk is None:
            return
        self._talk.measure_silence()
        self._judge(self._talk.heard())
        if self._overdue and not self._is_ending():
            if self._rank == 0:
                self._talk.have_last_word()
            if not self._is_ending():  # still
                self._over.set()
                self._on_lost(self._verdict)

    def _is_ending(self) -> bool:
        return self._asking or self._fate != ""

    def _look_for_stalls(self) -> None:
        place = self._place
        if place is self._stalled:
            return
        if self._stalled is not None:
            _log.info("training goes on")
            self._stalled = None
        if (stalled_s := time.monotonic() - place.since) >= self._settings.stall_after_s:
            self._stalled = place
            own = Beat(step=place.step, doing=place.doing, since_s=stalled_s, host=self._host)
            if self._rank == 0:
                heard = self._talk.heard() if self._talk is not None else {}
                beats = {0: own} | {rank: of.beat_now() for rank, of in heard.items() if not of.beat.fate}
                _log.warning("%s", sentence_of_stall(beats, stalled_s, self._stacks.folder))
            self._stacks.write(f"rank {self._rank} on {self._host}: {stalled_s:.0f} s in {_place_of(own)}")


class _Talk:
    """This rank's own connection to the store; its thread reads the beats that this rank may read, and posts one."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        settings: WatchSettings,
        answer: Callable[[Mapping[int, Heard]], Beat],
    ) -> None:
        """`answer`: what to say after hearing this; it gets its number here."""
        self._store, self._rank, self._settings, self._answer = store, rank, settings, answer
        self.rounds = 0  # in which the store answered
        self._heard = {other: Heard(Beat()) for other in (range(1, world_size) if rank == 0 else [0])}
        self._heard_at = self._measured_at = time.monotonic()
        self._measured_rounds = 0
        self._store_silent_s = 0.0
        self._begun = self._posted = 0  # numbers of beats
        self._is_cut = False
        self._awake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch: store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self.wake()

    def wake(self) -> None:
        """Do not wait for the next beat's time."""
        self._awake.set()

    def heard(self) -> Mapping[int, Heard]:
        """Rank 0 hears all others; they hear rank 0, and cannot when the store is silent."""
        heard, silent_s = self._heard, self._store_silent_s
        if self._rank and silent_s:
            return {0: replace(heard[0], silent_s=heard[0].silent_s + silent_s, store_silent_s=silent_s)}
        return heard

    def have_last_word(self) -> None:
        """Wait until the store has taken what is to be said now. Rank 0 waits until the others have read it, too.

        For the store may end with rank 0.
        """
        number = self._begun + 1
        deadline = time.monotonic() + _LINGER_S
        while self._thread.is_alive() and not self._is_cut and time.monotonic() < deadline:
            self.wake()
            if self._posted >= number and (self._rank or all_have_heard(self._heard, number, self._settings)):
                return
            time.sleep(_HURRY_S / 2)

    def measure_silence(self) -> None:
        """Called about once a beat, by a thread that does not wait for the store."""
        passed_s, self._measured_at = self._passed_since(self._measured_at)
        self._store_silent_s = self._store_silent_s + passed_s if self.rounds == self._measured_rounds else 0.0
        self._measured_rounds = self.rounds

    def _passed_since(self, then: float) -> tuple[float, float]:
        """At most two beats: while a whole job was suspended, nobody could give a sign of life."""
        now = time.monotonic()
        return min(now - then, 2 * self._settings.beat_every_s), now

    def _run(self) -> None:
        line: Store | None = None
        while not self._ended.is_set():
            self._awake.clear()
            try:
                line = line or self._connected()
                is_urgent = self._exchange(line)
                self._awake.wait(_HURRY_S if is_urgent else self._settings.beat_every_s)
            except Exception:  # of the store's client, which does not reconnect; a new one says much on stderr, so wait
                line, self._is_cut = None, True
                self._ended.wait(self._settings.lost_after_s / 2)

    def _connected(self) -> Store:
        line = PrefixStore("watch", self._store.clone())  # type: ignore[attr-defined]  # missing in torch's stub
        line.set_timeout(timedelta(seconds=self._settings.lost_after_s))
        for rank in self._heard:  # whoever reads before the other has spoken would wait for it
            line.compare_set(_key(rank), "", _text(Beat()))
        self._is_cut = False
        return line

    def _exchange(self, line: Store) -> bool:
        """Whether somebody waits for the outcome."""
        texts = line.multi_get([_key(rank) for rank in self._heard])
        self._hear({rank: Beat(**json.loads(text)) for rank, text in zip(self._heard, texts, strict=True)})
        self._begun += 1
        beat = replace(self._answer(self._heard), number=self._begun)
        line.set(_key(self._rank), _text(beat))
        line.check([_key(self._rank)])  # `set` alone does not wait for the store
        self._posted = beat.number
        return beat.asking or any(of.beat.asking for of in self._heard.values())

    def _hear(self, beats: Mapping[int, Beat]) -> None:
        passed_s, self._heard_at = self._passed_since(self._heard_at)
        before = self._heard
        self._heard = {
            rank: Heard(beat, before[rank].silent_s + passed_s if beat.number == before[rank].beat.number else 0.0)
            for rank, beat in beats.items()
        }
        self.rounds += 1


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _text(beat: Beat) -> str:
    return json.dumps(asdict(beat))


class _Stacks:
    """Where every thread of this process stands, when it stands for too long."""

    def __init__(self, rank: int) -> None:
        self.folder: Path | None = None
        self._rank = rank
        self._file: TextIO | None = None

    def keep_in(self, folder: Path) -> None:
        self.close()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank_{self._rank}.txt").open("a", encoding="utf-8")
        self.folder = folder

    def write(self, heading: str) -> None:
        """By this thread of Python, which holds the interpreter meanwhile. Not by `dump_traceback_later`: it looks at
        the stacks of threads that run, and brought a process down that had been suspended and went on.
        """
        if self._file is not None:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {heading}", file=self._file, flush=True)
            faulthandler.dump_traceback(self._file, all_threads=True)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            if os.fstat(file.fileno()).st_size == 0:
                Path(file.name).unlink(missing_ok=True)
            file.close()

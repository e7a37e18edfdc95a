"""`pathfm logs RUN`: what the ranks of a run say, across the starts of its job."""

import heapq
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathfm.errors import UserError, listed
from pathfm.jobs.find_run import find_run
from pathfm.jobs.run_progress import lives_here, writer_of
from pathfm.jobs.slurm_jobs import how_it_ended, in_words, job_ids, live_jobs, slurm_is_here
from pathfm.launch.attempts import Attempt, attempts, outcomes
from pathfm.launch.scontrol import SlurmRefusal
from pathfm.lifecycle.run import Run

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_QUESTIONS = 5.0  # to Slurm, while nothing new is logged
_CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d) ")  # that our log lines begin with
_DAY_S = 86_400


@dataclass(frozen=True)
class Source:
    """Whose logs are shown, and where they lie by the prefix of their lines."""

    name: str
    files: Mapping[str, Path]
    attempt: Attempt | None = None
    is_makeshift: bool = False  # until a rank says something


@dataclass
class Tail:
    """A file that grows, in whole lines."""

    path: Path
    position: int = 0
    _clock: float = 0.0
    _days: int = 0

    def lines(self, *, to_the_end: bool = False) -> Iterator[tuple[float, str]]:
        """Those that came since the last look, with the second of the line, or of the line before that has one.

        `to_the_end`: the last line too, though no line break ends it.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n") and not to_the_end:
                    break
                self.position += len(line)
                text = line.decode(errors="replace").rstrip("\n")
                yield self._second_of(text), text

    def _second_of(self, text: str) -> float:
        if match := _CLOCK.match(text):
            clock = int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])
            self._days += clock < self._clock - _DAY_S / 2  # midnight
            self._clock = clock
        return self._days * _DAY_S + self._clock


@dataclass
class Viewer:
    """Prints what is new in the files of a source."""

    tails: dict[Path, Tail] = field(default_factory=dict)

    def show(self, source: Source, *, to_the_end: bool = False) -> bool:
        """The lines of several files in the order of their clocks. Says whether there were any."""
        new = [self._lines(prefix, path, to_the_end) for prefix, path in source.files.items()]
        any_new = False
        for _, line in heapq.merge(*new, key=lambda timed: timed[0]):
            print(line)
            any_new = True
        sys.stdout.flush()
        return any_new

    def _lines(self, prefix: str, path: Path, to_the_end: bool) -> Iterator[tuple[float, str]]:
        for second, line in self.tails.setdefault(path, Tail(path)).lines(to_the_end=to_the_end):
            yield second, prefix + line


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    run = find_run(arguments.run)
    if arguments.follow:
        return _follow(run, arguments)
    source = _source(run, arguments)
    if source is None:
        raise UserError(f"run {run.name} has no logs yet; {_what_there_is_to_do(run)}")
    _say(_heading(source))
    if not Viewer().show(source, to_the_end=True):
        _say(
            "nothing is in it"
            if source.attempt
            else "nothing is in it; a run that was started on a terminal speaks there"
        )
    if told := _outcome_of(source):
        _say(told)
    return 0


# ---- which files


def _source(run: Run, wanted: Namespace) -> Source | None:
    """None: nothing was logged so far. Raises `UserError` for an attempt or a rank that is not there."""
    begun = attempts(run.directory)
    if wanted.attempt:
        named = [attempt for attempt in begun if attempt.name == wanted.attempt]
        if not named:
            there = listed(attempt.name for attempt in begun) or "none"
            raise UserError(f"run {run.name} has no attempt {wanted.attempt}; there are: {there}")
        begun = named
    if not begun:
        return _without_ranks(run)
    attempt, supervisor = begun[-1], _supervisor_log(run, begun[-1])
    if wanted.supervisor:
        return Source(f"the supervisor of job {attempt.job}", {"": supervisor}, attempt)
    logs = {int(log.stem.removeprefix("rank_")): log for log in attempt.rank_logs()}
    if not logs:
        name = f"the supervisor of job {attempt.job}, as no rank has said anything"
        return Source(name, {"": supervisor}, attempt, is_makeshift=True) if supervisor.exists() else None
    if wanted.all:
        return Source(f"all ranks of attempt {attempt.name}", {f"[{rank}] ": logs[rank] for rank in logs}, attempt)
    if wanted.rank not in logs:
        raise UserError(
            f"attempt {attempt.name} of run {run.name} has no log of rank {wanted.rank}; "
            f"its ranks are {min(logs)} to {max(logs)}"
        )
    return Source(f"rank {wanted.rank} of attempt {attempt.name}", {"": logs[wanted.rank]}, attempt)


def _without_ranks(run: Run) -> Source | None:
    """A run on this machine has one log for all ranks; a job whose ranks have not begun has its supervisor's."""
    logs = sorted((run.directory / "logs" / "submitit").glob("*_log.out"), key=lambda path: path.stat().st_mtime)
    return Source(f"job {logs[-1].name.split('_')[0]}", {"": logs[-1]}) if logs else None


def _supervisor_log(run: Run, attempt: Attempt) -> Path:
    return run.directory / "logs" / "submitit" / f"{attempt.job}_0_log.out"


def _heading(source: Source) -> str:
    where = listed((str(path) for path in source.files.values()), at_most=1)
    return f"{source.name}: {where}"


def _outcome_of(source: Source | None) -> str:
    """How the attempt ended, in the supervisor's words."""
    attempt = source.attempt if source else None
    for outcome in reversed(outcomes(attempt.run_dir)) if attempt else ():
        if attempt and (outcome.job, outcome.restart) == (attempt.job, attempt.restart):
            return f"attempt {attempt.name} ended: {outcome.decision}, {outcome.reason}"
    return ""


def _what_there_is_to_do(run: Run) -> str:
    if not job_ids(run):
        return "only what launchers/pretrain.py starts is logged there; pathfm train speaks to its terminal"
    if waiting := _queue(run):
        return f"{waiting}; wait for it with -f"
    return f"look at pathfm status {run.directory}"


# ---- following


def _follow(run: Run, wanted: Namespace) -> int:
    """Until the run is over, or Ctrl-C."""
    viewer, shown = Viewer(), _source(run, wanted)
    _say(_heading(shown) if shown else f"run {run.name} has no logs yet; {_queue(run) or 'waiting for its start'}")
    try:
        why = _show_until_over(run, wanted, viewer, shown)
    except KeyboardInterrupt:
        return 0
    _say(why)
    return 0


def _show_until_over(run: Run, wanted: Namespace, viewer: Viewer, shown: Source | None) -> str:
    """Returns why nothing more will come."""
    quiet_since = time.monotonic()
    while True:
        newest = _newest(run, wanted, shown)
        if newest and newest.name != (shown.name if shown else ""):
            _go_over(viewer, shown, newest)
        shown, why = newest, ""
        if time.monotonic() - quiet_since >= _SECONDS_BETWEEN_QUESTIONS:
            quiet_since, why = time.monotonic(), _over(run)
        if shown and viewer.show(shown, to_the_end=bool(why)):
            quiet_since = time.monotonic()
        if why:
            return "; ".join(filter(None, (_outcome_of(shown), why)))
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _newest(run: Run, wanted: Namespace, shown: Source | None) -> Source | None:
    """Where to read on. An attempt that just began, and whose ranks have said nothing, is waited for."""
    try:
        found = _source(run, wanted)
    except UserError:  # the rank that is asked for has not begun, but others have
        return shown
    return shown if shown and (found is None or found.is_makeshift) else found


def _go_over(viewer: Viewer, shown: Source | None, newest: Source) -> None:
    if shown:
        viewer.show(shown, to_the_end=True)
    _say("; ".join(filter(None, (_outcome_of(shown), f"now {_heading(newest)}"))))


def _over(run: Run) -> str:
    """Why nothing more will come; empty when something may."""
    verdict = how_it_ended(run).get("verdict") or "it never began"
    is_over = f"run {run.name} is over ({'killed' if verdict == 'running' else verdict})"
    if not job_ids(run):
        alive = lives_here(writer_of(run))
        has_left = alive is False or (alive is None and verdict in ("done", "interrupted", "failed"))
        return f"{is_over}: no process trains it" if has_left else ""
    if not slurm_is_here():
        last = outcomes(run.directory)[-1:]
        return is_over if verdict == "done" or any(outcome.decision == "fail" for outcome in last) else ""
    try:
        return "" if any(live_jobs(run)) else f"{is_over}: no job of it waits or runs"
    except SlurmRefusal:  # a controller that restarts
        return ""


def _queue(run: Run) -> str:
    try:
        job = next(live_jobs(run), None) if slurm_is_here() else None
    except SlurmRefusal as refusal:
        return f"Slurm does not answer ({refusal})"
    return f"job {job.job} is {in_words(job)}" if job else ""


def _say(text: str) -> None:
    """Beside the log itself, so that this can be piped."""
    print(f"pathfm: {text}", file=sys.stderr, flush=True)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm logs",
        description="Print the log of rank 0 of a run's newest start on Slurm, or the log of a run on this machine.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory, or its name in runs/")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, also when the job starts again")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, metavar="N", help="another rank's log")
    which.add_argument("--all", action="store_true", help="all ranks, each line with its rank, by the clock")
    which.add_argument("--supervisor", action="store_true", help="what became of the job's starts, and why")
    parser.add_argument("--attempt", metavar="JOB.RESTART", help="an earlier start; pathfm status RUN lists them")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""`pathfm status [RUN ...]`: every run in a line, or one in full: the queue, steps, tuning, alarms, its starts."""

import json
import re
import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any

from pathfm.jobs.find_run import RUNS, all_runs, find_run
from pathfm.jobs.run_progress import (
    Progress,
    Tuned,
    group,
    last_lines,
    lives_here,
    newest_checkpoint_of,
    progress_of,
    settings_of,
    tracked_of,
    tuned_of,
    writer_of,
)
from pathfm.jobs.slurm_jobs import how_it_ended, in_words, job_ids, live_jobs, slurm_is_here, time_span
from pathfm.launch.attempts import Attempt, Outcome, attempts, outcomes, submissions
from pathfm.launch.scontrol import JobRecord, SlurmRefusal
from pathfm.lifecycle.run import Run
from pathfm.tables import text_table

_COLUMNS = (
    "run", "in the queue", "state", "step", "loss", "logged", "samples/s", "ETA", "tuning",
    "checkpoint", "starts", "trouble",
)  # fmt: skip
_ALWAYS = ("run", "state", "step")  # the others only where some run has something to say
_FIRST_TO_GO = ("nodes", "logged", "loss", "starts")  # from a table that is too wide
_WIDTH = 140  # letters, if possible
_ATTEMPTS = ["attempt", "nodes", "ended", "decision", "checkpoint", "reason"]
_FEW_WORDS = 48  # letters of a reason, in a table
_LAST_ALARMS = 3  # of one run in full
_SECONDS_BETWEEN_LOOKS = 10.0
_AT_ONCE = 8  # questions to Slurm
_CLEAR = "\x1b[H\x1b[2J"
_NODES = re.compile(r" on \S*[^\s,]")  # in what is said of a job
_BEGUN_ON = re.compile(r"attempt (\S+) on (\S+): logs are")  # the supervisor's first words


@dataclass(frozen=True)
class Queued:
    """What Slurm has of a run. `answered`: whether somebody could say."""

    words: str = "-"
    job: JobRecord | None = None
    answered: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if not arguments.watch:
        print(_page(arguments.runs, arguments.runs_dir))
        return 0
    try:
        while True:
            page = _page(arguments.runs, arguments.runs_dir)
            print(f"{_CLEAR if sys.stdout.isatty() else ''}{datetime.now():%H:%M:%S}\n{page}", flush=True)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        return 0


def _page(names: Sequence[str], runs_dir: Path) -> str:
    runs = [find_run(name, runs_dir) for name in names] if names else all_runs(runs_dir)
    if not runs:
        return f"there are no runs in {runs_dir.absolute()}"
    queue = _queue(runs)
    table = _table([_row(run, queued) for run, queued in zip(runs, queue, strict=True)])
    return f"{table}\n\n{_details(runs[0], queue[0])}" if len(names) == 1 else table


# ---- Slurm


def _queue(runs: Sequence[Run]) -> list[Queued]:
    """Several are asked for at once; after one refusal no more questions are put."""
    if not slurm_is_here():
        return [Queued()] * len(runs)
    refused = Event()

    def ask(run: Run) -> Queued:
        if refused.is_set():
            return Queued("no answer")
        try:
            return _queued(run)
        except SlurmRefusal:
            refused.set()
            return Queued("no answer")
        except OSError:  # a run of somebody who does not show it
            return Queued()

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(ask, runs))


def _queued(run: Run) -> Queued:
    """Of a run that is done, and of one that never met Slurm, nothing is asked."""
    if how_it_ended(run).get("verdict") == "done" or not job_ids(run):
        return Queued(answered=True)
    job = next(live_jobs(run), None)
    return Queued(in_words(job) if job else "no job", job, answered=True)


# ---- a line


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Without what is empty for all runs, and as narrow as it can be made without leaving out much."""
    columns = [name for name in _COLUMNS if name in _ALWAYS or any(row[name] != "-" for row in rows)]
    metrics = {row["tuning"].split(" ")[0] for row in rows if row["tuning"] != "-"}
    header = {"tuning": metrics.pop()} if len(metrics) == 1 else {}
    cells = [{**row, "tuning": row["tuning"].removeprefix(f"{header.get('tuning')} ")} for row in rows]
    for name in ("", *_FIRST_TO_GO):
        if name == "nodes":
            cells = [{**row, "in the queue": _NODES.sub("", row["in the queue"])} for row in cells]
        columns = [column for column in columns if column != name]
        names = [header.get(column, column) for column in columns]
        table = text_table(names, [[row[column] for column in columns] for row in cells])
        if max(map(len, table.splitlines())) <= _WIDTH:
            break
    return table


def _row(run: Run, queued: Queued) -> dict[str, str]:
    told = {**dict.fromkeys(_COLUMNS, "-"), "run": run.name, "in the queue": queued.words}
    try:
        progress = progress_of(run)
        return {
            **told,
            "state": _short(_state(run, queued)),
            "step": _step(progress),
            "loss": _loss(progress),
            "logged": _ago(progress.logged) if progress.logged else "-",
            "samples/s": _samples_per_second(progress),
            "ETA": time_span(progress.seconds_to_go) if progress.seconds_to_go else "-",
            "tuning": _tuning(tuned_of(run, tracked_of(settings_of(run)))),
            "checkpoint": _checkpoint(run),
            "starts": _starts(run),
            "trouble": _trouble(run),
        }
    except OSError as error:
        return {**told, "state": f"cannot be read: {error.strerror}"}


def _state(run: Run, queued: Queued) -> str:
    """What exit.json says, as far as it is still true."""
    ended, job = how_it_ended(run), queued.job
    verdict = str(ended.get("verdict", ""))
    attempt = (ended.get("job"), ended.get("restart"))
    if verdict == "done":
        return verdict
    if job is not None and not job.is_waiting and attempt != (job.job, job.restarts):
        return "starting"
    if not verdict:
        return "not begun"
    outcome = next((found for found in reversed(_outcomes(run)) if (found.job, found.restart) == attempt), None)
    if verdict == "running":
        return _running(run, queued, outcome, on_slurm=ended.get("job") is not None)
    reason = str(ended.get("reason") or "") or (outcome.reason if outcome else "")
    if verdict == "failed" and job is not None:
        verdict = "crashed, tried again"
    if verdict == "interrupted" and outcome and outcome.decision == "leave" and job is None:
        reason = outcome.reason
    return f"{verdict}: {reason}" if reason else verdict


def _running(run: Run, queued: Queued, outcome: Outcome | None, *, on_slurm: bool) -> str:
    """exit.json says `running`; whoever wrote it may have been killed."""
    if outcome is not None:
        return f"killed: {outcome.reason}"
    if queued.job is not None:
        return "killed, to go on" if queued.job.is_waiting else "running"
    if on_slurm:
        return "stale: says running, yet no job" if queued.answered else "running"
    return "stale: says running, yet no process" if lives_here(writer_of(run)) is False else "running"


def _step(progress: Progress) -> str:
    if not progress.total_steps:
        return f"{progress.step:,}"
    percent = 100 * progress.step / progress.total_steps
    return f"{_count(progress.step)} / {_count(progress.total_steps)} ({percent:.0f} %)"


def _loss(progress: Progress) -> str:
    if not progress.has_metrics:
        return "-"
    return "not finite" if progress.loss is None else f"{progress.loss:.4f}"


def _samples_per_second(progress: Progress) -> str:
    speed = progress.samples_per_second
    return "-" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _tuning(tuned: Tuned | None) -> str:
    """The teacher's number / the student's, and at which step."""
    if tuned is None:
        return "-"
    student = "" if tuned.student is None else f"/{tuned.student:.3f}"
    return f"{tuned.metric} {tuned.teacher:.3f}{student} at {_count(tuned.step)}"


def _checkpoint(run: Run) -> str:
    step, written = newest_checkpoint_of(run)
    return f"{_count(step)}{f', {_ago(written)}' if written else ''}" if step else "-"


def _trouble(run: Run) -> str:
    """The last alarm or crash."""
    crashes = [(_moment(outcome.ended), "crash") for outcome in _outcomes(run) if outcome.was_crash]
    found = [(_moment(alarm.get("time")), str(alarm.get("alarm"))) for alarm in _alarms(run)]
    when, what = max([*found, *crashes], key=lambda pair: pair[0] or 0.0, default=(None, "-"))
    return f"{what}, {_ago(when)}" if when else what


def _starts(run: Run) -> str:
    """On Slurm; on this machine every start left its account in provenance.json."""
    crashes = sum(outcome.was_crash for outcome in _outcomes(run))
    number = len(attempts(run.directory)) or len(_segments(run))
    return f"{number:,}{f', {crashes:,} crashed' if crashes else ''}"


# ---- all of one run


def _details(run: Run, queued: Queued) -> str:
    try:
        sections = [_facts(run, queued), _attempts_table(run)]
    except OSError as error:
        return f"  the rest cannot be read: {error.strerror}: {error.filename}"
    return "\n\n".join(section for section in sections if section)


def _facts(run: Run, queued: Queued) -> str:
    progress, settings = progress_of(run), settings_of(run)
    rows = {
        "directory": run.directory.absolute(),
        "state": _state(run, queued),
        "last error": _last_error(run),
        "alarms": _last_alarms(run),
        "speed": _speed(progress),
        "tuning": _tuning_in_full(tuned_of(run, tracked_of(settings)), progress.step),
        "job": queued.job and f"{queued.job.job}: {queued.words}",
        "submitted": _submitted(run),
        "begun by": _writer(run),
        "logs": _newest_log(run),
        "checkpoints": _listing(run.checkpoints, "step_*"),
        "exports": _listing(run.exports, "teacher_[0-9]*.safetensors"),
        "accidents": _listing(run.accidents, "*.json"),
        "W&B": _wandb(run, group(settings, "wandb")),
    }
    below = "\n" + " " * 14
    return "\n".join(f"  {name:<12}" + str(fact).replace("\n", below) for name, fact in rows.items() if fact)


def _attempts_table(run: Run) -> str:
    nodes, ended = _nodes(run), {(outcome.job, outcome.restart): outcome for outcome in _outcomes(run)}
    rows = [_attempt_row(attempt, nodes, ended.get((attempt.job, attempt.restart))) for attempt in _begun(run)]
    return text_table(_ATTEMPTS, rows) if rows else ""


def _attempt_row(attempt: Attempt, nodes: Mapping[str, str], outcome: Outcome | None) -> list[str]:
    on = nodes.get(attempt.name, "?")
    if outcome is None:
        return [attempt.name, on, "-", "-", "-", "-"]
    return [attempt.name, on, _local(outcome.ended), outcome.decision, f"{outcome.checkpoint:,}", outcome.reason]


def _begun(run: Run) -> list[Attempt]:
    """Also those of which only the end is known, their logs having been cleared away."""
    begun = attempts(run.directory)
    known = {(attempt.job, attempt.restart) for attempt in begun}
    gone = [outcome for outcome in _outcomes(run) if (outcome.job, outcome.restart) not in known]
    return [*(Attempt(run.directory, outcome.job, outcome.restart) for outcome in gone), *begun]


def _nodes(run: Run) -> dict[str, str]:
    """Of every attempt, as its supervisor told."""
    logs = (run.directory / "logs" / "submitit").glob("*_0_log.out")
    told = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    return dict(_BEGUN_ON.findall(told)) if attempts(run.directory) else {}


def _speed(progress: Progress) -> str:
    if not progress.seconds_per_step:
        return ""
    samples = f", {progress.samples_per_second:,.0f} samples/s" if progress.samples_per_second else ""
    to_go = f", {time_span(progress.seconds_to_go)} of steps to go" if progress.seconds_to_go else ""
    return f"{1 / progress.seconds_per_step:.3g} steps/s{samples}{to_go}"


def _submitted(run: Run) -> str:
    told = []
    for submission in submissions(run.directory):
        follows = f", follows {submission.follows}" if submission.follows else ""
        size = f"{submission.nodes} x {submission.tasks_per_node} tasks"
        told.append(f"job {submission.job}, {_local(submission.submitted)}, {size}{follows}")
    return "\n".join(told)


def _tuning_in_full(tuned: Tuned | None, step: int) -> str:
    if tuned is None:
        return ""
    student = "" if tuned.student is None else f", student {tuned.student:.4f}"
    ago = f", {step - tuned.step:,} steps ago" if step > tuned.step else ""
    told = f"{tuned.metric}: teacher {tuned.teacher:.4f}{student}, at step {tuned.step:,}{ago}"
    if tuned.best is None:
        return told
    told += f"\nbest: {tuned.best:.4f}"
    if tuned.best_step is not None:
        told += f", at step {tuned.best_step:,}"
    if tuned.without_improvement is None:
        return told
    if tuned.patience is None:
        return f"{told}; {tuned.without_improvement:,} tunings since without an improvement"
    left = max(0, tuned.patience - tuned.without_improvement)
    return f"{told}; patience for {left:,} of {tuned.patience:,} tunings left"


def _last_alarms(run: Run) -> str:
    return "\n".join(
        f"{_local(alarm.get('time'))}, step {alarm.get('step')}, {alarm.get('alarm')}: {alarm.get('text')}"
        for alarm in _alarms(run)[-_LAST_ALARMS:]
    )


def _last_error(run: Run) -> str:
    """Of a crash that the run has outlived; the one that it ended with is its state."""
    crashes = [outcome for outcome in _outcomes(run) if outcome.was_crash]
    if not crashes or how_it_ended(run).get("verdict") == "failed":
        return ""
    return f"{_local(crashes[-1].ended)}, attempt {crashes[-1].job}.{crashes[-1].restart}: {crashes[-1].reason}"


def _writer(run: Run) -> str:
    writer = writer_of(run)
    return f"process {writer[0]} on {writer[1]}" if writer else ""


def _newest_log(run: Run) -> str:
    begun = attempts(run.directory)
    folder = begun[-1].folder if begun else run.directory / "logs" / "submitit"
    return f"{folder}   (pathfm logs {run.directory})" if folder.is_dir() else ""


def _listing(folder: Path, pattern: str) -> str:
    found = sorted(path.name for path in folder.glob(pattern))
    return f"{folder}: {f'{len(found):,}, the newest is ' if len(found) > 1 else ''}{found[-1]}" if found else ""


def _wandb(run: Run, settings: Mapping[str, Any]) -> str:
    """Its page, where recipe and id tell it; offline files wait in the run."""
    try:
        number = settings.get("resume_id") or (run.directory / "wandb_id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    place = "/".join(str(part) for part in (settings.get("username"), settings.get("project")) if part)
    return f"https://wandb.ai/{place}/runs/{number}" if settings.get("username") else f"run {number} of {place}"


# ---- small words


def _outcomes(run: Run) -> list[Outcome]:
    return outcomes(run.directory)


def _segments(run: Run) -> list[Any]:
    try:
        found = json.loads((run.directory / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _alarms(run: Run) -> list[dict[str, Any]]:
    return [line for line in last_lines(run.alarms) if isinstance(line.get("alarm"), str)]


def _count(number: int) -> str:
    """9,999, 12.3k, 1.25M."""
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e6:.3g}M" if number >= 999_500 else f"{number / 1e3:.3g}k"


def _ago(moment: float) -> str:
    return f"{time_span(time.time() - moment)} ago"


def _local(text: object) -> str:
    """UTC as it was noted -> the reader's own time."""
    moment = _moment(text)
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M}" if moment is not None else "-"


def _moment(text: object) -> float | None:
    """UTC as it was noted -> seconds since the epoch."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _short(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= _FEW_WORDS else f"{line[: _FEW_WORDS - 3].rstrip()}..."


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm status",
        description="Where runs stand: in Slurm's queue, by their own word, and by their metrics, tunings, alarms and "
        "checkpoints. Tuning is the teacher's number / the student's and their step. One run by name is told in full. "
        "Nothing is changed.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help="a run's directory, or its name in runs/ (default: all)")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs lie (default: runs)")
    parser.add_argument("--watch", action="store_true", help="look again every ten seconds, until Ctrl-C")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

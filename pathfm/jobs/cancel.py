"""`pathfm cancel RUN [RUN ...]`: end the Slurm jobs of a run for good; its checkpoints stay."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from pathfm.errors import UserError
from pathfm.jobs.find_run import find_run
from pathfm.jobs.run_progress import lives_here, writer_of
from pathfm.jobs.slurm_jobs import in_words, is_named_after, live_records, slurm_is_here
from pathfm.launch.attempts import newest_checkpoint, note_cancelled, submissions
from pathfm.launch.scontrol import JobRecord, SlurmRefusal, ask_to_leave, cancel
from pathfm.lifecycle.run import Run

_TRIES, _PATIENCE_S = 2, 60.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    runs = [find_run(name) for name in arguments.runs]
    if not slurm_is_here():
        raise UserError("there is no Slurm here (scontrol is not on PATH); cancel where the run was submitted")
    return max([_cancel(run, at_once=arguments.now) for run in runs])


def _cancel(run: Run, *, at_once: bool) -> int:
    """Returns the exit status: 1 when a job could not be cancelled. The newest job first: one may wait for another."""
    live = _live_jobs(run)
    ours = [job for job in live if is_named_after(job, run)]
    for job in live:
        if job not in ours:
            print(f"note: job {job.job} is named '{job.name}', not '{run.name}'; it is left alone", file=sys.stderr)
    if not ours:
        print(f"run {run.name} has no job that waits or runs; nothing to cancel{_who_trains_it(run)}")
        return 0
    cancelled = [job for job in ours if _is_cancelled(job, run, at_once=at_once)]
    if cancelled:
        print(_what_stays(run))
    return 0 if len(cancelled) == len(ours) else 1


def _is_cancelled(job: JobRecord, run: Run, *, at_once: bool) -> bool:
    """A job that trains is asked to save and leave; its supervisor knows by the note that it is not to go on."""
    trains = job.state == "RUNNING" and not at_once
    try:
        note_cancelled(run.directory, job.job)
        ask_to_leave(job.address) if trains else cancel(job.address)
    except SlurmRefusal as refusal:
        print(f"error: job {job.job} of run {run.name} was not cancelled: {refusal}", file=sys.stderr)
        return False
    saves = "; it saves and leaves" if trains else ""
    print(f"cancelled job {job.job} of run {run.name} ({in_words(job)}){saves}")
    return True


def _live_jobs(run: Run) -> list[JobRecord]:
    try:
        return [record for _, record in live_records(run, _TRIES, _PATIENCE_S)]
    except SlurmRefusal as refusal:
        raise UserError(f"Slurm does not answer ({refusal}); run {run.name} was not cancelled") from refusal


def _what_stays(run: Run) -> str:
    step = newest_checkpoint(run.directory)
    stays = f"its checkpoints stay, the newest is of step {step:,}" if step else "it has no checkpoint yet"
    submitted = [submission.command for submission in submissions(run.directory) if submission.command]
    command = submitted[-1].removesuffix(" --resubmit") if submitted else "the command that submitted it, with"
    return f"{stays}\ngo on with: {command} --resubmit"


def _who_trains_it(run: Run) -> str:
    """A run on this machine has no job."""
    writer = writer_of(run)
    return f"; end it with: kill -TERM {writer[0]}" if writer and lives_here(writer) else ""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm cancel",
        description="Cancel every Slurm job of a run that waits or runs. It is not started again by itself; "
        "its checkpoints stay. A job that trains is given the time to save once more.",
        epilog="Exit status: 1 when Slurm refused one of them; 0 otherwise, also when there was nothing to cancel.",
    )
    parser.add_argument(
        "--now",
        action="store_true",
        help="with scancel: what is not saved within Slurm's KillWait (often 30 s) is lost",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or its name in runs/")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""What the earlier jobs of a run say about another one."""

from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.jobs.earlier_jobs import standing
from pathfm.launch.attempts import Outcome, Submission, note_outcome, note_submission
from pathfm.lifecycle.run import Run
from tests.jobs.fake_slurm import FakeSlurm, slurm  # noqa: F401


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """It was submitted as job 12, of which Slurm knows nothing any more."""
    directory = tmp_path / "runs" / "vitb"
    note_submission(directory, Submission("12", "2020-01-01T00:00:00+00:00", 2, 4))
    return Run(directory)


def test_a_run_without_jobs_is_new(tmp_path: Path) -> None:
    assert standing(Run(tmp_path)).what == "new"


def test_a_job_that_ends_still_holds_its_run(run: Run, slurm: FakeSlurm) -> None:  # noqa: F811
    slurm.job("12", JobState="COMPLETING")
    assert standing(run).what == "busy"
    slurm.job("12", JobState="CANCELLED")
    assert standing(run).what == "ended"


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("outcome", "verdict", "why"),
    [
        (None, None, "it never began"),
        (None, ("running", ""), "killed"),
        (None, ("failed", "ValueError: no\nmore lines"), "failed, ValueError: no;"),
        (("leave", "somebody cancelled the job; its checkpoint stays"), ("interrupted", ""), "somebody cancelled"),
        (("fail", "3 crashes in a row"), ("failed", "rank 0"), "3 crashes in a row"),
        (("leave", "Slurm is requeueing the job by itself"), ("interrupted", ""), "no longer in the queue"),
        (("requeue", "the time limit came"), ("interrupted", ""), "no longer in the queue"),
    ],
)
def test_a_run_that_has_ended_says_why(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    outcome: tuple[str, str] | None,
    verdict: tuple[str, str] | None,
    why: str,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    if verdict:
        run.write_exit(verdict[0], 40, verdict[1])
    if outcome:
        note_outcome(run.directory, Outcome("12", 0, "12", 1, 40, outcome[0], False, outcome[1]))
    found = standing(run)
    assert found.what == "ended"
    assert why in found.line
    assert "job 12, " in found.line
    assert "\n" not in found.line
    assert found.line.endswith("add --resubmit to go on with it")


def test_while_slurm_is_silent_nothing_is_submitted(run: Run, slurm: FakeSlurm) -> None:  # noqa: F811
    slurm.go_down()
    with pytest.raises(UserError, match=r"Unable to contact slurm controller.*try again later"):
        standing(run)


def test_a_run_below_runs_is_called_by_its_name(
    run: Run,
    slurm: FakeSlurm,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run.directory.parents[1])
    slurm.job("12")
    assert "'pathfm logs vitb -f'" in standing(run).line

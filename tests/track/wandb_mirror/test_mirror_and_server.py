import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.processes import children_of
from pathfm.track.weights_and_biases import WeightsAndBiases, start_wandb
from tests.jobs.journeys import wait_until
from tests.track.runs_to_show import RECIPE, RunToShow, numbers_of, offline_rows, show
from tests.track.wandb_server import KEY, WandbServer

# A trainer that logs fifty lines and ends, with nothing of W&B but what any trainer has of it.
TRAINER = """
import sys
from pathlib import Path
from pathfm.track.config import WandbConfig
from pathfm.track.console import Console
from pathfm.track.json_lines import JsonLines
from pathfm.track.report import Report
from pathfm.track.weights_and_biases import start_wandb

run = Path(sys.argv[1])
wandb = start_wandb(WandbConfig(finish_within_s=2), run, {})
report = Report(JsonLines(run / "metrics.jsonl"), Console(50, 0, speak=False), wandb)
for step in range(1, 51):
    line = {"step": step, "samples_seen": 4 * step, "total_loss": 1.0, "lr": 0.1}
    report.interval({**line, "timing": {"samples_per_second": 1.0}})
report.finish()
assert "wandb" not in sys.modules
"""


def start(run: RunToShow, server: WandbServer, **settings) -> WeightsAndBiases:
    return start_wandb(WandbConfig(**settings), run.directory, RECIPE, {**os.environ, **server.environment})


@pytest.fixture
def server(monkeypatch) -> Iterator[WandbServer]:
    """One that behaves, and that this process' client knows."""
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_the_server_has_every_row_once_over_starts_and_a_killed_mirror(tmp_path: Path, server: WandbServer):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 11)
    show(run, "online")
    wandb = start(run, server)
    wait_until(lambda: sent(run).count("begun") == 2)
    server.manner = "hangs"
    run.steps(11, 21)
    wait_until(lambda: '"metrics": 20' in sent(run))
    os.kill(wandb._mirror.pid, signal.SIGKILL)  # what it was given did not arrive
    wandb.finish()
    server.manner = "behaves"
    show(run)  # as if a node had no internet
    run.steps(21, 31)
    show(run, "online")
    show(run, "online")
    assert server.run.steps() == list(range(1, 31))
    assert [row["samples_seen"] for row in server.run.rows()] == list(range(4, 124, 4))
    assert set(server.runs) == {(run.directory / "wandb_id").read_text()}
    assert not files_with_the_key(tmp_path)


def test_where_a_run_went_back_the_server_goes_back_too_and_says_nothing_twice(tmp_path: Path, server: WandbServer):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 11)
    run.alarm(8, "diverging")
    show(run, "online")
    run.metrics.forget_after(4)
    run.steps(5, 13, left_out=6)
    show(run, "online")
    assert server.run.steps() == list(range(1, 13))
    assert [row["batches_passed_over"] for row in server.run.rows()] == [0] * 4 + [6] * 8
    assert len(server.alerts) == 1


def test_a_server_that_cannot_go_back_keeps_its_rows_and_the_log_says_so(tmp_path: Path, server: WandbServer, caplog):
    run = RunToShow(tmp_path / "run")
    server.rewinds = False
    run.steps(1, 11)
    show(run, "online")
    run.metrics.forget_after(4)
    run.steps(5, 13, left_out=6)
    for _ in range(2):
        show(run, "online")
    assert [row["batches_passed_over"] for row in server.run.rows()] == [0] * 10 + [6] * 2
    assert server.asked.count("RewindRun") == 1
    assert caplog.text.count("W&B keeps what it has") == 1


def test_a_server_that_knows_more_than_the_run_does_is_believed(tmp_path: Path, server: WandbServer):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 11)
    show(run, "online")
    (run.directory / "wandb" / "sent.jsonl").unlink()  # or all of wandb/, to save room
    run.steps(11, 13)
    show(run, "online")
    assert server.run.steps() == list(range(1, 13))


@pytest.mark.parametrize(("verdict", "code"), [("interrupted", 0), ("failed", 1)])
def test_the_server_hears_whether_the_segment_failed(tmp_path: Path, server: WandbServer, verdict: str, code: int):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 2)
    (run.directory / "exit.json").write_text(f'{{"verdict": "{verdict}"}}')
    show(run, "online")
    assert server.run.exit_code == code


@pytest.mark.parametrize("manner", ["refuses", "forbids", "hangs", "drops"])
def test_whatever_the_server_does_training_ends_in_time_with_all_its_metrics(tmp_path: Path, manner):
    run = tmp_path / "run"
    run.mkdir()
    with WandbServer(manner) as server:
        started = time.monotonic()
        environment = {**os.environ, **server.environment, "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", TRAINER, str(run)], env=environment, capture_output=True, text=True, timeout=60
        )
        assert time.monotonic() - started < 10
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in RunToShow(run).metrics.read()] == list(range(1, 51))
    assert not mirrors_of(run)
    assert not files_with_the_key(tmp_path)
    show(RunToShow(run))
    assert numbers_of(offline_rows(run)) == list(range(1, 51))  # nothing is lost to those who come later


def test_a_mirror_whose_trainer_was_killed_leaves_a_hanging_server_by_itself(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    with WandbServer() as server:
        wandb = start(run, server, finish_within_s=1)
        run.steps(1, 3)
        wait_until(lambda: '"metrics": 2' in sent(run))
        server.manner = "hangs"
        wandb._mirror.stdin.close()  # all that a killed trainer leaves of itself
        family = [wandb._mirror.pid, *children_of(wandb._mirror.pid)]
        assert len(family) == 2
        wandb._mirror.wait(10)
        wait_until(lambda: not any(is_alive(process) for process in family), seconds=5)


def files_with_the_key(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and KEY.encode() in read(file)]


def sent(run: RunToShow) -> str:
    file = run.directory / "wandb" / "sent.jsonl"
    return file.read_text() if file.exists() else ""


def mirrors_of(run: Path) -> list[Path]:
    return [line for line in Path("/proc").glob("[0-9]*/cmdline") if str(run).encode() in read(line)]


def is_alive(process: int) -> bool:
    return read(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""

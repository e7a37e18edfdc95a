"""A local job is seen live, ends with the trainer's status, and leaves cleanly at Ctrl-C."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathfm.launch import local

LAUNCHER = """
import sys
from pathlib import Path
from pathfm.launch.local import run_local
sys.exit(run_local([sys.executable, "-u", sys.argv[1]], Path(sys.argv[2])))
"""

PATIENT_TRAINER = """
import signal, sys, time
def leave(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("training", flush=True)
time.sleep(60)
"""


def _launcher(tmp_path: Path, trainer: str) -> list[str]:
    (tmp_path / "trainer.py").write_text(trainer)
    return [sys.executable, "-c", LAUNCHER, str(tmp_path / "trainer.py"), str(tmp_path / "submitit")]


def _run(tmp_path: Path, trainer: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = _launcher(tmp_path, trainer)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def _read_until(descriptor: int, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        try:
            seen += (chunk := os.read(descriptor, 4096))
        except OSError:  # a terminal whose last process has gone
            chunk = b""
        assert chunk, f"{word!r} was never shown, only {seen!r}"
    return seen


@pytest.mark.parametrize("status", [0, 7])
def test_output_and_status_are_passed_on(tmp_path: Path, status: int) -> None:
    done = _run(tmp_path, f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({status})")
    assert done.returncode == status
    assert done.stdout.split() == ["out", "err"]
    assert done.stderr == ""


def test_a_trainer_killed_by_a_signal_fails_the_job(tmp_path: Path) -> None:
    done = _run(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert done.returncode == 128 + signal.SIGKILL


def test_visible_gpus_stay_as_they_were(tmp_path: Path) -> None:
    trainer = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    assert _run(tmp_path, trainer, CUDA_VISIBLE_DEVICES="GPU-1f,GPU-2a").stdout.strip() == "GPU-1f,GPU-2a"


def test_a_surrounding_slurm_job_is_not_taken_for_ours(tmp_path: Path) -> None:
    trainer = "import os; print([name for name in os.environ if name.startswith('SLURM')])"
    assert _run(tmp_path, trainer, SLURM_PROCID="3", SLURM_STEP_ID="0").stdout.strip() == "[]"


def test_term_to_the_launcher_lets_the_trainer_save_and_leave(tmp_path: Path) -> None:
    command = _launcher(tmp_path, PATIENT_TRAINER)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        assert launcher.stdout
        _read_until(launcher.stdout.fileno(), b"training")
        launcher.terminate()
        out, err = launcher.communicate(timeout=30)
    assert b"saved" in out
    assert b"stopping" in err
    assert launcher.returncode == 128 + signal.SIGTERM


def test_on_a_terminal_the_trainer_has_it_and_ctrl_c_lets_it_save_and_leave(tmp_path: Path) -> None:
    trainer = "import sys; print('terminal', sys.stdout.isatty(), sys.stderr.isatty())\n" + PATIENT_TRAINER
    command = _launcher(tmp_path, trainer)
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    shown = _read_until(terminal, b"training")
    assert b"terminal True True" in shown
    time.sleep(0.3)
    os.write(terminal, b"\x03")
    _read_until(terminal, b"saved")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGINT
    os.close(terminal)


def _debugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str) -> int:
    (tmp_path / "stand_in_trainer.py").write_text(trainer)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(local, "TRAINER_MODULE", "stand_in_trainer")
    command = ["python", "-u", "-m", "stand_in_trainer", "--config-file", "a.yaml"]
    return local.run_in_this_process(command, tmp_path / "submitit")


def test_debug_runs_the_trainer_with_its_arguments_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = "import os, sys; print(os.getpid(), *sys.argv[1:]); sys.exit(75)"
    before = sys.argv
    assert _debugged(tmp_path, monkeypatch, trainer) == 75
    assert capfd.readouterr().out.split() == [str(os.getpid()), "--config-file", "a.yaml"]
    assert sys.argv is before


def test_an_error_in_debug_is_the_trainers_own_and_opens_no_debugger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        _debugged(tmp_path, monkeypatch, "1 / 0")


@pytest.mark.parametrize(
    ("torch_version", "visible", "count"),
    [("2.13.0", None, 2), ("2.13.0", "1", 1), ("2.13.0", "", 0), ("2.13.0", "0,1,2", 3), ("2.13.0+cpu", None, 0)],
)
def test_gpus_are_those_that_torch_will_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_version: str, visible: str | None, count: int
) -> None:
    lines = [f"GPU {i}: NVIDIA A100-SXM4-80GB (UUID: GPU-{i}f8)" for i in range(2)]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in lines))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(local, "version", lambda package: torch_version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.gpus_of_this_machine() == count

"""A Slurm of shell scripts: `scontrol show job` and `scancel` over a folder of records that a test may change."""

from pathlib import Path

import pytest

from tests.launch.recorded_jobs import lines

_SCONTROL = """#!/bin/sh
echo "$*" >> {folder}/asked
[ -e {folder}/down ] && {{ echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }}
for job; do :; done
[ -e {folder}/job.$job ] && cat {folder}/job.$job && exit
echo 'slurm_load_jobs error: Invalid job id specified' >&2
exit 1
"""
_SCANCEL = """#!/bin/sh
[ -e {folder}/denied ] && {{ echo "scancel: error: Kill job error on job id $1: Access/permission denied"; exit 1; }}
[ $# -gt 1 ] && {{ echo "$*" >> {folder}/signalled; exit; }}
echo "$1" >> {folder}/cancelled
rm {folder}/job.$1
"""


class FakeSlurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, script in {"scontrol": _SCONTROL, "scancel": _SCANCEL}.items():
            (folder / name).write_text(script.format(folder=folder))
            (folder / name).chmod(0o755)

    def job(self, number: str, like: str = "running with a comment", name: str = "vitb", **fields: str) -> None:
        """Slurm has this job now: as one that was recorded, but for number, name and `fields`."""
        (line,) = lines(like)
        for field, value in {"JobId": number, "JobName": name, **fields}.items():
            before = next(word for word in line.split() if word.startswith(f"{field}="))
            line = line.replace(before, f"{field}={value}", 1)
        (self.folder / f"job.{number}").write_text(f"{line}\n")

    def forget(self, number: str) -> None:
        (self.folder / f"job.{number}").unlink()

    def go_down(self) -> None:
        (self.folder / "down").touch()

    def deny(self) -> None:
        (self.folder / "denied").touch()

    def asked(self) -> list[str]:
        """Which jobs somebody wanted to see."""
        return [words.split()[-1] for words in self._told("asked")]

    def cancelled(self) -> list[str]:
        return self._told("cancelled")

    def signalled(self) -> list[str]:
        """The words of scancel where it only sent a signal."""
        return self._told("signalled")

    def _told(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("pathfm.launch.scontrol._SECONDS_BETWEEN", 0.0)
    return FakeSlurm(folder)

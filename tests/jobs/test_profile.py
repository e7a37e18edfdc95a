"""A profile is written for the cluster at hand, once, and can be looked at."""

from pathlib import Path

import pytest
import yaml

from pathfm.errors import UserError
from pathfm.jobs import profile
from pathfm.jobs.profile import main
from pathfm.launch.profile import read_profile
from tests.launch.test_site import recorded


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of profiles, on a login node of the recorded cluster."""
    programs = tmp_path / "bin"
    programs.mkdir()
    said = recorded()
    for name in said:
        (programs / name.replace(" ", "_")).write_text(said[name])
    scripts = {
        "sinfo": f"cat {programs}/sinfo.txt",
        "scontrol": f'case "$*" in *partition*) cat {programs}/scontrol_show_partition;; '
        f"*) cat {programs}/scontrol_show_config;; esac",
    }
    (programs / "sinfo").rename(programs / "sinfo.txt")
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(profile, "PROFILES", tmp_path / "profiles")
    return tmp_path / "profiles"


def test_a_profile_is_written_under_the_name_of_the_cluster(profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    found = read_profile(profiles / "pathology.yaml")
    assert (found.partition, found.gpus_per_node, found.gpu_type, found.cpus_per_task) == ("gpu", 4, "a100", 16)
    shown = capsys.readouterr().out
    assert "--profile pathology" in shown
    assert "A job in partition gpu gives way to none." in shown


def test_a_profile_that_is_there_is_not_overwritten(profiles: Path) -> None:
    profiles.mkdir()
    (profiles / "mine.yaml").write_text("partition: gpu\n")
    with pytest.raises(UserError, match="is there already"):
        main(["init", "mine"])
    assert (profiles / "mine.yaml").read_text() == "partition: gpu\n"
    assert main(["init", "another"]) == 0
    with pytest.raises(UserError, match=r"'\.\./up' cannot be a profile's name"):
        main(["init", "../up"])


def test_a_profile_is_shown_with_its_defaults(profiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles.mkdir()
    (profiles / "mine.yaml").write_text("{partition: gpu, gpus_per_node: 2}")
    assert main(["show", "mine"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["partition"], shown["gpus_per_node"], shown["signal_lead_s"]) == ("gpu", 2, 120)
    with pytest.raises(UserError, match="there is no profile 'min'"):
        main(["show", "min"])


def test_without_slurm_one_line_says_where_to_go(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(profiles))
    with pytest.raises(UserError, match="do this on a login node"):
        main(["init"])

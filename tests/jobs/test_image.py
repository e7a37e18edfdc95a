"""`pathfm image check`, and what doctor and the launcher say of an image: told without starting it."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.__main__ import main as pathfm
from pathfm.jobs.examination.finding import Finding
from pathfm.jobs.examination.image import LOCKS, container_findings, environment, pin
from pathfm.launch.image import FLAVOUR_LABEL, FLAVOURS, LOCK_LABEL, ImageFacts, lock_hash
from pathfm.launch.profile import Container, Profile
from tests.jobs.fake_programs import programs

HERE, ELSEWHERE = ("02", "04") if platform.machine() == "x86_64" else ("04", "02")
NAMES = {"02": "amd64", "04": "arm64"}


def sif(path: Path, architecture: str = HERE) -> Path:
    """The first bytes of a SIF file."""
    launch = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0")
    path.write_bytes(launch + b"SIF_MAGIC\0" + b"01\0" + architecture.encode() + b"\0" + b"\1" * 40)
    return path


def sandbox(path: Path, **labels: str) -> Path:
    (path / ".singularity.d").mkdir(parents=True)
    (path / ".singularity.d" / "labels.json").write_text(json.dumps(labels))
    return path


def locks(folder: Path, torch: str = "torch==2.10.0") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "image.lock").write_text("numpy==2.4.6\n")
    (folder / "torch-cuda.lock").write_text(f"{torch}\n")
    return folder


def findings(image: Path | str, gpus: int = 0, setup: tuple[str, ...] = (), **container: object) -> list[Finding]:
    with_runtime = Container(**{"runtime": "apptainer", "image": str(image), **container})
    return list(container_findings(Profile(container=with_runtime, gpus_per_node=gpus, setup=setup)))


def said(found: list[Finding], check: str) -> Finding:
    return next(finding for finding in found if finding.check == check)


# ---- there, and for this machine


def test_without_a_container_there_is_nothing_to_look_at():
    assert [finding.verdict for finding in container_findings(Profile())] == ["ok"]


def test_an_image_and_a_bind_that_are_not_there_fail(tmp_path: Path):
    found = findings(tmp_path / "none.sif", binds=("/no/tiles:/tiles",))
    assert said(found, "container").found == f"there is no image {tmp_path}/none.sif"
    assert "docker/build.sh" in said(found, "container").advice
    assert said(found, "binds").found == "there is no /no/tiles to bind into the container"


@pytest.mark.parametrize("content", [b"", b"hello", b"#!/usr/bin/env run-singularity\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_told_from_one(tmp_path: Path, content: bytes):
    (tmp_path / "a.sif").write_bytes(content)
    assert "is no image of Apptainer's" in said(findings(tmp_path / "a.sif"), "container").found


def test_a_folder_that_is_no_image_is_told_from_one(tmp_path: Path):
    assert "is a folder, but no image of Apptainer's" in said(findings(tmp_path), "container").found


def test_an_image_for_another_architecture_fails_before_any_node_tries_it(tmp_path: Path):
    found = findings(sif(tmp_path / "a.sif", ELSEWHERE))
    assert said(found, "image").verdict == "fail"
    assert said(found, "image").found.startswith(f"the image is for {NAMES[ELSEWHERE]}, this machine is {NAMES[HERE]}")


def test_an_image_for_this_machine_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch, apptainer="exit 1")
    found = findings(sif(tmp_path / "a.sif"))
    assert said(found, "container").verdict == "ok"
    assert said(found, "image") == Finding("image", "ok", NAMES[HERE])


def test_a_sandbox_tells_its_architecture_by_a_label(tmp_path: Path):
    labels = {"org.label-schema.build-arch": NAMES[ELSEWHERE]}
    assert said(findings(sandbox(tmp_path / "box", **labels)), "image").verdict == "fail"


# ---- the program that starts it


def test_a_runtime_that_only_the_set_up_brings_is_worth_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch)
    image = sandbox(tmp_path / "box")
    assert said(findings(image), "container").verdict == "fail"
    assert said(findings(image, setup=("module load apptainer",)), "container").verdict == "warn"


def test_an_apptainer_without_the_list_of_nvidias_libraries_fails_where_gpus_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    programs(tmp_path / "bin", monkeypatch, apptainer=f"echo SYSCONFDIR={tmp_path}/etc")
    image = sandbox(tmp_path / "box")
    assert "no --nv" in said(findings(image, gpus=4), "container").found
    assert said(findings(image, gpus=0), "container").verdict == "ok"
    (tmp_path / "etc" / "apptainer").mkdir(parents=True)
    (tmp_path / "etc" / "apptainer" / "nvliblist.conf").touch()
    assert said(findings(image, gpus=4), "container").verdict == "ok"


def test_docker_that_knows_no_gpus_is_worth_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch, docker='[ "$1" = info ] && echo \'{"runc": {}} []\'')
    assert "no NVIDIA runtime" in said(findings("x@sha256:1", gpus=4, runtime="docker"), "container").found
    assert said(findings("x@sha256:1", gpus=0, runtime="docker"), "container").verdict == "ok"


@pytest.mark.parametrize(("plugin", "verdict"), [("", "fail"), ("--container-image=IMAGE", "ok")])
def test_srun_is_asked_whether_pyxis_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str, verdict: str
):
    programs(tmp_path / "bin", monkeypatch, srun=f"echo 'Usage: srun {plugin}'")
    assert said(findings("x@sha256:1", runtime="pyxis"), "container").verdict == verdict


@pytest.mark.parametrize(
    ("image", "proctrack", "has_setuid", "verdict"),
    [
        ("image.sif", "proctrack/linuxproc", False, "warn"),
        ("image.sif", "proctrack/linuxproc", True, "ok"),
        ("image.sif", "proctrack/cgroup", False, "ok"),
        ("sandbox", "proctrack/linuxproc", False, "ok"),
    ],
)
def test_an_image_that_dies_of_a_tasks_signals_is_worth_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, proctrack: str, has_setuid: bool, verdict: str
):
    sandbox(tmp_path / image) if image == "sandbox" else sif(tmp_path / image)
    starter = tmp_path / "apptainer" / "bin" / "starter-suid"
    starter.parent.mkdir(parents=True)
    starter.touch()
    starter.chmod(0o4755 if has_setuid else 0o755)
    config = f"echo 'ProctrackType           = {proctrack}'"
    programs(tmp_path / "bin", monkeypatch, scontrol=config, apptainer=f"echo LIBEXECDIR={tmp_path}")
    assert said(findings(tmp_path / image), "container").verdict == verdict
    assert said(findings(tmp_path / image, options=("--unsquash",)), "container").verdict == "ok"


# ---- what is in it


def test_the_lock_of_an_image_is_compared_with_this_codes(tmp_path: Path):
    here = locks(tmp_path / "docker")
    facts = ImageFacts(labels={LOCK_LABEL: lock_hash(here, "cuda"), FLAVOUR_LABEL: "cuda"})
    assert environment(facts, here).verdict == "ok"
    locks(tmp_path / "docker", torch="torch==2.11.0")
    other = environment(facts, here)
    assert other.verdict == "warn"
    assert "built from other pins" in other.found


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_images_build_and_this_code_mean_the_same_by_a_lock(flavour: str):
    told = subprocess.run([sys.executable, LOCKS / "locks.py", "hash", flavour], capture_output=True, text=True)
    assert lock_hash(LOCKS, flavour) == told.stdout.strip()


def test_an_image_that_says_nothing_is_worth_a_warning(tmp_path: Path):
    assert environment(ImageFacts(), locks(tmp_path / "docker")).verdict == "warn"


def test_the_labels_of_a_sif_are_apptainers_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = {"data": {"attributes": {"labels": {LOCK_LABEL: "0" * 64, FLAVOUR_LABEL: "cpu"}}}}
    programs(tmp_path / "bin", monkeypatch, apptainer=f"[ $1 = inspect ] && echo '{json.dumps(told)}'")
    assert "other pins (lock 000000000000)" in said(findings(sif(tmp_path / "a.sif")), "environment").found


def test_the_labels_of_a_name_are_its_stores_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = {LOCK_LABEL: "0" * 64, FLAVOUR_LABEL: "cuda"}
    image = {"Architecture": NAMES[HERE], "RepoDigests": ["r/pathfm@sha256:9"], "Config": {"Labels": labels}}
    programs(tmp_path / "bin", monkeypatch, docker=f"[ $1 = image ] && echo '{json.dumps([image])}'")
    found = findings("r/pathfm:1", runtime="docker")
    assert said(found, "image").found == f"{NAMES[HERE]} r/pathfm@sha256:9"
    assert said(found, "environment").verdict == "warn"
    assert said(found, "pin").advice == "pin it: r/pathfm@sha256:9"


# ---- pinned


@pytest.mark.parametrize(
    ("runtime", "image", "pinned"),
    [
        ("docker", "r/pathfm:latest", False),
        ("docker", "r/pathfm@sha256:9", True),
        ("pyxis", "r#pathfm:1", False),
        ("pyxis", "/images/pathfm.sqsh", True),
        ("apptainer", "/images/pathfm.sif", True),
        ("apptainer", "docker://r/pathfm:1", False),
    ],
)
def test_a_name_that_may_mean_another_image_tomorrow_is_worth_a_warning(runtime: str, image: str, pinned: bool):
    assert (pin(Container(runtime=runtime, image=image), None) is None) == pinned


# ---- the verb


def test_a_person_sees_a_table_and_what_to_do(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    programs(tmp_path / "bin", monkeypatch, apptainer="exit 1")
    assert pathfm(["image", "check", str(sif(tmp_path / "a.sif"))]) == 0
    assert "the image does not say what is in it" in capsys.readouterr().out
    assert pathfm(["image", "check", str(tmp_path / "b.sif")]) == 1
    assert "there is no image" in capsys.readouterr().out


def test_one_image_is_named(capsys: pytest.CaptureFixture[str]):
    assert pathfm(["image", "check"]) == 2
    assert "name one image" in capsys.readouterr().err


def test_the_profiles_image_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "p.yaml").write_text("container: {runtime: apptainer, image: /no/such.sif}\n")
    assert pathfm(["image", "check", "--profile", str(tmp_path / "p.yaml")]) == 1
    assert "there is no image /no/such.sif" in capsys.readouterr().out

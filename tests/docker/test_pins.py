"""Dockerfile, Singularity.def, lock files and pyproject.toml tell of one environment."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import locks
import pytest
import resolve
from packaging.requirements import Requirement

from pathfm import __version__
from pathfm.jobs.examination import machine
from pathfm.launch import image

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SINGULARITY = (ROOT / "Singularity.def").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = [DOCKER / "image.lock", DOCKER / "torch-cuda.lock", DOCKER / "torch-cpu.lock"]
both_flavours = pytest.mark.parametrize("flavour", locks.FLAVOURS)


@both_flavours
def test_every_requirement_of_pathfm_is_locked_and_satisfied(flavour: str):
    pins = locks.pins_of(flavour)
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    assert len(requirements) > 10
    unmet = [str(each) for each in requirements if not each.specifier.contains(pins[locks.normal(each.name)])]
    assert not unmet


@both_flavours
def test_the_torch_that_is_asked_for_is_locked(flavour: str):
    asked = locks.pins(DOCKER / f"torch-{flavour}.in")
    assert "torch" in asked
    assert asked.items() <= locks.pins(DOCKER / f"torch-{flavour}.lock").items()


def test_xformers_is_the_one_that_pyproject_names_and_was_built_for_this_torch():
    pins = locks.pins_of("cuda")
    assert PROJECT["optional-dependencies"]["xformers"] == [f"xformers=={pins['xformers']}"]
    installed = {"torch": pins["torch"], "xformers": pins["xformers"]}
    assert machine.versions(installed).verdict == "ok"


def test_the_cpu_flavour_has_the_torch_that_is_developed_with():
    developed = locks.pins(DOCKER / "cpu.lock")
    assert locks.pins_of("cpu")["torch"] == f"{developed['torch']}+cpu"
    assert "xformers" not in locks.pins_of("cpu")


def test_packages_have_the_versions_that_are_developed_with():
    developed = locks.pins(DOCKER / "cpu.lock")
    common = locks.pins(DOCKER / "image.lock")
    assert {name: v for name, v in common.items() if developed.get(name, v) != v} == {}


@both_flavours
def test_no_package_is_locked_twice(flavour: str):
    names = [name for lock in locks.lock_files(flavour) for name in locks.pins(lock)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_package_has_its_hashes_and_nothing_else_is_said(lock: Path):
    header, *rest = lock.read_text().replace(" \\\n    ", " ").splitlines()
    assert header.startswith("# ")
    assert rest
    assert not [line for line in rest if not re.fullmatch(r"[a-z0-9-]+==[\w.+]+( --hash=sha256:[0-9a-f]{64})+", line)]
    assert resolve.locked_in(lock).keys() == locks.pins(lock).keys()
    assert all(package.hashes for package in resolve.locked_in(lock).values())


def test_the_base_image_has_the_cuda_that_torch_was_built_with():
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.M)
    assert base
    cuda, ubuntu = re.fullmatch(r"docker\.io/nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu([\d.]+)", base[1]).groups()
    assert locks.pins_of("cuda")["nvidia-cuda-runtime-cu12"].startswith(f"{cuda}.")
    assert ubuntu == "24.04"


def test_the_image_swallows_no_command_and_runs_as_nobody_special():
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "ENTRYPOINT" not in DOCKERFILE
    assert re.findall(r"^USER (\S+)$", final, re.M) == ["pathfm"]
    assert "pip" not in final.replace("pip cache", "")


def test_code_comes_after_everything_that_takes_time():
    before, after = DOCKERFILE.split("\nCOPY . /opt/pathfm/code/\n")
    assert not re.search(r"^ARG (COMMIT|VERSION|LOCK_HASH)", before, re.M)
    assert not re.search(r"apt-get|pip |https?:", after)


def test_the_sif_is_the_image_and_nothing_is_installed_into_it():
    sections = re.findall(r"^%(\w+)", SINGULARITY, re.M)
    assert sections == ["arguments", "test", "help"]
    assert re.findall(r"^(\w+): (.+)$", SINGULARITY, re.M) == [("Bootstrap", "{{ bootstrap }}"), ("From", "{{ from }}")]


def test_all_name_the_smoke_test_where_the_image_has_it():
    folder = re.search(r"^COPY \. (\S+)/$", DOCKERFILE, re.M)
    assert folder
    smoke = f"python {folder[1]}/docker/smoke.py"
    assert smoke in SINGULARITY
    assert smoke in (DOCKER / "build.sh").read_text()


def test_the_builder_is_sent_what_the_image_needs_and_little_else():
    sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
    found = {path.relative_to(ROOT).as_posix() for pattern in sent for path in ROOT.glob(pattern)}
    needed = {"configs", "pathfm", "docker/smoke.py", "docker/locks.py", *(f"docker/{lock.name}" for lock in LOCKS)}
    assert found == needed | {"docker/cpu.lock"}


@both_flavours
def test_the_hash_is_that_of_the_files_one_after_the_other(flavour: str):
    content = (DOCKER / "image.lock").read_bytes() + (DOCKER / f"torch-{flavour}.lock").read_bytes()
    told = subprocess.run([sys.executable, DOCKER / "locks.py", "hash", flavour], capture_output=True, text=True)
    assert told.stdout.strip() == locks.lock_hash(flavour) == hashlib.sha256(content).hexdigest()
    assert image.lock_hash(DOCKER, flavour) == locks.lock_hash(flavour)  # what `pathfm image check` expects


def test_the_hashes_of_two_flavours_differ():
    assert locks.lock_hash("cpu") != locks.lock_hash("cuda")


def test_labels_have_the_names_that_are_looked_for():
    labels = re.findall(r"(org\.[\w.]+)=\$\{(\w+)\}", DOCKERFILE)
    assert dict(labels) == {
        image.VERSION_LABEL: "VERSION",
        image.COMMIT_LABEL: "COMMIT",
        image.LOCK_LABEL: "LOCK_HASH",
        image.FLAVOUR_LABEL: "TORCH_FLAVOUR",
    }


def test_an_image_knows_what_is_in_it():
    facts = locks.facts("cuda", "abc-dirty")
    assert facts == {
        "lock": locks.lock_hash("cuda"),
        "flavour": "cuda",
        "commit": "abc-dirty",
        "version": __version__,
        "torch": "2.10.0",
        "xformers": "0.0.35",
    }
    assert locks.facts("cpu", "abc")["xformers"] is None


def test_labels_that_would_not_be_true_stop_the_build(tmp_path: Path):
    told = tmp_path / "image.json"
    told.write_text(json.dumps(locks.facts("cpu", "abc")))

    def agree(version: str, number: str) -> tuple[int, str]:
        words = [sys.executable, DOCKER / "locks.py", "agree", told, version, number]
        done = subprocess.run(words, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert agree("", "") == (0, "")
    assert agree(locks.facts("cpu", "abc")["version"], locks.lock_hash("cpu")) == (0, "")
    assert agree("", "123") == (1, f"error: the image's lock is {locks.lock_hash('cpu')}, not 123\n")


def test_an_unknown_word_of_locks_is_one_clear_line():
    done = subprocess.run([sys.executable, DOCKER / "locks.py", "hash", "rocm"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: 'hash rocm' is none of: hash cuda|cpu; facts cuda|cpu COMMIT; agree FILE VERSION HASH\n"
    )

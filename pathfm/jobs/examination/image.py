"""The image of a profile, as the machine sees it from which a run is submitted. No torch."""

import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.examination.finding import Finding
from pathfm.launch.image import (
    COMMIT_LABEL,
    FLAVOUR_LABEL,
    FLAVOURS,
    LOCK_LABEL,
    VERSION_LABEL,
    ImageFacts,
    NoImage,
    image_facts,
    lock_hash,
)
from pathfm.launch.profile import Container, Profile
from pathfm.lifecycle.run import commit_and_diff

LOCKS = CONFIGS.parent / "docker"
_AMONG_CONTAINERS = {"x86_64": "amd64", "aarch64": "arm64"}
_BUILD = "build it with docker/build.sh and docker/to_sif.sh (docs/image.md)"
_FEW = 12  # letters of a hash


def container_findings(profile: Profile) -> Iterator[Finding]:
    """The first that fails explains those that would follow."""
    container = profile.container
    if container.runtime == "none":
        yield Finding("container", "ok", "none; every task runs this python")
        return
    try:
        facts = image_facts(container)
    except NoImage as error:
        yield Finding("container", "fail", str(error), _BUILD)
        facts = None
    else:
        yield started_by(profile)
    yield from missing_binds(container)
    if facts is not None:
        yield architecture(facts)
        yield environment(facts)
        if container.has_the_code:
            yield baked_code(facts)
    if finding := pin(container, facts):
        yield finding


def started_by(profile: Profile) -> Finding:
    """The program that starts the image is there and can show it the GPUs."""
    container = profile.container
    program = "srun" if container.runtime == "pyxis" else container.runtime
    if not shutil.which(program):
        if profile.setup:
            advice = f"fine if the profile's set-up brings it: {'; '.join(profile.setup)}"
            return Finding("container", "warn", f"{program} is not on PATH here", advice)
        return Finding("container", "fail", f"{program} is not on PATH", "load its module in the profile's 'setup'")
    if container.runtime == "pyxis" and "--container-image" not in _run(["srun", "--help"]).stdout:
        return Finding(
            "container", "fail", "srun has no --container-image", "pyxis is not installed here; take another runtime"
        )
    if profile.gpus_per_node and (finding := _no_gpus(container)):
        return finding
    if container.runtime == "apptainer" and "--unsquash" not in container.options and _dies_of_signals(container.image):
        found = f"{container.image} is mounted by squashfuse, which under proctrack/linuxproc dies of a rank's signals"
        advice = (
            "the rank may follow before it has saved: unpack the image once (apptainer build --sandbox FOLDER IMAGE) "
            "and name the folder, or add --unsquash to the container's options"
        )
        return Finding("container", "warn", found, advice)
    return Finding("container", "ok", f"{container.runtime}, {container.image}")


def missing_binds(container: Container) -> Iterator[Finding]:
    for bind in container.binds:
        if not Path(host := bind.split(":")[0]).exists():
            yield Finding(
                "binds", "fail", f"there is no {host} to bind into the container", "mend 'binds' in the profile"
            )


def architecture(facts: ImageFacts) -> Finding:
    here = _AMONG_CONTAINERS.get(platform.machine(), platform.machine())
    if facts.architecture and facts.architecture != here:
        return Finding("image", "fail", f"the image is for {facts.architecture}, this machine is {here}", _BUILD)
    return Finding("image", "ok", " ".join(filter(None, (facts.architecture, facts.digest))) or "it is there")


def environment(facts: ImageFacts, locks: Path = LOCKS) -> Finding:
    """What is installed in the image is what this code was tested with."""
    lock, flavour = facts.labels.get(LOCK_LABEL, ""), facts.labels.get(FLAVOUR_LABEL, "")
    if not lock or flavour not in FLAVOURS:
        return Finding("environment", "warn", "the image does not say what is in it", _BUILD)
    if not locks.is_dir():
        return Finding("environment", "ok", f"{flavour}, lock {lock[:_FEW]}; no checkout here to compare it with")
    if lock != (wanted := lock_hash(locks, flavour)):
        found = f"the image was built from other pins (lock {lock[:_FEW]}) than this code's ({wanted[:_FEW]})"
        return Finding("environment", "warn", found, f"it may well work; else {_BUILD}")
    return Finding("environment", "ok", f"{flavour}, lock {lock[:_FEW]}, as this code wants it")


def baked_code(facts: ImageFacts) -> Finding:
    commit, here = facts.labels.get(COMMIT_LABEL, ""), commit_and_diff(CONFIGS.parent)["commit"]
    version = facts.labels.get(VERSION_LABEL, "?")
    if here and commit.partition("-")[0] != here:
        found = f"the image's code is version {version}, commit {commit[:_FEW] or 'unknown'}; here is {here[:_FEW]}"
        return Finding("code", "warn", found, "the image's code runs; container.code: snapshot would run this one")
    return Finding("code", "ok", f"the image's own, version {version}, commit {commit[:_FEW]}")


def pin(container: Container, facts: ImageFacts | None) -> Finding | None:
    """A name that may mean another image tomorrow, or that every task would fetch anew."""
    name = container.image
    if container.runtime == "apptainer" and "://" in name:
        return Finding("pin", "warn", f"every task fetches {name}", "convert it once with docker/to_sif.sh")
    if container.runtime == "apptainer" or name.startswith("/") or "@sha256:" in name:
        return None
    pinned = facts.digest if facts and "@sha256:" in facts.digest else "NAME@sha256:..., which docker/push.sh prints"
    return Finding("pin", "warn", f"{name} may mean another image tomorrow", f"pin it: {pinned}")


def _no_gpus(container: Container) -> Finding | None:
    if container.runtime == "apptainer":
        folder = re.search(r"^SYSCONFDIR=(.+)$", _run(["apptainer", "buildcfg"]).stdout, re.M)
        if folder and not Path(folder[1], "apptainer", "nvliblist.conf").exists():
            return Finding(
                "container", "fail", "apptainer has no list of NVIDIA's libraries, so no --nv", "ask the administrator"
            )
    if container.runtime == "docker":
        told = _run(["docker", "info", "--format", "{{json .Runtimes}} {{json .CDISpecDirs}}"])
        if told.returncode == 0 and "nvidia" not in told.stdout and not _has_cdi():
            advice = "install NVIDIA's container toolkit, unless the nodes have it"
            return Finding("container", "warn", "docker here knows no NVIDIA runtime for --gpus", advice)
    if container.runtime == "podman" and not _has_cdi():
        advice = "nvidia-ctk cdi generate, unless the nodes have it"
        return Finding("container", "warn", "podman finds no description of GPUs here (CDI)", advice)
    return None


def _has_cdi() -> bool:
    return any([*Path("/etc/cdi").glob("nvidia*"), *Path("/var/run/cdi").glob("nvidia*")])


def _dies_of_signals(image: str) -> bool:
    """A .sif, Apptainer without setuid, and a Slurm that signals all descendants of a task, met together."""
    if not image.endswith(".sif") or not shutil.which("scontrol"):
        return False
    config = _run(["scontrol", "show", "config"]).stdout
    return re.search(r"^ProctrackType\s*=\s*proctrack/linuxproc", config, re.M) is not None and not _has_setuid()


def _has_setuid() -> bool:
    folder = re.search(r"^LIBEXECDIR=(.+)$", _run(["apptainer", "buildcfg"]).stdout, re.M)
    starter = Path(folder[1] if folder else "/usr/libexec", "apptainer", "bin", "starter-suid")
    return starter.exists() and bool(starter.stat().st_mode & stat.S_ISUID)


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=15)

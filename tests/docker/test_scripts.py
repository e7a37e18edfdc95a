"""What build.sh, push.sh and to_sif.sh tell docker, podman, buildah and apptainer."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.fake_tools import ROOT, Tools

RECORDED = Path(__file__).parent / "recorded"
SCRIPTS = sorted(path.name for path in (ROOT / "docker").glob("*.sh"))
TOOLS = ("docker", "podman", "buildah")
DESTINATION = "registry.local/group/pathfm"


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path, *TOOLS, "apptainer")


def _plain_temporary(line: str) -> str:
    return re.sub(r"TMP/tmp\.\w+", "TMP/x", line)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_recorded_commands_build_push_and_convert(tools: Tools, tool: str):
    folder = tools.folder / "wheels"
    folder.mkdir()
    calls = [
        ("build.sh", "--tool", tool, "--flavour", "cpu", "--base", "debian:12", "--compiler", "--", "--no-cache"),
        ("push.sh", "--tool", tool, "--flavour", "cpu", "--latest", DESTINATION),
        ("to_sif.sh", "--tool", tool, "--flavour", "cpu", "cpu.sif", "--", "--fakeroot"),
    ]
    told = []
    for script, *words in calls:
        before = len(tools.commands())
        done = tools.run(
            script,
            *words,
            PIP_CERT="/etc/our.crt",
            PIP_FIND_LINKS=str(folder),
            PIP_INDEX_URL="https://me:password@index.local/simple",
        )
        assert done.returncode == 0, done.stderr
        told += [f"# {script} {' '.join(words)}", *tools.commands()[before:], ""]
    text = "\n".join(_plain_temporary(line).replace(str(folder), "WHEELS") for line in told)
    assert "password" not in text
    assert text == (RECORDED / f"{tool}.txt").read_text()


def test_an_image_is_named_by_version_flavour_and_commit(tools: Tools):
    done = tools.run("build.sh", "--tool", "podman")
    assert tools.plain(done.stdout).splitlines()[-1] == (
        "image pathfm:VERSION-cuda-COMMIT12 (sha256:built), lock LOCK_CUDA"
    )


def test_a_dirty_work_tree_is_labelled_as_such(tools: Tools):
    tools.mark("changes", " M pathfm/recipe.py\n")
    done = tools.run("build.sh", "--tool", "podman")
    assert "pathfm:VERSION-cuda-COMMIT12-dirty" in tools.plain(done.stdout)
    assert "--build-arg COMMIT=COMMIT-dirty" in tools.commands()[0]


def test_an_image_that_fails_its_smoke_test_gets_no_name(tools: Tools):
    tools.mark("unfit")
    for tool in TOOLS:
        done = tools.run("build.sh", "--tool", tool)
        assert (done.returncode, done.stderr) == (2, "error: the image fails its smoke test and gets no name\n")
    assert not [command for command in tools.commands() if " tag " in command]
    assert tools.commands()[-1] == "buildah rm container-1"


def test_the_smoke_test_can_be_given_gpus_or_left_out(tools: Tools):
    tools.run("build.sh", "--tool", "docker", "--smoke-option=--gpus=all")
    assert "--gpus=all sha256:built" in tools.commands()[1]
    tools.run("build.sh", "--tool", "docker", "--no-smoke")
    assert [command.split()[1] for command in tools.commands()[3:]] == ["build", "tag"]


def test_the_first_tool_that_works_is_taken(tools: Tools):
    tools.mark("broken.docker")
    assert tools.run("build.sh").returncode == 0
    assert {command.split()[0] for command in tools.commands()} == {"podman"}


def test_an_archive_lies_where_the_caller_wants_it(tools: Tools):
    assert tools.run("build.sh", "--tool", "buildah", "--archive", "out/image.tar").returncode == 0
    assert (tools.tree / "out" / "image.tar").read_text() == "archive\n"
    assert not list((tools.tree / "out").glob("*.new"))


def test_the_digest_is_printed_and_recorded(tools: Tools):
    for tool in TOOLS:
        done = tools.run("push.sh", "--tool", tool, "--image", "pathfm:7", DESTINATION)
        assert tools.plain(done.stdout) == f"{DESTINATION}@DIGEST\n"
    recorded = (tools.tree / "build" / "image_digest.txt").read_text()
    assert tools.plain(recorded) == f"{DESTINATION}:7 {DESTINATION}@DIGEST\n" * len(TOOLS)


def test_an_archive_or_a_digest_needs_only_apptainer(tools: Tools):
    (tools.tree / "image.tar").touch()
    tools.run("to_sif.sh", "--archive", "image.tar", "a.sif")
    tools.run("to_sif.sh", "--pull", f"{DESTINATION}@sha256:1", "b.sif")
    assert tools.commands() == [
        "apptainer build --build-arg bootstrap=oci-archive --build-arg from=TREE/image.tar TREE/a.sif Singularity.def",
        f"apptainer build --build-arg bootstrap=docker --build-arg from={DESTINATION}@sha256:1 TREE/b.sif "
        "Singularity.def",
    ]


ERRORS = [
    (["build.sh", "--flavor", "cpu"], "unknown option '--flavor'; see docker/build.sh --help"),
    (["build.sh", "--flavour"], "--flavour needs a value"),
    (["build.sh", "--flavour", "rocm"], "there is no flavour 'rocm'; choose cuda or cpu"),
    (["build.sh", "--tool", "nerdctl"], "'nerdctl' is none of docker, podman, buildah"),
    (
        ["build.sh", "--tool", "docker", "--archive", "a.tar"],
        "docker writes no OCI archive; use podman or buildah, or docker/to_sif.sh, which asks docker",
    ),
    (["push.sh"], "where to? docker/push.sh REGISTRY/NAME"),
    (["push.sh", "pathfm"], "'pathfm' names no registry; give REGISTRY/NAME"),
    (["push.sh", "r.local/pathfm:1"], "'r.local/pathfm:1' has a tag; it gets that of the image"),
    (["push.sh", "r.local/a", "r.local/b"], "one REGISTRY/NAME only, not both r.local/a and r.local/b"),
    (["push.sh", "--image", "pathfm", "r.local/a"], "the image 'pathfm' has no tag"),
    (
        ["push.sh", "--image", "pathfm:latest", "r.local/a"],
        "'latest' says nothing about what is inside; give the image a tag",
    ),
    (["to_sif.sh"], "what is it to be called? docker/to_sif.sh FILE.sif"),
    (["to_sif.sh", "docker"], "TREE/docker is there already; remove it first, or choose another name"),
    (["to_sif.sh", "--image", "a:1", "--pull", "b", "x.sif"], "give one of --image, --archive and --pull"),
    (["to_sif.sh", "--archive", "no.tar", "x.sif"], "there is no archive TREE/no.tar"),
    (["base.sh"], "which file? docker/base.sh FILE.tar"),
    (["base.sh", "--suite"], "unknown option '--suite'; see docker/base.sh --help"),
]


@pytest.mark.parametrize(("command", "error"), ERRORS, ids=[" ".join(command) for command, _ in ERRORS])
def test_a_mistake_is_one_clear_line(tools: Tools, command: list[str], error: str):
    done = tools.run(*command)
    assert (done.returncode, tools.plain(done.stderr)) == (2, f"error: {error}\n")
    assert not tools.commands()


def test_what_is_missing_on_the_machine_is_said(tmp_path: Path):
    tools = Tools(tmp_path)
    nothing = "error: neither docker (with its daemon) nor podman nor buildah works here; install one of them\n"
    assert tools.run("build.sh").stderr == nothing
    assert tools.run("build.sh", "--tool", "podman").stderr == "error: podman is not on PATH\n"
    assert tools.run("to_sif.sh", "x.sif").stderr == (
        "error: apptainer is not on PATH; load its module, or convert on a machine that has it\n"
    )


@pytest.mark.parametrize("script", ["push.sh", "to_sif.sh"])
def test_an_image_that_was_not_built_is_said(tools: Tools, script: str):
    tools.mark("no_image")
    done = tools.run(script, "--tool", "podman", "--image", "pathfm:7", "r.local/a")
    assert done.stderr == "error: podman has no image pathfm:7; docker/build.sh makes it\n"


@pytest.mark.parametrize("script", ["base.sh", "build.sh", "image_test.sh", "push.sh", "to_sif.sh"])
def test_help_names_every_option(tools: Tools, script: str):
    done = tools.run(script, "--help")
    assert done.returncode == 0
    assert f"usage: docker/{script}" in done.stdout
    read = re.findall(r"^    (--[a-z-]+)\)", (ROOT / "docker" / script).read_text(), re.M)
    assert not [option for option in read if option not in done.stdout]
    assert not re.search(r"^#|set -euo", done.stdout, re.M)


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not here (make env brings it)")
    done = subprocess.run(
        [shellcheck, "--external-sources", *(f"docker/{script}" for script in SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_run_and_stop_at_the_first_error():
    for script in SCRIPTS:
        text = (ROOT / "docker" / script).read_text()
        is_sourced = not text.startswith("#!")
        assert is_sourced or "\nset -euo pipefail\n" in text, script
        assert is_sourced != os.access(ROOT / "docker" / script, os.X_OK), script

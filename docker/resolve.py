"""Make the lock files of the image, and check that pip would still choose what they pin.

python docker/resolve.py make    from pyproject.toml and torch-*.in; versions of docker/cpu.lock are kept. Needs uv.
python docker/resolve.py check   pip resolves the CUDA flavour for every Python and says what it would install. It reads
                                 names and requirements of the wheels, not the wheels: seconds, not gigabytes.

Packages come from where pip's own variables say: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locks import lock_files, normal, pins

HERE = Path(__file__).resolve().parent
PYPROJECT = HERE.parent / "pyproject.toml"
PYTHONS = ("3.11", "3.12")  # of Debian 12 and of Ubuntu 24.04; the first one may choose the versions
_PLATFORM = "x86_64-manylinux_2_28"
_TAGS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_UV_OPTIONS = ["--no-config", "--quiet", "--no-header", "--no-annotate", "--only-binary=:all:"]
_UV_OPTIONS += ["--python-platform", _PLATFORM, "--index-strategy=unsafe-best-match"]  # as pip: the best of all indices
_HEADER = "# {what} Made by 'make image-lock'.\n"
_WHAT = {
    "image": "What every image has, whatever its torch.",
    "cuda": "torch for NVIDIA GPUs, xFormers, and what only they need: CUDA 12.8, from PyPI.",
    "cpu": "torch's CPU build, which PyPI has not: from PyTorch's CPU index or a folder of wheels.",
}

Pins = dict[str, str]  # package -> version


@dataclass(frozen=True)
class Locked:
    """A package of a lock file: its version, and the SHA-256 of every file that may be installed."""

    version: str
    hashes: frozenset[str]


def main(words: list[str]) -> int:
    if words == ["make"]:
        make()
    elif words == ["check"]:
        problems = list(check())
        print("\n".join(f"error: {problem}" for problem in problems) or "pip chooses what the CUDA lock pins")
        return 1 if problems else 0
    else:
        print(f"error: '{' '.join(words)}' is neither make nor check", file=sys.stderr)
        return 2
    return 0


def make() -> None:
    """Resolve both flavours to one set of common packages, and write the three files."""
    cuda = _resolved("cuda", _without_torch(pins(HERE / "cpu.lock")))
    cpu = _resolved("cpu", _without_torch(cuda), PYTHONS[:1])
    common = {name: version for name, version in cpu.items() if cuda.get(name) == version}
    image, *_ = lock_files("cpu")
    _write(image, "image", common)
    for flavour, resolved in {"cuda": cuda, "cpu": cpu}.items():
        _write(lock_files(flavour)[1], flavour, {name: v for name, v in resolved.items() if name not in common})


def check() -> Iterator[str]:
    """What pip, free to choose, would do otherwise than the CUDA flavour's lock says; one line each."""
    locked = {name: pin for lock in lock_files("cuda") for name, pin in locked_in(lock).items()}
    reports = {python: _report(python, locked) for python in PYTHONS}
    yield from differences(reports, locked, of_all=set(pins(HERE / "image.lock")))


def differences(
    reports: Mapping[str, Mapping[str, Any]], locked: Mapping[str, Locked], of_all: Set[str] = frozenset()
) -> Iterator[str]:
    """Between what pip reports for each Python and what is locked. `of_all`: packages that every flavour has."""
    unused = set(locked) - of_all  # pip takes its own Python's version for markers, so it may miss what another needs
    for python, report in reports.items():
        chosen = {normal(item["metadata"]["name"]): item for item in report["install"]}
        unused -= chosen.keys()
        yield from (
            f"Python {python} needs {name}, which is not locked" for name in sorted(chosen.keys() - locked.keys())
        )
        for name in sorted(chosen.keys() & locked.keys()):
            if problem := _difference(chosen[name], locked[name]):
                yield f"Python {python}: {problem}"
    yield from (f"{name} is locked, and no Python needs it" for name in sorted(unused))


def _difference(chosen: Mapping[str, Any], locked: Locked) -> str | None:
    version, download = chosen["metadata"]["version"], chosen["download_info"]
    if version != locked.version:
        return f"{chosen['metadata']['name']} {version} is chosen, {locked.version} is locked"
    if download["archive_info"]["hashes"]["sha256"] not in locked.hashes:
        return f"the lock has no hash of {download['url'].rpartition('/')[2]}"
    return None


def locked_in(lock: Path) -> dict[str, Locked]:
    """By the name of the package."""
    versions = pins(lock)
    blocks = {block.partition("==")[0]: block for block in re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8"))}
    hashes = {name: frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", blocks[name])) for name in versions}
    return {name: Locked(version, hashes[name]) for name, version in versions.items()}


def _resolved(flavour: str, preferred: Pins, pythons: Iterable[str] = PYTHONS) -> Pins:
    """The packages of a flavour: those of every Python, in versions that the first of them can have."""
    found: Pins = {}
    for python in pythons:
        known = {**preferred, **_without_torch(found)}
        found |= _uv_compile([PYPROJECT, HERE / f"torch-{flavour}.in"], python, known)
    return found


def _uv_compile(sources: Iterable[Path], python: str, preferred: Pins) -> Pins:
    with tempfile.TemporaryDirectory() as folder:
        constraints, resolved = Path(folder, "constraints.txt"), Path(folder, "resolved.txt")
        constraints.write_text(_lines(preferred))
        options = [*_UV_OPTIONS, "--python-version", python, "--constraint", str(constraints)]
        _run_uv([*options, *map(str, sources), "--output-file", str(resolved)])
        return pins(resolved)


def _write(lock: Path, what: str, versions: Pins) -> None:
    """The pins with the hashes of all their files."""
    with tempfile.TemporaryDirectory() as folder:
        source, hashed = Path(folder, "pins.in"), Path(folder, "pins.txt")
        source.write_text(_lines(versions))
        options = [*_UV_OPTIONS, "--no-deps", "--generate-hashes", "--python-version", PYTHONS[0]]
        _run_uv([*options, str(source), "--output-file", str(hashed)])
        text = hashed.read_text()
    aside = lock.with_suffix(".new")
    aside.write_text(_HEADER.format(what=_WHAT[what]) + _with_local_hashes(text))
    aside.replace(lock)


def _with_local_hashes(text: str) -> str:
    """uv leaves out the hashes of wheels that lie in a folder."""

    def pinned(match: re.Match[str]) -> str:
        hashes = sorted(_hashes_in_folder(match[1], match[2]))
        if not hashes:
            raise SystemExit(
                f"error: no hash of {match[0]} is known; set PIP_FIND_LINKS to a folder that holds its wheel"
            )
        return " \\\n    ".join([match[0], *(f"--hash=sha256:{number}" for number in hashes)])

    return re.sub(r"^([a-z0-9-]+)==([^\s\\]+)$", pinned, text, flags=re.M)


def _hashes_in_folder(name: str, version: str) -> Iterator[str]:
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        for wheel in Path(folder).glob(f"{name.replace('-', '_')}-{version}-*_x86_64.whl"):
            with wheel.open("rb") as file:
                yield hashlib.file_digest(file, "sha256").hexdigest()


def _run_uv(arguments: list[str]) -> None:
    options = {"PIP_INDEX_URL": "--default-index", "PIP_EXTRA_INDEX_URL": "--index", "PIP_FIND_LINKS": "--find-links"}
    sources = [
        word for name, option in options.items() for url in os.environ.get(name, "").split() for word in (option, url)
    ]
    done = subprocess.run([sys.executable, "-m", "uv", "pip", "compile", *arguments, *sources])
    if done.returncode:
        raise SystemExit(done.returncode)


def _report(python: str, locked: Mapping[str, Locked]) -> dict[str, Any]:
    """What pip would install of pyproject and the CUDA pins. The other pins only stop it from taking newer ones."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text(_lines({name: package.version for name, package in locked.items()}))
        target = ["--python-version", python, *(word for tag in _TAGS for word in ("--platform", tag))]
        command = [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"),
            *("--ignore-installed", "--only-binary=:all:", "--use-feature=fast-deps", "--target", folder),
            *(*target, "--constraint", str(constraints), "--report", str(report)),
            *("--requirement", str(HERE / "torch-cuda.in"), *_requirements()),
        ]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: pip finds no solution for Python {python}: {done.stderr.strip()}")
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def _requirements() -> list[str]:
    import tomllib

    dependencies: list[str] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    return dependencies


def _without_torch(versions: Mapping[str, str]) -> Pins:
    return {name: version for name, version in versions.items() if name not in ("torch", "xformers")}


def _lines(versions: Mapping[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

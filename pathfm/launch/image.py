"""What an image is, told without starting it: its architecture, and what its build wrote into its labels."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm.launch.profile import Container

LOCK_LABEL = "org.pathfm.lock"
FLAVOUR_LABEL = "org.pathfm.flavour"
COMMIT_LABEL = "org.opencontainers.image.revision"
VERSION_LABEL = "org.opencontainers.image.version"
FLAVOURS = ("cuda", "cpu")

# The header of a SIF file (version 01): a launch line, a magic word, the version, the architecture, and more.
_LAUNCH, _MAGIC, _VERSION, _ARCHITECTURE = 32, b"SIF_MAGIC\0", 3, 3
_ARCHITECTURES = {b"01": "386", b"02": "amd64", b"03": "arm", b"04": "arm64", b"06": "ppc64le", b"11": "s390x"}
_SECONDS_TO_ANSWER = 30.0


class NoImage(Exception):
    """There is no such image here, or it is none."""


@dataclass(frozen=True)
class ImageFacts:
    """Empty where nobody can tell."""

    architecture: str = ""  # as containers have it: amd64, arm64
    digest: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def image_facts(container: Container) -> ImageFacts | None:
    """None: it lies elsewhere (a registry, a file of pyxis), or the program that knows is not here.

    Raises `NoImage` when it ought to be here and is not.
    """
    if container.runtime == "apptainer" and "://" not in container.image:
        return _of_file(Path(container.image))
    if container.runtime in ("docker", "podman"):
        return _of_store(container)
    if container.runtime == "pyxis" and container.image.startswith("/") and not Path(container.image).exists():
        raise NoImage(f"there is no image {container.image}")
    return None


def lock_hash(folder: Path, flavour: str) -> str:
    """Of the lock files in `folder` (a checkout's docker/) that an image of this flavour is built from."""
    digest = hashlib.sha256()
    for name in ("image.lock", f"torch-{flavour}.lock"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _of_file(path: Path) -> ImageFacts:
    if path.is_dir():
        return _of_sandbox(path)
    if not path.exists():
        raise NoImage(f"there is no image {path}")
    with path.open("rb") as file:
        header = file.read(_LAUNCH + len(_MAGIC) + _VERSION + _ARCHITECTURE)
    if not header[_LAUNCH:].startswith(_MAGIC):
        raise NoImage(f"{path} is no image of Apptainer's (no .sif file, no sandbox folder)")
    code = header[-_ARCHITECTURE:].rstrip(b"\0")
    told = _told(["apptainer", "inspect", "--json", "--labels", str(path)])
    return ImageFacts(_ARCHITECTURES.get(code, ""), labels=_labels_of_apptainer(told))


def _of_sandbox(path: Path) -> ImageFacts:
    file = path / ".singularity.d" / "labels.json"
    if not (path / ".singularity.d").is_dir():
        raise NoImage(f"{path} is a folder, but no image of Apptainer's")
    labels = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return ImageFacts(str(labels.get("org.label-schema.build-arch", "")), labels=labels)


def _of_store(container: Container) -> ImageFacts | None:
    """Of docker or podman on this machine."""
    told = _told([container.runtime, "image", "inspect", container.image])
    if not told:
        return None
    digests = told[0].get("RepoDigests") or [told[0].get("Id", "")]
    return ImageFacts(told[0].get("Architecture", ""), digests[0], (told[0].get("Config") or {}).get("Labels") or {})


def _labels_of_apptainer(told: Any) -> dict[str, str]:
    try:
        return dict(told["data"]["attributes"]["labels"])
    except (KeyError, TypeError):
        return {}


def _told(words: Sequence[str]) -> Any:
    """The JSON that a program prints, or None."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None

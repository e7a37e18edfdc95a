"""What the image's lock files pin, and the one number that names them. Needs nothing but Python.

python docker/locks.py hash cpu            the number, as the label org.pathfm.lock and image.json have it
python docker/locks.py facts cpu COMMIT    what image.json says of an image of this code
python docker/locks.py agree image.json VERSION HASH    whether labels with these values, if not empty, would be true
"""

import hashlib
import json
import re
import sys
from pathlib import Path

FLAVOURS = ("cuda", "cpu")
_HERE = Path(__file__).resolve().parent
_PIN = re.compile(r"^([\w.-]+)==([^\s\\;]+)", re.M)
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.M)


def lock_files(flavour: str, folder: Path = _HERE) -> list[Path]:
    """What every image has, then what depends on torch. They are installed, and hashed, in this order."""
    return [folder / "image.lock", folder / f"torch-{flavour}.lock"]


def lock_hash(flavour: str, folder: Path = _HERE) -> str:
    """SHA-256 over the files of a flavour, one after the other: `cat image.lock torch-cpu.lock | sha256sum`."""
    return hashlib.sha256(b"".join(lock.read_bytes() for lock in lock_files(flavour, folder))).hexdigest()


def pins(lock: Path) -> dict[str, str]:
    """The version of every package that a lock file names."""
    return {normal(name): version for name, version in _PIN.findall(lock.read_text(encoding="utf-8"))}


def pins_of(flavour: str, folder: Path = _HERE) -> dict[str, str]:
    """The version of every package in an image of this flavour."""
    return {name: version for lock in lock_files(flavour, folder) for name, version in pins(lock).items()}


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def facts(flavour: str, commit: str, folder: Path = _HERE) -> dict[str, str | None]:
    """What image.json says. `commit`: that of the code that lies beside `folder`."""
    found = _VERSION.search((folder.parent / "pathfm" / "__init__.py").read_text(encoding="utf-8"))
    packages = pins_of(flavour, folder)
    return {
        "lock": lock_hash(flavour, folder),
        "flavour": flavour,
        "commit": commit,
        "version": found[1] if found else None,
        "torch": packages["torch"],
        "xformers": packages.get("xformers"),
    }


def disagreements(image: dict[str, str | None], version: str, number: str) -> list[str]:
    """Where labels would tell something else than what is inside; an empty value tells nothing."""
    labels = {"version": version, "lock": number}
    return [f"{key} is {image[key]}, not {said}" for key, said in labels.items() if said and image[key] != said]


def main(words: list[str]) -> int:
    match words:
        case ["hash", flavour] if flavour in FLAVOURS:
            print(lock_hash(flavour))
        case ["facts", flavour, commit] if flavour in FLAVOURS:
            print(json.dumps(facts(flavour, commit), indent=2))
        case ["agree", image, version, number]:
            problems = disagreements(json.loads(Path(image).read_text(encoding="utf-8")), version, number)
            print("".join(f"error: the image's {problem}\n" for problem in problems), end="", file=sys.stderr)
            return 1 if problems else 0
        case _:
            given = " ".join(words)
            print(
                f"error: '{given}' is none of: hash cuda|cpu; facts cuda|cpu COMMIT; agree FILE VERSION HASH",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

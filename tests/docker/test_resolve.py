"""Whether pip would choose what is locked, told from its report."""

from typing import Any

import pytest
import resolve
from resolve import Locked, differences

LOCKED = {
    "torch": Locked("2.10.0", frozenset({"aa", "bb"})),
    "triton": Locked("3.6.0", frozenset({"cc"})),
    "setuptools": Locked("84.0.0", frozenset({"dd"})),
}


def _report(**chosen: tuple[str, str]) -> dict[str, Any]:
    """As pip writes it, of package = (version, hash)."""
    return {
        "install": [
            {
                "metadata": {"name": name, "version": version},
                "download_info": {
                    "url": f"https://index.local/{name}-{version}-cp312.whl",
                    "archive_info": {"hashes": {"sha256": number}},
                },
            }
            for name, (version, number) in chosen.items()
        ]
    }


AS_LOCKED = {"torch": ("2.10.0", "bb"), "triton": ("3.6.0", "cc"), "setuptools": ("84.0.0", "dd")}
CASES = {
    "as locked": ({}, []),
    "a newer one": ({"triton": ("3.7.0", "cc")}, ["Python 3.12: triton 3.7.0 is chosen, 3.6.0 is locked"]),
    "another file": ({"torch": ("2.10.0", "ee")}, ["Python 3.12: the lock has no hash of torch-2.10.0-cp312.whl"]),
    "one more": ({"Nvidia_NVTX.cu12": ("1", "f")}, ["Python 3.12 needs nvidia-nvtx-cu12, which is not locked"]),
}


@pytest.mark.parametrize(("changes", "expected"), CASES.values(), ids=CASES.keys())
def test_what_pip_would_do_otherwise_is_said(changes: dict[str, tuple[str, str]], expected: list[str]):
    assert list(differences({"3.12": _report(**AS_LOCKED | changes)}, LOCKED)) == expected


def test_a_package_that_no_python_needs_is_said():
    needs_two = _report(torch=("2.10.0", "aa"), setuptools=("84.0.0", "dd"))
    needs_all = _report(**AS_LOCKED)
    assert list(differences({"3.11": needs_two, "3.12": needs_all}, LOCKED)) == []
    assert list(differences({"3.11": needs_two, "3.12": needs_two}, LOCKED)) == [
        "triton is locked, and no Python needs it"
    ]


def test_what_every_flavour_has_may_be_needed_by_another():
    assert list(differences({"3.11": _report(torch=("2.10.0", "aa"))}, LOCKED, of_all={"triton", "setuptools"})) == []


def test_both_pythons_of_the_bases_are_resolved_for():
    assert resolve.PYTHONS == ("3.11", "3.12")

"""Where the golden vectors and the real tiles are; shapes in signatures are checked while the tests run."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before anything imports them: every call in these rooms is checked against its jaxtyping shapes.
install_import_hook(["pathfm.models", "pathfm.ssl"], "beartype.beartype")


def _shared() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("PATHFM_SHARED", beside))


def _folder(name: str) -> Path:
    folder = _shared() / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (set PATHFM_SHARED to the folder that holds '{name}')")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Golden vectors (../shared/golden or $PATHFM_SHARED/golden)."""
    return _folder("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real histology (../shared/data or $PATHFM_SHARED/data)."""
    return _folder("data")

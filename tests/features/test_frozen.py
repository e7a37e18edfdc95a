import numpy as np
import torch

from pathfm.features.frozen import class_token_features


def test_every_image_gives_one_row_in_order_whatever_the_batch():
    images = [np.full((4, 4, 3), level, dtype=np.uint8) for level in range(7)]

    def mean_red(pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :1].mean((2, 3))

    found = [class_token_features(mean_red, iter(images), torch.device("cpu"), batch_size=size) for size in (1, 3, 64)]
    expected = (torch.arange(7.0)[:, None] / 255 - 0.485) / 0.229
    for rows in found:
        torch.testing.assert_close(rows, expected)

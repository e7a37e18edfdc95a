"""A picture now and then of what the teacher makes of the same few tiles, while a run goes on."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from pathfm.data.decode import DecodeError, decode
from pathfm.data.labelled import at_side
from pathfm.features.tokens import token_maps, tokens_picture
from pathfm.files import written_aside
from pathfm.jobs.run_reports import draw
from pathfm.jobs.training_data import TrainingData
from pathfm.lifecycle.run import Run
from pathfm.parallel.apply import left_as_found, whole
from pathfm.ssl.network import Network
from pathfm.training.step import compute_dtype

_TILES = 8
_TRIED = 32  # samples, of which some may be damaged


def token_painter(run: Run, data: TrainingData, teacher: Network, *, first: bool) -> Callable[[int], None]:
    """Writes `previews/tokens_STEP.png`. All ranks call it together, since each may hold a share of the weights."""
    if data.recipe.student.feature_width is not None:  # there is no picture of what it reads
        return lambda step: None
    first_tiles = cache(partial(_first_tiles, data))  # read when the first picture is due, not at every start
    dtype = compute_dtype(data.recipe.train)

    def paint(step: int) -> None:
        if not len(tiles := first_tiles()):
            return
        with (
            left_as_found(teacher),
            whole(teacher),
            torch.autocast(data.device.type, dtype, enabled=dtype != torch.float32),
        ):
            maps = token_maps(teacher.backbone, tiles.to(data.device))
        if first:
            draw(run.previews / f"tokens_{step:08d}.png", lambda path: _save(tokens_picture(tiles, maps), path))

    return paint


def _first_tiles(data: TrainingData) -> UInt8[Tensor, "n 3 S S"]:
    """Of the run's order, as they lie in the tar, at the size of the global crops."""
    tiles = []
    for sample in data.order.samples(np.arange(min(_TRIED, data.order.epoch_size))).tolist():
        try:
            image = decode(data.dataset.read_bytes(sample), data.recipe.data.max_pixels)
        except DecodeError:
            continue
        tiles.append(torch.from_numpy(at_side(image, data.recipe.crops.global_crops_size)).permute(2, 0, 1))
        if len(tiles) == _TILES:
            break
    return torch.stack(tiles) if tiles else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


def _save(picture: Image.Image, path: Path) -> None:
    with written_aside(path) as aside:
        picture.save(aside, format="PNG")

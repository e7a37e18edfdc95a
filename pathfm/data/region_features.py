"""Bytes of a region's .pt file -> its features, one row for each patch of the region's grid, row-major."""

import math
from io import BytesIO
from pickle import UnpicklingError

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pathfm.data.datasets import Regions
from pathfm.data.decode import DecodeError
from pathfm.errors import UserError


class RegionFeatures:
    """The features of every region of a data set, all as wide as those of the first."""

    def __init__(self, dataset: Regions) -> None:
        self.dataset = dataset
        self.width = self._read(0).shape[1]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: int) -> Float[Tensor, "npatch width"]:
        """Raises `UserError` that names the file when it holds no such features."""
        features = self._read(sample)
        if features.shape[1] != self.width:
            raise UserError(
                f"{self._place(sample)} has features of width {features.shape[1]}, but those of "
                f"{self.dataset.name_of(0)} are {self.width} wide; extract all regions with one model"
            )
        return features

    def _read(self, sample: int) -> Float[Tensor, "npatch width"]:
        try:
            return decode_features(self.dataset.read_bytes(sample))
        except DecodeError as error:
            raise UserError(f"{self._place(sample)} holds no region features: {error}; extract it again") from error

    def _place(self, sample: int) -> str:
        return f"{self.dataset.name_of(sample)} in {self.dataset.tar_of(sample)}"


def decode_grid(encoded: bytes, width: int, smallest: int) -> Float[np.ndarray, "h w D"]:
    """A region's features as the square grid that its patches form, in fp32.

    `smallest`: rows and columns that the grid has at least. Raises `DecodeError`, also for features of another width.
    """
    features = decode_features(encoded)
    side = math.isqrt(len(features))
    if side * side != len(features):
        raise DecodeError(f"its {len(features)} patches form no square grid")
    if side < smallest:
        raise DecodeError(f"its grid of {side} x {side} patches is smaller than a crop of {smallest} x {smallest}")
    if features.shape[1] != width:
        raise DecodeError(f"its features are {features.shape[1]} wide, not {width}")
    return features.float().reshape(side, side, width).numpy()


def decode_features(encoded: bytes) -> Float[Tensor, "npatch width"]:
    """What torch.save wrote, on the CPU, in its own precision. Raises `DecodeError`; code in the file is never run."""
    try:
        features = torch.load(BytesIO(encoded), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except UnpicklingError as error:
        raise DecodeError("it is damaged, or holds code or objects beside a tensor, which are not loaded") from error
    except Exception as error:  # a damaged archive can raise anything
        raise DecodeError("it is not a whole file of torch.save") from error
    if not isinstance(features, Tensor):
        raise DecodeError(f"it is a {type(features).__name__}, not a tensor")
    if features.ndim != 2 or not features.is_floating_point() or not features.numel():
        raise DecodeError(f"it is {features.dtype} {list(features.shape)}, not float [npatch, width]")
    return features

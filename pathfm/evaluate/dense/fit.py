"""A head is trained on windows of pictures, through a backbone that stays as it is, and then asked about others.

H, W picture size in px   h, w window size in px   n windows   C channels of what a task maps
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from pathfm.batch import normalise_crops
from pathfm.evaluate.dense.heads import FrozenTokens, LinearHead, Task, Tokens
from pathfm.evaluate.dense.windows import Windows
from pathfm.random_streams import stream
from pathfm.schedule import CosineSchedule

_AT_ONCE = 8  # windows in one pass of the backbone


class Truth(NamedTuple):
    """A picture, and what is true of its pixels: class indices, or numbers."""

    image: UInt8[np.ndarray, "H W 3"]
    target: Tensor  # [H, W]


@dataclass(frozen=True)
class Sight:
    """How a picture is looked at: at which scales, through which windows, by which backbone."""

    tokens: FrozenTokens
    windows: Windows
    scales: tuple[float, ...]
    device: torch.device

    def windows_of(self, image: UInt8[np.ndarray, "H W 3"], scale: float) -> UInt8[Tensor, "n 3 h w"]:
        """Of the picture at a scale."""
        return self.windows.cut(scaled(torch.from_numpy(image).permute(2, 0, 1), scale))

    def tokens_of(self, windows: UInt8[Tensor, "n 3 h w"]) -> Iterator[Tokens]:
        """On the device, a few windows at a time."""
        for chunk in windows.split(_AT_ONCE):
            yield self.tokens(normalise_crops(chunk.to(self.device)))


class Example(NamedTuple):
    """One window of a training picture: what the backbone says of it, and what is true."""

    patches: Float[Tensor, "D y x"]
    cls: Float[Tensor, " D"]
    target: Tensor  # [h, w]


class Examples:
    """All windows of the training pictures at all scales, the backbone's tokens kept in memory as far as they fit.

    Of others the tokens are computed whenever they are asked for. `read` gives a picture and its truth by number.
    """

    def __init__(
        self, numbers: Sequence[int], read: Callable[[int], Truth], sight: Sight, task: Task, at_most_bytes: int
    ) -> None:
        self._numbers, self._read, self._sight, self._task = numbers, read, sight, task
        self._room_bytes = at_most_bytes
        self._places: list[tuple[int, float, int]] = []  # picture, scale, window
        self._kept: dict[int, Example] = {}

    def fill(self) -> Iterator[int]:
        """Look at every picture once; yields its number afterwards. Nothing is there before."""
        for number in self._numbers:
            truth = self._read(number)
            for scale in self._sight.scales:
                self._look_at(number, scale, truth)
            yield number

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Example:
        if place in self._kept:
            return self._kept[place]
        number, scale, window = self._places[place]
        truth = self._read(number)
        (tokens,) = self._sight.tokens_of(self._sight.windows_of(truth.image, scale)[window : window + 1])
        return Example(tokens.patches[0].cpu(), tokens.cls[0].cpu(), self._targets(truth, scale)[window])

    def _look_at(self, number: int, scale: float, truth: Truth) -> None:
        windows, targets = self._sight.windows_of(truth.image, scale), self._targets(truth, scale)
        first = len(self._places)
        self._places += [(number, scale, window) for window in range(len(windows))]
        if self._room_bytes <= 0:
            return
        found = (pair for tokens in self._sight.tokens_of(windows) for pair in zip(*tokens, strict=True))
        for window, (patches, cls) in enumerate(found):
            example = Example(*(part.to("cpu", copy=True) for part in (patches, cls, targets[window])))
            self._kept[first + window] = example
            self._room_bytes -= sum(part.nbytes for part in example)

    def _targets(self, truth: Truth, scale: float) -> Tensor:
        return self._sight.windows.cut_target(scaled_target(truth.target, scale), self._task.unknown)


@dataclass(frozen=True)
class FitSettings:
    """Of the head's training: AdamW, a linear warm-up over a tenth of the steps, then half a cosine to 0."""

    epochs: int = 50  # each sees every window once
    batch_size: int = 8  # windows
    lr: float = 1e-3  # DINOv2's heads
    weight_decay: float = 1e-4
    seed: int = 0

    def steps(self, examples: int) -> int:
        return self.epochs * -(-examples // self.batch_size)


def fit(
    head: LinearHead, task: Task, examples: Examples, settings: FitSettings, device: torch.device
) -> Iterator[float]:
    """Train the head in place; yields the loss of every step. The order of windows depends on the seed alone."""
    if not len(examples):
        return
    total = settings.steps(len(examples))
    schedule = CosineSchedule(settings.lr, 0.0, total, warmup_steps=total // 10)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    head.to(device).train()
    for step, places in enumerate(_order(len(examples), settings)):
        for group in optimiser.param_groups:
            group["lr"] = schedule(step)
        tokens, target = _together([examples[place] for place in places], device)
        loss = task.loss(task.maps(head(tokens), (target.shape[-2], target.shape[-1])), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()
    head.eval()


@torch.no_grad()
def look(head: LinearHead, task: Task, sight: Sight, image: UInt8[np.ndarray, "H W 3"]) -> Tensor:
    """[H, W] on the CPU: what a trained head says of every pixel of a picture of any size."""
    head.to(sight.device).eval()
    height, width = image.shape[:2]
    found = [resized(task.certain(_map_at(head, task, sight, image, scale)), height, width) for scale in sight.scales]
    return task.answer(torch.stack(found).mean(0)).cpu()


def scaled(picture: UInt8[Tensor, "3 H W"], scale: float) -> UInt8[Tensor, "3 y x"]:
    """Bicubic, without moire where it becomes smaller."""
    if scale == 1:
        return picture
    size = _scaled_size(picture.shape[1:], scale)
    finer = functional.interpolate(picture[None].float(), size, mode="bicubic", antialias=True)[0]
    return finer.round().clamp(0, 255).to(torch.uint8)


def scaled_target(target: Tensor, scale: float) -> Tensor:
    """[H, W] -> [y, x]: of each pixel the nearest, as there is nothing between two classes."""
    if scale == 1:
        return target
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long()
        for old, new in zip(target.shape, _scaled_size(target.shape, scale), strict=True)
    )
    return target[rows][:, columns]


def resized(maps: Float[Tensor, "C y x"], height: int, width: int) -> Float[Tensor, "C H W"]:
    if maps.shape[1:] == (height, width):
        return maps
    return functional.interpolate(maps[None], (height, width), mode="bilinear")[0]


def _map_at(
    head: LinearHead, task: Task, sight: Sight, image: UInt8[np.ndarray, "H W 3"], scale: float
) -> Float[Tensor, "C y x"]:
    windows = sight.windows_of(image, scale)
    maps = [task.maps(head(tokens), sight.windows.size) for tokens in sight.tokens_of(windows)]
    return sight.windows.merge(torch.cat(maps), *_scaled_size(image.shape[:2], scale))


def _scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    height, width = size
    return max(1, round(height * scale)), max(1, round(width * scale))


def _order(examples: int, settings: FitSettings) -> Iterator[Sequence[int]]:
    """Every step's windows: a new shuffle in every epoch."""
    for epoch in range(settings.epochs):
        shuffled = stream(settings.seed, epoch, "dense order").permutation(examples).tolist()
        for first in range(0, examples, settings.batch_size):
            yield shuffled[first : first + settings.batch_size]


def _together(examples: Sequence[Example], device: torch.device) -> tuple[Tokens, Tensor]:
    patches, cls, target = (torch.stack(parts).to(device) for parts in zip(*examples, strict=True))
    return Tokens(patches, cls), target

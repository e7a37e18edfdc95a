"""A few pictures beside what is true, what a head said, and where it erred.

H, W size in px   C classes
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pathfm.evaluate.dense.losses import IGNORED, is_known
from pathfm.sheets import GAP, captioned, paper, stacked

# Apart from each other, from H&E's pink and violet, and for colour-blind eyes (Okabe and Ito's, reordered).
_COLOURS = ((240, 228, 66), (0, 158, 115), (86, 180, 233), (230, 159, 0), (0, 114, 178), (213, 94, 0), (0, 0, 0))
_INVENTED, _MISSED = (213, 94, 0), (0, 114, 178)
_UNKNOWN = (150, 150, 150)
_SHARE = 0.3  # of a class's colour over tissue
_LEAST_SIDE, _MOST_SIDE = 224, 448  # px of a panel's longer side
_CLOSENESS = "viridis"  # of numbers
_HEAT = "magma"  # of errors


@dataclass(frozen=True)
class Seen:
    """A picture, what is true of it, what was said, and in a few words how good that was."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    truth: Tensor  # [H, W]
    said: Tensor  # [H, W]
    verdict: str


def segmentation_picture(seen: Sequence[Seen], classes: Sequence[str]) -> Image.Image:
    """A row for each picture, and a key of the colours below them. The first class is left as it looks."""
    rows = [
        captioned(
            [
                (one.name, _panel(one.image)),
                ("truth", _panel(_overlaid(one.image, one.truth, len(classes)))),
                (f"prediction: {one.verdict}", _panel(_overlaid(one.image, one.said, len(classes)))),
                ("errors", _panel(_errors(one, len(classes)))),
            ]
        )
        for one in seen
    ]
    return _sheet(rows, {**_key(classes), **_key_of_errors(classes)})


def regression_picture(seen: Sequence[Seen]) -> Image.Image:
    """A row for each picture; truth and prediction in one scale of colours, errors up to half of the truth."""
    rows = []
    for one in seen:
        known = is_known(one.truth)
        values = one.truth[known].float()
        low, high = (float(values.quantile(share)) for share in (0.01, 0.99)) if len(values) else (0.0, 1.0)
        off = (one.said - one.truth).abs() / one.truth.clamp(min=1e-12)
        rows.append(
            captioned(
                [
                    (one.name, _panel(one.image)),
                    (f"truth: {low:.3g} to {high:.3g}", _panel(_coloured(one.truth, low, high, _CLOSENESS, known))),
                    (f"prediction: {one.verdict}", _panel(_coloured(one.said, low, high, _CLOSENESS))),
                    ("error: 0 to 50 %", _panel(_coloured(off, 0.0, 0.5, _HEAT, known))),
                ]
            )
        )
    return _sheet(rows, {"unknown": _UNKNOWN} if any(not is_known(one.truth).all() for one in seen) else {})


def spread_by(values: Sequence[float], number: int) -> list[int]:
    """Which to show: from the best to the worst in even steps of rank, so that no picture flatters."""
    order = sorted(range(len(values)), key=lambda place: -values[place])
    if len(order) <= number:
        return order
    return [order[round(step * (len(order) - 1) / (number - 1))] for step in range(number)]


def _overlaid(image: UInt8[np.ndarray, "H W 3"], mask: Int[Tensor, "H W"], classes: int) -> UInt8[np.ndarray, "H W 3"]:
    """Classes in their colours over the tissue, each with its outline."""
    labels = mask.numpy()
    picture = image.astype(float)
    for number in range(1, classes):
        _tint(picture, labels == number, _colour(number))
    _tint(picture, labels == IGNORED, _UNKNOWN)
    return picture.round().astype(np.uint8)


def _tint(picture: Float[np.ndarray, "H W 3"], where: Bool[np.ndarray, "H W"], colour: tuple[int, int, int]) -> None:
    picture[where] = (1 - _SHARE) * picture[where] + _SHARE * np.array(colour)
    picture[_outline(where)] = colour


def _outline(where: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels that have a neighbour of another kind."""
    padded = np.pad(where, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return where & ~np.logical_and.reduce(neighbours)


def _errors(one: Seen, classes: int) -> UInt8[np.ndarray, "H W 3"]:
    """The tissue in pale grey, and wrong pixels in the colour of their kind."""
    grey = one.image.astype(float).mean(2, keepdims=True).repeat(3, axis=2)
    picture = 255 - (255 - grey) * 0.5
    truth, said = one.truth.numpy(), one.said.numpy()
    wrong = (truth != said) & (truth != IGNORED)
    is_missed = wrong & (said == 0)
    picture[wrong & ~is_missed] = _INVENTED
    picture[is_missed] = _MISSED
    return picture.round().astype(np.uint8)


def _coloured(
    values: Float[Tensor, "H W"], low: float, high: float, colours: str, known: Bool[Tensor, "H W"] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    import matplotlib

    scaled = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num()
    picture = (255 * matplotlib.colormaps[colours](scaled.numpy())[..., :3]).round().astype(np.uint8)
    if known is not None:
        picture[~known.numpy()] = _UNKNOWN
    return picture


def _panel(pixels: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """Small pictures are enlarged by whole pixels, large ones made smaller."""
    height, width = pixels.shape[:2]
    picture, longer = Image.fromarray(pixels), max(height, width)
    if longer < _LEAST_SIDE:
        times = -(-_LEAST_SIDE // longer)
        return picture.resize((width * times, height * times), Image.Resampling.NEAREST)
    if longer > _MOST_SIDE:
        size = (max(1, width * _MOST_SIDE // longer), max(1, height * _MOST_SIDE // longer))
        return picture.resize(size, Image.Resampling.BOX)
    return picture


def _key(classes: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    return {name: _colour(number) for number, name in enumerate(classes) if number}


def _key_of_errors(classes: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """The first class is the background: what was said to be it is missed."""
    first, *others = classes
    invented = f"{others[0]} where {first} is" if len(others) == 1 else "another class than is true"
    return {
        f"error: {first} where {others[0] if len(others) == 1 else 'another class'} is": _MISSED,
        f"error: {invented}": _INVENTED,
    }


def _sheet(rows: Sequence[Image.Image], key: dict[str, tuple[int, int, int]]) -> Image.Image:
    return stacked([*rows, *([_drawn_key(key)] if key else [])])


def _drawn_key(key: dict[str, tuple[int, int, int]]) -> Image.Image:
    font, side = ImageFont.load_default(12), 12
    widths = [side + GAP + int(font.getlength(name)) + 3 * GAP for name in key]
    strip = paper(sum(widths), side + 2 * GAP)
    pen, left = ImageDraw.Draw(strip), 0
    for (name, colour), width in zip(key.items(), widths, strict=True):
        pen.rectangle((left, GAP, left + side, GAP + side), fill=colour)
        pen.text((left + side + GAP, GAP - 1), name, fill=(70, 70, 70), font=font)
        left += width
    return strip


def _colour(number: int) -> tuple[int, int, int]:
    """The first class has none."""
    return _COLOURS[(number - 1) % len(_COLOURS)]

"""Encoded bytes -> the picture as people see it: uint8 RGB, upright, on white."""

from io import BytesIO

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from pathfm.data.config import MAX_PIXELS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2")
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000", "GIF", "PPM")  # no EPS, which is run as a program
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what undoes each EXIF orientation


class DecodeError(ValueError):
    """These bytes are no readable image; the message is the reason."""


def decode(encoded: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Decode a JPEG, PNG, TIFF, ... to 8-bit RGB.

    EXIF rotation is applied, transparency laid on white, grey, palette and CMYK converted, 16 bits scaled to 8.
    Raises `DecodeError` when the bytes are not an image, are cut, or claim more than `max_pixels`.
    """
    if not encoded:
        raise DecodeError("it is empty (0 bytes)")
    try:
        with open_image(encoded) as image:
            _refuse_bomb(image, max_pixels)
            if (pixels := _plain_jpeg(image, encoded)) is not None:
                return pixels
            image.load()  # first: Pillow itself turns TIFFs upright here, and then forgets their orientation
            orientation = _orientation(image)
            rgb = _on_white(image)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them to
        raise DecodeError(_reason(error)) from error
    return np.array(rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb)


def open_image(encoded: bytes) -> Image.Image:
    """An image of the formats that are read, of which only the header was looked at. Raises what Pillow does."""
    return Image.open(BytesIO(encoded), formats=_FORMATS)


def _refuse_bomb(image: Image.Image, max_pixels: int) -> None:
    """By the header alone, before memory is claimed. Pillow's own, global limit stays as it is, above this one."""
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(f"it claims {width} x {height} pixels, more than the {max_pixels:,} allowed")


def _plain_jpeg(image: Image.Image, encoded: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """What nearly every tile is, decoded in half of Pillow's time to the same bytes; None for all that is not plain.

    `image` was opened, not loaded. At the least damage Pillow decides what can still be read.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or _orientation(image) in _UPRIGHT:
        return None
    try:
        return simplejpeg.decode_jpeg(encoded)
    except ValueError:
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata do not make the pixels unreadable
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise DecodeError("its pixels are floating-point numbers without a known range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _eight_bits(grey: np.ndarray) -> UInt8[np.ndarray, "H W"]:
    """16-bit grey to 8 bits: 65535 becomes 255 (Pillow's own conversion has clipped at 255 in some versions)."""
    if grey.min() < 0 or grey.max() > 65535:
        raise DecodeError(f"its grey values run from {grey.min()} to {grey.max()}, not within 16 bits")
    return np.round(grey / 257.0).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__

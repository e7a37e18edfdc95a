import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pathfm.data import decode as decode_module
from pathfm.data.decode import DecodeError, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth() -> Image.Image:
    """A picture that JPEG keeps nearly as it is, different at every corner."""
    ramp = np.linspace(40, 200, 64)
    channels = [np.broadcast_to(ramp, (48, 64)), np.broadcast_to(ramp[:48, None], (48, 64)), np.full((48, 64), 90.0)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_formats_give_the_very_pixels(format):
    image = decode(encoded(Image.fromarray(PIXELS), format))
    assert (image.dtype, image.flags.writeable) == (np.uint8, True)
    np.testing.assert_array_equal(image, PIXELS)


def test_real_tiles_decode_as_pillow_decodes_them(shared_data):
    for path in sorted((shared_data / "osteosarcoma3" / "images").iterdir())[:3]:
        np.testing.assert_array_equal(decode(path.read_bytes()), np.asarray(Image.open(path)))


def no_jpeg_is_plain(image, encoded):
    return None


def outcome(encoded: bytes) -> bytes | str:
    """The picture, or the reason why there is none."""
    try:
        image = decode(encoded)
    except DecodeError as error:
        return str(error)
    return repr(image.shape).encode() + image.tobytes()


def by_pillow_alone(encoded: bytes) -> bytes | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "_plain_jpeg", no_jpeg_is_plain)
        return outcome(encoded)


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    colour=st.sampled_from(["RGB", "L", "CMYK", "YCbCr"]),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    restart_marker_rows=st.integers(0, 2),
)
def test_a_jpeg_of_any_kind_has_the_very_pixels_that_pillow_finds(height, width, colour, **options):
    image = smooth().resize((width, height)).convert(colour)
    jpeg = encoded(image, "JPEG", **options)
    assert outcome(jpeg) == by_pillow_alone(jpeg)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_cut_at_any_byte_is_judged_as_pillow_judges_it(options):
    jpeg = encoded(smooth(), "JPEG", **options)
    for length in range(len(jpeg)):
        assert outcome(jpeg[:length]) == by_pillow_alone(jpeg[:length]), length
    assert isinstance(outcome(jpeg[: len(jpeg) // 2]), str)


def test_a_plain_jpeg_is_not_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", None)
    assert decode(encoded(smooth(), "JPEG")).shape == (48, 64, 3)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation, format):
    """Turn the picture as a camera of that orientation would have stored it; what comes out is upright."""
    upright = np.asarray(smooth())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif))
    assert image.shape == upright.shape
    assert np.abs(image - upright.astype(int)).mean() <= (3 if format == "JPEG" else 0)


def test_alpha_is_laid_on_white():
    rgba = np.dstack([PIXELS, np.tile(np.array([0, 128, 255], np.uint8), (20, 10))])
    image = decode(encoded(Image.fromarray(rgba, "RGBA"))).astype(float)
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(image, PIXELS * alpha + 255 * (1 - alpha), atol=1)


def test_a_transparent_palette_entry_is_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    np.testing.assert_array_equal(decode(encoded(image, transparency=0)), [[[255, 255, 255], [0, 0, 255]]])


def test_grey_one_bit_and_cmyk_become_rgb():
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(decode(encoded(grey)), np.repeat(PIXELS[..., :1], 3, axis=2))
    assert set(np.unique(decode(encoded(grey.convert("1"))))) == {0, 255}
    cmyk = decode(encoded(smooth().convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(cmyk - np.asarray(smooth())).mean() < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(format):
    grey = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(grey), format))
    assert image[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert image.shape == (1, 5, 3)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_colours_of_sixteen_bits_become_colours_of_eight(format):
    colours = np.random.default_rng(0).integers(0, 2**16, (20, 30, 3), dtype=np.uint16)
    written, content = cv2.imencode(f".{format}", colours[..., ::-1])
    assert written
    assert np.abs(decode(content.tobytes()) - colours / 257).max() <= 1


def test_floating_point_pixels_are_refused():
    with pytest.raises(DecodeError, match="floating-point"):
        decode(encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_truncated_images_are_refused(format):
    whole = encoded(Image.fromarray(PIXELS.repeat(8, 0).repeat(8, 1)), format)
    for keep in (0.99, 0.9, 0.5, 0.1):
        with pytest.raises(DecodeError):
            decode(whole[: int(len(whole) * keep) - 1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not an image of a known format"),
        (encoded(Image.fromarray(PIXELS), "EPS"), "not an image of a known format"),
    ],
    ids=["empty", "text", "a PostScript program"],
)
def test_what_is_no_image_is_refused_with_the_reason(content, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(content)


def test_more_pixels_than_allowed_are_refused_before_they_are_decoded():
    with pytest.raises(DecodeError, match=r"claims 30 x 20 pixels, more than the 599 allowed"):
        decode(encoded(Image.fromarray(PIXELS)), max_pixels=599)


@pytest.mark.parametrize("side", [8193, 30_000])
def test_a_decompression_bomb_is_refused_without_touching_pillows_limit(side):
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += encoded(Image.fromarray(PIXELS))[33:]
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DecodeError, match=r"claims 8193 x 8193 pixels|decompression bomb"):
        decode(bomb)
    assert limit == Image.MAX_IMAGE_PIXELS


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_jpeg_is_judged_as_pillow_judges_it(data):
    jpeg = bytearray(encoded(smooth(), "JPEG", quality=data.draw(st.sampled_from([20, 95]))))
    for _ in range(data.draw(st.integers(1, 3))):
        jpeg[data.draw(st.integers(0, len(jpeg) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(bytes(jpeg)) == by_pillow_alone(bytes(jpeg))


def test_a_jpeg_that_claims_to_be_a_bomb_is_refused_by_its_header():
    claims = bytearray(encoded(smooth(), "JPEG"))
    size = claims.index(b"\xff\xc0") + 5  # height and width in the start of frame
    claims[size : size + 4] = struct.pack(">HH", 8193, 8193)
    with pytest.raises(DecodeError, match="claims 8193 x 8193 pixels"):
        decode(bytes(claims))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), format=st.sampled_from(["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"]))
def test_damaged_bytes_end_in_a_picture_or_a_decode_error(data, format):
    content = bytearray(encoded(Image.fromarray(PIXELS), format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(content), max_pixels=10**6)
    except DecodeError:
        return
    assert (image.ndim, image.shape[2], image.dtype) == (3, 3, np.uint8)

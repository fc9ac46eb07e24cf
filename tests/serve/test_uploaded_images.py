"""Uploads: the four formats by their content, sizes before anything is decoded, and boxes."""

import struct
import tracemalloc
import zlib

import numpy as np
import odd_images
import pytest
from PIL import Image

from personmae.serve import uploads
from personmae.serve.limits import Limits, Refusal
from personmae.serve.uploads import Box

LIMITS = Limits()


def saved(kind: str, **options) -> bytes:
    return odd_images.saved(Image.fromarray(odd_images.pixels()), kind, **options)


def refused(data: bytes, limits: Limits = LIMITS) -> Refusal:
    with pytest.raises(Refusal) as caught:
        uploads.decode(data, limits)
    assert "\n" not in caught.value.text
    return caught.value


def claimed_png(height: int, width: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def claimed_webp(height: int, width: int) -> bytes:
    """A lossless WebP whose header says it is large."""
    data = bytearray(saved("WEBP", lossless=True))
    place = data.index(b"VP8L") + 9
    data[place : place + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def claimed_jpeg(height: int, width: int) -> bytes:
    data = bytearray(saved("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def claimed_bmp(height: int, width: int) -> bytes:
    data = bytearray(saved("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_four_formats_are_decoded_upright(kind):
    data = saved(kind) if kind == "BMP" else odd_images.oriented(kind, 6)
    wanted = odd_images.pixels() if kind == "BMP" else np.rot90(odd_images.pixels(), -1)
    got = uploads.decode(data, LIMITS)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted).mean() < 4


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image at all", SVG, b"GIF89a" + bytes(99), saved("GIF"), saved("TIFF"), saved("PPM"), b"%PDF-1.7", b"MZ"],
    ids=["empty", "text", "svg", "gif head", "gif", "tiff", "ppm", "pdf", "exe"],
)
def test_everything_else_is_refused_by_its_content(data):
    refusal = refused(data)
    assert refusal.status == 415
    assert refusal.text.startswith("a JPEG, PNG, WebP or BMP image is required")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_damaged_image_is_refused(kind):
    whole = saved(kind)
    assert refused(whole[: len(whole) // 2]).status == 422
    assert refused(whole[:20]).status in (415, 422)


@pytest.mark.parametrize("claimed", [claimed_png, claimed_webp, claimed_jpeg, claimed_bmp])
@pytest.mark.parametrize("size", [(30_000, 30_000), (9_500, 9_500), (5_000, 5_000)])
def test_a_bomb_is_refused_by_its_header_and_costs_nothing(claimed, size):
    height, width = (min(side, 16_383) for side in size) if claimed is claimed_webp else size
    data = claimed(height, width)
    assert len(data) < 10_000
    tracemalloc.start()
    try:
        refusal = refused(data)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert refusal.status == 413
    assert "pixels" in refusal.text


def test_the_limit_of_pixels_is_met_exactly():
    data = saved("PNG")
    pixels = odd_images.HEIGHT * odd_images.WIDTH
    assert uploads.decode(data, Limits(pixels=pixels)).shape[:2] == (odd_images.HEIGHT, odd_images.WIDTH)
    assert "This one has 30 x 46" in refused(data, Limits(pixels=pixels - 1)).text


def test_a_jpeg_of_very_many_passes_is_refused():
    usual = saved("JPEG", progressive=True)
    assert uploads.decode(usual, LIMITS).shape == odd_images.pixels().shape
    start = usual.rindex(b"\xff\xda")
    assert "too many passes" in refused(usual[:start] + usual[start:-2] * 200 + usual[-2:]).text


def test_noise_that_looks_like_many_passes_is_taken_in_other_formats():
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    data = odd_images.saved(Image.fromarray(noise), "BMP")
    assert data.count(b"\xff\xda") > 100
    np.testing.assert_array_equal(uploads.decode(data, LIMITS), noise)


def test_a_box_is_a_part_of_the_image():
    pixels = odd_images.pixels(100, 50)
    assert uploads.cropped(pixels, None) is pixels
    np.testing.assert_array_equal(uploads.cropped(pixels, Box(0.1, 0.2, 0.9, 0.5)), pixels[20:50, 5:45])
    np.testing.assert_array_equal(uploads.cropped(pixels, Box(0.0, 0.0, 1.0, 1.0)), pixels)
    for box in (Box(0.5, 0, 0.6, 1), Box(0, 0.5, 1, 0.55)):
        with pytest.raises(Refusal, match="at least 8 pixels"):
            uploads.cropped(pixels, box)

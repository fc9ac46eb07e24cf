"""JPEG bytes onto canvases."""

import cv2
import numpy as np
import pytest
from PIL import Image

from personmae.data.decode import BadImage, decode_onto


def jpeg_of(image: np.ndarray, quality: int = 95) -> bytes:
    """``image`` is RGB, or grey."""
    bgr = image[..., ::-1] if image.ndim == 3 else image
    return cv2.imencode(".jpg", np.ascontiguousarray(bgr), (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()


def smooth(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def canvas_of(height: int, width: int) -> np.ndarray:
    return np.full((height, 3, width), 77, np.uint8)


def pixels(canvas: np.ndarray) -> np.ndarray:
    """(H, W, 3) of a canvas."""
    return canvas.transpose(0, 2, 1)


def test_channels_are_red_green_blue():
    image = np.zeros((32, 16, 3), np.uint8)
    image[...] = (200, 100, 20)
    canvas = canvas_of(32, 16)
    decode_onto(jpeg_of(image), canvas)
    assert np.abs(canvas.mean(axis=(0, 2)) - (200, 100, 20)).max() < 3


@pytest.mark.parametrize("size", [(40, 20), (160, 90), (320, 160), (400, 120), (100, 300), (1, 1)])
def test_the_picture_fills_the_canvas_and_its_own_height_and_width_are_returned(size):
    image, canvas = smooth(*size), canvas_of(160, 80)
    assert decode_onto(jpeg_of(image), canvas) == size
    expected = np.asarray(Image.fromarray(image).resize((80, 160), Image.Resampling.BICUBIC), np.float64)
    assert np.abs(pixels(canvas) - expected).mean() < 6


def test_a_picture_of_the_canvas_size_is_copied_as_pil_decodes_it():
    jpeg, canvas = jpeg_of(smooth(96, 48)), canvas_of(96, 48)
    decode_onto(jpeg, canvas)
    import io

    assert np.abs(pixels(canvas) - np.asarray(Image.open(io.BytesIO(jpeg)), np.float64)).max() <= 3


def test_shrinking_averages_instead_of_picking_pixels():
    fine = np.zeros((320, 160, 3), np.uint8)
    fine[::4] = 255
    canvas = canvas_of(80, 40)
    decode_onto(jpeg_of(fine, 100), canvas)
    assert np.abs(canvas.astype(float) - 255 / 4).max() < 12


def test_a_row_of_a_batch_is_written_and_its_neighbours_are_not():
    batch = np.full((3, 64, 3, 32), 77, np.uint8)
    decode_onto(memoryview(jpeg_of(smooth(50, 30))), batch[1])
    assert (batch[0] == 77).all()
    assert (batch[2] == 77).all()
    assert batch[1].std() > 10


def test_a_grey_jpeg_becomes_three_equal_channels():
    canvas = canvas_of(64, 32)
    decode_onto(jpeg_of(smooth(64, 32)[..., 0]), canvas)
    assert (canvas == canvas[:, :1]).all()


def test_the_orientation_tag_is_ignored_as_recorded_sizes_ignore_it():
    import io

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    Image.fromarray(smooth(60, 30)).save(file, "JPEG", exif=exif)
    assert decode_onto(file.getvalue(), canvas_of(64, 32)) == (60, 30)


@pytest.mark.parametrize("jpeg", [b"", b"\xff\xd8\xff", b"not a picture at all", bytes(1000)])
def test_bytes_that_are_no_picture_are_a_bad_image(jpeg):
    with pytest.raises(BadImage):
        decode_onto(jpeg, canvas_of(8, 8))

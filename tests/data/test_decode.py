"""JPEG bytes onto canvases, and what the regions cut from them have to do with the full image."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from closeness import largest
from PIL import Image

from personmae.data.decode import BadImage, decode_onto, fitted_size
from personmae.data.order import sample_keys
from personmae.model.regions import draw_regions, pixel_boxes, resize_canvas


def jpeg_of(image: np.ndarray, quality: int = 95) -> bytes:
    """``image`` is RGB, or grey."""
    bgr = image[..., ::-1] if image.ndim == 3 else image
    return cv2.imencode(".jpg", np.ascontiguousarray(bgr), (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()


def smooth(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def canvas_of(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 77, np.uint8)


def pil_pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.float64)


def test_channels_are_red_green_blue():
    image = np.zeros((32, 16, 3), np.uint8)
    image[...] = (200, 100, 20)
    canvas = canvas_of(32, 16)
    decode_onto(jpeg_of(image), canvas)
    assert np.abs(canvas.mean(axis=(0, 1)) - (200, 100, 20)).max() < 3


@pytest.mark.parametrize("size", [(40, 20), (160, 80), (1, 1), (97, 80), (160, 3)])
def test_an_image_that_fits_stands_in_the_upper_left_corner_as_pil_decodes_it(size):
    jpeg, canvas = jpeg_of(smooth(*size)), canvas_of(160, 80)
    assert decode_onto(jpeg, canvas) == (size, size)
    assert np.abs(canvas[: size[0], : size[1]] - pil_pixels(jpeg)).max() <= 2
    assert (canvas[size[0] :] == 77).all()
    assert (canvas[:, size[1] :] == 77).all()


@pytest.mark.parametrize("size", [(161, 80), (320, 160), (400, 120), (100, 300), (1100, 500), (640, 640)])
def test_a_larger_image_is_shrunk_by_eighths_until_it_fits(size):
    image, canvas = smooth(*size), canvas_of(160, 80)
    placed = decode_onto(jpeg_of(image), canvas)
    assert placed.native_size == size
    height, width = placed.size
    eighths = next(n for n in range(8, 0, -1) if -(-size[0] * n // 8) <= 160 and -(-size[1] * n // 8) <= 80)
    assert (height, width) == (-(-size[0] * eighths // 8), -(-size[1] * eighths // 8))
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float64)
    assert np.abs(canvas[:height, :width] - expected).mean() < 3
    assert (canvas[height:] == 77).all()
    assert (canvas[:, width:] == 77).all()


def test_an_image_of_more_than_eight_canvases_is_made_to_fit():
    image, canvas = smooth(1500, 100), canvas_of(160, 80)
    assert decode_onto(jpeg_of(image), canvas).size == (160, 13)
    assert decode_onto(jpeg_of(image.transpose(1, 0, 2)), canvas).size == (13, 80)


def test_the_size_that_is_asked_for_is_the_size_that_the_decoder_gives():
    jpegs = {size: jpeg_of(smooth(*size)) for size in ((401, 200), (500, 199), (399, 201), (800, 401), (333, 777))}
    for size, jpeg in jpegs.items():
        height, width = fitted_size(size, (400, 200))
        assert simplejpeg.decode_jpeg(jpeg, "RGB", min_height=height, min_width=width).shape[:2] == (height, width)


def test_shrinking_averages_instead_of_picking_pixels():
    fine = np.zeros((320, 160, 3), np.uint8)
    fine[::4] = 255
    canvas = canvas_of(80, 40)
    decode_onto(jpeg_of(fine, 100), canvas)
    assert np.abs(canvas.astype(float) - 255 / 4).max() < 12


def test_a_row_of_a_batch_is_written_and_its_neighbours_are_not():
    batch = np.full((3, 64, 32, 3), 77, np.uint8)
    decode_onto(memoryview(jpeg_of(smooth(50, 30))), batch[1])
    assert (batch[0] == 77).all()
    assert (batch[2] == 77).all()
    assert batch[1].std() > 10


def test_a_grey_jpeg_becomes_three_equal_channels():
    canvas = canvas_of(64, 32)
    decode_onto(jpeg_of(smooth(64, 32)[..., 0]), canvas)
    assert (canvas == canvas[..., :1]).all()
    assert canvas.std() > 10


@pytest.mark.parametrize("jpeg", [b"", b"\xff\xd8\xff", b"not an image at all", bytes(1000), jpeg_of(smooth(99, 50))[:-300]])
def test_bytes_that_are_no_whole_image_are_a_bad_image(jpeg):
    with pytest.raises(BadImage):
        decode_onto(jpeg, canvas_of(160, 80))


# --- the canvas path against the faithful one: the crop cut from the fully decoded image, resized by PIL ---

IMG_SIZE, MAX_SHIFT, CANVAS = (256, 128), 64, (480, 240)


def textured(height: int, width: int, seed: int) -> np.ndarray:
    """An image with detail at every scale: twice the frequency has half the amplitude, as in photographs."""
    rng, image = np.random.default_rng(seed), np.zeros((height, width, 3))
    for octave in range(2, 9):
        side = 2**octave
        noise = rng.normal(0, 160 / side, (side, side, 3))
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def differences(native: tuple[int, int], count: int = 8) -> list[float]:
    """Mean absolute difference of both paths, in grey levels, for ``count`` draws."""
    jpegs = [jpeg_of(textured(*native, seed)) for seed in range(count)]
    canvas = np.zeros((count, *CANVAS, 3), np.uint8)
    size = torch.tensor([decode_onto(jpeg, row).size for jpeg, row in zip(jpegs, canvas, strict=True)])
    keys = torch.from_numpy(sample_keys(np.arange(count), seed=0, epoch=0))
    drawn = draw_regions(
        keys,
        torch.tensor([native] * count),
        max_shift=MAX_SHIFT,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.375, 0.667),
        flip_prob=0.5,
    )
    ours = resize_canvas(torch.from_numpy(canvas), size, drawn, img_size=IMG_SIZE, max_shift=MAX_SHIFT)
    found = []
    for i, jpeg in enumerate(jpegs):
        shrunk = np.array(native) / size[i].numpy()
        y0, x0, y1, x1 = (pixel_boxes(drawn.boxes, size)[i].numpy() * [*shrunk, *shrunk]).tolist()
        p = int(drawn.scale[i])
        image = Image.open(io.BytesIO(jpeg)).resize((128 + p // 2, 256 + p), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
        expected = np.asarray(image, np.float64)
        expected = expected[:, ::-1] if drawn.flip[i] else expected
        mine = ours[i].permute(1, 2, 0).double().numpy()[: 256 + p, : 128 + p // 2]
        found.append(float(np.abs(mine - expected).mean()))
    return found


@pytest.mark.parametrize("native", [(150, 60), (256, 128), (399, 150), (480, 240), (180, 239)])
def test_an_image_that_fits_its_canvas_gives_the_pixels_of_the_faithful_path(native):
    assert largest(differences(native)) < 0.5  # grey levels of 255: PIL rounds between its two passes


@pytest.mark.parametrize("native", [(481, 190), (500, 230), (640, 300), (720, 360), (1200, 500), (400, 290)])
def test_an_image_that_the_decoder_shrinks_agrees_to_one_and_a_half_grey_levels(native):
    assert largest(differences(native)) < 1.5

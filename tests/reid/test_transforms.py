"""Reading and augmenting images; every batched operation against a loop."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from personmae.errors import RankError
from personmae.reid.transforms import (
    ERASE_AREA,
    Augmentation,
    ImageSet,
    augment,
    draw_augmentation,
    erase,
    erase_boxes,
    flip,
    load_ahead,
    load_images,
    normalise,
    read_image,
    shift,
)

SIZE = (32, 16)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=generator(99))


def drawn_for(batch_size: int, *, step: int = 0, **options) -> Augmentation:
    return draw_augmentation(batch_size, SIZE, seed=0, step=step, **options)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        cv2.imwrite(path, rng.integers(0, 256, (40 + i, 20, 3), dtype=np.uint8))
    return paths


def test_images_are_rgb_and_channels_first(tmp_path):
    bgr = np.zeros((*SIZE, 3), dtype=np.uint8)
    bgr[:8] = (1, 2, 3)
    cv2.imwrite(str(tmp_path / "x.png"), bgr)
    image = read_image(str(tmp_path / "x.png"), SIZE)
    assert image.shape == (3, *SIZE)
    assert image[:, 0, 0].tolist() == [3, 2, 1]
    assert image[:, 31, 0].tolist() == [0, 0, 0]


def test_images_are_resized_to_height_and_width(paths, pool):
    images = load_images(paths, SIZE, pool)
    assert images.dtype == torch.uint8
    original = cv2.imread(paths[3])
    assert original is not None
    expected = cv2.resize(original, (SIZE[1], SIZE[0]), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(images[3].permute(1, 2, 0).numpy(), expected[:, :, ::-1])


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_an_unreadable_file_is_named(paths, tmp_path, pool, content):
    bad = tmp_path / "bad.jpg"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(RankError, match=r"bad\.jpg"):
        load_images([*paths, str(bad)], SIZE, pool)


def thumbnail(jpeg: bytes) -> bytes:
    """The JPEG with another whole JPEG in its metadata, as cameras write them."""
    small = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    segment = b"Exif\0\0" + small
    return jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:]


@pytest.mark.parametrize("end", [0.5, 0.9, -2])
@pytest.mark.parametrize("kind", [".jpg", "progressive", "thumbnail", ".png"])
def test_an_image_that_is_cut_short_is_named_and_the_whole_one_is_read(tmp_path, kind, end):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1] if kind == "progressive" else []
    data = cv2.imencode(kind if kind.startswith(".") else ".jpg", pixels, options)[1].tobytes()
    data = thumbnail(data) if kind == "thumbnail" else data
    bad, good = tmp_path / "bad.jpg", tmp_path / "good.jpg"
    good.write_bytes(data + b"trailing")
    assert read_image(str(good), SIZE).shape == (3, *SIZE)
    bad.write_bytes(data[: int(end * len(data)) if end > 0 else -14])
    with pytest.raises(RankError, match=r"bad\.jpg is not a whole image: it ends early"):
        read_image(str(bad), SIZE)


def test_a_header_beyond_all_bounds_is_named(tmp_path):
    data = bytearray(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    data[16:24] = (0xF0000).to_bytes(4, "big") * 2  # width and height
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(RankError, match=r"bad\.png is not a whole image: "):
        read_image(str(tmp_path / "bad.png"), SIZE)


def test_reading_ahead_keeps_the_order_and_is_one_batch_ahead(paths, pool):
    images = ImageSet(paths, SIZE, pool=pool)
    batches = [np.array(indices) for indices in ([4, 0], [1, 1], [3, 2])]
    asked = []
    ahead = load_ahead(images, (asked.append(i) or batch for i, batch in enumerate(batches)))
    got = []
    for number, batch in enumerate(ahead):
        assert asked == list(range(min(number + 2, 3)))
        got.append(batch)
    assert all(torch.equal(one, images.load(batch)) for one, batch in zip(got, batches, strict=True))


def test_reading_ahead_tells_of_a_bad_file_in_its_own_batch(paths, pool, tmp_path):
    images = ImageSet([*paths, str(tmp_path / "bad.jpg")], SIZE, pool=pool, cache_bytes=0)
    ahead = load_ahead(images, [np.array([0]), np.array([5])])
    assert len(next(ahead)) == 1
    with pytest.raises(RankError, match=r"bad\.jpg"):
        next(ahead)


def test_a_cached_set_gives_the_images_of_an_uncached_one_and_reads_none_again(paths, pool):
    cached = ImageSet(paths, SIZE, pool=pool)
    direct = ImageSet(paths, SIZE, pool=pool, cache_bytes=5 * 3 * 32 * 16 - 1)
    assert len(cached) == len(direct) == 5
    indices = np.array([4, 0, 4])
    wanted = direct.load(indices)
    assert torch.equal(cached.load(indices), wanted)
    for path in paths:
        os.remove(path)
    assert torch.equal(cached.load(indices), wanted)
    with pytest.raises(RankError, match=r"cannot read .*\.png"):
        direct.load(indices)


def test_loaded_images_are_not_the_cache_itself(paths, pool):
    images = ImageSet(paths, SIZE, pool=pool)
    before = images.load([0]).clone()
    images.load([0]).zero_()
    assert torch.equal(images.load([0]), before)


def test_normalising_is_per_channel_on_the_unit_scale():
    images = random_images()
    expected = (images.numpy() / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert np.allclose(normalise(images, MEAN, STD).numpy(), expected, atol=1e-5)


def test_flipping_mirrors_the_chosen_images_and_about_half_are_chosen():
    images = random_images(400)
    flipped = drawn_for(400).flipped
    assert 160 < int(flipped.sum()) < 240
    for out, image, mirrored in zip(flip(images, flipped), images, flipped, strict=True):
        assert torch.equal(out, image.flip(-1) if mirrored else image)


def test_shifting_equals_padding_and_cropping_one_by_one():
    images, pad = random_images(40), 3
    offsets = drawn_for(len(images), pad=pad).offsets
    for image, out, (y, x) in zip(images, shift(images, offsets, pad=pad), offsets.tolist(), strict=True):
        canvas = np.zeros((3, SIZE[0] + 2 * pad, SIZE[1] + 2 * pad), dtype=np.uint8)
        canvas[:, pad:-pad, pad:-pad] = image.numpy()
        assert np.array_equal(out.numpy(), canvas[:, y : y + SIZE[0], x : x + SIZE[1]])
    assert len(set(offsets.flatten().tolist())) == 2 * pad + 1  # both ends occur


def test_without_padding_nothing_shifts():
    images = random_images()
    assert torch.equal(shift(images, drawn_for(len(images), pad=0).offsets, pad=0), images)


def test_erased_boxes_lie_inside_and_have_the_asked_area():
    height, width = 256, 128
    boxes = erase_boxes(2000, (height, width), generator(), prob=1.0)
    y0, x0, y1, x1 = boxes.unbind(1)
    assert (y0 >= 0).all()
    assert (x0 >= 0).all()
    assert (y1 <= height).all()
    assert (x1 <= width).all()
    assert ((y1 == height).any(), (y0 == 0).any(), (x1 == width).any(), (x0 == 0).any()) == (True,) * 4
    area = (y1 - y0) * (x1 - x0) / (height * width)
    assert area.min() > ERASE_AREA[0] - 0.005
    assert area.max() < ERASE_AREA[1] + 0.005


def test_the_share_of_erased_images_is_the_probability():
    empty = erase_boxes(2000, SIZE, generator(), prob=0.25)
    erased = (empty[:, 2] > empty[:, 0]).float().mean()
    assert abs(erased - 0.25) < 0.05
    assert torch.equal(erase_boxes(50, SIZE, generator(), prob=0.0)[:, :2], erase_boxes(50, SIZE, generator(), prob=0.0)[:, 2:])


def test_erasing_replaces_the_box_and_nothing_else():
    images = normalise(random_images(), MEAN, STD)
    drawn = drawn_for(len(images))
    erased = erase(images.clone(), drawn.boxes, drawn.noise_seeds)
    assert 0 < sum(y1 > y0 for y0, _, y1, _ in drawn.boxes.tolist()) < len(images)
    for image, out, (y0, x0, y1, x1) in zip(images, erased, drawn.boxes.tolist(), strict=True):
        restored = out.clone()
        assert (restored[:, y0:y1, x0:x1] != image[:, y0:y1, x0:x1]).all()
        restored[:, y0:y1, x0:x1] = image[:, y0:y1, x0:x1]
        assert torch.equal(restored, image)


def test_erased_pixels_are_standard_normal():
    images = torch.full((200, 3, *SIZE), 50.0)
    drawn = drawn_for(200, erase_prob=1.0)
    noise = erase(images, drawn.boxes, drawn.noise_seeds)
    noise = noise[noise != 50.0]
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_augmentation_is_a_function_of_the_step():
    images = random_images()

    def run(step: int) -> torch.Tensor:
        return augment(images, drawn_for(len(images), step=step, pad=2), mean=MEAN, std=STD, pad=2)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_part_of_a_batch_is_augmented_as_in_the_whole():
    images = random_images()
    drawn = drawn_for(len(images), pad=2)
    whole = augment(images, drawn, mean=MEAN, std=STD, pad=2)
    for rows in (slice(0, 5), slice(5, 12)):
        assert torch.equal(augment(images[rows], drawn.part(rows), mean=MEAN, std=STD, pad=2), whole[rows])


def test_augmentation_with_all_chances_zero_is_the_test_transform():
    images = random_images()
    drawn = drawn_for(len(images), pad=0, flip_prob=0.0, erase_prob=0.0)
    assert torch.equal(augment(images, drawn, mean=MEAN, std=STD, pad=0), normalise(images, MEAN, STD))

"""Eq. (1), (2) and (4), and what is random about an image."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_allclose
from paper_numpy import eq1_resize, eq2_slice, eq4_coords, tokens_of, whole_pixels
from PIL import Image
from torch import Tensor

from personmae.data.order import sample_keys
from personmae.model import regions
from personmae.model.regions import (
    RegionDraws,
    cut_regions,
    draw_boxes,
    draw_regions,
    pixel_boxes,
    region_b_coords,
    resize_canvas,
    resize_images,
    resize_matrix,
    uniforms,
)
from personmae.model.vit import grid_coords, patchify

PAPER: dict[str, Any] = {"crop_scale": (0.8, 1.0), "crop_ratio": (0.375, 0.667)}


def keys_of(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(sample_keys(np.arange(count, dtype=np.int64), seed=seed, epoch=0))


def sizes(count: int, height: int = 200, width: int = 100) -> Tensor:
    return torch.tensor([[height, width]]).expand(count, -1)


def draws(boxes: list, flip: list[bool], scale: list[int], shift: list[tuple[int, int]] | None = None) -> RegionDraws:
    shift = shift or [(0, 0)] * len(boxes)
    return RegionDraws(torch.tensor(boxes), torch.tensor(flip), torch.tensor(scale), torch.tensor(shift))


def whole(canvas: Tensor) -> Tensor:
    """Sizes of images that fill their canvases."""
    return torch.tensor([canvas.shape[1:3]] * len(canvas))


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


# --- uniform numbers ---


@pytest.mark.parametrize("keys", [torch.arange(20_000), torch.arange(20_000) << 32, keys_of(20_000)])
def test_uniforms_are_uniform_in_every_column(keys):
    u = uniforms(keys, 0, 8).double()
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert (u.mean(0) - 1 / 2).abs().max() < 5 * (1 / 12 / 20_000) ** 0.5
    assert (u.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / 20_000) ** 0.5
    for column in u.T:
        counts = torch.histc(column, 50, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * (2 * 49) ** 0.5  # chi square with 49 degrees of freedom


@pytest.mark.parametrize("keys", [torch.arange(20_000), torch.arange(20_000) << 32, keys_of(20_000)])
def test_uniforms_of_counters_streams_and_neighbouring_keys_are_uncorrelated(keys):
    columns = torch.cat([uniforms(keys, stream, 4) for stream in range(4)], dim=1).double()
    columns = torch.cat([columns, columns.roll(1, dims=0)], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(32)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_streams_never_share_numbers_and_longer_requests_begin_alike():
    u = torch.cat([uniforms(keys_of(50), stream, 200) for stream in range(4)], dim=1)
    assert len(u.unique()) > 0.99 * u.numel()
    assert torch.equal(uniforms(keys_of(5), 2, 7), uniforms(keys_of(5), 2, 200)[:, :7])


def test_uniforms_equal_a_hash_written_with_python_integers():
    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    keys = keys_of(20)
    for key, row in zip(keys.tolist(), uniforms(keys, 3, 6).tolist(), strict=True):
        for i, value in enumerate(row):
            counter = (3 * 2**16 + 1 + i) * 0x9E3779B9 % 2**32
            x = lowbias32(lowbias32(key % 2**32 ^ counter) ^ key % 2**64 >> 32)
            assert value == (x >> 8) / 2**24


# --- draws ---


def test_draws_depend_on_the_key_and_not_on_the_batch():
    keys, native = keys_of(64), torch.stack([torch.arange(64) * 3 + 60, torch.arange(64) + 40], dim=1)
    options = PAPER | {"max_shift": 64, "flip_prob": 0.5}
    together = draw_regions(keys, native, **options)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = draw_regions(keys[order], native[order], **options)
    alone = [draw_regions(keys[i : i + 1], native[i : i + 1], **options) for i in range(64)]
    for field in range(4):
        assert torch.equal(shuffled[field], together[field][order])
        assert torch.equal(torch.cat([sample[field] for sample in alone]), together[field])


@pytest.mark.parametrize("max_shift", [0, 1, 32, 64, 96])
def test_p_and_the_shifts_cover_their_ranges_evenly(max_shift):
    count = 40_000
    drawn = draw_regions(keys_of(count), sizes(count), max_shift=max_shift, flip_prob=0.25, **PAPER)
    p, (s_h, s_w) = drawn.scale, drawn.shift.unbind(dim=1)
    assert set(p.tolist()) == set(range(max_shift + 1))
    assert ((s_h >= 0) & (s_h <= p) & (s_w >= 0) & (s_w <= p // 2)).all()
    assert (s_h == p).any()
    assert (s_w == p // 2).any()
    expected = count / (max_shift + 1)
    assert (torch.bincount(p) - expected).abs().max() < 5 * expected**0.5
    assert s_h.float().mean().item() == pytest.approx(max_shift / 4, rel=0.03)
    assert s_w.float().mean().item() == pytest.approx(sum(q // 2 for q in range(max_shift + 1)) / (max_shift + 1) / 2, rel=0.03)
    assert drawn.flip.float().mean().item() == pytest.approx(0.25, abs=0.01)
    large = p >= 0.75 * max_shift
    assert set(s_h[large].tolist()) >= set(range(int(0.75 * max_shift)))
    assert set(s_w[large].tolist()) >= set(range(int(0.75 * max_shift) // 2))


def test_shifts_crop_and_flip_are_drawn_independently():
    drawn = draw_regions(keys_of(20_000), sizes(20_000), max_shift=64, flip_prob=0.5, **PAPER)
    p, (s_h, s_w) = drawn.scale.double(), drawn.shift.double().unbind(dim=1)
    height = drawn.boxes[:, 2] - drawn.boxes[:, 0]
    columns = torch.stack([p, s_h / (p + 1), s_w / (p // 2 + 1), drawn.flip.double(), height.double()])
    correlation = torch.corrcoef(columns[:, p > 20]) - torch.eye(5)
    assert correlation.abs().max() < 0.03


def test_a_flip_probability_of_zero_or_one_decides():
    for probability in (0.0, 1.0):
        drawn = draw_regions(keys_of(500), sizes(500), max_shift=64, flip_prob=probability, **PAPER)
        assert (drawn.flip == bool(probability)).all()


@pytest.mark.parametrize("native", [(200, 100), (96, 60), (384, 160)])
def test_crop_boxes_lie_inside_and_have_the_area_and_aspect_asked_for_in_the_images_own_pixels(native):
    boxes = draw_boxes(keys_of(5000), sizes(5000, *native), **PAPER)
    height, width = (boxes[:, 2] - boxes[:, 0]) * native[0], (boxes[:, 3] - boxes[:, 1]) * native[1]
    area, aspect = height * width / (native[0] * native[1]), width / height
    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-6
    assert ((area >= 0.8 - 1e-5) & (area <= 1 + 1e-5)).all()
    assert ((aspect >= 0.375 - 1e-5) & (aspect <= 0.667 + 1e-5)).all()
    assert area.std() > 0.02
    assert aspect.std() > 0.02


def test_crops_are_placed_evenly_where_there_is_room():
    boxes = draw_boxes(keys_of(10_000), sizes(10_000), crop_scale=(0.2, 0.4), crop_ratio=(0.5, 0.5)).double()
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        place = low / (1 - (high - low))
        assert place.mean().item() == pytest.approx(0.5, abs=0.01)
        assert place.var().item() == pytest.approx(1 / 12, abs=0.005)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert area.mean().item() == pytest.approx(0.3, abs=0.003)
    assert area.var().item() == pytest.approx(0.2**2 / 12, rel=0.05)


@pytest.mark.parametrize(("native", "wanted"), [((100, 300), 0.667), ((900, 100), 0.375)])
def test_an_image_that_no_crop_fits_is_cropped_in_its_middle_to_the_nearest_aspect(native, wanted):
    boxes = draw_boxes(keys_of(20), sizes(20, *native), **PAPER)
    height, width = (boxes[:, 2] - boxes[:, 0]) * native[0], (boxes[:, 3] - boxes[:, 1]) * native[1]
    assert (width / height).tolist() == pytest.approx([wanted] * 20, rel=1e-4)
    assert torch.allclose(boxes[:, 0] + boxes[:, 2], torch.ones(20))
    assert torch.allclose(boxes[:, 1] + boxes[:, 3], torch.ones(20))
    assert max(height[0] / native[0], width[0] / native[1]).item() == pytest.approx(1.0)


# --- Eq. (1): resizing ---


def test_eq1_equals_a_float64_crop_resize_and_flip_for_each_sample():
    canvas, size = noise(6, 80, 40), (64, 32)
    boxes = [[0.0, 0.0, 1.0, 1.0], [0.113, 0.051, 0.947, 0.861], [0.31, 0.21, 0.63, 0.52]]
    boxes += [[0.11, 0.12, 0.91, 0.93], [0.0, 0.41, 0.21, 0.56], [0.01, 0.0, 0.99, 0.98]]
    drawn = draws(boxes, [False, True, False, True, True, False], [16, 7, 0, 16, 3, 1])
    own = torch.tensor([[80, 40], [80, 40], [61, 33], [50, 40], [80, 21], [77, 39]])
    ours = resize_canvas(canvas, own, drawn, img_size=size, max_shift=16)
    assert ours.shape == (6, 3, 80, 40)
    for i, box in enumerate(drawn.boxes.numpy()):
        height, width = own[i].tolist()
        pixels, p = whole_pixels(box, height, width), int(drawn.scale[i])
        expected = eq1_resize(canvas[i, :height, :width].double().numpy(), pixels, bool(drawn.flip[i]), p, size)
        assert expected.shape == (64 + p, 32 + p // 2, 3)
        mine = ours[i].permute(1, 2, 0).double().numpy()[: 64 + p, : 32 + p // 2]
        assert_allclose(mine, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 256, 128), (10, 4, 240, 120), (30, 60, 90, 100)])
def test_eq1_equals_pils_bicubic_resize_of_the_cropped_image(box, flip):
    coarse = noise(1, 32, 16)[0].numpy()
    image = Image.fromarray(coarse).resize((128, 256), Image.Resampling.BICUBIC)
    y0, x0, y1, x1 = box
    cropped = image.crop((x0, y0, x1, y1)).resize((128 // 2 + 8, 256 // 2 + 16), Image.Resampling.BICUBIC)
    expected = np.asarray(cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cropped, np.float64)
    drawn = draws([[y0 / 256, x0 / 128, y1 / 256, x1 / 128]], [flip], [16])
    canvas = torch.from_numpy(np.array(image))[None]
    ours = resize_canvas(canvas, whole(canvas), drawn, img_size=(128, 64), max_shift=16)[0].permute(1, 2, 0).double().numpy()
    assert np.abs(ours - expected).max() < 1.5


def test_crops_are_whole_pixels_of_the_image_and_at_least_one():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0000001], [0.1, 0.26, 0.34, 0.9], [0.999, 0.5, 1.0, 0.501], [0.2, 0.2, 0.2, 0.2]])
    size = torch.tensor([[80, 40], [10, 10], [61, 33], [7, 3]])
    expected = [[0, 0, 80, 40], [1, 3, 3, 9], [60, 17, 61, 18], [1, 1, 2, 2]]
    assert pixel_boxes(boxes, size).tolist() == expected
    assert [list(whole_pixels(b.numpy(), *s.tolist())) for b, s in zip(boxes, size, strict=True)] == expected


@pytest.mark.parametrize("count", [1, 40])
def test_image_by_image_and_by_matrices_they_are_resized_to_the_same_grey_levels(count):
    canvas = noise(count, 80, 40) // 2 + 64  # overshoots stay in range: image by image they are clipped after each pass
    own = torch.tensor([[80, 40], [61, 33], [7, 40], [80, 5], [77, 39]]).repeat(8, 1)[:count]
    drawn = draw_regions(keys_of(count), own, max_shift=16, flip_prob=0.5, crop_scale=(0.1, 1.0), crop_ratio=(0.2, 0.8))
    ours = resize_images(canvas, own, drawn, img_size=(64, 32), max_shift=16)
    plain = resize_canvas(canvas, own, drawn, img_size=(64, 32), max_shift=16)
    for i, p in enumerate(drawn.scale.tolist()):
        far = (ours[i, :, : 64 + p, : 32 + p // 2] - plain[i, :, : 64 + p, : 32 + p // 2]).abs()
        assert far.max() < 1.6  # each of two passes rounds by a half, and bicubic weights amplify the first
        assert far.mean() < 0.4


def test_an_unchanged_size_is_the_identity():
    canvas = noise(1, 64, 32)
    drawn = draws([[0.0, 0.0, 1.0, 1.0]], [False], [0])
    ours = resize_canvas(canvas, whole(canvas), drawn, img_size=(64, 32), max_shift=0)
    torch.testing.assert_close(ours[0].permute(1, 2, 0), canvas[0].float(), rtol=0, atol=1e-3)


def test_a_flip_mirrors_the_unflipped_result():
    canvas = noise(1, 64, 32).expand(2, -1, -1, -1)
    drawn = draws([[0.1, 0.2, 0.8, 0.7]] * 2, [False, True], [8, 8])
    plain, mirrored = resize_canvas(canvas, whole(canvas), drawn, img_size=(64, 32), max_shift=8)
    torch.testing.assert_close(mirrored, plain.flip(2), rtol=0, atol=1e-3)


def test_rows_of_a_resize_matrix_sum_to_one_up_to_the_size_and_ignore_pixels_outside_the_crop():
    start, stop, size = torch.tensor([3.0, 0.0, 9.7]), torch.tensor([45.0, 48.0, 20.2]), torch.tensor([20, 32, 32])
    mirrored, own = torch.tensor([False, False, True]), torch.tensor([48, 48, 30])
    matrix = resize_matrix(start, stop, size, mirrored, in_size=own, in_length=60, out_length=32, min_out_size=20)
    for i, rows in enumerate(matrix):
        torch.testing.assert_close(rows[: size[i]].sum(1), torch.ones(int(size[i])))
        rows = torch.cat([rows[:, : own[i]].flip(1), rows[:, own[i] :]], dim=1) if mirrored[i] else rows
        outside = [j for j in range(60) if j + 1 <= start[i] or j >= stop[i]]
        assert (rows[:, outside] == 0).all()


def test_what_lies_beside_the_image_on_its_canvas_is_never_seen():
    canvas, own = noise(8, 80, 40), torch.tensor([[61, 33]] * 8)
    drawn = draw_regions(keys_of(8), own, max_shift=16, flip_prob=0.5, **PAPER)
    first = resize_canvas(canvas, own, drawn, img_size=(64, 32), max_shift=16)
    canvas[:, 61:], canvas[:, :, 33:] = 0, 255
    assert torch.equal(first, resize_canvas(canvas, own, drawn, img_size=(64, 32), max_shift=16))


def test_pixels_stay_in_the_range_of_the_image():
    canvas = noise(4, 64, 32) // 128 * 255  # black and white: bicubic overshoots
    drawn = draws([[0.2, 0.2, 0.5, 0.5]] * 4, [False] * 4, [16] * 4)
    image = resize_canvas(canvas, whole(canvas), drawn, img_size=(64, 32), max_shift=16)
    assert image.min() == 0
    assert image.max() == 255


# --- Eq. (2): two regions ---


@pytest.mark.parametrize("max_shift", [0, 7, 16])
def test_eq2_cuts_region_a_at_the_origin_and_region_b_at_its_shift(max_shift):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(5, 3, 64 + max_shift, 32 + max_shift // 2, generator=generator)
    shift = torch.stack([torch.randint(0, n + 1, (5,), generator=generator) for n in (max_shift, max_shift // 2)], 1)
    shift[0], shift[1] = torch.tensor([0, 0]), torch.tensor([max_shift, max_shift // 2])
    region_a, region_b = cut_regions(image, shift, (64, 32))
    for i, (s_h, s_w) in enumerate(shift.tolist()):
        pixels = image[i].permute(1, 2, 0).double().numpy()
        for ours, expected in (
            (region_a, eq2_slice(pixels, 0, 0, (64, 32))),
            (region_b, eq2_slice(pixels, s_h, s_w, (64, 32))),
        ):
            assert np.array_equal(ours[i].permute(1, 2, 0).double().numpy(), expected)


# --- Eq. (4): coordinates ---


def test_eq4_moves_coordinates_by_exactly_a_sixteenth_of_the_shift():
    coords = grid_coords((16, 8))
    shift = torch.tensor([[0, 0], [16, 32], [1, 0], [5, 3], [64, 32]])
    ours = region_b_coords(coords, shift, 16)
    for i, (s_h, s_w) in enumerate(shift.tolist()):
        assert np.array_equal(ours[i].double().numpy(), eq4_coords((16, 8), s_h, s_w, 16))
        assert torch.equal(ours[i] - coords, torch.tensor([[s_h / 16, s_w / 16]]).expand(128, -1))


def test_a_patch_of_region_b_that_lies_on_region_as_grid_is_region_as_patch():
    image = torch.rand(1, 3, 96, 48, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[32, 16]])
    region_a, region_b = cut_regions(image, shift, (64, 32))
    patches_a, patches_b = patchify(region_a, 16)[0], patchify(region_b, 16)[0]
    coords = region_b_coords(grid_coords((4, 2)), shift, 16)[0]
    shared = [(i, int(y), int(x)) for i, (y, x) in enumerate(coords.tolist()) if y < 4 and x < 2]
    assert [(i, y, x) for i, y, x in shared] == [(0, 2, 1), (2, 3, 1)]
    for i, y, x in shared:
        assert torch.equal(patches_b[i], patches_a[y * 2 + x])


def test_regions_have_the_patches_that_numpy_slices_give():
    image = torch.rand(1, 3, 72, 36, generator=torch.Generator().manual_seed(0))
    _, region_b = cut_regions(image, torch.tensor([[5, 3]]), (64, 32))
    expected = tokens_of(eq2_slice(image[0].permute(1, 2, 0).double().numpy(), 5, 3, (64, 32)), 16)
    assert np.array_equal(patchify(region_b, 16)[0].double().numpy(), expected)


def test_every_stream_of_numbers_has_its_own_name():
    names = [regions.CROP_STREAM, regions.SHIFT_STREAM, regions.BLOCK_STREAM, regions.FILL_STREAM]
    assert len(set(names)) == 4
    assert math.log2(4 * 2**16) < 32  # stream and counter fit the 32 bits that are hashed

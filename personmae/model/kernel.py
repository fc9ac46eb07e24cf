"""From bytes to tokens on a GPU: a kernel that does the work of ``inputs.cut_batch`` in one pass, without an image between.

One program makes one patch of one sample: of RegionA where it is visible, of RegionB always. It reads the pixels under the
patch from the canvas and resizes them by two small matrix products, whose weights it computes itself. It writes the
normalised patch, its coordinates and, for RegionB, the target of Eq. (5). Random values are drawn before (``draw_batch``).

At 256 x 128 and a batch of 1,024, images that fill their canvases are 0.35 GB to read. bf16 patches with fp32 targets are
0.66 GB to write. That takes at least 0.30 ms at 3.35 TB/s and 0.21 ms at 4.8 TB/s, by arithmetic. It was not yet run on a
GPU.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, UInt8
from torch import Tensor

from personmae.model.inputs import Batch, Draws, RegionSpec

ROWS, COLUMNS = 32, 16  # pixels of the canvas that are taken at a time
NUM_WARPS = 1  # a patch is little work: many programs hide each other's waits

# ``no_type_check`` keeps the tests' run-time checks of shapes away from what Triton compiles from its source.


def cut_batch(
    canvas: UInt8[Tensor, "B Hc Wc 3"],
    size: Int[Tensor, "B 2"],
    draws: Draws,
    spec: RegionSpec,
    *,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """``inputs.cut_batch`` on a GPU, and with it ``pixel_target`` (B, L, P), the left side of Eq. (5).

    ``dtype`` is that of the patches: the encoders round them to theirs anyway. The target stays fp32, since a patch that
    was rounded before would no longer have its mean and its deviation.
    """
    num_samples, canvas_h, canvas_w, _ = canvas.shape
    num_visible, num_patches = draws.ids_keep.shape[1], spec.grid[0] * spec.grid[1]

    def empty(length: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_samples, length, width, dtype=dtype, device=canvas.device)

    batch = {
        "patches_a": empty(num_visible, 3 * spec.patch_size**2, dtype),
        "coords_a": empty(num_visible, 2, torch.float32),
        "patches_b": empty(num_patches, 3 * spec.patch_size**2, dtype),
        "coords_b": empty(num_patches, 2, torch.float32),
        "pixel_target": empty(num_patches, 3 * spec.patch_size**2, torch.float32),
    }
    inputs = (canvas, size, *draws.regions, draws.ids_keep)
    launch: Any = _cut_patch[(num_samples * (num_visible + num_patches),)]
    launch(
        *(tensor.contiguous() for tensor in inputs),
        *batch.values(),
        *(canvas_h, canvas_w, num_visible, num_patches),
        *(255 * share for share in (*spec.mean, *spec.std)),
        img_h=spec.img_size[0],
        img_w=spec.img_size[1],
        patch_size=spec.patch_size,
        tile=max(16, triton.next_power_of_2(spec.patch_size)),  # a matrix product has at least 16 rows
        num_rows=ROWS,
        num_columns=COLUMNS,
        num_warps=NUM_WARPS,
        # Where a crop begins decides which pixels count; rounded once instead of twice, it could begin at another.
        enable_fp_fusion=False,
    )
    return batch


@triton.jit
@no_type_check
def _cut_patch(
    canvas,  # uint8 (B, Hc, Wc, 3)
    size,  # int64 (B, 2)
    boxes,  # float32 (B, 4)
    flip,  # bool (B,)
    scale,  # int64 (B,)
    shift,  # int64 (B, 2)
    ids_keep,  # int64 (B, K)
    patches_a,  # (B, K, P)
    coords_a,  # float32 (B, K, 2)
    patches_b,  # (B, L, P)
    coords_b,  # float32 (B, L, 2)
    pixel_target,  # float32 (B, L, P)
    canvas_h,
    canvas_w,
    num_visible,
    num_patches,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    img_h: tl.constexpr,
    img_w: tl.constexpr,
    patch_size: tl.constexpr,
    tile: tl.constexpr,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
):
    # The patches of a sample are neighbours, so that they find its canvas in the cache.
    number = tl.program_id(0) % (num_visible + num_patches)
    sample = (tl.program_id(0) // (num_visible + num_patches)).to(tl.int64)  # a batch may have more than 2^31 bytes
    in_a = number < num_visible
    kept = tl.load(ids_keep + sample * num_visible + number, mask=in_a, other=0).to(tl.int32)  # V_a of Eq. (3)
    patch = tl.where(in_a, kept, number - num_visible)
    patch_y, patch_x = patch // (img_w // patch_size), patch % (img_w // patch_size)
    # Eq. (2): RegionA lies at the origin.
    shift_h = tl.where(in_a, 0, tl.load(shift + 2 * sample).to(tl.int32))
    shift_w = tl.where(in_a, 0, tl.load(shift + 2 * sample + 1).to(tl.int32))

    # Eq. (1). A flip mirrors the image before anything is cut from it.
    size_h, size_w = tl.load(size + 2 * sample).to(tl.int32), tl.load(size + 2 * sample + 1).to(tl.int32)
    y0, x0 = tl.load(boxes + 4 * sample), tl.load(boxes + 4 * sample + 1)
    y1, x1 = tl.load(boxes + 4 * sample + 2), tl.load(boxes + 4 * sample + 3)
    flipped, p = tl.load(flip + sample) != 0, tl.load(scale + sample).to(tl.int32)
    # ``regions.pixel_boxes``; the small numbers are exact in fp32.
    top, left = tl.minimum(tl.floor(y0 * size_h + 0.5), size_h - 1), tl.minimum(tl.floor(x0 * size_w + 0.5), size_w - 1)
    bottom, right = tl.maximum(tl.floor(y1 * size_h + 0.5), top + 1), tl.maximum(tl.floor(x1 * size_w + 0.5), left + 1)
    left, right = tl.where(flipped, size_w - right, left), tl.where(flipped, size_w - left, right)
    canvas += sample * canvas_h * canvas_w * 3
    rows = top, bottom, img_h + p, shift_h + patch_y * patch_size, size_h
    columns = left, right, img_w + p // 2, shift_w + patch_x * patch_size, size_w
    red, green, blue = _resize(canvas, canvas_w, rows, columns, flipped, patch_size, tile, num_rows, num_columns)
    red, green, blue = (red - mean_r) * (1 / std_r), (green - mean_g) * (1 / std_g), (blue - mean_b) * (1 / std_b)

    y, x, axis = tl.arange(0, tile)[:, None], tl.arange(0, tile)[None, :], tl.arange(0, 2)
    place, wanted = y * patch_size + x, (y < patch_size) & (x < patch_size)
    coords = tl.where(axis == 0, patch_y, patch_x).to(tl.float32)
    if in_a:
        token = sample * num_visible + number
        tl.store(coords_a + 2 * token + axis, coords)
        _store(patches_a + 3 * patch_size * patch_size * token + place, red, green, blue, wanted, patch_size)
    else:
        token = sample * num_patches + patch
        coords += tl.div_rn(tl.where(axis == 0, shift_h, shift_w).to(tl.float32), patch_size * 1.0)  # Eq. (4)
        tl.store(coords_b + 2 * token + axis, coords)
        _store(patches_b + 3 * patch_size * patch_size * token + place, red, green, blue, wanted, patch_size)
        # Eq. (5), left, over all colours of the patch: ``pixel_target``.
        mean = tl.sum(tl.where(wanted, red + green + blue, 0.0)) / (3 * patch_size * patch_size)
        red, green, blue = red - mean, green - mean, blue - mean
        variance = tl.sum(tl.where(wanted, red * red + green * green + blue * blue, 0.0)) / (3 * patch_size * patch_size - 1)
        factor = tl.rsqrt(variance + 1e-6)
        target = pixel_target + 3 * patch_size * patch_size * token + place
        _store(target, red * factor, green * factor, blue * factor, wanted, patch_size)


@triton.jit
@no_type_check
def _resize(
    canvas,
    canvas_w,
    rows,
    columns,
    flipped,
    patch_size: tl.constexpr,
    tile: tl.constexpr,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
):
    """Three colours (tile, tile) in [0, 255] of the patch that begins at a given pixel of the resized crop.

    ``rows`` and ``columns`` are (start, stop, size of the result, first pixel of the patch, size of the image): the first
    four as in ``regions.resize_matrix``.
    """
    top, bottom, out_h, first_y, size_h = rows
    left, right, out_w, first_x, size_w = columns
    step_h = tl.div_rn(bottom - top, out_h.to(tl.float32))
    step_w = tl.div_rn(right - left, out_w.to(tl.float32))
    begin_y, end_y = _reach(top, step_h, first_y, size_h, patch_size)
    begin_x, end_x = _reach(left, step_w, first_x, size_w, patch_size)
    red = tl.zeros((tile, tile), tl.float32)
    green = tl.zeros((tile, tile), tl.float32)
    blue = tl.zeros((tile, tile), tl.float32)
    total = tl.zeros((tile, tile), tl.float32)
    for y0 in range(begin_y, end_y, num_rows):
        y = y0 + tl.arange(0, num_rows)
        row_high, row_low = _halves(_weights(top, bottom, step_h, first_y, size_h, y0, tile, num_rows))
        for x0 in range(begin_x, end_x, num_columns):
            x = x0 + tl.arange(0, num_columns)
            weights = _weights(left, right, step_w, first_x, size_w, x0, tile, num_columns)
            column_high, column_low = _halves(tl.trans(weights))
            exists = (y < size_h)[:, None] & (x < size_w)[None, :]
            at = canvas + 3 * (y[:, None] * canvas_w + tl.where(flipped, size_w - 1 - x, x)[None, :])
            red = _add(red, row_high, row_low, tl.load(at, mask=exists, other=0), column_high, column_low)
            green = _add(green, row_high, row_low, tl.load(at + 1, mask=exists, other=0), column_high, column_low)
            blue = _add(blue, row_high, row_low, tl.load(at + 2, mask=exists, other=0), column_high, column_low)
            # A fourth colour that is 1 everywhere: each pixel's sum of weights, which has to be one.
            total = _add(total, row_high, row_low, tl.full((num_rows, num_columns), 1, tl.uint8), column_high, column_low)
    per_total = 1 / tl.maximum(total, 1e-6)
    red, green, blue = red * per_total, green * per_total, blue * per_total
    return tl.clamp(red, 0.0, 255.0), tl.clamp(green, 0.0, 255.0), tl.clamp(blue, 0.0, 255.0)


@triton.jit
@no_type_check
def _reach(start, step, first, in_size, patch_size: tl.constexpr):
    """The pixels [begin, end) of the image that a patch has weights for."""
    support = tl.maximum(step, 1.0)
    begin = tl.ceil(start + (first + 0.5) * step - 2 * support - 0.5).to(tl.int32)
    end = tl.floor(start + (first + (patch_size - 0.5)) * step + 2 * support - 0.5).to(tl.int32) + 1
    return tl.maximum(begin, 0), tl.minimum(end, in_size)


@triton.jit
@no_type_check
def _weights(start, stop, step, first, in_size, begin, tile: tl.constexpr, length: tl.constexpr):
    """(tile, length): ``regions.resize_matrix`` from a row and a column on, before its rows are divided by their sums."""
    centre = start + (tl.arange(0, tile).to(tl.float32) + (first + 0.5)) * step
    pixel = begin + tl.arange(0, length)
    middle = pixel + 0.5
    inside = (middle > start - 0.5) & (middle < stop + 0.5) & (pixel < in_size)
    middle = tl.where(inside, middle - begin, -1e6)  # so far away that it weighs nothing
    per_support = 1 / tl.maximum(step, 1.0)
    # Keys' cubic kernel with a = -1/2, as ``regions._cubic``; its outer piece is 0 at 2.
    x = tl.minimum(tl.abs(((centre - begin) * per_support)[:, None] - (middle * per_support)[None, :]), 2.0)
    near = tl.fma(tl.fma(x, 1.5, -2.5), x * x, 1.0)
    far = tl.fma(tl.fma(tl.fma(x, -0.5, 2.5), x, -4.0), x, 2.0)
    return tl.where(x < 1, near, far)


@triton.jit
@no_type_check
def _halves(x):
    """Two fp16 numbers whose sum is ``x`` to 2^-22 of it: the tensor cores add products of fp16 in fp32."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
@no_type_check
def _add(pixels, row_high, row_low, colour, column_high, column_low):
    """Add weights (tile, num_rows) times bytes (num_rows, num_columns) times weights (num_columns, tile)."""
    colour = colour.to(tl.float16)  # exact
    high, low = _halves(tl.dot(row_high, colour, tl.dot(row_low, colour)))
    # The product of both low halves is too small to count.
    return tl.dot(high, column_high, tl.dot(high, column_low, tl.dot(low, column_high, pixels)))


@triton.jit
@no_type_check
def _store(at, red, green, blue, wanted, patch_size: tl.constexpr):
    """Write a patch as (C, y, x), rounded to the tensor's type."""
    tl.store(at, red.to(at.dtype.element_ty), mask=wanted)
    tl.store(at + patch_size * patch_size, green.to(at.dtype.element_ty), mask=wanted)
    tl.store(at + 2 * patch_size * patch_size, blue.to(at.dtype.element_ty), mask=wanted)

"""RegionA and RegionB: random draws for an image, and cropping both regions of a whole batch (Sec. III-B).

Everything random about a sample is drawn from its 64-bit key alone. So the same sample gives the same regions on any device,
in any batch and on any number of ranks.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real, UInt8
from torch import Tensor

# One stream of uniform numbers per purpose: adding draws to one never moves another.
CROP_STREAM, SHIFT_STREAM, BLOCK_STREAM, FILL_STREAM = range(4)

_CROP_TRIES = 10
_LOW_32 = (1 << 32) - 1
_GOLDEN = 0x9E3779B9  # spreads the counter over all bits
# The multipliers of the "lowbias32" hash; the second is taken modulo 2^32 to a negative one so that a product of 32 bits
# by it stays inside a signed 64-bit integer.
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


def uniforms(keys: Int[Tensor, " B"], stream: int, count: int) -> Float[Tensor, "B count"]:
    """Independent numbers in [0, 1) for each key: a 32-bit hash of (key, stream, counter), of which 24 bits are used."""
    # With "+" the compiler takes the product below for an index, of 32 bits on a GPU, which it does not fit.
    counter = torch.arange(1, count + 1, device=keys.device) | (stream << 16)
    low, high = keys[:, None] & _LOW_32, (keys[:, None] >> 32) & _LOW_32
    x = _mix(low ^ ((counter * _GOLDEN) & _LOW_32))
    return (_mix(x ^ high) >> 8).float() * 2.0**-24


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    x = ((x ^ (x >> 16)) * _MIX_1) & _LOW_32
    x = ((x ^ (x >> 15)) * _MIX_2) & _LOW_32
    return x ^ (x >> 16)


class RegionDraws(NamedTuple):
    """What Eq. (1) and (2) leave to chance, one row per sample."""

    boxes: Float[Tensor, "B 4"]  # the global crop: y0, x0, y1, x1 as shares of the image
    flip: Bool[Tensor, " B"]
    scale: Int[Tensor, " B"]  # p of Eq. (1), in pixels
    shift: Int[Tensor, "B 2"]  # (s_h, s_w) of RegionB in Eq. (2), in pixels


def draw_regions(
    keys: Int[Tensor, " B"],
    native_size: Int[Tensor, "B 2"],
    *,
    max_shift: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip_prob: float,
) -> RegionDraws:
    """Draw the global crop, the flip, p ~ U{0..m}, s_h ~ U{0..p} and s_w ~ U{0..p//2} for each sample.

    ``native_size`` is (height, width) of the images before they were put on a canvas: ``crop_ratio`` is width / height
    in the image's own pixels.
    """
    u = uniforms(keys, SHIFT_STREAM, 4)
    scale = (u[:, 0] * (max_shift + 1)).long()
    shift_h = (u[:, 1] * (scale + 1)).long()
    shift_w = (u[:, 2] * (scale // 2 + 1)).long()
    boxes = draw_boxes(keys, native_size, crop_scale=crop_scale, crop_ratio=crop_ratio)
    return RegionDraws(boxes, u[:, 3] < flip_prob, scale, torch.stack([shift_h, shift_w], dim=1))


def draw_boxes(
    keys: Int[Tensor, " B"],
    native_size: Int[Tensor, "B 2"],
    *,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
) -> Float[Tensor, "B 4"]:
    """Random resized crops as shares of the image: area uniform, log aspect uniform, the first of ten that fits.

    An image that none fits is cropped in its middle to the nearest allowed aspect, as torchvision does.
    """
    u = uniforms(keys, CROP_STREAM, 4 * _CROP_TRIES).reshape(len(keys), 4, _CROP_TRIES)
    height, width = native_size.float().unbind(dim=1)
    area = (crop_scale[0] + u[:, 0] * (crop_scale[1] - crop_scale[0])) * (height * width)[:, None]
    low, high = math.log(crop_ratio[0]), math.log(crop_ratio[1])
    ratio = (low + u[:, 1] * (high - low)).exp()
    crop_h, crop_w = (area / ratio).sqrt() / height[:, None], (area * ratio).sqrt() / width[:, None]
    fits = (crop_h <= 1) & (crop_w <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)  # argmax of equal values is the first
    crop_h, crop_w = crop_h.gather(1, first)[:, 0], crop_w.gather(1, first)[:, 0]
    y0, x0 = u[:, 2].gather(1, first)[:, 0] * (1 - crop_h), u[:, 3].gather(1, first)[:, 0] * (1 - crop_w)
    box = torch.stack([y0, x0, y0 + crop_h, x0 + crop_w], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), box, _middle_box(width / height, crop_ratio))


def _middle_box(aspect: Float[Tensor, " B"], crop_ratio: tuple[float, float]) -> Float[Tensor, "B 4"]:
    wanted = aspect.clamp(*crop_ratio)
    half_h, half_w = (aspect / wanted).clamp(max=1) / 2, (wanted / aspect).clamp(max=1) / 2
    return torch.stack([0.5 - half_h, 0.5 - half_w, 0.5 + half_h, 0.5 + half_w], dim=1)


def pixel_boxes(boxes: Float[Tensor, "B 4"], size: Int[Tensor, "B 2"]) -> Int[Tensor, "B 4"]:
    """Crops in whole pixels of images of a (height, width): each edge to the nearest, at least one, as torchvision."""
    edges = (boxes * torch.cat([size, size], dim=1) + 0.5).floor().long()
    start = torch.minimum(edges[:, :2], size - 1)
    return torch.cat([start, torch.maximum(edges[:, 2:], start + 1)], dim=1)


def resize_matrix(
    start: Float[Tensor, " B"],
    stop: Float[Tensor, " B"],
    out_size: Int[Tensor, " B"],
    mirrored: Bool[Tensor, " B"] | None = None,
    *,
    in_size: Int[Tensor, " B"],
    in_length: int,
    out_length: int,
    min_out_size: int,
) -> Float[Tensor, "B out_length in_length"]:
    """The rows of an antialiased bicubic resize of [start, stop) to ``out_size`` pixels, as a matrix.

    The input fills the first ``in_size`` of ``in_length`` pixels. Where ``mirrored``, it is read backwards. ``start`` and
    ``stop`` are in pixels of the input and need not be whole. Rows at or beyond ``out_size``, which is at least
    ``min_out_size``, continue past the crop and hold nothing of use. A pixel outside the crop has no weight, as if the
    image had been cropped first.
    """
    step = (stop - start) / out_size
    support = step.clamp(min=1.0)[:, None, None]
    centre = (start[:, None] + (torch.arange(out_length, device=start.device) + 0.5) * step[:, None])[..., None]
    # Only the pixels under the kernel are weighed; all others of the dense matrix stay zero.
    num_taps = 2 * math.ceil(2 * max(1.0, in_length / min_out_size)) + 1
    pixel = (centre - 2 * support - 0.5).ceil().long() + torch.arange(num_taps, device=start.device)
    weight = _cubic((centre - (pixel + 0.5)) / support)
    inside = (pixel + 0.5 > start[:, None, None] - 0.5) & (pixel + 0.5 < stop[:, None, None] + 0.5)
    last = in_size[:, None, None] - 1
    weight = weight * (inside & (pixel >= 0) & (pixel <= last))
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-3)
    if mirrored is not None:
        pixel = torch.where(mirrored[:, None, None], last - pixel, pixel)
    dense = torch.zeros(len(start), out_length, in_length, device=start.device)
    return dense.scatter_add_(2, pixel.clamp(0, in_length - 1), weight)


def _cubic(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Keys' cubic kernel with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize_canvas(
    canvas: UInt8[Tensor, "B Hc Wc 3"],
    size: Int[Tensor, "B 2"],
    draws: RegionDraws,
    *,
    img_size: tuple[int, int],
    max_shift: int,
) -> Float[Tensor, "B 3 Hm Wm"]:
    """Eq. (1): the global crop, flipped and resized to [H + p, W + p/2]. Values in [0, 255].

    Each image is in the upper left corner of its canvas, ``size`` (height, width) pixels large. The result has room
    for the largest p. Beyond a sample's own H + p and W + p/2 its values are undefined.
    """
    _, canvas_h, canvas_w, _ = canvas.shape
    y0, x0, y1, x1 = pixel_boxes(draws.boxes, size).unbind(dim=1)
    (height, width), shift_w = img_size, max_shift // 2
    size_h, size_w = size.unbind(dim=1)
    rows = resize_matrix(
        y0.float(),
        y1.float(),
        height + draws.scale,
        in_size=size_h,
        in_length=canvas_h,
        out_length=height + max_shift,
        min_out_size=height,
    )
    # A flip mirrors the image before anything is cut from it.
    columns = resize_matrix(
        torch.where(draws.flip, size_w - x1, x0).float(),
        torch.where(draws.flip, size_w - x0, x1).float(),
        width + draws.scale // 2,
        draws.flip,
        in_size=size_w,
        in_length=canvas_w,
        out_length=width + shift_w,
        min_out_size=width,
    )
    # Each row colour by colour: then neither product has to move its operands.
    by_colour = canvas.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)  # (B, Hc, 3, Wc)
    wide = torch.bmm(by_colour.flatten(1, 2), columns.transpose(1, 2))  # (B, Hc * 3, Wm)
    image = torch.bmm(rows, wide.unflatten(1, (canvas_h, 3)).flatten(2))  # (B, Hm, 3 * Wm)
    return image.unflatten(2, (3, width + shift_w)).transpose(1, 2).clamp_(0, 255)


def resize_images(
    canvas: UInt8[Tensor, "B Hc Wc 3"],
    size: Int[Tensor, "B 2"],
    draws: RegionDraws,
    *,
    img_size: tuple[int, int],
    max_shift: int,
) -> UInt8[Tensor, "B 3 Hm Wm"]:
    """``resize_canvas`` for a CPU, image by image: it weighs only the pixels under the kernel, and rounds both passes."""
    boxes, flips, scales = pixel_boxes(draws.boxes, size).tolist(), draws.flip.tolist(), draws.scale.tolist()
    height, width, num_threads = img_size[0] + max_shift, img_size[1] + max_shift // 2, torch.get_num_threads()
    result = torch.zeros(len(canvas), height, width, 3, dtype=torch.uint8)
    target = result.numpy()  # written by numpy: torch would start threads of its own below each of these

    def resize(first: int) -> None:
        for i in range(first, len(canvas), num_threads):
            (y0, x0, y1, x1), h, w = boxes[i], img_size[0] + scales[i], img_size[1] + scales[i] // 2
            crop = canvas[i, y0:y1, x0:x1].permute(2, 0, 1)[None]
            resized = F.interpolate(crop, (h, w), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
            target[i, :h, :w] = resized[:, ::-1] if flips[i] else resized

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(resize, range(num_threads)))
    return result.permute(0, 3, 1, 2)


def cut_regions(
    image: Real[Tensor, "B 3 Hm Wm"], shift: Int[Tensor, "B 2"], img_size: tuple[int, int]
) -> tuple[Real[Tensor, "B 3 H W"], Real[Tensor, "B 3 H W"]]:
    """Eq. (2): RegionA at the origin and RegionB at (s_h, s_w), both of size [H, W]."""
    height, width = img_size
    windows = image.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, m + 1, m//2 + 1, H, W), a view
    samples = torch.arange(len(image), device=image.device)
    return image[:, :, :height, :width], windows[samples, :, shift[:, 0], shift[:, 1]]


def region_b_coords(coords: Float[Tensor, "L 2"], shift: Int[Tensor, "B 2"], patch_size: int) -> Float[Tensor, "B L 2"]:
    """Eq. (4): coordinates of RegionB's patches with RegionA's upper left corner as the origin, in patches (y, x)."""
    return coords + shift[:, None, :].float() / patch_size

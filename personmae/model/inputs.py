"""From decoded images to the inputs of the model: random draws for each sample, and both regions (Eq. (1)-(4))."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Real, UInt8
from torch import Tensor

from personmae.model import masking, regions
from personmae.model.regions import RegionDraws
from personmae.model.vit import grid_coords, patchify, take_tokens

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """How an image becomes the two regions: sizes in pixels, shares and chances. Defaults in ``keys/pretraining.py``."""

    img_size: tuple[int, int]
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_shift: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_prob: float
    mask_kind: str
    mask_ratio: float
    min_block: int
    block_ratio: float | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) of the canvas that carries an image to the device.

        A crop of most of an image is resized to at most [H + m, W + m/2] (Eq. (1)). Half as much again leaves it enough
        pixels. Larger images are shrunk while they are decoded.
        """
        largest = self.img_size[0] + self.max_shift, self.img_size[1] + self.max_shift // 2
        return math.ceil(1.5 * largest[0]), math.ceil(1.5 * largest[1])


def normalise(patches: Real[Tensor, "B L P"], mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Tensor, "B L P"]:
    """Scale pixels of [0, 255] to the network's input range."""
    colours = patches.unflatten(2, (3, -1)).unbind(dim=2)
    # Plain numbers, colour by colour: a tensor made here would be a copy to the device, and a wait, in every step.
    scaled = [(pixels - 255 * m) / (255 * s) for pixels, m, s in zip(colours, mean, std, strict=True)]
    return torch.cat(scaled, dim=2)


class Draws(NamedTuple):
    """Everything that is random about a batch."""

    regions: RegionDraws
    ids_keep: Int[Tensor, "B K"]  # ascending indices of RegionA's visible patches


def draw_mask(keys: Int[Tensor, " B"], spec: RegionSpec) -> Bool[Tensor, "B L"]:
    """M of Eq. (3): True where a patch of RegionA is hidden."""
    if spec.mask_kind == "random":
        return masking.random_mask(keys, spec.grid, spec.mask_ratio)
    draw = {"block": masking.block_mask, "person": masking.person_mask}[spec.mask_kind]
    return draw(keys, spec.grid, spec.mask_ratio, min_block=spec.min_block, block_ratio=spec.block_ratio)


def draw_batch(keys: Int[Tensor, " B"], native_size: Int[Tensor, "B 2"], spec: RegionSpec) -> Draws:
    """Draw regions and masks from the samples' keys. ``native_size`` is (height, width) before decoding."""
    drawn = regions.draw_regions(
        keys,
        native_size,
        max_shift=spec.max_shift,
        crop_scale=spec.crop_scale,
        crop_ratio=spec.crop_ratio,
        flip_prob=spec.flip_prob,
    )
    mask = draw_mask(keys, spec)
    num_visible = mask.shape[1] - masking.num_hidden(spec.grid, spec.mask_ratio)
    return Draws(drawn, masking.ids_visible(mask, num_visible))


def cut_batch(
    canvas: UInt8[Tensor, "B Hc Wc 3"],
    size: Int[Tensor, "B 2"],
    draws: Draws,
    spec: RegionSpec,
    resize: Callable[..., Tensor] = regions.resize_canvas,
) -> Batch:
    """Eq. (1)-(4) for a whole batch: what the encoder sees, and what is to be predicted.

    The images are in the upper left corners of their canvases, ``size`` (height, width) pixels large. Returns
    ``patches_a`` (B, K, P) and ``coords_a`` (B, K, 2), the visible part of RegionA. ``patches_b`` (B, L, P) and
    ``coords_b`` (B, L, 2), all of RegionB in RegionA's coordinates.
    """
    image = resize(canvas, size, draws.regions, img_size=spec.img_size, max_shift=spec.max_shift)  # Eq. (1)
    region_a, region_b = regions.cut_regions(image, draws.regions.shift, spec.img_size)  # Eq. (2)
    coords = grid_coords(spec.grid, canvas.device)
    patches_a, patches_b = patchify(region_a, spec.patch_size), patchify(region_b, spec.patch_size)
    return {
        "patches_a": normalise(take_tokens(patches_a, draws.ids_keep), spec.mean, spec.std),  # V_a of Eq. (3)
        "coords_a": coords[draws.ids_keep],
        "patches_b": normalise(patches_b, spec.mean, spec.std),
        "coords_b": regions.region_b_coords(coords, draws.regions.shift, spec.patch_size),  # Eq. (4)
    }


def prepare_batch(
    canvas: UInt8[Tensor, "B Hc Wc 3"],
    size: Int[Tensor, "B 2"],
    native_size: Int[Tensor, "B 2"],
    keys: Int[Tensor, " B"],
    spec: RegionSpec,
) -> Batch:
    """What ``cut_batch`` returns for the draws that belong to the samples' keys, by the way that suits the device."""
    resize = regions.resize_images if canvas.device.type == "cpu" else regions.resize_canvas
    return cut_batch(canvas, size, draw_batch(keys, native_size, spec), spec, resize)

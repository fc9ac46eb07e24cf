"""Which patches of RegionA are hidden (Eq. 3): blocks as in BEiT, or single patches; always exactly round(r * N).

A mask is True where a patch is hidden.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.model.regions import BLOCK_STREAM, FILL_STREAM, uniforms

# Of 3,000 masks at r = 0.75 on 16 x 8, all but the usual one in six were full after 32 proposals; the rest is filled.
NUM_PROPOSALS = 32
MIN_ASPECT = 0.3  # height / width of a block lies in [0.3, 1 / 0.3]


def num_hidden(grid: tuple[int, int], mask_ratio: float) -> int:
    """round(r * N), the number of hidden patches.

    Raises:
        ValueError: nothing would be hidden, or nothing would stay visible.
    """
    total = grid[0] * grid[1]
    hidden = round(total * mask_ratio)
    if not 0 < hidden < total:
        raise ValueError(f"mask ratio {mask_ratio} hides {hidden} of {total} patches; at least one of each is needed")
    return hidden


def random_mask(keys: Int[Tensor, " B"], grid: tuple[int, int], mask_ratio: float) -> Bool[Tensor, "B L"]:
    """Hide patches one by one, uniformly without replacement."""
    nothing = torch.zeros(len(keys), grid[0] * grid[1], dtype=torch.bool, device=keys.device)
    return _fill(nothing, keys, num_hidden(grid, mask_ratio))


def block_mask(keys: Int[Tensor, " B"], grid: tuple[int, int], mask_ratio: float, *, min_block: int) -> Bool[Tensor, "B L"]:
    """Hide rectangles of random area, aspect and place until r * N patches are hidden (BEiT, as cited by Sec. III-C).

    Each proposal's area is uniform between ``min_block`` and what is still to hide; it is dropped when it does not fit
    the grid, hides nothing new or would hide too much. What 32 proposals leave open is filled with random patches.
    """
    h, w = grid
    target = num_hidden(grid, mask_ratio)
    u = uniforms(keys, BLOCK_STREAM, 4 * NUM_PROPOSALS).reshape(len(keys), NUM_PROPOSALS, 4)
    mask = torch.zeros(len(keys), h, w, dtype=torch.bool, device=keys.device)
    for proposal in u.unbind(dim=1):
        mask = _hide_block(mask, proposal, target, min_block)  # pyright: ignore[reportCallIssue]
    return _fill(mask.flatten(1), keys, target)


@torch.compiler.nested_compile_region  # compiled once for all proposals: written out they took minutes
def _hide_block(mask: Bool[Tensor, "B h w"], u: Float[Tensor, "B 4"], target: int, min_block: int) -> Bool[Tensor, "B h w"]:
    """Hide one proposed block where it may be hidden."""
    _, h, w = mask.shape
    y, x = torch.arange(h, device=u.device)[:, None], torch.arange(w, device=u.device)[None, :]
    remaining = target - mask.sum(dim=(1, 2))
    top, left, block_h, block_w = _propose(u, remaining, (h, w), min_block)
    rows = (y >= top[:, None, None]) & (y < (top + block_h)[:, None, None])
    block = rows & (x >= left[:, None, None]) & (x < (left + block_w)[:, None, None])
    new = (block & ~mask).sum(dim=(1, 2))
    accepted = (block_h <= h) & (block_w <= w) & (new > 0) & (new <= remaining)
    return mask | (block & accepted[:, None, None])


def _propose(
    u: Float[Tensor, "B 4"], remaining: Int[Tensor, " B"], grid: tuple[int, int], min_block: int
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, " B"]]:
    area = min_block + u[:, 0] * (remaining - min_block).clamp(min=0)
    aspect = (math.log(MIN_ASPECT) * (1 - 2 * u[:, 1])).exp()
    block_h = (area * aspect).sqrt().round().long().clamp(min=1)
    block_w = (area / aspect).sqrt().round().long().clamp(min=1)
    top = (u[:, 2] * (grid[0] - block_h + 1).clamp(min=1)).long()
    left = (u[:, 3] * (grid[1] - block_w + 1).clamp(min=1)).long()
    return top, left, block_h, block_w


def _fill(mask: Bool[Tensor, "B L"], keys: Int[Tensor, " B"], target: int) -> Bool[Tensor, "B L"]:
    """Hide further random patches until each sample hides ``target``; no sample may hide more already."""
    order = uniforms(keys, FILL_STREAM, mask.shape[1]).masked_fill(mask, -1.0).argsort(dim=1, stable=True)
    return torch.zeros_like(mask).scatter(1, order[:, :target], True)


def ids_visible(mask: Bool[Tensor, "B L"], num_visible: int) -> Int[Tensor, "B K"]:
    """Ascending indices of the visible patches; every sample has exactly ``num_visible``."""
    return mask.int().argsort(dim=1, stable=True)[:, :num_visible]

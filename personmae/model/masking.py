"""Masks of RegionA (Eq. (3)): blocks as in BEiT, blocks with a fixed share of the middle columns, or single patches.

Always exactly round(r * N) patches are hidden. A mask is True where a patch is hidden.
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
        raise ValueError(f"mask ratio {mask_ratio} hides {hidden} of {total} patches. At least one of each is needed")
    return hidden


def random_mask(keys: Int[Tensor, " B"], grid: tuple[int, int], mask_ratio: float) -> Bool[Tensor, "B L"]:
    """Hide patches one by one, uniformly without replacement."""
    nothing = torch.zeros(len(keys), grid[0] * grid[1], dtype=torch.bool, device=keys.device)
    return _fill(nothing, keys, num_hidden(grid, mask_ratio))


def block_mask(
    keys: Int[Tensor, " B"],
    grid: tuple[int, int],
    mask_ratio: float,
    *,
    min_block: int,
    block_ratio: float | None = None,
) -> Bool[Tensor, "B L"]:
    """Hide rectangles of random area, aspect and place until r * N patches are hidden (BEiT, as cited by Sec. III-C).

    Each proposal's area is uniform between ``min_block`` and what is still to hide. It is dropped when it does not fit
    the grid, hides nothing new or would hide too much. What 32 proposals leave open is filled with random patches.
    With ``block_ratio`` blocks hide at most that share of all patches, and random ones the rest of r * N.
    """
    target = num_hidden(grid, mask_ratio)
    in_blocks = target if block_ratio is None else min(target, round(block_ratio * grid[0] * grid[1]))
    mask = torch.zeros(len(keys), *grid, dtype=torch.bool, device=keys.device)
    for proposal in _proposals(keys):
        mask = _hide_block(mask, proposal, in_blocks, min_block)  # pyright: ignore[reportCallIssue]
    return _fill(mask.flatten(1), keys, target)


def middle_columns(width: int) -> tuple[int, int]:
    """The columns of the person, end exclusive: without a quarter of the ``width`` at each side."""
    beside = (width + 1) // 4
    return beside, width - beside


def num_hidden_of_person(grid: tuple[int, int], mask_ratio: float) -> int:
    """round(r * M) of the M patches in the middle columns, or as near as the number hidden of all patches allows."""
    first, stop = middle_columns(grid[1])
    of_person, total = grid[0] * (stop - first), num_hidden(grid, mask_ratio)
    least = total - (grid[0] * grid[1] - of_person)  # the others have no more
    return min(max(round(of_person * mask_ratio), least), of_person, total)


def person_mask(
    keys: Int[Tensor, " B"],
    grid: tuple[int, int],
    mask_ratio: float,
    *,
    min_block: int,
    block_ratio: float | None = None,
) -> Bool[Tensor, "B L"]:
    """Hide blocks so that every mask hides the same share of the person: r of the middle columns and r of the others.

    The proposals are those of ``block_mask``, with two differences. A block that leaves the grid below comes in again above,
    so all rows are hidden equally often. A block that would hide too much of either area is dropped. What the proposals
    leave open is filled with random patches, in each area by itself.
    """
    target, of_person = num_hidden(grid, mask_ratio), num_hidden_of_person(grid, mask_ratio)
    share = 1.0 if block_ratio is None else min(1.0, block_ratio * grid[0] * grid[1] / target)
    in_blocks = round(share * of_person), round(share * (target - of_person))
    mask = torch.zeros(len(keys), *grid, dtype=torch.bool, device=keys.device)
    for proposal in _proposals(keys):
        mask = _hide_turned_block(mask, proposal, *in_blocks, min_block)  # pyright: ignore[reportCallIssue]
    first, stop = middle_columns(grid[1])
    column = torch.arange(grid[0] * grid[1], device=keys.device) % grid[1]
    person = (column >= first) & (column < stop)
    flat = mask.flatten(1)
    return _fill(flat, keys, of_person, person) | _fill(flat, keys, target - of_person, ~person)


def hiding_probability(mask: Bool[Tensor, "B L"], grid: tuple[int, int]) -> Float[Tensor, "h w"]:
    """The share of some masks that hides each patch."""
    return mask.float().mean(dim=0).unflatten(0, grid)


def _proposals(keys: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B 4"], ...]:
    u = uniforms(keys, BLOCK_STREAM, 4 * NUM_PROPOSALS).reshape(len(keys), NUM_PROPOSALS, 4)
    return u.unbind(dim=1)


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


@torch.compiler.nested_compile_region
def _hide_turned_block(
    mask: Bool[Tensor, "B h w"], u: Float[Tensor, "B 4"], of_person: int, beside: int, min_block: int
) -> Bool[Tensor, "B h w"]:
    """``_hide_block`` with rows that wrap around, and separate targets for the middle columns and the others."""
    _, h, w = mask.shape
    y, x = torch.arange(h, device=u.device)[:, None], torch.arange(w, device=u.device)[None, :]
    first, stop = middle_columns(w)
    person = (x >= first) & (x < stop)
    left_of_person = of_person - (mask & person).sum(dim=(1, 2))
    left_beside = beside - (mask & ~person).sum(dim=(1, 2))
    _, left, block_h, block_w = _propose(u, left_of_person + left_beside, (h, w), min_block)
    top = (u[:, 2] * h).long()
    rows = (y - top[:, None, None]) % h < block_h[:, None, None]
    block = rows & (x >= left[:, None, None]) & (x < (left + block_w)[:, None, None])
    new_of_person = (block & ~mask & person).sum(dim=(1, 2))
    new_beside = (block & ~mask & ~person).sum(dim=(1, 2))
    fits = (block_h <= h) & (block_w <= w) & (new_of_person + new_beside > 0)
    accepted = fits & (new_of_person <= left_of_person) & (new_beside <= left_beside)
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


def _fill(
    mask: Bool[Tensor, "B L"], keys: Int[Tensor, " B"], target: int, area: Bool[Tensor, " L"] | None = None
) -> Bool[Tensor, "B L"]:
    """Hide further random patches until each sample hides ``target``, with an ``area`` in that alone. None may hide more there.

    The result has nothing outside the area.
    """
    order = uniforms(keys, FILL_STREAM, mask.shape[1]).masked_fill(mask, -1.0)
    if area is not None:
        order = order.masked_fill(~area, 2.0)
    order = order.argsort(dim=1, stable=True)
    return torch.zeros_like(mask).scatter(1, order[:, :target], True)


def ids_visible(mask: Bool[Tensor, "B L"], num_visible: int) -> Int[Tensor, "B K"]:
    """Ascending indices of the visible patches. Every sample has exactly ``num_visible``."""
    return mask.int().argsort(dim=1, stable=True)[:, :num_visible]

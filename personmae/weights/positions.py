"""Positions of other projects' encoders: fixed ones by our rule, learned ones as a table, and tokens that have their own."""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from personmae.errors import UserError
from personmae.model.positions import x_first
from personmae.model.vit import grid_coords, sincos_embedding

Size = tuple[int, int]
# (H, W) in pixels of the images that encoders were trained on. Of several that give as many patches the first one is taken.
SIZES: Final[tuple[Size, ...]] = (
    *((256, 128), (224, 224), (384, 128), (384, 384), (224, 112), (256, 192), (256, 256), (128, 64), (448, 448), (512, 512)),
    (518, 518),
)
OVERLAP: Final = 12  # pixels from one patch of 16 to the next, in TransReID and CLIP-ReID
_SAME: Final = 1e-4  # largest difference of fixed positions that were written in fp32


class Placed(NamedTuple):
    """Tensors without positions of their own but a table, and what the positions are of.

    ``table`` is the grid (h, w) of learned positions, or None for fixed ones. ``size`` (H, W) and ``stride`` are those of the
    images they were trained on.
    """

    tensors: dict[str, Tensor]
    table: Size | None
    size: Size
    stride: int
    words: str


def place(tensors: dict[str, Tensor], patch_size: int, model_size: str, wanted: Size | None = None) -> Placed:
    """Bring positions to ours. ``wanted`` is a size of images to think of first.

    What the class token had as a position is added to it, since it is always the same. Fixed positions are computed and not
    kept. Where their first half is y, all weights are permuted, which changes no result.

    Raises:
        UserError: there are none, or the size of the images cannot be told from their number.
    """
    tensors = dict(tensors)
    if "pos_embed" not in tensors:
        raise UserError("learned or fixed positions (pos_embed) are required. These weights have none")
    rows = _fold(tensors)
    if fixed := _fixed(rows):
        grid, order = fixed
        del tensors["pos_embed"]
        tensors = tensors if order == "x" else x_first(tensors, {"size": model_size})
        done = "as here" if order == "x" else "where y comes first: all weights are permuted so that x does, exactly"
        size = (grid[0] * patch_size, grid[1] * patch_size)
        return Placed(tensors, None, size, patch_size, f"fixed sines and cosines of {_named(grid, size)}, {done}")
    size, stride, grid = _geometry(len(rows), patch_size, wanted)
    tensors["pos_embed"] = rows[None]
    overlap = "" if stride == patch_size else f", a patch each {stride} pixels"
    return Placed(tensors, grid, size, stride, f"a learned table of {_named(grid, size)}{overlap}, kept")


def _fold(tensors: dict[str, Tensor]) -> Tensor:
    """Add fixed positions of single tokens to these tokens, and return the rows (L, D) that are left for patches."""
    rows = tensors["pos_embed"][0].float()
    if "part_token1" in tensors:  # PASS: each token has a position of its own
        parts = [tensors.pop(f"part_token{i}") + tensors.pop(f"part{i}_pos") for i in (1, 2, 3)]
        tensors["reg_token"] = torch.cat(parts, dim=1)
        tensors["cls_token"] = tensors["cls_token"] + tensors.pop("cls_pos")
        return rows
    if "reg_token" in tensors or _has_no_class_row(len(rows)):
        return rows
    tensors["cls_token"] = tensors["cls_token"].float() + rows[:1]
    return rows[1:]


def _has_no_class_row(count: int) -> bool:
    """Whether this number of rows is that of patches alone: it is as many as a size has, and one less is not."""
    counts = {math.prod(grid) for patch in (8, 14, 16, 32) for _, _, grid in _candidates(patch, None)}
    return count in counts and count - 1 not in counts


def _fixed(rows: Tensor) -> tuple[Size, str] | None:
    """The grid whose sines and cosines these rows are, and the axis of their first half. None where they are learned."""
    count, dim = rows.shape
    for h in range(2, count // 2 + 1):
        if count % h == 0 and dim % 4 == 0:
            computed = sincos_embedding(grid_coords((h, count // h)), dim)
            for order, table in (("x", computed), ("y", computed.roll(dim // 2, dims=1))):
                if (table - rows).abs().max() < _SAME:
                    return (h, count // h), order
    return None


def _geometry(count: int, patch_size: int, wanted: Size | None) -> tuple[Size, int, Size]:
    """Size of the images, stride and grid of so many patches."""
    found = next(((s, stride, grid) for s, stride, grid in _candidates(patch_size, wanted) if math.prod(grid) == count), None)
    if found is None:
        raise UserError(
            f"positions of images of a known size are required. There are {count} of patches of {patch_size} pixels: give "
            "--img-size HxW, the size of the images that these weights were trained on"
        )
    return found


def _candidates(patch_size: int, wanted: Size | None) -> Iterator[tuple[Size, int, Size]]:
    for size in (*([wanted] if wanted else []), *SIZES):
        for stride in (patch_size, OVERLAP) if patch_size > OVERLAP else (patch_size,):
            h, w = ((side - patch_size) // stride + 1 for side in size)
            yield size, stride, (h, w)


def _named(grid: Size, size: Size) -> str:
    return f"{grid[0]}x{grid[1]} patches ({size[0]}x{size[1]} pixels)"

"""Which patches of two images an encoder takes for the same: mutual nearest neighbours between their tokens."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from personmae.explain.sheet import PAPER, font, scaled
from personmae.explain.tokens import PatchGrid, grid_of, patch_tokens
from personmae.images import Pixels
from personmae.weights.encoder import Encoder
from personmae.weights.pixels import ImageLike

Point = tuple[float, float]  # (x, y) in pixels

MOST: Final = 12  # matches that are shown: more lines hide the people
# Dark enough for white numbers. Each is numbered too, for eyes that do not tell colours apart.
COLOURS: Final = (
    *("#0b6bcb", "#b3261e", "#137333", "#7b1fa2", "#a15c00", "#00696d"),
    *("#c2185b", "#37474f", "#5d4037", "#3949ab", "#557000", "#8e2460"),
)
_FINE: Final = 3  # drawn so many times larger, then shrunk: smooth edges


class Match(NamedTuple):
    """Two patches, each by its (row, column), that are each other's nearest. ``similarity`` is their cosine in [-1, 1]."""

    first: tuple[int, int]
    second: tuple[int, int]
    similarity: float


def match(encoder: Encoder, first: ImageLike, second: ImageLike, *, most: int = MOST) -> list[Match]:
    """The ``most`` similar pairs of patches of two images of any size that are mutual nearest neighbours, best first.

    Tokens are those after the encoder's last block and its norm. They are compared by cosine.

    Raises:
        UserError: something is no image, or a file cannot be read.
    """
    tokens = [patch_tokens(encoder, image) for image in (first, second)]
    _, columns = grid_of(encoder).shape
    pairs = mutual_neighbours(tokens[0], tokens[1])[:most]
    return [Match(divmod(one, columns), divmod(other, columns), similarity) for one, other, similarity in pairs]


def mutual_neighbours(first: Float[Tensor, "L D"], second: Float[Tensor, "M D"]) -> list[tuple[int, int, float]]:
    """Pairs (row of ``first``, row of ``second``, cosine) that are each other's nearest, best first.

    Of equally near ones the first counts. Equally similar pairs keep the order of ``first``.
    """
    cosines = F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).T
    nearest, back = cosines.argmax(dim=1), cosines.argmax(dim=0)  # of equal values the first
    ones = (back[nearest] == torch.arange(len(first))).nonzero()[:, 0]
    values, order = cosines[ones, nearest[ones]].sort(descending=True, stable=True)
    ones = ones[order]
    return list(zip(ones.tolist(), nearest[ones].tolist(), values.tolist(), strict=True))


def in_words(matches: Sequence[Match]) -> str:
    """What ``draw`` shows, for those who do not see it. Rows and columns are counted from 1."""
    if not matches:
        return "No two patches are each other's nearest."
    places = [
        f"{number}: row {one[0] + 1}, column {one[1] + 1} and row {other[0] + 1}, column {other[1] + 1} ({similarity:.2f})"
        for number, (one, other, similarity) in enumerate(matches, 1)
    ]
    return f"{len(matches)} matched patches, the most similar first. {'. '.join(places)}."


def draw(first: Pixels, second: Pixels, matches: Sequence[Match], grid: PatchGrid, *, height: int = 384) -> Pixels:
    """Both images next to each other, ``height`` pixels high, each match a line between two dots with its number.

    ``grid`` is that of the encoder, by ``grid_of``. The worst match is drawn first, so that the best one is on top.
    """
    images = [scaled(image, height) for image in (first, second)]
    widths = [image.shape[1] for image in images]
    lefts = 0, widths[0] + height // 6
    sheet = Image.new("RGBA", (lefts[1] + widths[1], height), PAPER)
    for image, left in zip(images, lefts, strict=True):
        sheet.paste(Image.fromarray(image), (left, 0))
    ends = [
        [_place(patch, grid, lefts[i], widths[i], height) for i, patch in enumerate((one.first, one.second))] for one in matches
    ]
    sheet.alpha_composite(_draw_lines((sheet.width, height), ends))
    return np.asarray(sheet.convert("RGB"))


def _place(patch: tuple[int, int], grid: PatchGrid, left: int, width: int, height: int) -> Point:
    """The middle of a patch in an image of (height, width) that begins at ``left``."""
    y, x = grid.centre(patch)
    return left + x * width, y * height


def _draw_lines(size: tuple[int, int], matches: Sequence[Sequence[Point]]) -> Image.Image:
    """Lines and dots on nothing, of (width, height) = ``size``. They are drawn larger and shrunk, for smooth edges."""
    layer = Image.new("RGBA", (size[0] * _FINE, size[1] * _FINE), (255, 255, 255, 0))
    canvas, radius = ImageDraw.Draw(layer), max(5, size[1] // 42) * _FINE
    numbered = [
        (str(number), COLOURS[(number - 1) % len(COLOURS)], [(x * _FINE, y * _FINE) for x, y in ends])
        for number, ends in enumerate(matches, 1)
    ][::-1]
    for _, colour, ends in numbered:
        _draw_line(canvas, ends, colour)
    for number, colour, ends in numbered:
        for end in ends:
            _draw_dot(canvas, end, radius, colour, number)
    return layer.resize(size, Image.Resampling.BOX)


def _draw_line(canvas: ImageDraw.ImageDraw, ends: Sequence[Point], colour: str) -> None:
    """A line with a white edge, which is seen on any ground."""
    canvas.line(ends, fill="#ffffff", width=4 * _FINE)
    canvas.line(ends, fill=colour, width=2 * _FINE)


def _draw_dot(canvas: ImageDraw.ImageDraw, at: Point, radius: int, colour: str, number: str) -> None:
    box = at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius
    canvas.ellipse(box, fill=colour, outline="#ffffff", width=_FINE)
    canvas.text(at, number, fill="#ffffff", font=font(round(1.2 * radius), bold=True), anchor="mm")

"""Images for a report: inputs and predictions of the model (Figure 3 of the paper), rank lists (Figure 5), and curves.

Images are uint8 RGB arrays (H, W, 3). ``report.py`` chooses the runs to draw and the text about them.
"""

import base64
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from personmae import config, images
from personmae.data.decode import decode_onto
from personmae.data.order import sample_keys
from personmae.data.shard_set import ShardSet
from personmae.errors import UserError
from personmae.explain.reconstruction import (
    GREY,
    TARGET_STATISTICS,
    VISIBLE_STATISTICS,
    Reconstruction,
    open_pretrained,
    reconstruct_batch,
)
from personmae.model.inputs import RegionSpec, draw_batch

Pixels = NDArray[np.uint8]
Row = Sequence[tuple[Pixels, bool | None]]  # a query (None), then gallery images and whether they are right

GREEN, RED, DARK = (22, 148, 72), (208, 40, 40), (70, 76, 84)
FIGURE_WIDTH: Final = 1200  # pixels
CAPTIONS: Final = ("RegionA", "visible", "RegionB", "prediction ¹", "prediction ²")
REGION_WORDS: Final = (
    "RegionA",
    "RegionA, hidden patches grey",
    "RegionB, the target",
    "prediction with the target's own patch statistics",
    "prediction with RegionA's statistics",
)
FOOTNOTE: Final = f"Target of the prediction: RegionB.  ¹ {TARGET_STATISTICS}.  ² {VISIBLE_STATISTICS}."


class NotYet(UserError):  # noqa: N818 - not an error
    """A run has not got this far yet. Nothing is wrong."""


def reconstruct_run(
    settings: config.Pretrain, directory: Path, count: int, *, checkpoint: Path | None = None
) -> Reconstruction:
    """``reconstruct_batch`` with a run's newest student, for ``count`` images spread over the first of its shards.

    Regions and masks are those the images have in the run's first epoch. ``checkpoint`` names an older student.

    Raises:
        UserError: there is no checkpoint, or the shards cannot be read.
    """
    pretrained = open_pretrained(checkpoint or directory, device="cpu")
    own = pretrained.spec  # an encoder of another project brings its normalisation along
    spec = replace(RegionSpec(**settings.region_arguments()), mean=own.mean, std=own.std)
    with open_shards(settings, directory) as shards:
        ids = np.linspace(0, shards.sizes[0] - 1, min(count, shards.sizes[0])).astype(np.int64)
        height, width = spec.canvas_size
        canvas = np.empty((len(ids), height, width, 3), np.uint8)
        placed = [decode_onto(shards.jpeg(int(i)), row) for i, row in zip(ids, canvas, strict=True)]
    native, size = (torch.tensor(sizes) for sizes in zip(*placed, strict=True))
    keys = torch.from_numpy(sample_keys(ids, seed=settings.seed, epoch=0))
    return reconstruct_batch(pretrained.model, torch.from_numpy(canvas), size, draw_batch(keys, native, spec), spec)


def open_shards(settings: config.Pretrain, directory: Path) -> ShardSet:
    """The shards a pre-training run was trained on."""
    return ShardSet(settings.data.shards, settings.data.cache_dir or directory / "shards")


def draw_map(shares: Float[Tensor, "h w"], cell: int = 24) -> Pixels:
    """A grid of shares in [0, 1] as squares of ``cell`` pixels with thin lines between them. Larger shares are darker."""
    grey = (255 * (1 - shares.numpy())).round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    grey[::cell], grey[:, ::cell] = GREY, GREY
    return np.repeat(grey[..., None], 3, axis=2)


def read_thumbnail(path: Path, size: tuple[int, int]) -> Pixels:
    """An image file brought to (height, width).

    Raises:
        UserError: the file is missing or is not an image.
    """
    try:
        image = images.decode(path.read_bytes() if path.is_file() else b"").pixels
    except images.BadImage as error:
        raise UserError(
            f"an image is required at {path} and there is none. Put the benchmark back or evaluate again"
        ) from error
    return cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def framed(image: Pixels, correct: bool | None, width: int = 3) -> Pixels:
    """A border inside the image's edge: green for a right answer, red for a wrong one, dark for the query.

    A wrong one is crossed in its corner too, for eyes that do not tell red from green.
    """
    colour = DARK if correct is None else GREEN if correct else RED
    out = np.array(image, order="C")
    height, right = out.shape[0] - 1, out.shape[1] - 1
    cv2.rectangle(out, (0, 0), (right, height), colour, 2 * width - 1)
    if correct is False:
        arm = max(8, out.shape[1] // 5)
        cv2.rectangle(out, (right - arm - width, 0), (right, arm + width), colour, cv2.FILLED)
        for y0, y1 in ((width, arm), (arm, width)):
            cv2.line(out, (right - arm, y0), (right - width, y1), (255, 255, 255), max(1, width // 2), cv2.LINE_AA)
    return out


def data_uri(image: Pixels, suffix: str = ".png") -> str:
    """The image inside a ``data:`` address. ``.png`` keeps every pixel, ``.jpg`` is a tenth of the size."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else []
    _, encoded = cv2.imencode(suffix, image[:, :, ::-1], options)
    kind = {".png": "png", ".jpg": "jpeg"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"


def write_figure(
    path: Path, groups: Sequence[Sequence[Pixels]], rank_lists: Mapping[str, Sequence[Row]], *, title: str
) -> None:
    """A PNG, 1200 pixels wide: two groups of five images to a row, then rank lists, one column for each name."""
    canvas = _Page(title)
    if groups:
        _draw_groups(canvas, groups)
    if rank_lists:
        _draw_rank_lists(canvas, rank_lists)
    canvas.save(path)


class _Page:
    """Images and words at pixels counted from the upper left corner. ``y`` is how far the page is filled."""

    def __init__(self, title: str):
        self._images: list[tuple[int, int, Pixels]] = []
        self._words: list[tuple[float, float, str, dict[str, Any]]] = []
        self.y = 12
        for line in textwrap.wrap(title, 120):
            self.write(MARGIN, line, size=15, weight="bold")
            self.y += 22
        self.y += 8

    def paste(self, x: int, image: Pixels, below: int = 0) -> None:
        self._images.append((x, self.y + below, image))

    def write(self, x: float, text: str, *, size: float = 11, below: int = 0, **style: Any) -> None:
        self._words.append((x, self.y + below, text, {"fontsize": size * 0.72, "va": "top", **style}))

    def save(self, path: Path) -> None:
        height = self.y + 8
        figure = Figure(figsize=(FIGURE_WIDTH / 100, height / 100), dpi=100, facecolor="white")
        for x, y, image in self._images:
            figure.figimage(image, x, height - y - image.shape[0], resize=False)
        for x, y, text, style in self._words:
            figure.text(x / FIGURE_WIDTH, 1 - y / height, text, **style)
        figure.savefig(path, dpi=100)


MARGIN, GAP = 20, 4
_GROUPS_PER_ROW = 2


def _draw_groups(page: _Page, groups: Sequence[Sequence[Pixels]]) -> None:
    """Each group holds the five images of a ``Reconstruction``."""
    between = 30
    room = (FIGURE_WIDTH - 2 * MARGIN - between) // _GROUPS_PER_ROW
    width = (room - 4 * GAP) // 5
    for i, caption in enumerate(CAPTIONS * min(_GROUPS_PER_ROW, len(groups))):
        x = MARGIN + (i // 5) * (room + between) + (i % 5) * (width + GAP)
        page.write(x + width / 2, caption, ha="center", color="#444c56")
    page.y += 20
    for start in range(0, len(groups), _GROUPS_PER_ROW):
        for column, group in enumerate(groups[start : start + _GROUPS_PER_ROW]):
            for i, image in enumerate(group):
                x = MARGIN + column * (room + between) + i * (width + GAP)
                page.paste(x, _scaled(image, width))
        page.y += groups[0][0].shape[0] * width // groups[0][0].shape[1] + 2 * GAP
    for line in textwrap.wrap(FOOTNOTE, 175):
        page.write(MARGIN, line, size=11, color="#444c56")
        page.y += 16
    page.y += 16


def _draw_rank_lists(page: _Page, rank_lists: Mapping[str, Sequence[Row]]) -> None:
    """One column for each name. Line i of all columns belongs to the same query."""
    between = 30
    room = (FIGURE_WIDTH - 2 * MARGIN - between * (len(rank_lists) - 1)) // len(rank_lists)
    most = max(len(row) for rows in rank_lists.values() for row in rows)
    width = min(80, (room - 8 - GAP * (most - 1)) // most)
    for column, (name, rows) in enumerate(rank_lists.items()):
        left = MARGIN + column * (room + between)
        page.write(left, f"{name}: query, then the ten nearest images of the gallery", color="#444c56")
        for line, row in enumerate(rows):
            for i, (image, correct) in enumerate(row):
                x = left + i * (width + GAP) + (8 if i else 0)
                page.paste(x, framed(_scaled(image, width), correct, 2), 20 + line * (2 * width + 2 * GAP))
    page.y += 20 + max(map(len, rank_lists.values())) * (2 * width + 2 * GAP)
    page.write(MARGIN, "green: the same person from another camera. Red and crossed: another person", color="#444c56")
    page.y += 16


def _scaled(image: Pixels, width: int) -> Pixels:
    height = image.shape[0] * width // image.shape[1]
    method = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method).astype(np.uint8, copy=False)

"""What the masks of a run hide: how often each patch is hidden, and how much of a drawn figure stays visible."""

import json
import math
from typing import Any, Final

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from personmae.data.order import sample_keys
from personmae.errors import UserError
from personmae.model import regions
from personmae.model.inputs import Draws, RegionSpec, draw_batch, draw_mask
from personmae.model.masking import hiding_probability
from personmae.model.vit import patchify
from personmae.synthetic.benchmarks import FORMAT_VERSION
from personmae.synthetic.image import draw_silhouette
from personmae.synthetic.plan import SynthSettings, plan

NUM_MASKS: Final = 4096
NUM_FIGURES: Final = 256
_AT_ONCE: Final = 32  # figures that are cut together


def hiding_map(spec: RegionSpec, seed: int) -> Float[Tensor, "h w"]:
    """How often each patch of RegionA is hidden, by the masks of a run's first samples."""
    keys = torch.from_numpy(sample_keys(np.arange(NUM_MASKS), seed=seed, epoch=0))
    return hiding_probability(draw_mask(keys, spec), spec.grid)


def describe_map(shares: Float[Tensor, "h w"]) -> str:
    """A map of ``hiding_map`` in words."""
    h, w = shares.shape
    middle = shares[(h - 1) // 2 : h // 2 + 1, (w - 1) // 2 : w // 2 + 1].mean()
    corners = shares[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    return f"the middle {100 * middle:.1f} %, a corner {100 * corners:.1f} %, on average {100 * shares.mean():.1f} %"


def print_hiding(spec: RegionSpec, seed: int, mark: bytes | None) -> None:
    """Print in how many of a hundred masks each patch is hidden. For drawn people, print the visible share of the figure too.

    ``mark`` is the mark of drawn people, if there is one.
    """
    shares = hiding_map(spec, seed)
    print(f"how often a patch of RegionA is hidden, by {NUM_MASKS:,} masks: {describe_map(shares)}")
    for row in shares.tolist():
        print("  " + " ".join(f"{100 * share:3.0f}" for share in row))
    if (seen := seen_of_drawn(spec, seed, mark)) is not None:
        print(f"what the encoder sees of drawn people, over {len(seen)} of them: {describe_seen(seen)}")


def describe_seen(seen: Float[Tensor, " B"]) -> str:
    """The shares of ``seen_of_drawn`` in words."""
    little = 100 * (seen < 0.05).float().mean()
    return f"{100 * seen.mean():.1f} % of the figure on average, less than a twentieth of it in {little:.1f} % of the images"


def seen_of_drawn(spec: RegionSpec, seed: int, mark: bytes | None) -> Float[Tensor, " B"] | None:
    """The share of the figure that the encoder sees. None where people are not drawn.

    They are drawn again as silhouettes. A mark of another version means other people, so it does not count.
    """
    try:
        record = json.loads(mark or b"{}")
        settings = SynthSettings(**record["settings"])
    except (ValueError, KeyError, TypeError, UserError):
        return None
    if record.get("format_version") != FORMAT_VERSION:
        return None
    pool = [shot for shot in plan(settings) if shot.split == "pool"]
    picked = np.linspace(0, len(pool) - 1, min(NUM_FIGURES, len(pool))).astype(np.int64)
    seen = []
    for some in np.array_split(picked, math.ceil(len(picked) / _AT_ONCE)):
        canvas, size, native = _onto_canvases([draw_silhouette(settings, pool[number]) for number in some], spec)
        keys = torch.from_numpy(sample_keys(some, seed=seed, epoch=0))
        seen.append(share_seen(canvas, size, draw_batch(keys, native, spec), spec))
    found = torch.cat(seen)
    return found[found.isfinite()]  # a box may hold nobody


def share_seen(
    figures: UInt8[Tensor, "B Hc Wc 3"], size: Int[Tensor, "B 2"], draws: Draws, spec: RegionSpec
) -> Float[Tensor, " B"]:
    """The share of a figure's pixels in RegionA that are in visible patches. NaN where it has none.

    ``figures`` are 255 where a pixel is of the figure, on canvases as ``cut_batch`` takes them.
    """
    image = regions.resize_canvas(figures, size, draws.regions, img_size=spec.img_size, max_shift=spec.max_shift)
    region_a, _ = regions.cut_regions(image, draws.regions.shift, spec.img_size)
    parts = patchify(region_a, spec.patch_size).sum(dim=2)
    return parts.gather(1, draws.ids_keep).sum(dim=1) / parts.sum(dim=1)


def _onto_canvases(figures: list[NDArray[np.uint8]], spec: RegionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Silhouettes (H, W) on canvases, shrunk where they are too large, with their sizes there and before."""
    height, width = spec.canvas_size
    canvas = np.zeros((len(figures), height, width, 3), np.uint8)
    sizes: list[tuple[int, int]] = []
    for row, figure in zip(canvas, figures, strict=True):
        scale = min(1.0, height / figure.shape[0], width / figure.shape[1])
        sizes.append((max(1, int(figure.shape[0] * scale)), max(1, int(figure.shape[1] * scale))))
        fitted: Any = cv2.resize(figure, sizes[-1][::-1], interpolation=cv2.INTER_AREA)
        row[: sizes[-1][0], : sizes[-1][1]] = fitted[..., None]
    native = torch.tensor([figure.shape for figure in figures])
    return torch.from_numpy(canvas), torch.tensor(sizes), native

"""Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): how much of each patch may reach the class token.

The network itself attends in one fused operation that gives no matrices. They are computed again here, slowly and in the open.
"""

from collections.abc import Sequence
from typing import Final, cast

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from personmae.explain.tokens import blocks_of, embedded, grid_of
from personmae.images import Pixels
from personmae.model.vit import Attention, Block
from personmae.weights.encoder import Encoder
from personmae.weights.pixels import ImageLike

RESIDUAL: Final = 0.5  # share of a token that goes past attention, as the paper has it
STRENGTH: Final = 0.75  # how opaque the colour of the strongest patch is


def rollout(encoder: Encoder, image: ImageLike) -> Float[np.ndarray, "rows columns"]:
    """Attention from the class token to each patch, through all blocks. The shares sum to 1.

    Raises:
        UserError: it is no image, or its file cannot be read.
    """
    rows, columns = grid_of(encoder).shape
    joined = join(attention_maps(encoder, image))
    shares = joined[0, 1 : 1 + rows * columns]  # without the class token itself, and without registers
    return (shares / shares.sum()).reshape(rows, columns).numpy()


@torch.no_grad()
def attention_maps(encoder: Encoder, image: ImageLike) -> list[Float[Tensor, "h T T"]]:
    """What each block's heads attend to, first block to last: row t is what token t takes, and sums to 1.

    The blocks are walked one by one instead of hooked, so that threads can share a model.
    """
    tokens, maps = embedded(encoder, image), []
    for module in blocks_of(encoder.model.network):
        block = cast(Block, module)
        maps.append(attention_weights(block.attn, block.norm1(tokens))[0].cpu())
        tokens = block(tokens)
    return maps


def attention_weights(attention: Attention, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B h T T"]:
    """softmax(q k' / sqrt(d)) for tokens as the attention gets them, after their norm."""
    q, k, _ = heads_of(attention, tokens)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def heads_of(attention: Attention, tokens: Float[Tensor, "B T D"]) -> list[Float[Tensor, "B h T d"]]:
    """Queries, keys and values of each head."""
    parts = attention.qkv(tokens).chunk(3, dim=-1)
    return [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts]


def join(maps: Sequence[Float[Tensor, "h T T"]]) -> Float[Tensor, "T T"]:
    """The product over blocks of 0.5 A + 0.5 I, A the mean over heads. Its rows sum to 1."""
    eye = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    joined = eye
    for weights in maps:
        joined = ((1 - RESIDUAL) * weights.double().mean(dim=0) + RESIDUAL * eye) @ joined
    return joined


def in_words(heat: Float[np.ndarray, "rows columns"]) -> str:
    """Where the shares of ``rollout`` lie, for those who do not see them. Rows and columns are counted from 1."""
    thirds = 100 * thirds_of(heat)
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    rows, columns = heat.shape
    return (
        f"{thirds[0]:.0f} % of the attention lies in the upper third, {thirds[1]:.0f} % in the middle and {thirds[2]:.0f} % "
        f"in the lower third. Of {rows} x {columns} patches the strongest is in row {row + 1}, column {column + 1}, "
        f"with {100 * float(heat.max()):.1f} %. Evenly spread, each would have {100 / heat.size:.1f} %."
    )


def thirds_of(heat: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "3"]:
    """The shares of the upper, middle and lower third. A row that a border cuts counts in both by its parts."""
    above = np.concatenate([[0.0], heat.sum(axis=1).cumsum()])
    return np.diff(np.interp(np.linspace(0, len(heat), 4), np.arange(len(above)), above))


def overlay(image: Pixels, heat: Float[np.ndarray, "rows columns"]) -> Pixels:
    """An image with shares laid over it: blue to yellow, the stronger the more opaque. Between patches it is smooth."""
    height, width = image.shape[:2]
    share = heat.astype(np.float32) / max(float(heat.max()), 1e-12)
    smooth = cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR)  # a cubic would ring beside a peak
    colours = cv2.applyColorMap((255 * smooth).round().astype(np.uint8), cv2.COLORMAP_PLASMA)[..., ::-1]
    alpha = STRENGTH * smooth[..., None] ** 2  # squared: what is weak leaves the colours of the image
    return (image * (1 - alpha) + colours * alpha).round().astype(np.uint8)

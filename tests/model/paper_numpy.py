"""The paper's equations in float64 numpy, written from the text and not from the package: slow, one sample at a time.

Images are (H, W, C); a patch's vector is (C, y, x), as a convolution's weight would meet it.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def keys_cubic(x: float) -> float:
    """The cubic convolution kernel of Keys (1981) with a = -1/2."""
    a, x = -0.5, abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_line(line: Array, start: float, stop: float, size: int) -> Array:
    """The interval [start, stop) of the first axis, resized with the kernel widened by the shrinking factor."""
    first, last = math.floor(start), math.ceil(stop)  # the pixels of the crop, whole or in part
    factor = (stop - start) / size
    out = []
    for i in range(size):
        centre = start + (i + 0.5) * factor
        weights = np.array([keys_cubic((j + 0.5 - centre) / max(factor, 1.0)) for j in range(first, last)])
        out.append(np.tensordot(weights / weights.sum(), line[first:last], axes=1))
    return np.stack(out)


def whole_pixels(box: NDArray[np.float32], height: int, width: int) -> tuple[int, int, int, int]:
    """A crop (y0, x0, y1, x1) in shares of an image, each edge at the nearest pixel, at least one pixel large."""
    y0, x0, y1, x1 = (math.floor(share * side + np.float32(0.5)) for share, side in zip(box, 2 * (height, width), strict=True))
    y0, x0 = min(y0, height - 1), min(x0, width - 1)
    return y0, x0, max(y1, y0 + 1), max(x1, x0 + 1)


def eq1_resize(image: Array, box: tuple[float, float, float, float], flip: bool, p: int, size: tuple[int, int]) -> Array:
    """X~ = I_p(X, [H + p, W + p/2]) of the crop ``box`` (y0, x0, y1, x1 in pixels), mirrored where ``flip``."""
    y0, x0, y1, x1 = box
    rows = resize_line(image, y0, y1, size[0] + p)
    columns = resize_line(rows.transpose(1, 0, 2), x0, x1, size[1] + p // 2)
    resized = np.clip(columns.transpose(1, 0, 2), 0, 255)
    return resized[:, ::-1] if flip else resized


def eq2_slice(image: Array, s_h: int, s_w: int, size: tuple[int, int]) -> Array:
    """X~[(s_h, s_w), (H, W)]."""
    return image[s_h : s_h + size[0], s_w : s_w + size[1]]


def tokens_of(region: Array, patch_size: int) -> Array:
    """Non-overlapping patches, row by row."""
    t, (height, width, _) = patch_size, region.shape
    corners = [(y, x) for y in range(0, height, t) for x in range(0, width, t)]
    return np.stack([region[y : y + t, x : x + t].transpose(2, 0, 1).ravel() for y, x in corners])


def eq4_coords(grid: tuple[int, int], s_h: int, s_w: int, patch_size: int) -> Array:
    """r(x, y) = (x + s_h / T, y + s_w / T) with x in [0, H/T - 1] and y in [0, W/T - 1]; s of RegionA is 0."""
    return np.array([[x + s_h / patch_size, y + s_w / patch_size] for x in range(grid[0]) for y in range(grid[1])])


def sincos(coords: Array, dim: int) -> Array:
    """Sin-cos of both coordinates: sin(column), cos(column), sin(row), cos(row), a quarter of the channels each."""
    out = np.zeros((len(coords), dim))
    for n, (row, column) in enumerate(coords):
        for i in range(dim // 4):
            frequency = 1 / 10000 ** (i / (dim / 4))
            out[n, i], out[n, dim // 4 + i] = math.sin(column * frequency), math.cos(column * frequency)
            out[n, dim // 2 + i] = math.sin(row * frequency)
            out[n, 3 * dim // 4 + i] = math.cos(row * frequency)
    return out


def eq5_target(patches: Array) -> Array:
    """x^_i = (x_i - m_i) / s_i, one mean and one standard deviation for all values of a patch."""
    return np.stack([(x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6) for x in patches])


def eq5_loss(patches: Array, predicted: Array) -> float:
    """sum_i ||x^_i - z_i||^2 / (T^2 C), over N, so that its size does not depend on the grid."""
    target = eq5_target(patches)
    return sum(((x - z) ** 2).sum() / len(x) for x, z in zip(target, predicted, strict=True)) / len(target)


def eq7_loss(target: Array, predicted: Array, beta: float) -> float:
    """Smooth L1, case by case, over N and the channels."""
    total = 0.0
    for d in np.abs(target - predicted).ravel():
        total += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    return total / target.size


def layer_norm(x: Array, weights: Weights | None = None, name: str = "", eps: float = 1e-6) -> Array:
    """LayerNorm over the last axis; without ``weights`` its non-affine form."""
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return normal if weights is None else normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: Weights, name: str) -> Array:
    """x W^T + b."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x: Array, weights: Weights, name: str, heads: int) -> Array:
    """Multi-head self-attention of one sample (T, D), head by head."""
    dim = x.shape[1]
    qkv, size, out = linear(x, weights, f"{name}.qkv"), dim // heads, []
    for h in range(heads):
        q, k, v = (qkv[:, part * dim + h * size : part * dim + (h + 1) * size] for part in range(3))
        scores = np.exp(q @ k.T / math.sqrt(size))
        out.append(scores / scores.sum(1, keepdims=True) @ v)
    return linear(np.concatenate(out, axis=1), weights, f"{name}.proj")


def vit_blocks(x: Array, weights: Weights, name: str, depth: int, heads: int) -> Array:
    """Pre-norm blocks with GELU in its exact form."""
    for i in range(depth):
        at = f"{name}.{i}"
        x = x + attention(layer_norm(x, weights, f"{at}.norm1"), weights, f"{at}.attn", heads)
        hidden = linear(layer_norm(x, weights, f"{at}.norm2"), weights, f"{at}.mlp.fc1")
        x = x + linear(0.5 * hidden * (1 + _erf(hidden / math.sqrt(2))), weights, f"{at}.mlp.fc2")
    return x


def encode(patches: Array, coords: Array, weights: Weights, depth: int, heads: int) -> Array:
    """E(V): class token and patches with their positions through all blocks, before the last LayerNorm."""
    kernel = weights["patch_embed.proj.weight"]
    tokens = patches @ kernel.reshape(len(kernel), -1).T + weights["patch_embed.proj.bias"]
    tokens = tokens + sincos(coords, tokens.shape[1])
    return vit_blocks(np.concatenate([weights["cls_token"][0], tokens]), weights, "blocks", depth, heads)


def decode(tokens: Array, coords: Array, weights: Weights, depth: int, heads: int, seen_at: Array | None = None) -> Array:
    """Visible tokens and N mask tokens with RegionB's positions through the blocks; the prediction at the mask tokens.

    As in MAE the visible tokens, but for the class token, are given the positions ``seen_at`` too.
    """
    visible = linear(tokens, weights, "embed")
    if seen_at is not None:
        visible = np.concatenate([visible[:1], visible[1:] + sincos(seen_at, visible.shape[1])])
    wanted = weights["mask_token"][0] + sincos(coords, visible.shape[1])
    out = vit_blocks(np.concatenate([visible, wanted]), weights, "blocks", depth, heads)
    return linear(layer_norm(out[-len(coords) :], weights, "norm"), weights, "head")


def below(weights: Weights, name: str) -> dict[str, Array]:
    """The weights of one submodule."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}

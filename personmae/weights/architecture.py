"""Size and variant of a Vision Transformer, read from the names and shapes of its tensors."""

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from personmae.errors import UserError
from personmae.model.vit import SIZES
from personmae.weights.families import depth_of, require_plain

HEAD_DIM: Final = 64  # of all encoders that are read. The number of heads is in no file
CLIP: Final = {"pre_norm": True, "activation": "quick_gelu", "patch_bias": False, "norm_eps": 1e-5}
_PART: Final = re.compile(
    r"(cls_token|pos_embed|reg_token|part_token[123]|part[123]_pos|cls_pos"
    r"|(patch_embed\.proj|norm|norm_pre|blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12]))\.(weight|bias))"
)


def is_part(name: str) -> bool:
    """Whether a tensor of this name is one of an encoder's."""
    return bool(_PART.fullmatch(name))


def read(tensors: Mapping[str, Tensor], where: str) -> tuple[str, int, dict[str, Any]]:
    """Size, side of a patch in pixels, and options beside those of a plain encoder.

    Raises:
        UserError: it is no plain Vision Transformer, or of no size that is here.
    """
    require_plain(tensors, where)
    if more := next((name for name in tensors if name.startswith("blocks.") and not is_part(name)), None):
        raise UserError(f"plain blocks of norms, attention and an MLP are required. {where} has {more}")
    size, patch_size = _size(tensors, where), _patch_size(tensors["patch_embed.proj.weight"], where)
    options: dict[str, Any] = dict(CLIP) if "norm_pre.weight" in tensors else {}
    if "part_token1" in tensors:
        options["num_registers"] = 3
    elif "reg_token" in tensors:
        options["num_registers"] = tensors["reg_token"].shape[1]
    return size, patch_size, options


def size_of(width: int, depth: int, num_heads: int) -> str | None:
    """The name of an encoder so wide and deep and with so many heads, or None."""
    shape = {"embed_dim": width, "depth": depth, "num_heads": num_heads}
    return next((name for name, size in SIZES.items() if size == shape), None)


def _size(tensors: Mapping[str, Tensor], where: str) -> str:
    width, depth = tensors["patch_embed.proj.weight"].shape[0], depth_of(tensors)
    size = size_of(width, depth, width // HEAD_DIM)
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in tensors else 4 * width
    if size is None or hidden != 4 * width:
        named = [f"{name} {of['embed_dim']} and {of['depth']}" for name, of in SIZES.items() if name != "micro"]
        raise UserError(
            f"an encoder of a known width and depth is required ({', '.join(named)}, with an MLP of 4 widths). {where} has "
            f"{width} and {depth}, with an MLP of {hidden / max(width, 1):g} widths"
        )
    return size


def _patch_size(weight: Tensor, where: str) -> int:
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        shape = "x".join(map(str, weight.shape))
        raise UserError(f"square patches of three colours are required. {where} has patch_embed.proj.weight of {shape}")
    return weight.shape[2]

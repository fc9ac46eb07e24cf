"""Conversion of old weights, from before positions had MAE's order of axes: the first half of their channels was y, now x.

Swapping the halves of a position is a permutation P of the residual stream. A network with weights permuted alike gives the
same tokens up to P, since norms, attention and activations do not depend on the order of channels. So old weights are
permuted once when they are read: writers to the stream by their rows, readers by their columns. Moments of an optimizer
belong to single numbers and are permuted with them.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from personmae.model.vit import SIZES

# Which axes of a tensor run over channels of the residual stream, by the end of its name. A stream is as wide as the tensor;
# heads of fine-tuning may have the encoder's more than once, one after the other.
_AXES: Final = [
    (re.compile(rf"(^|\.)({pattern})$"), axes)
    for pattern, axes in (
        (r"(patch_embed\.proj|attn\.proj|mlp\.fc2|norm[12]?)\.(weight|bias)", (0,)),
        (r"(attn\.qkv|mlp\.fc1)\.weight", (1,)),
        (r"(cls|mask)_token", (2,)),
        (r"(pixel|feature)_decoder\.embed\.weight|feature_decoder\.head\.weight", (0, 1)),  # from one stream to another
        (r"(pixel|feature)_decoder\.embed\.bias|feature_decoder\.head\.bias", (0,)),
        (r"pixel_decoder\.head\.weight|head\.embeds\.\d+\.proj\.weight", (1,)),
        (r"head\.bn\.(weight|bias|running_mean|running_var)", (0,)),
        (r"head\.classifier\.weight|centroids", (1,)),
    )
]
_OF_A_HEAD: Final = re.compile(r"(^|\.)(head\.(bn|classifier)\..*|centroids)$")


def x_first(tensors: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by parameter name in the order x first, out of those in the order y first. And back, for it is its own inverse.

    ``model`` are the settings that travel with the weights, of which ``size`` tells the width of the encoder.
    """
    width = SIZES[model["size"]]["embed_dim"]
    return {name: _permuted(name, tensor, width) for name, tensor in tensors.items()}


def _permuted(name: str, tensor: Tensor, width: int) -> Tensor:
    for axis in next((axes for pattern, axes in _AXES if pattern.search(name)), ()):
        tensor = _halves_swapped(tensor, axis, width if _OF_A_HEAD.search(name) else tensor.shape[axis])
    return tensor


def _halves_swapped(tensor: Tensor, axis: int, width: int) -> Tensor:
    """Each stretch of ``width`` channels with its second half first."""
    return tensor.unflatten(axis, (-1, 2, width // 2)).flip(axis + 1).flatten(axis, axis + 2)

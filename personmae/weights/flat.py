"""What a plain Vision Transformer of other libraries can hold of a model: tensors by timm's names, positions written out.

Such a network has one table of positions, so it is for one image size. It ends with a norm and takes the class token or the
mean of the patch tokens. A normalisation after that mean can be put into the norm: both scale and shift each channel.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personmae.model.vit import Attention, Mlp
from personmae.reid.heads import BNNeck, Neck, ReIDModel, encoder_weights
from personmae.weights.encoder import Encoder

_EPS: Final = 1e-6
PlainPool = Literal["token", "avg"]  # timm's names: the class token, the mean of the patch tokens


@dataclass(frozen=True, slots=True)
class FlatViT:
    """A plain ViT. ``whole`` says whether ``pool`` of its tokens is the model's feature, but for its length.

    Else it is the encoder of a model whose head it cannot hold, and ``why`` says what is left out.
    """

    tensors: dict[str, Tensor]
    img_size: tuple[int, int]
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    pool: PlainPool
    whole: bool
    why: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size


def flatten(encoder: Encoder) -> FlatViT:
    """The plain ViT of a model, in fp32 on the CPU. ``lacks`` must have found nothing."""
    network: ReIDModel = encoder.model.network
    pool, why = _plain_pool(network.head)
    tensors = encoder_weights({name: tensor.detach().cpu() for name, tensor in network.state_dict().items()})
    if not why and isinstance(norm := getattr(network.head, "bn", None), nn.BatchNorm1d) and not _before_norm(network.head):
        tensors |= _folded(tensors["norm.weight"], tensors["norm.bias"], norm)
    size = encoder.config["size"]
    tensors["pos_embed"] = positions(network, size)
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    heads = next(layer.num_heads for layer in network.modules() if isinstance(layer, Attention))
    return FlatViT(
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
        img_size=size,
        patch_size=network.encoder.patch_size,
        dim=network.encoder.embed_dim,
        depth=depth,
        num_heads=heads,
        pool=pool,
        whole=not why,
        why=why,
    )


def _plain_pool(head: nn.Module) -> tuple[PlainPool, str]:
    """How a plain ViT pools for the head's feature, and what it lacks of it."""
    if isinstance(head, BNNeck | Neck):
        if head.pool in ("cls", "mean"):
            return ("token" if head.pool == "cls" else "avg"), ""
        return "avg", f"the head's pooling ({head.pool})"
    return "avg", f"the head ({type(head).__name__})"


def _before_norm(head: nn.Module) -> bool:
    return isinstance(head, BNNeck) and head.neck_feat == "before"


def _folded(weight: Tensor, bias: Tensor, norm: nn.BatchNorm1d) -> dict[str, Tensor]:
    """The final norm with the batch normalisation of an evaluation behind it: y = (w x + b - mean) scale + beta."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale = norm.weight.detach().cpu().double() / (var + norm.eps).sqrt()
    shift = (bias.double() - mean) * scale + norm.bias.detach().cpu().double()
    return {"norm.weight": (weight.double() * scale).float(), "norm.bias": shift.float()}


def lacks(encoder: Encoder) -> str:
    """What of an encoder no plain ViT has, in words. Empty where there is nothing."""
    network = encoder.model.network.encoder
    mlp = next(layer for layer in network.modules() if isinstance(layer, Mlp))
    norm = next(layer for layer in network.modules() if isinstance(layer, nn.LayerNorm))
    found = {
        "overlapping patches": network.stride != network.patch_size,
        "registers": bool(network.num_registers),
        "a norm before the blocks": network.norm_pre is not None,
        f"the activation {mlp.activation}": mlp.activation != "gelu",
        f"norms with eps {norm.eps:g}": norm.eps != _EPS,
        "a patch projection without bias": network.patch_embed.proj.bias is None,
    }
    return ", ".join(name for name, is_so in found.items() if is_so)


def positions(network: ReIDModel, img_size: tuple[int, int]) -> Float[Tensor, "1 1+L D"]:
    """What the encoder adds to the patches of an image of (H, W) = ``img_size``, behind nothing for the class token."""
    encoder = network.encoder
    with torch.no_grad():
        of_patches = encoder.positions(encoder.coords(img_size, encoder.cls_token.device)).cpu().float()
    return torch.cat([torch.zeros(1, encoder.embed_dim), of_patches])[None]


def reference(encoder: Encoder, flat: FlatViT) -> nn.Module:
    """What the plain ViT must agree with, on normalised images: the model's feature, or the mean token of its encoder."""
    return encoder.model if flat.whole else MeanToken(encoder)


class MeanToken(nn.Module):
    """The mean patch token (B, D) of the encoder below a head, that of MGN's whole-person branch."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.network: ReIDModel = encoder.model.network

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        tokens, _ = self.network.encode(images)
        branches: Any = getattr(self.network.head, "branches", None)
        return (branches[0](tokens) if branches is not None else tokens)[:, 1:].mean(dim=1)

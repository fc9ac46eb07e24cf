"""The Vision Transformer of the whole system. Its state-dict names are timm's.

Positions are an argument, not a buffer. A token carries its real-valued (y, x) coordinate in units of patches, so shifted
regions, visible subsets and other input sizes need no special case. Encoders of other projects may have a learned table of
positions, which is sampled at these coordinates. They may have registers, overlapping patches and CLIP's variants too.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

SIZES: Final[dict[str, dict[str, Any]]] = {
    "micro": {"embed_dim": 128, "depth": 4, "num_heads": 4},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


ActivationCheckpointing = Literal["none", "selective", "full"]
Activation = Literal["gelu", "quick_gelu"]
_ATEN: Final = torch.ops.aten
# What ``selective`` keeps: outputs of the matrix products and of attention, which are dear to compute again.
_KEPT: Final = [
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default),
    *(_ATEN._scaled_dot_product_flash_attention.default, _ATEN._scaled_dot_product_efficient_attention.default),
    *(_ATEN._scaled_dot_product_cudnn_attention.default, _ATEN._scaled_dot_product_flash_attention_for_cpu.default),
]


def patchify(images: Real[Tensor, "B C H W"], patch_size: int, stride: int | None = None) -> Real[Tensor, "B L P"]:
    """Cut images into patches, row by row. A patch is flattened as (C, y, x), the order of a convolution's weight.

    Patches overlap where ``stride``, the step from one to the next, is below ``patch_size``. They touch by default.
    """
    if stride and stride != patch_size:
        windows = images.unfold(2, patch_size, stride).unfold(3, patch_size, stride)  # (B, C, h, w, y, x)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    b, c, height, width = images.shape
    h, w = height // patch_size, width // patch_size
    patches = images.reshape(b, c, h, patch_size, w, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * patch_size**2)


def unpatchify(patches: Float[Tensor, "B L P"], grid: tuple[int, int], patch_size: int) -> Float[Tensor, "B C H W"]:
    """Invert ``patchify``. ``grid`` is (h, w) in patches."""
    b, _, p = patches.shape
    h, w = grid
    c = p // patch_size**2
    images = patches.reshape(b, h, w, c, patch_size, patch_size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h * patch_size, w * patch_size)


def grid_coords(grid: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "L 2"]:
    """(y, x) of every patch of an unshifted region, row by row, in units of patches."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in grid), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=-1)


def rescale_coords(
    coords: Float[Tensor, "L 2"],
    img_size: tuple[int, int],
    patch_size: int,
    stride: int,
    trained_size: tuple[int, int] | None,
    trained_stride: int | None,
) -> Float[Tensor, "L 2"]:
    """Coordinates of patches in an image as coordinates in images that positions were trained on.

    Sizes are (H, W), strides the pixels from one patch to the next. The middle of a patch keeps its place in the image.
    """
    trained_size, trained_stride = trained_size or img_size, trained_stride or patch_size
    if (trained_size, trained_stride) == (img_size, stride):
        return coords
    scale = torch.tensor(trained_size, device=coords.device) / torch.tensor(img_size, device=coords.device)
    return ((coords * (stride / patch_size) + 0.5) * scale - 0.5) * (patch_size / trained_stride)


def sincos_embedding(coords: Float[Tensor, "*N 2"], dim: int) -> Float[Tensor, "*N D"]:
    """Fixed 2-D sin-cos embedding of real coordinates (y, x): the first half of the channels is x, the second y, as in MAE.

    Each half is [sin(c w_i), cos(c w_i)] with w_i = 10000^(-4i/dim), i = 0 ... dim/4 - 1. ``dim`` is a multiple of 4.
    """
    exponent = torch.arange(dim // 4, dtype=torch.float32, device=coords.device) / (dim / 4)
    angle = coords.float().flip(-1)[..., None] * (10000.0**-exponent)  # (*N, 2, dim/4)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sample_table(table: Float[Tensor, "1 L D"], grid: tuple[int, int], coords: Float[Tensor, "*N 2"]) -> Float[Tensor, "*N D"]:
    """Learned positions of a ``grid`` (h, w) at real coordinates (y, x), in fp32.

    Between four positions it is bilinear, at a position exactly that one, and outside the grid the nearest one of its border.
    """
    y, x = (_shares(coords[..., axis].float(), size) for axis, size in enumerate(grid))
    shares = (y[..., :, None] * x[..., None, :]).flatten(-2)  # (*N, L)
    with torch.autocast(coords.device.type, enabled=False):
        return shares @ table[0].float()


def _shares(coords: Float[Tensor, "*N"], size: int) -> Float[Tensor, "*N size"]:
    """How much of each of ``size`` entries in a row a coordinate takes: all of one, or parts of two neighbours."""
    entries = torch.arange(size, dtype=coords.dtype, device=coords.device)
    return (1 - (coords.clamp(0, size - 1)[..., None] - entries).abs()).clamp(min=0)


def take_tokens(tokens: Real[Tensor, "B L D"], ids: Int[Tensor, "B K"]) -> Real[Tensor, "B K D"]:
    """Select the tokens with the given indices from each sample."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def plain_attention(
    q: Float[Tensor, "B h M d"], k: Float[Tensor, "B h L d"], v: Float[Tensor, "B h L d"]
) -> Float[Tensor, "B h M d"]:
    """Attention written out. The softmax is taken in fp32."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.float().softmax(dim=-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B L D"], num_out: int | None = None) -> Float[Tensor, "B M D"]:
        b, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q if num_out is None else q[:, :, -num_out:]
        # On CPU the flash backward cost half of a whole step at these lengths; docs/performance.md has the ratio.
        attend = F.scaled_dot_product_attention if x.is_cuda else plain_attention
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, -1, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, or CLIP's approximation of it."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu"):
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        hidden = self.fc1(x)
        return self.fc2(F.gelu(hidden) if self.activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden))


class Block(nn.Module):
    """Pre-norm transformer block. ``drop_path`` is the chance that a sample skips a residual branch in training."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        activation: Activation = "gelu",
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)
        self.drop_path = drop_path
        self.drop_share: tuple[int, slice] | None = None

    def forward(self, x: Float[Tensor, "B L D"], num_out: int | None = None) -> Float[Tensor, "B M D"]:
        """With ``num_out`` only that number of last tokens is returned. They attend to all tokens."""
        wanted = x if num_out is None else x[:, -num_out:]
        x = wanted + self._dropped(self.attn(self.norm1(x), num_out))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        if not self.training or self.drop_path == 0.0:
            return branch
        size, rows = self.drop_share or (len(branch), slice(None))
        kept = (torch.rand(size, 1, 1, device=branch.device) >= self.drop_path)[rows]
        return branch * kept.to(branch.dtype) / (1.0 - self.drop_path)


def share_drop_path(module: nn.Module, batch_size: int, rows: slice) -> None:
    """Let all blocks of a module draw for a batch of ``batch_size`` and take ``rows`` of it.

    With one seed on all ranks, what is dropped then does not depend on their number.
    """
    for block in module.modules():
        if isinstance(block, Block):
            block.drop_share = batch_size, rows


class PatchEmbed(nn.Module):
    """Linear projection of flattened patches, stored as the convolution that timm has."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, patches: Float[Tensor, "B L P"]) -> Float[Tensor, "B L D"]:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """The encoder E of Eq. (3) and Eq. (6): patches and their coordinates to tokens, the class token first.

    What follows ``stride`` is for encoders of other projects. ``table`` is the grid (h, w) of learned positions, which take
    the place of the fixed ones. ``num_registers`` more tokens without a place take part behind the patches and are not
    returned, but where the last blocks are taken over by a head (``keeps_registers``). ``pre_norm``, ``activation``,
    ``patch_bias`` and ``norm_eps`` are CLIP's choices.

    ``trained_size`` (H, W) and ``trained_stride`` in pixels are of the images that its positions belong to, where they are
    not those that it sees (``coords``).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        stride: int | None = None,
        table: tuple[int, int] | None = None,
        num_registers: int = 0,
        pre_norm: bool = False,
        activation: Activation = "gelu",
        patch_bias: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.embed_dim, self.patch_size, self.stride = embed_dim, patch_size, stride or patch_size
        self.table, self.num_registers, self.keeps_registers = table, num_registers, False
        self.trained_size: tuple[int, int] | None = None
        self.trained_stride: int | None = None
        self.activation_checkpointing: ActivationCheckpointing = (
            "none"  # what the backward pass computes again instead of keeping it
        )
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_bias)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, table[0] * table[1], embed_dim)) if table else None
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else None
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        shared: dict[str, Any] = {"mlp_ratio": mlp_ratio, "activation": activation, "norm_eps": norm_eps}
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop_path=rate, **shared) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        init_weights(self)

    def grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w): how many patches an image of (H, W) pixels is cut into."""
        h, w = ((side - self.patch_size) // self.stride + 1 for side in img_size)
        return h, w

    def coords(self, img_size: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "L 2"]:
        """Where the patches of an image of (H, W) pixels lie, row by row, in the encoder's own positions.

        In an image of another size or stride than those of its training the middle of a patch keeps its place.
        """
        coords = grid_coords(self.grid(img_size), device)
        return rescale_coords(coords, img_size, self.patch_size, self.stride, self.trained_size, self.trained_stride)

    def embed(
        self,
        patches: Float[Tensor, "B K P"],
        coords: Float[Tensor, "B K 2"],
    ) -> Float[Tensor, "B T D"]:
        """Patch embedding plus position, in fp32 also under autocast: bf16 would lose a shift by a sixteenth of a patch.

        The class token comes first and carries no position, and neither do registers, which come last.
        """
        tokens = self.patch_embed(patches).float() + self.positions(coords)
        others = [token.expand(tokens.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = torch.cat([others[0], tokens, *others[1:]], dim=1)
        return tokens if self.norm_pre is None else self.norm_pre(tokens)

    def positions(self, coords: Float[Tensor, "*N 2"]) -> Float[Tensor, "*N D"]:
        """Embedding of (y, x): fixed sines and cosines, or the learned table between its entries."""
        if self.pos_embed is None or self.table is None:
            return sincos_embedding(coords, self.embed_dim)
        return sample_table(self.pos_embed, self.table, coords)

    def forward_features(
        self,
        patches: Float[Tensor, "B L P"],
        coords: Float[Tensor, "B L 2"],
        ids_keep: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Tokens after the last block, before the final LayerNorm. Only ``ids_keep`` is encoded where it is given."""
        if ids_keep is not None:
            patches, coords = take_tokens(patches, ids_keep), take_tokens(coords, ids_keep)
        recomputed: ActivationCheckpointing = self.activation_checkpointing if self.training else "none"
        tokens = run_blocks(self.blocks, self.embed(patches, coords), recomputed)
        return tokens[:, : -self.num_registers] if self.num_registers and not self.keeps_registers else tokens

    def forward(
        self,
        patches: Float[Tensor, "B L P"],
        coords: Float[Tensor, "B L 2"],
        ids_keep: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        return self.norm(self.forward_features(patches, coords, ids_keep))


def run_blocks(
    blocks: nn.ModuleList,
    x: Float[Tensor, "B L D"],
    activation_checkpointing: ActivationCheckpointing = "none",
    num_out: int | None = None,
) -> Float[Tensor, "B M D"]:
    """Apply blocks in order. With ``num_out`` the last block computes only that number of last tokens.

    ``activation_checkpointing`` trades stored activations for a second forward pass: ``full`` keeps the input of each block
    alone, ``selective`` also what is expensive to compute.
    """
    for i, block in enumerate(blocks, 1):
        inputs = x, num_out if i == len(blocks) else None
        if activation_checkpointing == "none":
            x = block(*inputs)
        elif activation_checkpointing == "full":
            x = checkpoint(block, *inputs, use_reentrant=False)
        else:
            kept = partial(create_selective_checkpoint_contexts, _KEPT)
            x = checkpoint(block, *inputs, use_reentrant=False, context_fn=kept)
    return x


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers (the patch projection as one), zero biases, N(0, 0.02) tokens, unit norms."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, parameter in module.named_parameters():
        if name.endswith(("_token", "pos_embed")):
            nn.init.normal_(parameter, std=0.02)


def trained_size(model_settings: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) that an encoder was trained on, from the settings in its checkpoint. Its own ``img_size`` by default."""
    height, width = model_settings.get("trained_size") or model_settings["img_size"]
    return height, width


def build_encoder(model_settings: Mapping[str, Any], *, drop_path_rate: float = 0.0) -> VisionTransformer:
    """The encoder that the settings in a checkpoint describe, with new weights.

    ``encoder`` among them are the options of an encoder that came from another project.
    """
    options = dict(model_settings.get("encoder") or {})
    if options.get("table"):
        options["table"] = tuple(options["table"])
    size, patch_size, stride = SIZES[model_settings["size"]], model_settings["patch_size"], model_settings.get("stride")
    encoder = VisionTransformer(**size, patch_size=patch_size, stride=stride, drop_path_rate=drop_path_rate, **options)
    encoder.trained_size, encoder.trained_stride = trained_size(model_settings), model_settings.get("trained_stride")
    return encoder

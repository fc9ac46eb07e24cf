"""PersonMAE: from the inputs of a batch to both losses (Sec. III). Each equation is named at its code."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from personmae.model.identity import IdentityHead, identity_loss
from personmae.model.inputs import Batch
from personmae.model.vit import (
    SIZES,
    Block,
    VisionTransformer,
    init_weights,
    run_blocks,
    sincos_embedding,
)

Reduction = Literal["mean", "sum"]  # of the feature loss, over channels


class Decoder(nn.Module):
    """Predicts all of RegionB from the encoded visible tokens: mask tokens with positions, ViT blocks, one linear layer.

    Only the mask tokens carry a position. The visible tokens keep the one they were encoded with (Sec. III-E). As MAE has it
    they are given theirs once more: that is what ``coords_a`` is for. The class token never has one.
    """

    def __init__(self, encoder_dim: int, dim: int, depth: int, out_dim: int):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, max(1, dim // 64)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)
        init_weights(self)

    def forward(
        self,
        tokens: Float[Tensor, "B T D"],
        coords_b: Float[Tensor, "B L 2"],
        coords_a: Float[Tensor, "B K 2"] | None = None,
    ) -> Float[Tensor, "B L out_dim"]:
        dim = self.mask_token.shape[-1]
        visible = self.embed(tokens).float()  # like the positions; see VisionTransformer.embed
        if coords_a is not None:
            visible = torch.cat([visible[:, :1], visible[:, 1:] + sincos_embedding(coords_a, dim)], dim=1)
        wanted = self.mask_token + sincos_embedding(coords_b, dim)
        x = run_blocks(self.blocks, torch.cat([visible, wanted], dim=1), num_out=coords_b.shape[1])
        return self.head(self.norm(x))


def pixel_target(patches: Float[Tensor, "B L P"]) -> Float[Tensor, "B L P"]:
    """Eq. (5), left: each patch minus its mean, over its standard deviation (unbiased, variance + 1e-6)."""
    # A layer norm, but for its variance, which is the biased one.
    size = patches.shape[-1]
    biased = (size - 1) / size
    return F.layer_norm(patches.float(), (size,), eps=1e-6 * biased) * biased**0.5


def pixel_loss(pred: Float[Tensor, "B L P"], target: Float[Tensor, "B L P"]) -> Float[Tensor, ""]:
    """Eq. (5): squared error to the normalised patches, as a mean over patches, pixels and samples."""
    return F.mse_loss(pred.float(), target)


def feature_loss(
    pred: Float[Tensor, "B L D"], target: Float[Tensor, "B L D"], beta: float, reduction: Reduction = "mean"
) -> Float[Tensor, ""]:
    """Eq. (7): smooth L1 to the teacher's features, as a mean over patches and samples, and a mean or a sum over channels."""
    loss = F.smooth_l1_loss(pred.float(), target.float(), beta=beta)
    return loss * target.shape[-1] if reduction == "sum" else loss


def spread_over_images(target: Float[Tensor, "B L D"]) -> Float[Tensor, ""]:
    """Standard deviation of the features at a position, by the mean variance over images. It is 0 for a collapsed teacher.

    The unbiased variance, whose mean does not depend on how many images are looked at together. Of one image it is 0.
    """
    centred = target - target.mean(dim=0)
    return (centred.square().sum(dim=0) / max(1, len(target) - 1)).mean().sqrt()


class PersonMAE(nn.Module):
    """The online encoder, both decoders and both losses: one ``forward(batch)`` holds the whole loss computation.

    ``feature_weight`` is lambda of Eq. (8). At 0 there is no feature decoder. ``identity_weight`` is that of the loss on both
    regions' class tokens, which the paper does not have (``identity.py``). At 0 there is no such head. With both at 0 no
    target is needed. ``encoder_options`` are those of an encoder that came from another project.
    """

    def __init__(
        self,
        *,
        size: str,
        patch_size: int = 16,
        decoder_depth: int = 2,
        pixel_dim: int | None = None,
        feature_dim: int | None = None,
        visible_positions: bool = False,
        feature_weight: float = 1.0,
        beta: float = 2.0,
        reduction: Reduction = "mean",
        identity_weight: float = 0.0,
        identity_dim: int = 256,
        identity_group: int = 64,
        encoder_options: Mapping[str, Any] | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.feature_weight, self.beta, self.compute_dtype = feature_weight, beta, compute_dtype
        self.reduction: Reduction = reduction
        self.visible_positions, self.identity_weight, self.identity_group = visible_positions, identity_weight, identity_group
        self.encoder = VisionTransformer(**SIZES[size], patch_size=patch_size, **encoder_options or {})
        dim = self.encoder.embed_dim
        self.pixel_decoder = Decoder(dim, pixel_dim or min(512, dim), decoder_depth, 3 * patch_size**2)
        self.feature_decoder = Decoder(dim, feature_dim or dim, decoder_depth, dim) if feature_weight > 0 else None
        self.identity_head = IdentityHead(dim, identity_dim) if identity_weight > 0 else None

    @property
    def needs_teacher(self) -> bool:
        """Whether a batch must have the teacher's ``target``."""
        return self.feature_decoder is not None or self.identity_head is not None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one batch of ``cut_batch``, with the teacher's ``target`` (B, L, D) in it where one is needed.

        With an identity head the target is (B, 1 + L, D), the class token first. A batch may bring its ``pixel_target``
        (B, L, P) along, as the kernel's does.
        """
        coords_b, coords_a = batch["coords_b"], batch["coords_a"] if self.visible_positions else None
        with torch.autocast(batch["patches_a"].device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            tokens = self.encoder(batch["patches_a"], batch["coords_a"])  # Eq. (3), normalised
            pixels = self.pixel_decoder(tokens, coords_b, coords_a)  # Z_b
            features = self.feature_decoder(tokens, coords_b, coords_a) if self.feature_decoder else None  # Y_b
            embeddings = None
            if self.identity_head:  # both at once: one call of a module for each of an engine's hooks
                embeddings = self.identity_head(torch.cat([tokens[:, 0], batch["target"][:, 0].to(tokens.dtype)]))
        loss_p = pixel_loss(pixels, batch["pixel_target"] if "pixel_target" in batch else pixel_target(batch["patches_b"]))
        if not self.needs_teacher:
            return {"loss": loss_p, "pixel_loss": loss_p}
        target, parts = batch["target"] if embeddings is None else batch["target"][:, 1:], {"pixel_loss": loss_p}
        loss = loss_p
        if features is not None:
            parts["feature_loss"] = feature_loss(features, target, self.beta, self.reduction)
            loss = loss + self.feature_weight * parts["feature_loss"]  # Eq. (8)
        if embeddings is not None:
            ours, theirs = embeddings.chunk(2)
            parts["identity_loss"] = identity_loss(ours, theirs, self.identity_group)
            loss = loss + self.identity_weight * parts["identity_loss"]
        return {"loss": loss, **parts, "target_std": spread_over_images(target)}

    def predict_pixels(self, batch: Batch) -> Float[Tensor, "B L P"]:
        """Z_b: the predicted normalised patches of RegionB."""
        tokens = self.encoder(batch["patches_a"], batch["coords_a"])
        return self.pixel_decoder(tokens, batch["coords_b"], batch["coords_a"] if self.visible_positions else None)

"""The same pre-training the usual way, as a sound repository of the MAE family has it: what ours is compared with.

timm's blocks, run eagerly under autocast; images read by PIL, cropped and normalised in the workers of a DataLoader; masks
drawn block by block in Python; the teacher averaged parameter by parameter; the loss read in every step. The sizes, the losses
and the names in the state dict are ours, so that both can be given the same weights: ``tests/integration/test_peers.py`` holds
losses, gradients and images equal.
"""

import copy
import math
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from jaxtyping import Bool, Float, Int
from PIL import Image
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from personmae.model.inputs import RegionSpec
from personmae.model.vit import SIZES

TOKENS = ["encoder.cls_token", "pixel_decoder.mask_token", "feature_decoder.mask_token"]  # without weight decay


class Sample(NamedTuple):
    """What the DataLoader gives; a batch of it has one more dimension in front."""

    region_a: Float[Tensor, "... 3 H W"]
    region_b: Float[Tensor, "... 3 H W"]
    ids_keep: Int[Tensor, "... K"]  # ascending indices of RegionA's visible patches
    shift: Int[Tensor, "... 2"]  # (s_h, s_w) of RegionB, in pixels


def draw_mask(grid: tuple[int, int], num_hidden: int, min_block: int) -> Bool[np.ndarray, "h w"]:
    """Hide blocks until ``num_hidden`` patches are hidden, ten tries for each as BEiT has it; single ones fill the rest."""
    mask = np.zeros(grid, bool)
    while mask.sum() < num_hidden and any(_add_block(mask, num_hidden, min_block) for _ in range(10)):
        pass
    missing = num_hidden - int(mask.sum())
    mask.flat[random.sample(np.flatnonzero(~mask).tolist(), missing)] = True
    return mask


def _add_block(mask: Bool[np.ndarray, "h w"], num_hidden: int, min_block: int) -> bool:
    """Hide one more block, unless it does not fit, hides nothing new or hides too much."""
    area = random.uniform(min_block, max(min_block, num_hidden - mask.sum()))
    aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
    block_h, block_w = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
    if block_h > mask.shape[0] or block_w > mask.shape[1]:
        return False
    top, left = random.randint(0, mask.shape[0] - block_h), random.randint(0, mask.shape[1] - block_w)
    block = mask[top : top + block_h, left : left + block_w]
    if not 0 < (~block).sum() <= num_hidden - mask.sum():
        return False
    block[:] = True
    return True


def cut(
    image: Any, box: tuple[int, int, int, int], flip: bool, scale: int, shift: tuple[int, int], spec: RegionSpec
) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, "3 H W"]]:
    """RegionA and RegionB of a PIL image; ``box`` is (top, left, height, width) of the global crop in pixels."""
    height, width = spec.img_size
    size = [height + scale, width + scale // 2]
    crop = TF.resized_crop(image, *box, size, InterpolationMode.BICUBIC)
    if flip:
        crop = TF.hflip(crop)
    pixels = TF.normalize(TF.to_tensor(crop), list(spec.mean), list(spec.std))  # pyright: ignore[reportArgumentType]
    top, left = shift
    return pixels[:, :height, :width], pixels[:, top : top + height, left : left + width]


class Crops(Dataset[Sample]):
    """A folder of JPEGs, so many times over, each cut anew whenever it is asked for."""

    def __init__(self, folder: Path, spec: RegionSpec, repeats: int = 1):
        self.paths, self.spec, self.repeats = sorted(folder.iterdir()), spec, repeats
        self.num_hidden = round(spec.grid[0] * spec.grid[1] * spec.mask_ratio)

    def __len__(self) -> int:
        return self.repeats * len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        spec = self.spec
        image: Any = Image.open(self.paths[index % len(self.paths)]).convert("RGB")
        box = RandomResizedCrop.get_params(image, list(spec.crop_scale), list(spec.crop_ratio))
        scale = random.randint(0, spec.max_shift)
        shift = random.randint(0, scale), random.randint(0, scale // 2)
        region_a, region_b = cut(image, box, random.random() < spec.flip_prob, scale, shift, spec)
        mask = draw_mask(spec.grid, self.num_hidden, spec.min_block)
        return Sample(region_a, region_b, torch.from_numpy(np.flatnonzero(~mask)), torch.tensor(shift))


def load(
    folder: Path, spec: RegionSpec, batch_size: int, num_workers: int, *, pin_memory: bool, num_batches: int = 1
) -> DataLoader[Sample]:
    """Shuffled batches of a folder of JPEGs, ``num_batches`` or more in an epoch: at its end the workers begin anew."""
    repeats = math.ceil(num_batches * batch_size / sum(1 for _ in folder.iterdir()))
    return DataLoader(
        Crops(folder, spec, repeats),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def sincos(coords: Float[Tensor, "*N 2"], dim: int) -> Float[Tensor, "*N D"]:
    """2-D sin-cos positions of (y, x) in units of patches: half of the channels each, x first."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32, device=coords.device) / (dim // 4))
    y, x = coords[..., 0, None] * omega, coords[..., 1, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


def grid_coords(grid: tuple[int, int]) -> Float[Tensor, "L 2"]:
    """(y, x) of every patch, row by row."""
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return torch.from_numpy(np.stack([y.ravel(), x.ravel()], axis=-1)).float()


def blocks(dim: int, num_heads: int, depth: int) -> nn.ModuleList:
    """timm's blocks as MAE makes them."""
    norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(Block(dim, num_heads, 4.0, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))


class Encoder(nn.Module):
    """A ViT that embeds the whole image, then takes the visible tokens."""

    def __init__(self, spec: RegionSpec, *, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        self.patch_embed = PatchEmbed(spec.img_size, spec.patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos(grid_coords(spec.grid), embed_dim)[None], persistent=False)
        self.blocks = blocks(embed_dim, num_heads, depth)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward_features(
        self, images: Float[Tensor, "B 3 H W"], ids_keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.patch_embed(images) + self.pos_embed
        if ids_keep is not None:
            x = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, images: Float[Tensor, "B 3 H W"], ids_keep: Int[Tensor, "B K"]) -> Float[Tensor, "B T D"]:
        return self.norm(self.forward_features(images, ids_keep))


class Decoder(nn.Module):
    """Mask tokens with RegionB's positions behind the encoded ones."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, out_dim: int):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = blocks(dim, max(1, dim // 64), depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, tokens: Float[Tensor, "B T D"], coords: Float[Tensor, "B L 2"]) -> Float[Tensor, "B L out_dim"]:
        mask_tokens = self.mask_token.repeat(len(tokens), coords.shape[1], 1) + sincos(coords, self.mask_token.shape[-1])
        x = torch.cat([self.embed(tokens), mask_tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, tokens.shape[1] :])


class UsualPersonMAE(nn.Module):
    """Encoder, both decoders, both losses."""

    def __init__(self, size: str, spec: RegionSpec, *, decoder_depth: int = 2, beta: float = 2.0):
        super().__init__()
        self.patch_size, self.beta = spec.patch_size, beta
        self.encoder = Encoder(spec, **SIZES[size])
        dim = SIZES[size]["embed_dim"]
        self.pixel_decoder = Decoder(dim, min(512, dim), decoder_depth, 3 * spec.patch_size**2)
        self.feature_decoder = Decoder(dim, dim, decoder_depth, dim)
        self.register_buffer("coords", grid_coords(spec.grid)[None], persistent=False)
        self.coords: Tensor

    def patchify(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L P"]:
        b, c, height, width = images.shape
        h, w, p = height // self.patch_size, width // self.patch_size, self.patch_size
        return torch.einsum("nchpwq->nhwcpq", images.reshape(b, c, h, p, w, p)).reshape(b, h * w, c * p**2)

    def forward(
        self,
        region_a: Float[Tensor, "B 3 H W"],
        region_b: Float[Tensor, "B 3 H W"],
        ids_keep: Int[Tensor, "B K"],
        shift: Int[Tensor, "B 2"],
        features: Float[Tensor, "B L D"],  # the teacher's
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The pixel loss and the feature loss."""
        tokens = self.encoder(region_a, ids_keep)
        coords = self.coords + shift[:, None] / self.patch_size
        target = self.patchify(region_b)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
        pixel_loss = ((self.pixel_decoder(tokens, coords) - target) ** 2).mean()
        return pixel_loss, F.smooth_l1_loss(self.feature_decoder(tokens, coords).float(), features, beta=self.beta)


class Trainer:
    """The model, its teacher, its optimizer, and the body of the loop."""

    def __init__(
        self,
        model: UsualPersonMAE,
        *,
        dtype: torch.dtype,
        betas: tuple[float, float],
        weight_decay: float,
        compile: bool = False,
    ):
        self.model, self.teacher, self.dtype = model, copy.deepcopy(model.encoder).requires_grad_(False), dtype
        self.device = next(model.parameters()).device
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=TOKENS)
        self.optimizer = torch.optim.AdamW(groups, betas=betas)
        self.losses: Any = torch.compile(model) if compile else model
        self.features: Any = torch.compile(self.teacher.forward_features) if compile else self.teacher.forward_features

    def step(self, batch: Sample, lr: float, momentum: float) -> float:
        """One update; returns the loss.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        region_a, region_b, ids_keep, shift = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            with torch.no_grad():
                features = self.features(region_b)[:, 1:].float()
                features = F.layer_norm(features, features.shape[-1:])
            pixel_loss, feature_loss = self.losses(region_a, region_b, ids_keep, shift, features)
            loss = pixel_loss + feature_loss
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        self.optimizer.zero_grad()
        loss.backward()
        self.grad_norm = torch.norm(torch.stack([torch.norm(p.grad) for p in self.model.parameters() if p.grad is not None]))
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.teacher.parameters(), self.model.encoder.parameters(), strict=True):
                average.mul_(momentum).add_(parameter, alpha=1 - momentum)
        return value

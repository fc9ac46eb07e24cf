"""Files of weights as other projects write them: names, shapes and what lies around them from their code, numbers at random.

All are of the size "tiny", 192 wide and 12 deep. ``tests/golden/foreign_features.json`` has what the projects' own classes make
of the same numbers: each was built 192 wide from a checkout, loaded with the tensors of its file, and called with ``images``.
Its class token and the mean of its patch tokens after the last norm are there, every fourth channel. No code of theirs is here.

=====================  =============================================================================  ==============
family                 class                                                                          how it was fed
=====================  =============================================================================  ==============
MAE                    facebookresearch/mae efb2a80, models_vit.VisionTransformer.forward_features    load_state_dict
HAP                    junkunyuan/HAP e86cd1c, person_reid/models/models_vit, the same                load_state_dict
DINO                   facebookresearch/dino 7c446df, vision_transformer.VisionTransformer            load_state_dict
TransReID-SSL          damo-cv/TransReID-SSL fc39e88, dino/vision_transformer.VisionTransformer       load_state_dict
PersonViT              hustvl/PersonViT de479ab, transreid_pytorch vit_pytorch.TransReID              load_param
CION                   Zplusdragon/CION_ReIDZoo 7ac6fd7, TransReID Standard_ViT.VisionTransformer     load_param
PASS                   CASIA-IVA-Lab/PASS-reID 5b84b42, PASS_transreid vit_pytorch.TransReID          load_state_dict
TransReID              damo-cv/TransReID dec5504, vit_pytorch.TransReID, stride 12, no cameras        load_state_dict
TransReID with parts   the same, make_model.build_transformer_local: tokens of its branch b1          load_state_dict
CLIP-ReID              Syliz517/CLIP-ReID eb1898b, model/clip/model.VisionTransformer, stride 12      load_state_dict
plain                  timm's vit_tiny_patch16_224                                                    load_state_dict
=====================  =============================================================================  ==============
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personmae.model.vit import grid_coords, sincos_embedding

WIDTH, DEPTH, HIDDEN = 192, 12, 768
Weights = dict[str, Tensor]


class Numbers:
    """Random tensors of one file, a function of its seed alone."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, scale: float = 0.05, mean: float = 0.0) -> Tensor:
        return torch.from_numpy((mean + scale * self._rng.standard_normal(shape)).astype(np.float32))

    def linear(self, name: str, out: int, into: int) -> Weights:
        return {f"{name}.weight": self(out, into), f"{name}.bias": self(out)}

    def norm(self, name: str, width: int = WIDTH) -> Weights:
        return {f"{name}.weight": self(width, scale=0.1, mean=1.0), f"{name}.bias": self(width)}

    def batch_norm(self, name: str, width: int = WIDTH) -> Weights:
        running = {f"{name}.running_mean": self(width), f"{name}.running_var": self(width).abs() + 1}
        return self.norm(name, width) | running | {f"{name}.num_batches_tracked": torch.tensor(3)}

    def block(self, name: str, width: int = WIDTH) -> Weights:
        return {
            **self.norm(f"{name}.norm1", width),
            **self.linear(f"{name}.attn.qkv", 3 * width, width),
            **self.linear(f"{name}.attn.proj", width, width),
            **self.norm(f"{name}.norm2", width),
            **self.linear(f"{name}.mlp.fc1", 4 * width, width),
            **self.linear(f"{name}.mlp.fc2", width, 4 * width),
        }

    def vit(self, num_positions: int, patch_size: int = 16) -> Weights:
        """A ViT by the names that timm, MAE, DINO and TransReID share."""
        weights = {
            "cls_token": self(1, 1, WIDTH, scale=0.5),
            "pos_embed": self(1, num_positions, WIDTH, scale=0.5),
            "patch_embed.proj.weight": self(WIDTH, 3, patch_size, patch_size),
            "patch_embed.proj.bias": self(WIDTH),
        }
        for i in range(DEPTH):
            weights |= self.block(f"blocks.{i}")
        return weights | self.norm("norm")


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def sincos_rows(grid: tuple[int, int]) -> Tensor:
    """MAE's fixed table, (1, 1 + hw, D): a row of zeros for the class token, and x first."""
    table = sincos_embedding(grid_coords(grid), WIDTH)
    return torch.cat([torch.zeros(1, WIDTH), table])[None]


def masked(seed: int, grid: tuple[int, int], num_decoder_blocks: int) -> Weights:
    """The encoder and decoder of MAE."""
    n = Numbers(seed)
    weights = n.vit(1 + grid[0] * grid[1]) | {"pos_embed": sincos_rows(grid)}
    weights |= {"mask_token": n(1, 1, 512), "decoder_pos_embed": n(1, 1 + grid[0] * grid[1], 512)}
    weights |= n.linear("decoder_embed", 512, WIDTH) | n.norm("decoder_norm", 512) | n.linear("decoder_pred", 768, 512)
    for i in range(num_decoder_blocks):
        weights |= n.block(f"decoder_blocks.{i}", 512)
    return weights


def mae(seed: int = 0) -> dict[str, Any]:
    args = argparse.Namespace(model="mae_vit_tiny_patch16", lr=1e-3, mask_ratio=0.75)
    return {
        "model": masked(seed, (14, 14), 1),
        "optimizer": {"state": {}},
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": args,
    }


def hap(seed: int = 1) -> dict[str, Any]:
    return {"epoch": 400, "arch": "pose_mae_vit", "model": masked(seed, (16, 8), 1), "optimizer": {}, "scaler": {}}


def self_distilled(seed: int, num_positions: int, **beside: Any) -> dict[str, Any]:
    """Student and teacher as DINO's main program saves them."""
    n = Numbers(seed)
    head = n.linear("head.mlp.0", 32, WIDTH) | {"head.last_layer.weight_g": n(8, 1), "head.last_layer.weight_v": n(8, 32)}
    teacher = prefixed("backbone.", n.vit(num_positions)) | head
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    args = argparse.Namespace(arch="vit_tiny", patch_size=16)
    return {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 100, "args": args, **beside}


def dino(seed: int = 2) -> dict[str, Any]:
    return self_distilled(seed, 197, dino_loss={"center": torch.zeros(1, 8)})


def transreid_ssl(seed: int = 3) -> dict[str, Any]:
    return self_distilled(seed, 129, dino_loss={"center": torch.zeros(1, 8)})


def personvit(seed: int = 4) -> dict[str, Any]:
    return self_distilled(seed, 129, ibot_loss={"center": torch.zeros(1, 8)})


def cion(seed: int = 5) -> dict[str, Any]:
    return {"teacher": prefixed("backbone.", Numbers(seed).vit(129))}


def pass_reid(seed: int = 6) -> dict[str, Any]:
    n = Numbers(seed)
    weights = n.vit(128)
    for name in ("part_token1", "part_token2", "part_token3", "cls_pos", "part1_pos", "part2_pos", "part3_pos"):
        weights[name] = n(1, 1, WIDTH, scale=0.5)
    return {"student": {}, "teacher": prefixed("backbone.", weights) | n.linear("head.mlp_cls.0", 8, WIDTH), "epoch": 1}


def transreid(seed: int = 7, num_positions: int = 211) -> Weights:
    """Fine-tuned with overlapping patches and camera embeddings, without parts."""
    n = Numbers(seed)
    weights = prefixed("base.", n.vit(num_positions) | n.linear("fc", 10, WIDTH) | {"sie_embed": n(6, 1, WIDTH)})
    return weights | {"classifier.weight": n(9, WIDTH)} | n.batch_norm("bottleneck")


def transreid_parts(seed: int = 8) -> Weights:
    """Fine-tuned with parts (JPM): its encoder's own last block and norm are not run."""
    n = Numbers(seed)
    weights = prefixed("base.", n.vit(129) | n.linear("fc", 10, WIDTH))
    for branch in ("b1", "b2"):
        weights |= n.block(f"{branch}.0") | n.norm(f"{branch}.1")
    for i in ("", "_1", "_2", "_3", "_4"):
        weights |= {f"classifier{i}.weight": n(9, WIDTH)} | n.batch_norm(f"bottleneck{i}")
    return weights


def clip_block(n: Numbers, name: str, width: int) -> Weights:
    renamed = n.block(name, width)
    theirs = (
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("qkv.", "in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("fc1", "c_fc"),
        ("fc2", "c_proj"),
    )
    for ours, new in theirs:
        renamed = {key.replace(ours, new): tensor for key, tensor in renamed.items()}
    return renamed


def clip_reid(seed: int = 9) -> Weights:
    """Fine-tuned with overlapping patches. The text side is there too."""
    n = Numbers(seed)
    visual = {
        "class_embedding": n(WIDTH, scale=0.5),
        "positional_embedding": n(211, WIDTH, scale=0.5),
        "conv1.weight": n(WIDTH, 3, 16, 16),
        "proj": n(WIDTH, 128),
    }
    for i in range(DEPTH):
        visual |= clip_block(n, f"transformer.resblocks.{i}", WIDTH)
    visual |= n.norm("ln_pre") | n.norm("ln_post")
    text = clip_block(n, "text_encoder.transformer.resblocks.0", 64) | {"text_encoder.positional_embedding": n(77, 64)}
    heads = n.batch_norm("bottleneck") | n.batch_norm("bottleneck_proj", 128)
    prompts = {"prompt_learner.cls_ctx": n(9, 4, 64), "prompt_learner.token_prefix": n(1, 5, 64), "cv_embed": n(6, WIDTH)}
    classes = {"classifier.weight": n(9, WIDTH), "classifier_proj.weight": n(9, 128)}
    return prefixed("image_encoder.", visual) | text | heads | prompts | classes


def plain(seed: int = 10) -> Weights:
    """timm's names and nothing around them."""
    n = Numbers(seed)
    return n.vit(197) | n.linear("head", 10, WIDTH)


FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "MAE": mae,
    "HAP": hap,
    "DINO": dino,
    "TransReID-SSL": transreid_ssl,
    "PersonViT": personvit,
    "CION": cion,
    "PASS": pass_reid,
    "TransReID": transreid,
    "TransReID with parts": transreid_parts,
    "CLIP-ReID": clip_reid,
    "plain": plain,
}
SIZES = {"MAE": (224, 224), "DINO": (224, 224), "plain": (224, 224)}  # of the others: 256 x 128


def images(name: str) -> Tensor:
    """Two normalised images (2, 3, H, W) of the size that a family was trained on."""
    height, width = SIZES.get(name, (256, 128))
    rng = np.random.default_rng(99)
    return torch.from_numpy(rng.standard_normal((2, 3, height, width)).astype(np.float32))


def write(name: str, folder: Path) -> Path:
    """The file of a family."""
    path = folder / f"{name.replace(' ', '_')}.pth"
    torch.save(FILES[name](), path)
    return path

"""Runs as programs leave them, with random weights: an encoder that was pre-trained, and models with heads."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.model.vit import SIZES, VisionTransformer
from personmae.reid.heads import ReIDModel, build_head

MODEL: dict[str, Any] = {
    "size": "micro",
    "img_size": [64, 32],
    "patch_size": 16,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
}
HEADS: dict[str, dict[str, Any]] = {
    "mgn": {"kind": "mgn", "embed_dim": 16, "split": "adaptive", "pool": "cls", "classifier": "linear"},
    "bnneck": {"kind": "bnneck", "pool": "cls_mean", "classifier": "circle"},
    "neck": {"kind": "neck", "pool": "rows", "columns": "middle", "num_rows": 4},
}


def draw(module: nn.Module, seed: int = 0) -> None:
    """Random numbers everywhere, also in norms and running statistics, so that nothing that is left out goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.1 * drawn.abs() if "running_var" in name else 0.05 * drawn + (tensor.ndim == 1))


def encoder(**options: Any) -> VisionTransformer:
    made = VisionTransformer(**SIZES["micro"], **options)
    draw(made)
    return made


def write_run(run_dir: Path, tensors: Mapping[str, dict[str, torch.Tensor]], step: int = 3, **state: Any) -> Path:
    with closing(Writer(run_dir, keep_last=1)) as writer:
        writer.save(portable.Checkpoint(step, dict(tensors), {"total_steps": 3, "model": MODEL} | state))
    return run_dir


def pretrained(run_dir: Path, step: int = 3) -> tuple[Path, VisionTransformer]:
    """A finished pre-training and its encoder. The student has decoders too."""
    made = encoder().eval()
    student = {f"encoder.{name}": tensor for name, tensor in made.state_dict().items()}
    decoder = {"pixel_decoder.mask_token": torch.zeros(1, 1, 4)}
    return write_run(run_dir, {"student": student | decoder, "exp_avg": student}, step), made


def finetuned(run_dir: Path, kind: str, **state: Any) -> tuple[Path, ReIDModel]:
    """A finished fine-tuning with a head of this kind, and its model."""
    base = VisionTransformer(**SIZES["micro"])
    model = ReIDModel(base, build_head(base, 5, **HEADS[kind]), trained_size=(64, 32)).eval()
    draw(model)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return write_run(run_dir, {"model": tensors}, head=HEADS[kind], num_classes=5, init="random", **state), model

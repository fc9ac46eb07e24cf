"""Encoders as ``personmae.load`` gives them, pre-training runs with decoders, and images whose patches can be moved.

All weights are random.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.model.personmae import PersonMAE
from personmae.model.vit import build_encoder, init_weights
from personmae.reid.heads import MGN, ReIDModel, build_head
from personmae.weights.encoder import Encoder, Features, build
from personmae.weights.stored import Stored

SIZE = 128, 64  # of images, in pixels
GRID = 8, 4
MODEL: dict[str, Any] = {"size": "micro", "img_size": list(SIZE), "patch_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
HEADS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "mgn": {"kind": "mgn", "embed_dim": 16},
    "bnneck": {"kind": "bnneck", "pool": "cls"},
    "neck": {"kind": "neck", "pool": "rows", "num_rows": 8},
}
CLIP = {"pre_norm": True, "activation": "quick_gelu", "patch_bias": False, "norm_eps": 1e-5}
OPTIONS: dict[str, dict[str, Any]] = {  # of encoders of other projects
    "overlapping patches": {"stride": 12},
    "learned positions": {"encoder": {"table": list(GRID)}},
    "registers": {"encoder": {"table": list(GRID), "num_registers": 3}},
    "CLIP": {"encoder": {"table": [10, 5], **CLIP}, "stride": 12},
}


def made(head: str = "none", *, seed: int = 0, places: bool = True, **settings: Any) -> Encoder:
    """An encoder with a head of this name. Without ``places`` tokens know nothing of where they are."""
    model = MODEL | settings
    if not places:
        model |= {"encoder": {"table": list(GRID)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(model)
        if not places:
            assert encoder.pos_embed is not None
            torch.nn.init.zeros_(encoder.pos_embed)
        options = HEADS[head]
        network = ReIDModel(encoder, build_head(encoder, 5, **options)) if options else None
        if network and isinstance(network.head, MGN):
            init_weights(network.head.branches)  # which begin as copies of one block
    tensors = (network or encoder).state_dict()
    stored = Stored("made", model, tensors, options, about={"num_classes": 5})
    return Encoder(Features(build(stored)), stored, torch.device("cpu"))


def write_pretraining(
    folder: Path, model: dict[str, Any] | None = None, visible_positions: bool = False, step: int = 2, **tensors: Any
) -> tuple[Path, PersonMAE]:
    """A pre-training that was stopped at ``step`` of 9, and its student. ``tensors`` replace kinds of its checkpoint."""
    settings = MODEL | (model or {})
    options = {name: tuple(v) if name == "table" else v for name, v in settings.get("encoder", {}).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = PersonMAE(
            size="micro",
            decoder_depth=3,
            pixel_dim=64,
            visible_positions=visible_positions,
            identity_weight=0.1,
            encoder_options=options,
        ).eval()
    state = {"total_steps": 9, "model": settings, portable.RESUME_KEY: {"decoders.visible_positions": visible_positions}}
    kinds = {"student": dict(student.state_dict()), "exp_avg": {"a": torch.zeros(1)}} | tensors
    with closing(Writer(folder, keep_last=9, resumed=portable.newest(folder))) as writer:
        writer.save(portable.Checkpoint(step, kinds, state))
    return folder, student


def write_finetuning(folder: Path, img_size: tuple[int, int] = SIZE, *, seed: int = 0) -> Path:
    """A finished fine-tuning, whose head has a row of patches for every one of an image of ``img_size``."""
    head = {"kind": "neck", "pool": "rows", "num_rows": img_size[0] // 16}
    model = MODEL | {"img_size": list(img_size), "mean": [0.5] * 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(model)
        network = ReIDModel(encoder, build_head(encoder, 5, **head)).eval()
    tensors = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    state = {"total_steps": 3, "model": model, "head": head, "num_classes": 5, "init": "random"}
    with closing(Writer(folder, keep_last=1)) as writer:
        writer.save(portable.Checkpoint(3, {"model": tensors}, state))
    return folder


def patches(seed: int = 0, grid: tuple[int, int] = GRID, size: int = 16) -> UInt8[np.ndarray, "H W 3"]:
    """An image in which each patch has a texture of its own that is the same upside down and in a mirror.

    So turning the whole image moves its patches and changes none.
    """
    rng = np.random.default_rng(seed)
    quarter = rng.integers(0, 256, (*grid, size // 2, size // 2, 3), dtype=np.uint8)
    upper = np.concatenate([quarter, quarter[:, :, :, ::-1]], axis=3)
    whole = np.concatenate([upper, upper[:, :, ::-1]], axis=2)  # (h, w, size, size, 3)
    return np.ascontiguousarray(whole.transpose(0, 2, 1, 3, 4).reshape(grid[0] * size, grid[1] * size, 3))

"""Vision Transformers of timm by their names: weights of a file or of timm's own cache, nothing from the network."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import vision_transformer
from torch import nn

from personmae.errors import UserError
from personmae.weights import positions
from personmae.weights.architecture import is_part, size_of
from personmae.weights.families import Family
from personmae.weights.files import read_file, unwrap
from personmae.weights.found import Found, checked, left_out
from personmae.weights.stored import as_fp32

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": None, "QuickGELU": "quick_gelu"}


def find(name: str, file: Path | None) -> Found:
    """The encoder of timm's model ``name``, its weights from ``file`` or from timm's cache.

    timm's own code brings the weights into its names.

    Raises:
        UserError: there is no such model, it is no plain Vision Transformer, or its weights are not there.
    """
    model = _create(name)
    _require_plain(model, name)
    path = file or _cached(model.pretrained_cfg, name)
    tensors, _, _ = unwrap(read_file(path), path)
    tensors = vision_transformer.checkpoint_filter_fn(tensors, model)
    kept = {key: as_fp32(tensor) for key, tensor in tensors.items() if is_part(key)}
    heads = model.blocks[0].attn.num_heads
    size = size_of(model.embed_dim, len(model.blocks), heads)
    if size is None:
        raise UserError(
            f"an encoder of a known size is required. {name} has {len(model.blocks)} blocks of width {model.embed_dim} with "
            f"{heads} heads"
        )
    patch_size, cfg = model.patch_embed.patch_size[0], model.pretrained_cfg
    placed = positions.place(kept, patch_size, size, tuple(model.patch_embed.img_size))
    family = Family(f"timm's {name}", (tuple(cfg["mean"]), tuple(cfg["std"])), "as timm says", _pool(model))
    lines = (
        f"{path} is {family.name}, a ViT of size {size} with patches of {patch_size} pixels",
        f"{len(kept)} of {len(tensors)} tensors are the encoder's{left_out(name for name in tensors if name not in kept)}",
        f"positions: {placed.words}",
    )
    return checked(Found(placed.tensors, family, size, patch_size, placed, _options(model), lines), str(path))


def _create(name: str) -> Any:
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        near = _nearest(name)
        known = f". Near it {'are' if len(near) > 1 else 'is'} {', '.join(near)}" if near else ""
        raise UserError(f"the name of one of timm's models is required. Got {name!r}{known}") from error
    if not isinstance(model, vision_transformer.VisionTransformer):
        raise UserError(f"a plain Vision Transformer is required. timm's {name} is a {type(model).__name__}")
    return model


def _nearest(name: str) -> list[str]:
    """Vision Transformers of timm's that a wrong name may mean: of its architecture where that is right, by other weights."""
    known = timm.list_models(module="vision_transformer")
    architecture = name.partition(".")[0]
    if architecture in known:
        return timm.list_models(f"{architecture}.*", pretrained=True)[:3]
    return difflib.get_close_matches(architecture, known, n=3)


def _require_plain(model: Any, name: str) -> None:
    block = model.blocks[0]
    reasons = {
        "its blocks have a layer scale": not isinstance(getattr(block, "ls1", nn.Identity()), nn.Identity),
        "its blocks are of another kind": type(block) is not vision_transformer.Block,
        "its attention normalises queries and keys": not isinstance(getattr(block.attn, "q_norm", nn.Identity()), nn.Identity),
        "its attention has no bias": block.attn.qkv.bias is None,
        "it has no class token": model.cls_token is None,
        "it has no positions": model.pos_embed is None,
        "it normalises after pooling": isinstance(model.norm, nn.Identity),
        "its activation is another one": ACTIVATIONS.get(type(block.mlp.act).__name__) is None,
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise UserError(f"a plain Vision Transformer with a class token is required. timm's {name} is none: {found[0]}")


def _options(model: Any) -> dict[str, Any]:
    """What the model has beside a plain encoder."""
    options: dict[str, Any] = {}
    if not isinstance(model.norm_pre, nn.Identity):
        options["pre_norm"] = True
    if model.patch_embed.proj.bias is None:
        options["patch_bias"] = False
    if model.num_reg_tokens:
        options["num_registers"] = model.num_reg_tokens
    if model.norm.eps != 1e-6:
        options["norm_eps"] = model.norm.eps
    if (activation := ACTIVATIONS[type(model.blocks[0].mlp.act).__name__]) != "gelu":
        options["activation"] = activation
    return options


def _pool(model: Any) -> str | None:
    return {"token": "cls", "avg": "mean"}.get(model.global_pool)


def _cached(cfg: Mapping[str, Any], name: str) -> Path:
    """The file of a model's weights in the caches that timm fills."""
    if hub_id := cfg.get("hf_hub_id"):
        from huggingface_hub import try_to_load_from_cache

        for file in ("model.safetensors", "pytorch_model.bin"):
            if isinstance(found := try_to_load_from_cache(hub_id, file), str):
                return Path(found)
    if url := cfg.get("url"):
        cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if cached.is_file():
            return cached
    raise UserError(
        f"weights in timm's cache are required. Those of {name} are not there: have timm download them "
        f"(timm.create_model({name!r}, pretrained=True)), or give --file"
    )

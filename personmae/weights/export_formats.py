"""The files of an exported folder: each written for one library, by that library's own names.

All raise an ``OSError`` where a file cannot be written, as on a full disk.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from personmae.checkpoint.host_copy import write_blocks
from personmae.weights.flat import FlatViT

_TIMM: Final = {  # the model of timm's that a width is closest to. Its other sizes are given beside the name
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
}
_TRANSFORMERS: Final = (  # timm's names, and those of the transformers library
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^norm\.", "layernorm."),
)
_QKV: Final = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_timm(folder: Path, flat: FlatViT, preprocessing: dict[str, Any], dtype: torch.dtype) -> None:
    """``config.json`` and ``model.safetensors``, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    height, width = flat.img_size
    sizes = {"embed_dim": flat.dim, "depth": flat.depth, "num_heads": flat.num_heads, "patch_size": flat.patch_size}
    config = {
        "architecture": _TIMM.get(flat.dim, _TIMM[192]),
        "num_classes": 0,
        "num_features": flat.dim,
        "global_pool": flat.pool,
        "model_args": {"img_size": [height, width], "global_pool": flat.pool, "fc_norm": False, **sizes},
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_blocks(folder / "model.safetensors", [safetensors.torch.save(_as(flat.tensors, dtype), {"format": "pt"})])


def write_transformers(folder: Path, flat: FlatViT, preprocessing: dict[str, Any], dtype: torch.dtype) -> None:
    """``config.json``, ``preprocessor_config.json`` and ``model.safetensors``, for ``ViTModel.from_pretrained``."""
    height, width = flat.img_size
    hidden = flat.tensors["blocks.0.mlp.fc1.weight"].shape[0]
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": flat.dim,
        "num_hidden_layers": flat.depth,
        "num_attention_heads": flat.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": [height, width],
        "patch_size": flat.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor)
    tensors = _as(to_transformers(flat.tensors), dtype)
    write_blocks(folder / "model.safetensors", [safetensors.torch.save(tensors, {"format": "pt"})])


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the transformers library, where queries, keys and values are three layers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _QKV.match(name):
            where = f"encoder.layer.{match[1]}.attention.attention"
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {f"{where}.{part}.{match[2]}": values.contiguous() for part, values in parts}
            continue
        pattern, new = next((pattern, new) for pattern, new in _TRANSFORMERS if re.search(pattern, name))
        renamed[re.sub(pattern, new, name)] = tensor
    return renamed


def write_reid(folder: Path, timm: Path, home: Path, flat: FlatViT, preprocessing: dict[str, Any]) -> None:
    """``reid_config.json`` and ``weights.safetensors`` for roboflow's reid: a timm model of the folder ``timm``.

    ``home`` is where that folder will be. The weights are its own, as a second name of one file where the disk can do that.
    """
    folder.mkdir()
    config = {
        "architecture": f"timm:local-dir:{home}",
        "preprocessing": {
            "input_size": list(flat.img_size),
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "interpolation": "bicubic",
            "to_rgb": True,
            "normalize_embeddings": True,
        },
    }
    write_json(folder / "reid_config.json", config)
    try:
        os.link(timm / "model.safetensors", folder / "weights.safetensors")
    except OSError:
        shutil.copyfile(timm / "model.safetensors", folder / "weights.safetensors")


def write_transreid(path: Path, flat: FlatViT, dtype: torch.dtype) -> None:
    """A flat dictionary of tensors by timm's names, with positions, for ``PRETRAIN_PATH`` of the TransReID family.

    Its loaders call ``torch.load``. There is nothing but tensors in the file, so ``weights_only=True`` reads it.
    """
    path.parent.mkdir()
    _write(path, lambda file: torch.save(_as(flat.tensors, dtype), file))


def write_boxmot_metadata(onnx: Path, img_size: tuple[int, int]) -> None:
    """What BoxMOT reads beside an ONNX file: a name for it, and its image size."""
    described = {"model_name": "personmae", "model_kwargs": {"img_size": list(img_size)}}
    write_json(onnx.with_name(f"{onnx.name}.metadata.json"), described)


def write_torch_export(path: Path, program: torch.export.ExportedProgram) -> None:
    path.parent.mkdir()
    _write(path, lambda file: torch.export.save(program, file))


def _write(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    """Write what torch saves, by way of memory: a full disk is then the operating system's error, and not one of torch's."""
    content = io.BytesIO()
    save(content)
    write_blocks(path, [content.getbuffer()])


def _as(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

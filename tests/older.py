"""Checkpoints as they were written when positions were y first, and the positions of that time."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from personmae.checkpoint import portable
from personmae.model import personmae, vit

MICRO: dict[str, Any] = {"size": "micro", "img_size": [128, 64], "patch_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
_LATER = ("decoders.visible_positions", "loss.identity_", "mask.block_ratio", "target.")  # settings that came after


def y_first(coords: Tensor, dim: int) -> Tensor:
    """The embedding of before."""
    angle = coords[..., None] * (10000.0 ** -(torch.arange(dim // 4) / (dim / 4)))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


@contextmanager
def positions_of_before() -> Iterator[None]:
    """Inside, positions are as they were."""
    with mock.patch.object(vit, "sincos_embedding", y_first), mock.patch.object(personmae, "sincos_embedding", y_first):
        yield


def make_old(path: Path) -> Path:
    """Take from a checkpoint's record what it has of late: format, floor, and settings that were not there."""
    record = json.loads((path / portable.STATE).read_bytes())
    assert record.pop("format") == portable.FORMAT == 2
    record.pop("floor", None)
    if "identity" in record:
        record["identity"] = {key: value for key, value in record["identity"].items() if not key.startswith(_LATER)}
    content = json.dumps(record).encode()
    (path / portable.STATE).write_bytes(content)
    manifest = json.loads((path / portable.MANIFEST).read_bytes())
    manifest[portable.STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / portable.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path

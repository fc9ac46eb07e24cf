"""Finished runs with random weights, as their programs save them."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from made_encoders import write_pretraining
from made_runs import write_training

from personmae import config
from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer

MODEL: dict[str, Any] = {"size": "micro", "img_size": [64, 32], "patch_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
HEAD: dict[str, Any] = {"kind": "neck", "pool": "rows", "num_rows": 4}


def save(folder: Path, kind: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    with closing(Writer(folder, keep_last=1)) as writer:
        writer.save(portable.Checkpoint(3, {kind: tensors}, {"total_steps": 3, "model": MODEL, **state}))


def save_pretraining(folder: Path, shards: Path, **model: Any) -> Path:
    """A pre-training on shards, at step 2 of 9."""
    given = {
        "run_dir": str(folder),
        "data": {"shards": str(shards)},
        "model": {"size": "micro", "img_size": (128, 64), **model},
        "regions": {"max_shift": 16},
    }
    write_training(folder, config.Pretrain.model_validate(given), step=2, total=9)
    shutil.rmtree(portable.folder(folder))
    return write_pretraining(folder)[0]


def copy(run: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run whose checkpoint says something else of itself."""
    shutil.copytree(run, to)
    checkpoint = portable.locate(to)
    state = json.loads((checkpoint / portable.STATE).read_text()) | changes
    ((kind, tensors),) = portable.read(checkpoint).tensors.items()
    shutil.rmtree(portable.folder(to))
    save(to, kind, dict(tensors), {name: value for name, value in state.items() if name != "step"})
    return to

"""Small runs with heads of each kind, what a plain ViT can hold of them, and the program that uses them."""

import os
import subprocess
from pathlib import Path
from typing import Any

import made_weights
import numpy as np
import pytest
import warm
from made_weights import MODEL

from personmae import __main__
from personmae.errors import EXIT_USER_ERROR
from personmae.reid.heads import ReIDModel, build_head
from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import SynthSettings, plan

HEADS: dict[str, dict[str, Any]] = {
    "bnneck": {"kind": "bnneck", "pool": "cls"},  # the feature is from before its normalisation
    "neck": {"kind": "neck", "pool": "mean"},  # the feature is from after it
    "mgn": {"kind": "mgn", "embed_dim": 16},
    "rows": {"kind": "neck", "pool": "rows", "num_rows": 4},
}
WHOLE = {"bnneck": True, "neck": True, "mgn": False, "rows": False, "pretrained": False}


def make(run_dir: Path, kind: str, **state: Any) -> Path:
    """A finished run with random weights: fine-tuned with a head of this kind, or pre-trained."""
    if kind == "pretrained":
        return made_weights.pretrained(run_dir)[0]
    base = made_weights.encoder()
    model = ReIDModel(base, build_head(base, 5, **HEADS[kind])).eval()
    made_weights.draw(model)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return made_weights.write_run(run_dir, {"model": tensors}, head=HEADS[kind], num_classes=5, init="random", **state)


def people(count: int, seed: int = 7) -> list[np.ndarray]:
    """Crops of drawn people, RGB, of different sizes."""
    settings = SynthSettings(seed=seed, pool_images=count, pool_identities=count)
    shots = [shot for shot in plan(settings) if shot.split == "pool"]
    return [np.ascontiguousarray(draw_shot(settings, shot)[0][..., ::-1]) for shot in shots]


def environment() -> dict[str, str]:
    """This process's environment, on the CPU, without a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}


def personmae(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """``personmae ARGS`` as a process of its own."""
    return warm.run(["-m", "personmae", *args], env=environment(), timeout=300)


def refusal(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The error of ``personmae ARGS``, in this process. It must be one line, with exit code 78."""
    capsys.readouterr()
    code, texts = __main__.main([*map(str, args)]), capsys.readouterr()
    assert code == EXIT_USER_ERROR, texts
    lines = [line for line in texts.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, texts.err
    return lines[0]


__all__ = ["HEADS", "MODEL", "WHOLE", "environment", "make", "people", "personmae", "refusal"]

"""Doing plans of the scenario in real processes, and what they leave behind."""

import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import warm
from closeness import assert_close, largest
from safetensors.torch import load_file
from scenario import ACCUM, KINDS, STEPS, Tensors

# Sums in another order differ in the last bits: 8e-7 was the largest difference of a tensor, 5e-7 of a norm, 2e-7 of a loss.
SAME = 5e-6
MAX_NORM = 0.5  # half of the norms that come up
POISONED = {"5": "gradient", "6": "loss"}  # steps after the middle, and what is not finite in them


@dataclass(frozen=True)
class Results:
    """What the runs left behind; a run is known by its name."""

    folder: Path

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, name: str, step: int = STEPS) -> Tensors:
        return load_file(self.folder / f"{name}-{step}.safetensors")


def task_of(name: str, engine: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """A run of the scenario from its beginning to its end, unless ``settings`` say otherwise."""
    common = {"max_norm": None, "activation_checkpointing": "none", "compiled": False, "load": None, "first": 0, "last": STEPS}
    common |= {"poison": {}, "together": None, "killed_rank": None, "identity": False}
    return common | {"engine": engine, "out": str(folder / name)} | settings


def launch(plan: list[dict[str, Any]], num_ranks: int, folder: Path, *, killed_rank: int | None = None) -> None:
    """Do a plan on so many ranks of this host, which must all succeed, unless one is to be killed: then none does."""
    plan_file = folder / "plan.json"
    plan_file.write_text(json.dumps(plan))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    common = warm.FIXED | {"PYTHONPATH": str(root)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
        command = [Path(__file__).with_name("scenario.py"), plan_file]
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(warm.start(command, env=os.environ | common | own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=400) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    ends = [-9 if rank == killed_rank else 1 for rank in range(num_ranks)] if killed_rank is not None else [0] * num_ranks
    assert codes == ends, "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(num_ranks))


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Softmax does not see the bias of the keys: its gradient is nothing but rounding, which Adam blows up to full steps."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def difference(ours: Tensors, theirs: Tensors) -> dict[str, float]:
    """For each kind of tensor the largest relative distance between two of the same name."""
    assert ours.keys() == theirs.keys()
    assert ours["num_updates"] == theirs["num_updates"]
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name in ours.keys() - {"num_updates"}:
        a, b = (without_key_bias(name, tensors[name]).double() for tensors in (ours, theirs))
        found[name.partition("/")[0]].append(0.0 if torch.equal(a, b) else ((a - b).norm() / b.norm()).item())
    return {kind: largest(distances) for kind, distances in found.items()}


def assert_same_losses(results: Results, name: str, reference: str, *, rel: float = SAME) -> None:
    """Losses and gradient norms agree over the steps that the run did, and are finite but where a step was spoiled."""
    ours, theirs = results.record(name), results.record(reference)
    for what in ("losses", "norms"):
        tail = theirs[what][: len(ours[what])] if len(ours[what]) < len(theirs[what]) else theirs[what]
        if "then" in name:
            tail = theirs[what][-len(ours[what]) :]
        spoiled = [int(step) * (ACCUM if what == "losses" else 1) for step in POISONED] if name.endswith("-clipped") else []
        assert_close(ours[what], tail, rel=rel, spoiled=spoiled, what=what)


def assert_same_state(results: Results, name: str, reference: str, step: int = STEPS, *, rel: float = SAME) -> None:
    found = difference(results.state(name, step), results.state(reference, step))
    assert largest(found.values()) < rel, found

"""Doing plans of the scenario in real processes, and what they leave behind."""

import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm
from safetensors.torch import load_file
from scenario import STEPS, Tensors

MAX_NORM = 0.5  # half of the norms that come up
POISONED = {"5": "gradient", "6": "loss"}  # steps after the middle, and what is not finite in them


@dataclass(frozen=True)
class Results:
    """What the runs left behind; a run is known by its name."""

    folder: Path

    def told(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, name: str, step: int = STEPS) -> Tensors:
        return load_file(self.folder / f"{name}-{step}.safetensors")


def task_of(name: str, engine: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """A run of the scenario from its beginning to its end, unless ``settings`` say otherwise."""
    common = {"max_norm": None, "activation_checkpointing": "none", "compiled": False, "load": None, "first": 0, "last": STEPS}
    common |= {"poison": {}, "together": None, "killed_rank": None}
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

"""Doing plans of the scenario in real processes, and what they leave behind."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from scenario import STEPS, Tensors

MAX_NORM, POISONED = 0.5, 5  # half of the norms that come up, and a step after the middle


@dataclass(frozen=True)
class Results:
    """What the runs left behind; a run is known by its name."""

    folder: Path

    def told(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, name: str, step: int = STEPS) -> Tensors:
        return load_file(self.folder / f"{name}-{step}.safetensors")


def launch(plan: list[dict[str, Any]], num_ranks: int, folder: Path) -> None:
    """Do a plan on so many ranks of this host, which must all succeed."""
    plan_file = folder / "plan.json"
    plan_file.write_text(json.dumps(plan))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    common = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("scenario.py")), str(plan_file)]
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, env=os.environ | common | own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * num_ranks, "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(num_ranks))

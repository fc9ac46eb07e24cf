"""``personmae bench checkpoint``: how long saving the whole state holds up training, and when the save is committed."""

import contextlib
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from personmae import dist
from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.monitor import environment, progress
from personmae.system import files

GRID = (16, 8)  # of 256 x 128 pixels; the state does not depend on it


@dataclass
class CheckpointBench:
    """What to measure: ``saves`` of an encoder of a size with decoders, teacher and both moments."""

    size: str = "base"
    saves: int = 4


def run_checkpoint(bench: CheckpointBench, out: Path | None = None) -> dict[str, Any]:
    """Measure in a directory next to this one, print a line, and write the record to ``out``."""
    world = dist.read_world()
    dist.start(world)
    progress.log_to_stderr(f"bench checkpoint: saving the state of {bench.size} again and again ...")
    try:
        measured = _pauses(bench, world.device)
    finally:
        dist.stop()
    record = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": asdict(bench) | {"device": str(world.device), "threads": torch.get_num_threads()},
        "measured": measured,
    }
    Console().print(
        f"a checkpoint of {bench.size} ({measured['bytes'] / 1e9:.2f} GB) holds up a step for "
        f"{measured['pause_milliseconds']:.0f} ms (the first {measured['first_pause_milliseconds']:.0f}), "
        f"and is committed after {measured['committed_seconds']:.1f} s"
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, files.to_json(record, indent=1) + "\n")
    return record


def _pauses(bench: CheckpointBench, device: torch.device) -> dict[str, float]:
    """How long saves of a whole state hold up the loop, and when they are committed. The first one also allocates memory."""
    model = PersonMAE(size=bench.size).to(device)
    teacher = Teacher(model.encoder, GRID).to(device)
    params = dict(model.state_dict())
    moments = {kind: {name: torch.rand_like(p) for name, p in params.items()} for kind in ("exp_avg", "exp_avg_sq")}
    tensors = {"student": params, "teacher": dict(teacher.encoder.state_dict()), **moments}
    num_bytes = sum(t.numel() * t.element_size() for of_kind in tensors.values() for t in of_kind.values())
    paused, committed = [], []
    with (
        tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as directory,
        contextlib.closing(Writer(directory, keep_last=1)) as writer,
    ):
        for step in range(1, bench.saves + 1):
            start = time.perf_counter()
            paused.append(1000 * writer.save(portable.Checkpoint(step, tensors, {})))
            while writer.busy:
                time.sleep(0.01)
            committed.append(time.perf_counter() - start)
    return {
        "bytes": num_bytes,
        "first_pause_milliseconds": paused[0],
        "pause_milliseconds": statistics.median(paused[1:] or paused),
        "committed_seconds": statistics.median(committed),
    }

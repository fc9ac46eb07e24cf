"""``personmae bench step``: what an engine costs beyond the arithmetic, and how long a checkpoint holds up training.

All ways train the same model on the same synthetic patches, one process, taken in turn: what differs is the engine.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from personmae import checkpoint, dist, metrics, optim
from personmae.engine.base import Engine
from personmae.keeper import Writer
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.model.vit import grid_coords

GRID, NUM_VISIBLE, PATCH_DIM = (16, 8), 32, 768  # of 256 x 128 pixels, three quarters hidden
PLAIN = "plain loop"
ENGINES = ("native", "deepspeed 0", "deepspeed 1", "deepspeed 2", "deepspeed 3", "fsdp")
MOMENTUM = 0.999
Batch = dict[str, Tensor]


@dataclass
class StepBench:
    """What to measure: ``num_steps`` steps of each engine, ``rounds`` times; a checkpoint of ``checkpoint_size``."""

    size: str = "micro"
    batch_size: int = 32
    num_steps: int = 20
    rounds: int = 3
    precision: str = "fp32"
    compile: bool = False
    checkpoint_size: str = "base"
    saves: int = 4


def run_step(bench: StepBench, out: Path | None = None) -> dict[str, Any]:
    """Measure, print tables, and write the record to ``out``."""
    world = dist.read_world()
    dist.start(world)
    try:
        milliseconds = _engines(bench, world.device)
        paused = _pauses(bench, world.device)
    finally:
        dist.stop()
    record = {
        "commit": metrics.git_commit(),
        "hardware": metrics.describe_hardware(),
        "versions": checkpoint.versions(),
        "settings": asdict(bench) | {"device": str(world.device), "threads": torch.get_num_threads()},
        "milliseconds": milliseconds,
        "checkpoint": paused,
    }
    _print(bench, record)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _engines(bench: StepBench, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a step by engine, over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in (PLAIN, *ENGINES)}
    for _ in range(bench.rounds):
        for name, times in found.items():
            with _steps(bench, name, device) as step:
                for _ in range(3):
                    step()
                times.append(statistics.median(_timed(step, device) for _ in range(bench.num_steps)))
    return {name: statistics.median(times) for name, times in found.items()}


def _timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


@contextlib.contextmanager
def _steps(bench: StepBench, name: str, device: torch.device) -> Iterator[Callable[[], None]]:
    """One step of an engine, or of a loop written out, with teacher and EMA; called again and again."""
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[bench.precision]
    model = PersonMAE(size=bench.size, compute_dtype=dtype).to(device)
    teacher = Teacher(model.encoder, GRID, dtype).to(device)
    if bench.compile:
        model.compile()
        teacher.compile()
    optimizer = optim.adamw(optim.param_groups(model.named_parameters(), lr=1e-4, weight_decay=0.05), (0.9, 0.95))
    batch = _batch(bench.batch_size, device)

    if name == PLAIN:

        def step() -> None:
            model({**batch, "target": teacher(batch["patches_b"])})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update(list(model.encoder.parameters()), MOMENTUM)

        yield step
        return
    engine = _engine(name, model, optimizer, bench.batch_size)

    def step() -> None:
        engine.forward_backward({**batch, "target": teacher(batch["patches_b"])}, last_micro=True)
        skipped = engine.step(1.0).skipped
        with engine.full_params(model.encoder) as params:
            teacher.update(params, MOMENTUM, skipped)

    try:
        yield step
    finally:
        engine.close()


def _engine(name: str, model: PersonMAE, optimizer: torch.optim.Optimizer, batch_size: int) -> Engine:
    plan: dict[str, Any] = {"grad_accum_steps": 1, "max_norm": None}
    if name == "native":
        from personmae.engine.native import NativeEngine

        return NativeEngine(model, optimizer, **plan)
    if name == "fsdp":
        from personmae.engine.fsdp import FsdpEngine

        return FsdpEngine(model, optimizer, shard_size=None, **plan)
    from personmae.engine.deepspeed import DeepSpeedEngine

    stage = int(name.removeprefix("deepspeed "))
    return DeepSpeedEngine(model, optimizer, micro_batch_size=batch_size, zero_stage=stage, extra={}, **plan)


def _batch(batch_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    coords = grid_coords(GRID).expand(batch_size, -1, -1)
    batch = {
        "patches_a": torch.randn(batch_size, NUM_VISIBLE, PATCH_DIM, generator=generator),
        "coords_a": coords[:, :NUM_VISIBLE],
        "patches_b": torch.randn(batch_size, len(coords[0]), PATCH_DIM, generator=generator),
        "coords_b": coords + 0.5,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _pauses(bench: StepBench, device: torch.device) -> dict[str, float]:
    """How long saves of a whole state hold up the loop, and when they are committed to a directory beside this one."""
    model = PersonMAE(size=bench.checkpoint_size).to(device)
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
            paused.append(1000 * writer.save(checkpoint.Checkpoint(step, tensors, {})))
            while writer.busy:
                time.sleep(0.01)
            committed.append(time.perf_counter() - start)
    return {
        "bytes": num_bytes,
        "first_pause_milliseconds": paused[0],
        "pause_milliseconds": statistics.median(paused[1:] or paused),
        "committed_seconds": statistics.median(committed),
    }


def _print(bench: StepBench, record: dict[str, Any]) -> None:
    times = record["milliseconds"]
    where = (
        f"{record['settings']['threads']} threads" if record["settings"]["device"] == "cpu" else record["settings"]["device"]
    )
    title = f"{bench.size}, {bench.batch_size} images, {bench.precision}, {where}: milliseconds a step"
    table = Table("engine", "ms", "over the plain loop", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, milliseconds in times.items():
        over = "" if name == PLAIN else f"{milliseconds - times[PLAIN]:+.1f} ms, {milliseconds / times[PLAIN]:.2f} x"
        table.add_row(name, f"{milliseconds:.1f}", over)
    console = Console()
    console.print(table)
    paused = record["checkpoint"]
    console.print(
        f"a checkpoint of {bench.checkpoint_size} ({paused['bytes'] / 1e9:.2f} GB) holds up a step for "
        f"{paused['pause_milliseconds']:.0f} ms (the first {paused['first_pause_milliseconds']:.0f}), "
        f"and is committed after {paused['committed_seconds']:.1f} s"
    )

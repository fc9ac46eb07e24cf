"""One configuration of a step, timed part by part: the parts of ``pretrain.train`` in its order, without its records.

``open_loop``, ``run_round`` and ``close_loop`` run in a process that has one loop and nothing else. So its memory is
separate from that of others, and its traces in compilers, engines and allocators end with it.
"""

import contextlib
import gc
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from personmae import dist, optim
from personmae.bench.counts import spec_at
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, CanvasBatch, to_device
from personmae.engine.base import Batch, Engine
from personmae.errors import UserError
from personmae.model.compiled import CropBackend, choose_prepare, compile_parts
from personmae.model.inputs import RegionSpec
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.model.vit import ActivationCheckpointing
from personmae.precision import dtype_of
from personmae.system import compile_cache

PLAIN = "plain"  # a loop written out, which no engine can be faster than
ENGINES = (PLAIN, "native", "deepspeed 0", "deepspeed 1", "deepspeed 2", "deepspeed 3", "fsdp")
PARTS = ("data_wait", "inputs", "teacher", "forward_backward", "optimizer")  # the last with the teacher's average
SYNTHETIC, SHARDS = "synthetic", "shards"
WARM_UP = 3  # steps of a round that do not count; CUDA graphs are recorded in the second that a process makes
MOMENTUM = 0.999
Compiled = Literal["off", "on", "graph"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured: one configuration of a step on ``batch_size`` images of ``img_size`` (height, width) pixels."""

    size: str
    batch_size: int
    engine: str
    compile: Compiled
    precision: str
    checkpointing: ActivationCheckpointing
    img_size: tuple[int, int]
    crop_backend: CropBackend = "torch"

    @property
    def spec(self) -> RegionSpec:
        """How its images become regions."""
        return spec_at(self.img_size)


class Failed(NamedTuple):
    """Why there is no measurement."""

    why: str


class Repeat(NamedTuple):
    """Milliseconds of ``PARTS`` for each step, and the most memory so far in bytes.

    On a GPU that is what tensors have taken, and what the allocator has taken for them. On a CPU what the process has grown
    by since it began to build its model.
    """

    milliseconds: list[list[float]]
    peak_bytes: int
    reserved_bytes: int | None


class Loop:
    """A model, its teacher and its engine, ready to step."""

    def __init__(self, cell: Cell, shards: str | None):
        world = dist.read_world()
        dist.start(world)
        self._bytes_before = memory_bytes("VmRSS")
        self._cell, self._device, self._threads = cell, world.device, dist.threads_per_rank(world)
        torch.manual_seed(0)
        dtype = dtype_of(cell.precision)
        self._model = PersonMAE(size=cell.size, compute_dtype=dtype).to(world.device)
        self._model.encoder.activation_checkpointing = cell.checkpointing
        self._teacher = Teacher(self._model.encoder, cell.spec.grid, dtype).to(world.device)
        compiled, graphed = cell.compile != "off", cell.compile == "graph"
        self._prepare = choose_prepare(self._model, crop_backend=cell.crop_backend, compiled=compiled, cuda_graphs=graphed)
        if compiled:
            compile_cache.mend()
            compile_parts(self._model, self._teacher, graphed)
        self._engine = _build_engine(cell, self._model)
        self._synthetic = _synthetic_batch(cell, world.device)
        self._copies = torch.cuda.Stream() if world.device.type == "cuda" else None
        self._scratch = tempfile.TemporaryDirectory(prefix="personmae-bench-")
        self._shards = ShardSet(shards, self._scratch.name) if shards else None

    def run_round(self, source: str, num_steps: int) -> Repeat:
        """Warm up, then time some steps, on the same canvases again and again or on those of the shards."""
        if self._copies:
            torch.cuda.reset_peak_memory_stats()
        with self.batches(source) as batches:
            self.run(batches, WARM_UP)
            times = self.run(batches, num_steps)
        if self._copies:
            return Repeat(times, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        return Repeat(times, memory_bytes("VmHWM") - self._bytes_before, None)

    def run(self, batches: Iterable[CanvasBatch], num_steps: int) -> list[list[float]]:
        """Milliseconds of each part of each step. It waits for the device only at the end, as a run does."""
        model, teacher, engine, marks, batches = self._model, self._teacher, self._engine, _Marks(self._device), iter(batches)
        for _ in range(num_steps):
            marks.begin()
            batch = next(batches)
            marks.begin()
            if self._cell.compile == "graph":  # else it would only import much of the compiler
                torch.compiler.cudagraph_mark_step_begin()
            inputs = self._prepare(*batch, self._cell.spec)
            marks.begin()
            inputs["target"] = teacher(inputs["patches_b"])
            marks.begin()
            losses = engine.forward_backward(inputs, last_micro=True)
            marks.begin()
            _ = {name: torch.stack([loss]).mean() for name, loss in losses.items()}
            skipped = engine.step(1.0).skipped
            with engine.full_params(model.encoder) as params:
                teacher.update(params, MOMENTUM, skipped)
        marks.begin()
        return marks.milliseconds(len(PARTS))

    @contextlib.contextmanager
    def batches(self, source: str) -> Iterator[Iterable[CanvasBatch]]:
        """What a step is given: the same canvases again and again, or those of the shards from their beginning."""
        if source == SYNTHETIC:
            yield itertools.repeat(self._synthetic)
            return
        assert self._shards, "a loop without shards has synthetic canvases alone"
        size = self._cell.batch_size
        reader = BatchReader(
            self._shards,
            canvas_size=self._cell.spec.canvas_size,
            num_threads=self._threads,
            prefetch_batches=4,
            max_bad_ratio=0.01,
            seed=0,
            rank=0,
            world_size=1,
            micro_batch_size=size,
            global_batch_size=size,
            first_step=0,
        )
        with contextlib.closing(reader):
            yield (to_device(batch, self._device, self._copies) for batch in reader)

    def close(self) -> None:
        """Let go of the engine, the shards and the process group."""
        self._engine.close()
        if self._shards:
            self._shards.close()
        self._scratch.cleanup()
        dist.stop()


class _Marks:
    """When parts began: by events in the device's stream, so that nothing waits, or by this thread's clock."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def begin(self) -> None:
        """A part begins, and the one before it ends."""
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self, num_parts: int) -> list[list[float]]:
        """How long each of the parts of each step was."""
        if self._on_gpu:
            torch.cuda.synchronize()
        pairs = itertools.pairwise(self._marks)
        times = [begin.elapsed_time(end) if self._on_gpu else 1000 * (end - begin) for begin, end in pairs]
        return [times[first : first + num_parts] for first in range(0, len(times), num_parts)]


class PlainLoop:
    """Replaces the engine in a plain loop of one process: no ranks, no guard, no norm of gradients."""

    class Done(NamedTuple):
        skipped: None = None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_graphed: bool):
        self._model, self._optimizer, self._is_graphed = model, optimizer, is_graphed
        if is_graphed:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def forward_backward(self, batch: Batch, *, last_micro: bool) -> Batch:
        losses = self._model(batch)
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, lr_scale: float) -> Done:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=not self._is_graphed)
        return self.Done()

    @contextlib.contextmanager
    def full_params(self, module: nn.Module) -> Iterator[list[Tensor]]:
        yield list(module.parameters())

    def close(self) -> None:
        """Nothing is held."""


def _build_engine(cell: Cell, model: PersonMAE) -> Engine | PlainLoop:
    optimizer = optim.adamw(optim.param_groups(model.named_parameters(), lr=1e-4, weight_decay=0.05), (0.9, 0.95))
    plan: dict[str, Any] = {"grad_accum_steps": 1, "max_norm": None}
    graphs = cell.compile == "graph"
    if cell.engine == PLAIN:
        return PlainLoop(model, optimizer, is_graphed=graphs)
    if cell.engine == "native":
        from personmae.engine.native import NativeEngine

        return NativeEngine(model, optimizer, is_graphed=graphs, **plan)
    if graphs:
        raise UserError(f"CUDA graphs need the native engine, got {cell.engine}")
    if cell.engine == "fsdp":
        from personmae.engine.fsdp import FsdpEngine

        return FsdpEngine(model, optimizer, shard_size=None, **plan)
    from personmae.engine.deepspeed import DeepSpeedEngine

    stage = int(cell.engine.removeprefix("deepspeed "))
    return DeepSpeedEngine(model, optimizer, micro_batch_size=cell.batch_size, zero_stage=stage, extra={}, **plan)


def _synthetic_batch(cell: Cell, device: torch.device) -> CanvasBatch:
    """Noise that fills its canvases, which is as much as an image can be. It is on the device already."""
    height, width = cell.spec.canvas_size
    canvas = torch.randint(0, 256, (cell.batch_size, height, width, 3), dtype=torch.uint8, device=device)
    size = torch.tensor([[height, width]], device=device).repeat(cell.batch_size, 1)
    return CanvasBatch(canvas, size, size.clone(), torch.arange(cell.batch_size, device=device))


def memory_bytes(name: str) -> int:
    """A number of bytes that Linux reports for this process, or 0 on other systems."""
    try:
        return 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").partition(f"{name}:")[2].split()[0])
    except (OSError, IndexError):
        return 0


_loop: Loop | None = None  # of this process


def open_loop(cell: Cell, shards: str | None) -> float | Failed:
    """Build a loop and return the seconds of its first step, which includes compilation."""
    global _loop
    try:
        _loop = Loop(cell, shards)
        start = time.perf_counter()
        with _loop.batches(SYNTHETIC) as batches:
            _loop.run(batches, 1)
        seconds = time.perf_counter() - start
        gc.collect()
        gc.freeze()  # as a run does after its first step
        return seconds
    except Exception as error:
        return _failed(error)


def run_round(source: str, num_steps: int) -> Repeat | Failed:
    """A round of the loop that was opened."""
    assert _loop, "a loop is opened first"
    try:
        return _loop.run_round(source, num_steps)
    except Exception as error:
        return _failed(error)


def close_loop() -> None:
    """Let the loop go."""
    if _loop:
        _loop.close()


def _failed(error: Exception) -> Failed:
    """An error in one line. It may hold what cannot be sent to another process."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Failed("out of memory")
    line = (str(error).strip().splitlines() or [""])[0]
    return Failed(line if isinstance(error, UserError) else f"{type(error).__name__}: {line}")

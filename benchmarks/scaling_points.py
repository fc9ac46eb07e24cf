"""The points that ``scaling.py`` is fitted to and checked with: steps, ranks, reading and checkpoints of this machine.

A device is a core here: one thread, so that two ranks have two of them. On a GPU machine it is a GPU, and ranks are left out.
Which points are held out is fixed before anything is measured; the larger encoder is among them, for that is what is asked of
the model elsewhere too. Steps cut their regions by matrices on CPUs as well, for these kernels are what ``scaling_work.py``
counts; a run on a CPU cuts image by image, in less time.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import crops
import torch
import torch.distributed as tdist
from scaling_model import Point
from scaling_work import DTYPES, spec_of

from personmae import dist, optim
from personmae.bench.ceilings import require_native
from personmae.bench.data import BATCH_SIZE, SPEC
from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
from personmae.engine.native import NativeEngine
from personmae.model.inputs import cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.monitor import environment

LARGE, SMALL = (256, 128), (128, 64)
PRECISION = "bf16"
Case = tuple[str, tuple[int, int], int, bool]  # encoder, pixels, images, whether it is held out

STEPS: Final[dict[str, tuple[Case, ...]]] = {
    "cpu": (
        *(("micro", LARGE, 8, False), ("micro", LARGE, 32, False), ("micro", LARGE, 16, True), ("micro", LARGE, 64, True)),
        *(("micro", SMALL, 16, False), ("micro", SMALL, 128, False), ("micro", SMALL, 64, True)),
        *(("small", LARGE, 2, False), ("small", LARGE, 8, False), ("small", LARGE, 4, True), ("small", SMALL, 8, True)),
        *(("base", LARGE, 2, True), ("base", SMALL, 4, True)),
    ),
    "cuda": (
        *(("small", LARGE, 8, False), ("small", LARGE, 64, False), ("small", LARGE, 256, False), ("small", LARGE, 512, True)),
        *(("small", LARGE, 32, True), ("small", SMALL, 256, True)),
        *(("base", LARGE, 16, False), ("base", LARGE, 128, False), ("base", LARGE, 64, True), ("base", LARGE, 256, True)),
        *(("large", LARGE, 8, True), ("large", LARGE, 64, True)),
    ),
}
# Two ranks: encoder, images, micro-batches, whether gradients are reduced, whether it is held out.
RANKS = (("micro", 16, 1, False, False), ("micro", 8, 1, True, True), ("micro", 16, 2, True, True), ("small", 2, 1, True, True))
REDUCED = ((1 << 16, False), (1 << 18, True), (1 << 20, False), (1 << 22, True), (1 << 24, False), (1 << 26, True))
READ: Final = {"cpu": ((1, False), (2, True)), "cuda": ((1, False), (4, True), (8, True))}  # threads
UPDATED = (("small", False), ("base", True))
SAVED = (("small", False), ("base", True))


def measure(rounds: int) -> dict[str, Any]:
    """All points, each the median of ``rounds`` turns, with what it was measured on."""
    world = dist.read_world()
    require_native([PRECISION], world.device)
    dist.start(world)
    torch.set_num_threads(1)
    kind = world.device.type
    cases = [Point("step", 0.0, held, size, img_size, images) for size, img_size, images, held in STEPS[kind]]
    try:
        points = _told(_in_turn(cases, lambda case: _step_seconds(case, world.device), rounds))
        updates = [Point("update", 0.0, held, size) for size, held in UPDATED]
        points += _told(_in_turn(updates, lambda case: _update_seconds(case, world.device), rounds))
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as directory:
            points += _told(_pauses(world.device, Path(directory)))
            image_bytes, read = _reading(READ[kind], Path(directory), rounds)
            points += _told(read)
    finally:
        dist.stop()
    if kind == "cpu":
        points += _told(_two_ranks(rounds))
    return {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": {"device": kind, "precision": PRECISION, "rounds": rounds, "threads": 1},
        "image_bytes": image_bytes,
        "points": [asdict(point) for point in points],
    }


def _in_turn(cases: list[Point], seconds: Callable[[Point], float], rounds: int) -> list[Point]:
    found: dict[Point, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, times in found.items():
            times.append(seconds(case))
    return [replace(case, seconds=statistics.median(times)) for case, times in found.items()]


def _told(points: list[Point]) -> list[Point]:
    for point in points:
        print(f"{describe(point)}: {1000 * point.seconds:.4g} ms", flush=True)
    return points


def describe(point: Point) -> str:
    """A point in words."""
    if point.kind == "all_reduce":
        return f"all-reduce of {point.num_bytes / 1e6:.2f} MB over {point.world_size} ranks"
    if point.kind == "data":
        return f"an image read and decoded on {point.threads} core{'s' * (point.threads > 1)}"
    if point.kind == "pause":
        return f"pause of a checkpoint of {point.size}, {point.num_bytes / 1e9:.2f} GB"
    if point.kind == "update":
        return f"update and moving average of {point.size}"
    height, width = point.img_size
    batch = f"{point.micro_batches} x {point.batch_size}" if point.micro_batches > 1 else str(point.batch_size)
    ranks = f", {point.world_size} ranks {'with' if point.reduces else 'without'} all-reduce" if point.world_size > 1 else ""
    return f"step of {point.size}, {height}x{width}, {batch} images{ranks}"


def _step_seconds(case: Point, device: torch.device) -> float:
    """The median step of a case after one that is not counted; ranks take five, a single one as many as a second has."""
    model, teacher, engine = _build(case, device)
    step = _step(case, model, teacher, engine, device)
    step()
    times: list[float] = []
    while len(times) < (3 if case.world_size == 1 else 5) or (case.world_size == 1 and sum(times) < 1):
        dist.barrier()
        times.append(_timed(step, device))
    return statistics.median(times)


def _update_seconds(case: Point, device: torch.device) -> float:
    """The median of what follows the gradients in a step, after one that is not counted: it makes the moments."""
    model, teacher, engine = _build(case, device)
    times = []
    for _ in range(6):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        times.append(_timed(lambda: _update(model, teacher, engine), device))
    return statistics.median(times[1:])


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _build(case: Point, device: torch.device) -> tuple[PersonMAE, Teacher, NativeEngine]:
    torch.manual_seed(0)
    dtype = DTYPES[PRECISION]
    model = PersonMAE(size=case.size, compute_dtype=dtype).to(device)
    teacher = Teacher(model.encoder, spec_of(case.img_size).grid, dtype).to(device)
    optimizer = optim.adamw(optim.param_groups(model.named_parameters(), lr=1e-4, weight_decay=0.05), (0.9, 0.95))
    return model, teacher, NativeEngine(model, optimizer, grad_accum_steps=case.micro_batches, max_norm=None)


def _update(model: PersonMAE, teacher: Teacher, engine: NativeEngine) -> None:
    skipped = engine.step(1.0).skipped
    teacher.update(list(model.encoder.parameters()), 0.999, skipped)


def _step(case: Point, model: PersonMAE, teacher: Teacher, engine: NativeEngine, device: torch.device) -> Callable[[], None]:
    """One step as ``pretrain.train`` has it, from canvases on the device, to be called again and again."""
    spec = spec_of(case.img_size)
    height, width = spec.canvas_size
    canvas = torch.randint(0, 256, (case.batch_size, height, width, 3), dtype=torch.uint8).to(device)
    keys = torch.arange(case.batch_size, device=device)
    size = torch.tensor([[height, width]] * case.batch_size, device=device)

    def step() -> None:
        for micro in range(case.micro_batches):
            inputs = cut_batch(canvas, size, draw_batch(keys, size, spec), spec)
            inputs["target"] = teacher(inputs["patches_b"])
            last = micro == case.micro_batches - 1
            engine.forward_backward(inputs, last_micro=last and (case.reduces or case.world_size == 1))
        _update(model, teacher, engine)

    return step


# --- two ranks ---


def _two_ranks(rounds: int) -> list[Point]:
    """Steps and all-reduces of two ranks of a thread each, over gloo."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [context.Process(target=_rank, args=(rank, rounds, directory)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a rank failed; its error stands above")
        return [Point.read(record) for record in json.loads((Path(directory) / "points.json").read_text(encoding="utf-8"))]


def _rank(rank: int, rounds: int, directory: str) -> None:
    tdist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    device = torch.device("cpu")
    dist.start(dist.World(rank, 2, rank, 2, device))
    torch.set_num_threads(1)
    sums = [Point("all_reduce", 0.0, held, num_bytes=num_bytes, world_size=2) for num_bytes, held in REDUCED]
    steps = [
        Point("ranks", 0.0, held, size, LARGE, images, micro_batches, 2, reduces)
        for size, images, micro_batches, reduces, held in RANKS
    ]
    points = _in_turn(sums, _all_reduce_seconds, rounds)
    points += _in_turn(steps, lambda case: _step_seconds(case, device), rounds)
    if rank == 0:
        (Path(directory) / "points.json").write_text(json.dumps([asdict(point) for point in points]), encoding="utf-8")
    dist.barrier()
    dist.stop()


def _all_reduce_seconds(case: Point) -> float:
    values, times = torch.ones(case.num_bytes // 4), []
    for _ in range(8):
        tdist.barrier()
        start = time.perf_counter()
        tdist.all_reduce(values)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


# --- reading, and checkpoints ---


def _reading(cases: tuple[tuple[int, bool], ...], directory: Path, rounds: int) -> tuple[float, list[Point]]:
    """Bytes of a drawn crop, and seconds of one read and decoded by so many threads on so many cores."""
    crops.write(directory / "shards", 2000)
    points = [Point("data", 0.0, held, threads=threads) for threads, held in cases]
    with ShardSet(str(directory / "shards"), "") as shards:
        image_bytes = sum(shard.num_bytes for shard in shards.shards) / len(shards)
        return image_bytes, _in_turn(points, lambda case: _read_seconds(shards, case.threads), rounds)


def _read_seconds(shards: ShardSet, threads: int, num_batches: int = 24) -> float:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:threads]))  # threads that are started meanwhile inherit it
    order = {"seed": 0, "global_batch_size": BATCH_SIZE, "rank": 0, "world_size": 1, "micro_batch_size": BATCH_SIZE}
    decoding = {"num_threads": threads, "prefetch_batches": 4, "max_bad_ratio": 0.01}
    try:
        with closing(BatchReader(shards, canvas_size=SPEC.canvas_size, first_step=0, **order, **decoding)) as reader:
            next(reader)
            start = time.perf_counter()
            for _ in islice(reader, num_batches):
                pass
            return (time.perf_counter() - start) / (num_batches * BATCH_SIZE)
    finally:
        os.sched_setaffinity(0, cores)


def _pauses(device: torch.device, directory: Path) -> list[Point]:
    """How long a save holds up the loop, after the first, which takes the memory."""
    points = []
    for size, held in SAVED:
        model = PersonMAE(size=size).to(device)
        params, encoder = dict(model.state_dict()), dict(model.encoder.state_dict())
        moments = {kind: {name: torch.rand_like(p) for name, p in params.items()} for kind in ("exp_avg", "exp_avg_sq")}
        tensors = {"student": params, "teacher": {name: p.clone() for name, p in encoder.items()}, **moments}
        num_bytes = sum(t.numel() * t.element_size() for of_kind in tensors.values() for t in of_kind.values())
        times = []
        with closing(Writer(directory / size, keep_last=1)) as writer:
            for step in range(1, 4):
                times.append(writer.save(portable.Checkpoint(step, tensors, {})))
                while writer.busy:
                    time.sleep(0.01)
        points.append(Point("pause", statistics.median(times[1:]), held, size, num_bytes=num_bytes))
    return points

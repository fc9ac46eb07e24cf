"""How long a step, a run and its failures take on any number of GPUs: the equations, and the fit of their constants.

Nothing is timed here. What a step computes and moves is counted from the real model (``scaling_work.py``); how fast a machine
does that are the constants of ``Machine``, fitted to measured points (``scaling_points.py``) or assumed.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scaling_work import Work, count_work
from scipy.optimize import least_squares

from personmae import batch_plan
from personmae.errors import UserError

HOUR = 3600.0
UPDATE_BYTES = 32  # of a trained parameter: the norm reads a gradient; AdamW reads four numbers and writes three
AVERAGE_BYTES = 12  # of a parameter of the teacher: two numbers read, one written
# A fit begins at each: what is hidden behind something else at first does not say in which direction to look.
_SLOWER_STARTS, _WEAKER_PRODUCTS = (1.0, 0.1, 10.0), (1.0, 0.1, 0.01)
BUCKET_BYTES = 25 << 20  # that DistributedDataParallel reduces at once


# --- how fast that goes ---


@dataclass(frozen=True)
class Machine:
    """Constants of a device, of the host it is in, and of what joins hosts; seconds, bytes and operations, per second."""

    seconds_per_kernel: float  # to start one
    flops_per_second: float  # that matrix products reach
    bytes_per_second: float  # of the device's memory, that the other kernels of a micro-batch reach
    update_bytes_per_second: float  # and that the optimizer and the average reach, in few and large kernels
    asynchronous: bool  # whether starting kernels, computing and communicating go on side by side, as with a GPU
    contention: float  # how much longer a step takes when the host's other devices work too
    node_latency: float  # of a message between devices of a host
    node_bandwidth: float  # of a device to its neighbour in a host
    images_per_core: float  # read and decoded a second
    copy_bandwidth: float  # of a state to the host's memory, for a checkpoint
    network_latency: float = 20e-6
    network_bandwidth: float = 50e9  # of a host to another
    devices_per_node: int = 8
    cores_per_device: float = 16.0
    store_bandwidth: float = 2.5e9  # of the object store to a host
    cache_bytes: float = 4e12  # of a host's disk, for shards
    mtbf_hours: float = 10_000.0  # between two failures of a host
    restart_seconds: float = 300.0  # from a failure to the first step after it

    def nodes(self, world_size: int) -> int:
        """Hosts that so many devices fill."""
        return math.ceil(world_size / self.devices_per_node)


def compute_seconds(work: Work, batch_size: int, machine: Machine, kernels: slice = slice(None)) -> float:
    """A micro-batch: each kernel is bound by arithmetic or by memory, and has to be started.

    sum_k max(flops_k / rate, bytes_k / bandwidth), and starting: beside it where that is asynchronous, else in addition.
    """
    busy, starting = _busy_seconds(work, batch_size, machine, kernels), len(work.flops[kernels]) * machine.seconds_per_kernel
    return max(busy, starting) if machine.asynchronous else busy + starting


def _busy_seconds(work: Work, batch_size: int, machine: Machine, kernels: slice) -> float:
    moved = (work.fixed_bytes[kernels] + batch_size * work.image_bytes[kernels]) / machine.bytes_per_second
    return float(np.maximum(batch_size * work.flops[kernels] / machine.flops_per_second, moved).sum())


def update_seconds(work: Work, machine: Machine) -> float:
    """The optimizer and the moving average: memory traffic alone."""
    return (UPDATE_BYTES * work.num_params + AVERAGE_BYTES * work.num_averaged) / machine.update_bytes_per_second


def all_reduce_seconds(num_bytes: float, world_size: int, machine: Machine) -> float:
    """A ring in each host, 2 (n - 1) messages of bytes / n, and the quicker of a ring and a tree of hosts.

    A double binary tree moves 2 bytes / bandwidth, with 2 log2(n) latencies instead of 2 (n - 1).
    """
    inside, nodes = min(world_size, machine.devices_per_node), machine.nodes(world_size)
    within = 2 * (inside - 1) * (machine.node_latency + num_bytes / inside / machine.node_bandwidth)
    ring = 2 * (nodes - 1) * (machine.network_latency + num_bytes / nodes / machine.network_bandwidth)
    tree = 2 * (math.ceil(math.log2(nodes)) * machine.network_latency + num_bytes / machine.network_bandwidth)
    return within + min(ring, tree)


def exposed_seconds(work: Work, batch_size: int, world_size: int, machine: Machine) -> float:
    """What a step waits for the all-reduce of its gradients, bucket by bucket.

    A GPU's buckets travel while the last micro-batch's backward pass goes on, but for the last bucket.
    """
    num_buckets = math.ceil(work.gradient_bytes / BUCKET_BYTES)
    bucket = all_reduce_seconds(work.gradient_bytes / num_buckets, world_size, machine)
    if not machine.asynchronous:
        return num_buckets * bucket
    backward = compute_seconds(work, batch_size, machine, slice(work.num_forward, None))
    return max(bucket, num_buckets * bucket - backward)


def data_seconds(global_batch_size: int, image_bytes: float, world_size: int, machine: Machine, *, cold: bool) -> float:
    """Until a host has its part of a global batch: decoded, and ``cold`` from the store.

    Every host fetches every shard: samples of a shard are shuffled over all ranks.
    """
    cores = machine.cores_per_device * world_size
    store = global_batch_size * image_bytes / machine.store_bandwidth if cold else 0.0
    return max(global_batch_size / (machine.images_per_core * cores), store)


# --- a step and a run ---


@dataclass(frozen=True)
class Plan:
    """A run of pre-training."""

    size: str
    num_images: float
    global_batch_size: int = 2048
    max_micro_batch_size: int = 256
    epochs: float = 100
    img_size: tuple[int, int] = (256, 128)
    precision: str = "bf16"
    image_bytes: float = 12_500
    checkpoint_steps: int = 1000


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step by what takes them; ``data`` is beside the others."""

    compute: float
    starting: float  # kernels: part of ``compute`` or beside it
    all_reduce: float
    update: float
    data: float

    @property
    def total(self) -> float:
        """max(compute + what is not hidden of the all-reduce + update, data)."""
        return max(self.compute + self.all_reduce + self.update, self.data)

    @property
    def bound(self) -> str:
        """What takes most of it."""
        if self.data >= self.total:
            return "data"
        longest = "compute" if self.starting < 0.95 * self.compute else "kernel starts"
        return longest if self.compute >= max(self.all_reduce, self.update) else "all-reduce"


def step_times(plan: Plan, world_size: int, machine: Machine, *, cold: bool = False) -> StepTimes:
    """A step of the global batch.

    Raises:
        UserError: these ranks cannot take equal parts of the batch.
    """
    work = count_work(plan.size, plan.img_size, plan.precision)
    batch = batch_plan.plan_batch(plan.global_batch_size, world_size, plan.max_micro_batch_size)
    slower = machine.contention if world_size > 1 else 1.0
    return StepTimes(
        slower * batch.grad_accum_steps * compute_seconds(work, batch.micro_batch_size, machine),
        batch.grad_accum_steps * len(work.flops) * machine.seconds_per_kernel,
        exposed_seconds(work, batch.micro_batch_size, world_size, machine) if world_size > 1 else 0.0,
        slower * update_seconds(work, machine),
        data_seconds(plan.global_batch_size, plan.image_bytes, world_size, machine, cold=cold),
    )


def run_seconds(plan: Plan, world_size: int, machine: Machine) -> float:
    """A whole run: steps, the pauses of checkpoints, and what failures cost.

    A failure comes each ``mtbf_hours`` / hosts and costs half the time between two checkpoints, and a restart. Steps that are
    done again can fail too: wall = productive / (1 - lost / between failures).

    Raises:
        UserError: more is lost than is done.
    """
    work, per_epoch = count_work(plan.size, plan.img_size, plan.precision), plan.num_images / plan.global_batch_size
    fits = plan.num_images * plan.image_bytes <= machine.cache_bytes
    cold = per_epoch * (min(1.0, plan.epochs) if fits else plan.epochs)
    warm = per_epoch * plan.epochs - cold
    stepping = sum(n * step_times(plan, world_size, machine, cold=c).total for n, c in ((cold, True), (warm, False)))
    pause = state_bytes(work) / machine.copy_bandwidth
    productive = stepping + (cold + warm) / plan.checkpoint_steps * pause
    between = machine.mtbf_hours * HOUR / machine.nodes(world_size)
    lost = productive / (cold + warm) * plan.checkpoint_steps / 2 + machine.restart_seconds
    if lost >= between:
        raise UserError(
            f"a failure costs {lost:.0f} s and comes each {between:.0f} s: save more often than {plan.checkpoint_steps} steps"
        )
    return productive / (1 - lost / between)


def state_bytes(work: Work) -> int:
    """Of a checkpoint: parameters, two moments and the teacher, fp32."""
    return 4 * (3 * work.num_params + work.num_averaged)


# --- measured points, and the constants that they give ---


@dataclass(frozen=True)
class Point:
    """A measurement; ``held_out`` ones are predicted and never fitted."""

    kind: Literal["step", "update", "ranks", "all_reduce", "data", "pause"]
    seconds: float
    held_out: bool
    size: str = ""
    img_size: tuple[int, int] = (256, 128)
    batch_size: int = 0  # of a rank and micro-batch
    micro_batches: int = 1
    world_size: int = 1
    reduces: bool = False  # whether the ranks average their gradients
    num_bytes: int = 0
    threads: int = 1

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Point":
        """From JSON, which has no tuples."""
        return cls(**{**record, "img_size": tuple(record["img_size"])})


FREE: Final[dict[str, tuple[str, ...]]] = {
    "step": ("seconds_per_kernel", "flops_per_second", "bytes_per_second"),
    "update": ("update_bytes_per_second",),
    "ranks": ("contention",),
    "all_reduce": ("node_latency", "node_bandwidth"),
    "data": ("images_per_core",),
    "pause": ("copy_bandwidth",),
}


def predict(point: Point, machine: Machine, precision: str) -> float:
    """Seconds that the equations give for a point; of an image where it is about data."""
    if point.kind == "all_reduce":
        return all_reduce_seconds(point.num_bytes, point.world_size, machine)
    if point.kind == "data":
        return 1 / (machine.images_per_core * point.threads)
    if point.kind == "pause":
        return point.num_bytes / machine.copy_bandwidth
    work = count_work(point.size, point.img_size, precision)
    if point.kind == "update":
        return update_seconds(work, machine)
    seconds = point.micro_batches * compute_seconds(work, point.batch_size, machine) + update_seconds(work, machine)
    seconds *= machine.contention if point.world_size > 1 else 1.0
    return seconds + (exposed_seconds(work, point.batch_size, point.world_size, machine) if point.reduces else 0.0)


def fit(points: Sequence[Point], start: Machine, precision: str) -> Machine:
    """The constants of ``FREE`` that the points which are not held out determine: least squares of log(predicted / measured).

    Raises:
        UserError: there are fewer points of a kind than it has constants.
    """
    used = [point for point in points if not point.held_out]
    names: list[str] = []
    for kind in sorted({point.kind for point in points}):
        if (have := sum(point.kind == kind for point in used)) < len(FREE[kind]):
            raise UserError(f"{len(FREE[kind])} points or more of kind {kind!r} are required to fit, got {have}: measure again")
        names += FREE[kind]

    def machine_at(logs: NDArray[np.float64]) -> Machine:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        machine = machine_at(logs)
        return np.array([math.log(predict(point, machine, precision) / point.seconds) for point in used])

    found = []
    for slower, weaker in itertools.product(_SLOWER_STARTS, _WEAKER_PRODUCTS):
        begin = asdict(start)
        begin["seconds_per_kernel"] *= slower
        begin["flops_per_second"] *= weaker
        logs = np.log([begin[name] for name in names])
        found.append(least_squares(residuals, logs, xtol=1e-12, ftol=1e-12, gtol=1e-12))
    return machine_at(min(found, key=lambda one: one.cost).x)

"""The most that this machine can do: matrix products per second, and bytes moved per second.

The speed of a step is judged by these two. Both are measured in the same run, since a data sheet knows neither the clock
nor the other programs on the machine.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch

from personmae import dist
from personmae.errors import UserError
from personmae.precision import AUTO, choose, dtype_of
from personmae.system import signals

Product = tuple[int, int, int]  # (M, K, N): of a matrix (M, K) and one (K, N)
# Square ones, and those of the first layer of an MLP on many tokens: ViT-S, ViT-B and ViT-L; on a CPU also the micro encoder.
_ON_CPU: tuple[Product, ...] = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 128, 512), (4096, 384, 1536), (2048, 768, 3072))
_ON_CUDA: tuple[Product, ...] = (
    *((4096, 4096, 4096), (8192, 8192, 8192)),
    *((32768, 384, 1536), (32768, 768, 3072), (32768, 1024, 4096)),
)
_BUFFER_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # beyond what caches hold
_BLOCK_SECONDS = 0.01  # of calls that are timed together: long beside what an event or the clock misses
_BUDGET_SECONDS = {"cpu": 0.3, "cuda": 0.2}  # for each product and for the copy


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that was seen. Products count two operations for each multiplication and its sum. A copy reads and writes."""

    matrix_rate: dict[str, float]  # operations a second, by precision: the best of ``products``
    bandwidth: float  # bytes a second
    products: dict[str, dict[str, float]] = field(default_factory=dict)  # operations a second, by precision and "M x K x N"


def require_native(precisions: Sequence[str], device: torch.device) -> tuple[str, ...]:
    """The wanted precisions that a device computes natively, with ``auto`` resolved. A precision that is left out is printed.

    A bf16 product by emulation takes a hundred times as long as an fp32 one, and says nothing about the machine.

    Raises:
        UserError: none is left.
    """
    native = (choose(AUTO, str(device))).native
    wanted = dict.fromkeys(native.best if name == AUTO else name for name in precisions)
    left = tuple(name for name in wanted if name == "fp32" or native.bf16)
    if not left:
        raise UserError(f"bf16 cannot be measured here, since {native.why}. Give fp32")
    if len(left) < len(wanted):
        print(f"bf16 is left out: {native.why}", flush=True)
    return left


def measure_alone(precisions: Sequence[str]) -> Ceilings:
    """The ceilings of the device that a program would take, from a process that leaves nothing behind."""
    print(f"measuring the most that this machine can do, in {' and '.join(precisions)} ...", flush=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signals.end_quietly) as pool:
        return pool.submit(_measure_here, tuple(precisions)).result()


def _measure_here(precisions: tuple[str, ...]) -> Ceilings:
    world = dist.read_world()
    dist.start(world)
    try:
        return measure_ceilings(world.device, precisions)
    finally:
        dist.stop()


def measure_ceilings(device: torch.device, precisions: Sequence[str]) -> Ceilings:
    """Both ceilings of a device, within ten seconds on two cores. Each number is the best of many short blocks of calls."""
    shapes = _ON_CUDA if device.type == "cuda" else _ON_CPU
    products = {
        precision: {" x ".join(map(str, shape)): _product_rate(shape, dtype_of(precision), device) for shape in shapes}
        for precision in precisions
    }
    return Ceilings({precision: max(rates.values()) for precision, rates in products.items()}, _bandwidth(device), products)


def _product_rate(shape: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of one product of random numbers. Zeros would save power and let the clock rise."""
    m, k, n = shape
    left, right = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2.0 * m * k * n / _best_seconds(lambda: torch.mm(left, right, out=out), device)


def _bandwidth(device: torch.device) -> float:
    """Bytes a second of copying a buffer within a device's memory, those read and those written."""
    source = torch.ones(_BUFFER_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time of one call, by blocks of calls."""
    call()
    calls = max(1, round(_BLOCK_SECONDS / _block_seconds(call, 1, device)))
    end = time.perf_counter() + _BUDGET_SECONDS[device.type]
    best = _block_seconds(call, calls, device)
    while time.perf_counter() < end:
        best = min(best, _block_seconds(call, calls, device))
    return best / calls


def _block_seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of some calls, by the device's own clock where it has one."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start

"""Ranks and process groups: who we are, and what all agree on."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as tdist

from personmae.errors import Diverged, Stopped, Unavailable, UserError
from personmae.system import signals

_TIMEOUT = timedelta(minutes=10)
_PATIENCE = timedelta(hours=4)  # for what the first rank does alone, such as clustering or ranking
T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: ``local_*`` counts on this host only."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Ranks from the environment of ``deepspeed``, ``torchrun`` or nothing at all."""
    environ = os.environ
    # The deepspeed launcher exports LOCAL_SIZE only. Where LOCAL_WORLD_SIZE is not set, mosaicml-streaming takes 1.
    environ.setdefault("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", "1"))
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if use_cuda() else torch.device("cpu")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"each rank of a host needs a GPU of its own. Rank {local_rank} of this host has none among "
            f"{torch.cuda.device_count()}: start fewer ranks, or set DS_ACCELERATOR=cpu"
        )
    return World(
        rank=int(environ.get("RANK", "0")),
        world_size=int(environ.get("WORLD_SIZE", "1")),
        local_rank=local_rank,
        local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
        device=device,
    )


def use_cuda() -> bool:
    """Whether to compute on GPUs: where there are some, unless DS_ACCELERATOR=cpu, which DeepSpeed obeys too."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))  # int("max") is the ValueError
    return cores


def threads_per_rank(world: World) -> int:
    """Threads that a rank may use for reading and decoding."""
    return max(1, usable_cores() // world.local_world_size)


def compute_threads(world: World) -> int:
    """Threads for a rank's arithmetic on a CPU: ``OMP_NUM_THREADS`` where somebody has set it, else its share of the cores.

    torchrun sets it to 1 where a host has several ranks and nobody has set it: that does not count.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in os.environ and world.local_world_size > 1
    if given.isdigit() and int(given) and not by_torchrun:
        return int(given)
    return max(1, usable_cores() // world.local_world_size)


def start(world: World) -> None:
    """Join the process group (nccl and gloo on GPUs, gloo on CPUs) and share this host's cores among its ranks."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(compute_threads(world))
        keep_freed_memory()
    if tdist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if world.world_size > 1:
        tdist.init_process_group(backend, timeout=_TIMEOUT)
    else:  # a group of one needs no address and no port. DeepSpeed wants a group even so
        store = tdist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        tdist.init_process_group(backend, store=store, rank=0, world_size=1)


def keep_freed_memory() -> None:
    """Tell glibc not to give large blocks back to the system: page faults were a quarter of a step on CPUs."""
    with contextlib.suppress(OSError, AttributeError):  # another C library manages on its own
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 1 << 26)):
            mallopt(option, value)


def stop() -> None:
    """Leave the process group, if there is one."""
    if tdist.is_initialized():
        tdist.destroy_process_group()


class StopSignal:
    """A flag that SIGTERM and SIGINT set. It is read at step boundaries only. The first one is answered on the spot."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def settle(self) -> None:
        """The stop is agreed on: a SIGTERM that comes late must not end a rank whose interpreter is already closing."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _request(self, number: int, _: object) -> None:
        if not self.requested:
            again = "Ctrl-C again ends at once" if number == signal.SIGINT else "SIGKILL ends at once"
            signals.log(f"stopping after this step. {again}")
        self.requested = True
        if number == signal.SIGINT:  # a second Ctrl-C ends at once. Checkpoints are whole or absent
            signal.signal(signal.SIGINT, self._end)

    def _end(self, *_: object) -> None:
        raise KeyboardInterrupt("The last checkpoint stands. Run the same command again to go on from it")


def any_rank(flag: bool) -> bool:
    """True on all ranks when it is True on one."""
    return any_ranks(flag)[0]


def any_ranks(*flags: bool) -> tuple[bool, ...]:
    """Each flag True on all ranks when it is True on one, by one collective."""
    if not tdist.is_initialized():
        return flags
    values = torch.tensor(flags, dtype=torch.int32)
    tdist.all_reduce(values, op=tdist.ReduceOp.MAX)
    return tuple(map(bool, values.tolist()))


def all_flags(flag: bool) -> list[bool]:
    """Every rank's flag, in the order of ranks."""
    if not tdist.is_initialized():
        return [flag]
    flags: list[bool] = [False] * tdist.get_world_size()
    tdist.all_gather_object(flags, flag)
    return flags


def is_first() -> bool:
    """Whether this is rank 0, also where there is no process group."""
    return not tdist.is_initialized() or tdist.get_rank() == 0


def from_first_rank(value: T) -> T:
    """Rank 0's value, on all ranks. It must be one that can be pickled."""
    if not tdist.is_initialized():
        return value
    box = [value]
    tdist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's values, in place, on all ranks. The others give a tensor of that shape and type."""
    if tdist.is_initialized():
        tdist.broadcast(values, src=0)
    return values


def on_first_rank(work: Callable[[], T]) -> T | None:
    """What ``work`` returns on rank 0, None on the others, which wait for it much longer than for a collective.

    A user error, a stop, a divergence or what is away at present is raised on all ranks, so that all end alike.
    """
    if not tdist.is_initialized() or tdist.get_world_size() == 1:
        return work()
    waiting = tdist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(waiting, tdist.ProcessGroup)
    failure: list[Exception | None] = [None]
    result = None
    if is_first():
        try:
            result = work()
        except (UserError, Unavailable, Stopped, Diverged) as error:
            failure[0] = type(error)(str(error))
        except Exception as error:
            failure[0] = RuntimeError(f"the first rank failed: {error!r}")
            tdist.broadcast_object_list(failure, src=0, group=waiting)
            raise
    tdist.broadcast_object_list(failure, src=0, group=waiting)
    tdist.destroy_process_group(waiting)
    if failure[0]:
        raise failure[0]
    return result


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over ranks, on the CPU."""
    values = values.detach().to("cpu", copy=True)
    if tdist.is_initialized() and tdist.get_world_size() > 1:
        tdist.all_reduce(values)
        values /= tdist.get_world_size()
    return values


def share(count: int) -> slice:
    """This rank's part of ``count`` things, contiguous, ranks in order."""
    rank, world_size = (tdist.get_rank(), tdist.get_world_size()) if tdist.is_initialized() else (0, 1)
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def largest_share(count: int) -> int:
    """The most that a rank's ``share`` of ``count`` things holds."""
    return -(-count // (tdist.get_world_size() if tdist.is_initialized() else 1))


def gather_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of all ranks in order, on all of them, where each has its ``share`` of ``count`` rows. Without a gradient."""
    rows = rows.detach()
    if not tdist.is_initialized() or tdist.get_world_size() == 1:
        return rows
    world_size = tdist.get_world_size()
    sizes = [count * (rank + 1) // world_size - count * rank // world_size for rank in range(world_size)]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    tdist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_with_grad(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in order, as many from each. A rank's gradient is the sum of what all ranks have for its rows.

    A loss that each rank computes alike from the gathered rows thus has, after the mean over ranks, the gradient that one rank
    with all the rows would have.
    """
    if not tdist.is_initialized() or tdist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """All ranks' rows. Torch's own (torch.distributed.nn) is deprecated. What follows it needs a backend's reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(tdist.get_world_size())]
        tdist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        tdist.all_reduce(grad)
        return grad.chunk(tdist.get_world_size())[tdist.get_rank()]


def average_buffers(module: torch.nn.Module) -> None:
    """Set floating-point buffers, which are running statistics, to their mean over ranks. Called by all of them."""
    if tdist.is_initialized() and tdist.get_world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                tdist.all_reduce(buffer)
                buffer /= tdist.get_world_size()


def barrier() -> None:
    """Wait for all ranks."""
    if tdist.is_initialized():
        tdist.barrier()

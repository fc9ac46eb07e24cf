"""Which attention is fastest at the lengths of PersonMAE: 33 visible tokens, 129 of a whole region, 161 in the decoders.

    python benchmarks/attention.py                   # under a minute on a GPU
    python benchmarks/attention.py --batch-size 32   # a CPU

Writes ``benchmarks/results/attention.json``: median milliseconds of each way, forward alone and forward with backward, the
ways in turn; after each shape what there is of it. ``default`` is what torch chooses when it is left to itself; a way that a
device does not have is left out.
"""

import argparse
import functools
import json
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from personmae import dist
from personmae.bench.ceilings import require_native
from personmae.checkpoint import portable
from personmae.errors import run_program
from personmae.model.vit import plain_attention
from personmae.monitor import environment

RESULTS = Path(__file__).resolve().parent / "results" / "attention.json"
LENGTHS = (33, 129, 161)
HEADS = {"small": 6, "base": 12, "large": 16}  # of 64 channels each
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(device: torch.device) -> dict[str, Attend]:
    """All forms by name."""

    def by(backend: SDPBackend) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    found: dict[str, Attend] = {"default": F.scaled_dot_product_attention, "plain": plain_attention}
    if device.type == "cuda":
        found["plain compiled"] = torch.compile(plain_attention, dynamic=False)
    return found | {name: by(backend) for name, backend in BACKENDS.items()}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int, int], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by way; ``shape`` is (B, heads, L, 64), with q, k and v cut from one product as in the encoder."""
    b, heads, length, dim = shape
    qkv = torch.randn(b, length, 3, heads, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def forward(attend: Attend) -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both(attend: Attend) -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attend(q, k, v).sum().backward()
        qkv.grad = None

    todo = {}
    torch.compiler.reset()  # of one function the compiler keeps a few shapes, and runs all others eagerly
    for name, attend in ways(device).items():
        try:
            both(attend)
            forward(attend)
        except RuntimeError:
            continue  # not on this device, or not for this shape
        todo[name] = {"forward": functools.partial(forward, attend), "forward and backward": functools.partial(both, attend)}
    for _ in range(repeats):
        for name, runs in todo.items():
            for what, run in runs.items():
                found[name][what].append(1000 * seconds(run, device))
    return {name: {what: round(statistics.median(v), 4) for what, v in times.items()} for name, times in found.items()}


def main() -> None:
    """Measure each length of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512, help="images (default 512)")
    parser.add_argument("--sizes", nargs="+", choices=list(HEADS), default=["small", "base"], help="(default small base)")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each way, in turn (default 20)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(attention|cuDNN|Flash|efficient).*")
    world = dist.read_world()
    require_native(["bf16"], world.device)
    dist.start(world)
    record: dict[str, Any] = {"commit": environment.git_commit(), "hardware": environment.describe_hardware()}
    record |= {"versions": portable.versions(), "batch_size": args.batch_size, "milliseconds": {}}
    for size in args.sizes:
        for length in LENGTHS:
            shape = (args.batch_size, HEADS[size], length, 64)
            record["milliseconds"][f"{size} {length}"] = measure(shape, world.device, args.repeats)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    dist.stop()
    show(record["milliseconds"], args.batch_size)


def show(found: dict[str, dict[str, dict[str, float]]], batch_size: int) -> None:
    """Print one row for each length and direction."""
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    table = Table("", *names, title=f"attention of {batch_size} images, bf16: milliseconds")
    for case, times in found.items():
        for what in ("forward", "forward and backward"):
            row = [times.get(name, {}).get(what) for name in names]
            least = min(value for value in row if value is not None)
            table.add_row(
                f"{case}, {what}", *("" if v is None else f"[bold]{v:.3f}" if v == least else f"{v:.3f}" for v in row)
            )
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(run_program(main))

"""From bytes to tokens on a GPU: the kernel against the compiled plain version and the eager one.

    python benchmarks/regions.py --tune   # about ten minutes on one GPU; on a CPU there is nothing to measure
    python benchmarks/regions.py --sizes 256x128 --images full                  # under two minutes

Writes ``benchmarks/results/regions.json``: milliseconds and peak memory for each size of image, and with ``--tune`` for every
choice of the kernel's constants; after each case what there is of it. All write the same tensors, the target of Eq. (5) among
them. A kernel that does not beat the compiled version has to go; ``bound_ms`` is the time that its bytes alone need, at the
speed of a copy on the same device.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from personmae.model.inputs import Batch, Draws, RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import pixel_target
from personmae.monitor import environment

RESULTS = Path(__file__).resolve().parent / "results" / "regions.json"
BATCH = 1024
SIZES = {"128x64": ((128, 64), 32), "256x128": ((256, 128), 64), "384x128": ((384, 128), 64)}
IMAGES = {"small": 0.35, "full": 1.0}  # height and width as shares of the canvas
CHOICES = list(itertools.product((16, 32, 64), (16, 32), (1, 2, 4)))  # ROWS, COLUMNS, NUM_WARPS
HALF = (0.5, 0.5, 0.5)  # mean and deviation of the colours
TOLERANCE = 1e-4


def plain(canvas: torch.Tensor, size: torch.Tensor, draws: Draws, spec: RegionSpec, *, dtype: torch.dtype) -> Batch:
    """What the kernel writes, from the plain version."""
    batch = cut_batch(canvas, size, draws, spec)
    batch["pixel_target"] = pixel_target(batch["patches_b"])
    return batch | {name: batch[name].to(dtype) for name in ("patches_a", "patches_b")}


def cost(run: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds, and peak memory in MB above what was there; the L2 cache is emptied before each repeat."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    median: Any = do_bench(run, return_mode="median")
    return {"ms": round(median, 4), "peak_mb": round(peak, 1)}


def bound(canvas: torch.Tensor, share: float, batch: Batch) -> float:
    """Milliseconds that reading the images and writing the batch take at the speed of a copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    per_byte = cost(lambda: target.copy_(source))["ms"] / (2 * source.numel())
    written = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    return round(per_byte * (canvas.numel() * share**2 + written), 4)


def measure(spec: RegionSpec, share: float, dtype: torch.dtype, *, tune: bool) -> dict[str, Any]:
    """One size of image."""
    from personmae.model import kernel

    height, width = spec.canvas_size
    canvas = torch.randint(0, 256, (BATCH, height, width, 3), dtype=torch.uint8, device="cuda")
    size = torch.tensor([[round(share * height), round(share * width)]] * BATCH, device="cuda")
    keys = torch.arange(BATCH, device="cuda") * 977
    draws = draw_batch(keys, size, spec)
    torch.compiler.reset()
    compiled, compiled_draw = torch.compile(plain, dynamic=False), torch.compile(draw_batch, dynamic=False)
    call = functools.partial(kernel.cut_batch, canvas, size, draws, spec, dtype=dtype)
    expected, ours = plain(canvas, size, draws, spec, dtype=torch.float32), kernel.cut_batch(canvas, size, draws, spec)
    for name in ("patches_a", "patches_b"):
        assert (ours[name] - expected[name]).abs().max() < TOLERANCE, name
    del expected, ours
    found: dict[str, Any] = {
        "eager": cost(lambda: plain(canvas, size, draws, spec, dtype=dtype)),
        "compiled": cost(lambda: compiled(canvas, size, draws, spec, dtype=dtype)),
        "kernel": cost(call),
        "bound_ms": bound(canvas, share, call()),
        "draw eager": cost(lambda: draw_batch(keys, size, spec)),
        "draw compiled": cost(lambda: compiled_draw(keys, size, spec)),
    }
    if not tune:
        return found
    kept = kernel.ROWS, kernel.COLUMNS, kernel.NUM_WARPS
    for choice in CHOICES:
        kernel.ROWS, kernel.COLUMNS, kernel.NUM_WARPS = choice
        found["kernel rows={} columns={} warps={}".format(*choice)] = cost(call)
    kernel.ROWS, kernel.COLUMNS, kernel.NUM_WARPS = kept
    return found


def main() -> None:
    """Measure each size and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="of the regions (default all)")
    parser.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES), help="(default all)")
    parser.add_argument("--tune", action="store_true", help="try every choice of the kernel's constants")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("the kernel runs on a GPU and this machine has none: nothing to measure")
        return
    record: dict[str, Any] = {"commit": environment.git_commit(), "hardware": environment.describe_hardware(), "batch": BATCH}
    for name, images in itertools.product(args.sizes, args.images):
        (img_size, max_shift), share = SIZES[name], IMAGES[images]
        spec = RegionSpec(img_size, 16, HALF, HALF, max_shift, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
        for dtype in (torch.bfloat16, torch.float32):
            case = f"{name} {images} {dtype}".replace("torch.", "")
            record[case] = measure(spec, share, dtype, tune=args.tune)
            print(case, json.dumps(record[case]), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

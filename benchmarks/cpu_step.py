"""Where a step of the quickstart goes on this CPU, and what its choices are worth.

    python benchmarks/cpu_step.py                    # about three minutes on idle cores
    python benchmarks/cpu_step.py --as avx2          # as without AVX-512 and bf16, in fp32 alone

Writes ``benchmarks/results/cpu_step.json``, one entry per processor: milliseconds of each part at a batch of 128, the median of
alternating repeats. The student is timed with both attention forms and both precisions in turn; the whole is timed in processes
that keep freed memory (as ``dist.start`` arranges) and in processes that give it back, in turn. "resize" is a part of
"cut by image", and "forward" one of "student plain".
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from commands import AS

from personmae import dist
from personmae.bench.ceilings import require_native
from personmae.model import regions, vit
from personmae.model.inputs import RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.monitor import environment
from personmae.precision import dtype_of

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_step.json"
ROUNDS, REPEATS, WARM_UP = 3, 12, 3
FORMS = {"plain": vit.plain_attention, "sdpa": F.scaled_dot_product_attention}
SPEC = RegionSpec((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)


def parts() -> dict[str, Callable[[], object]]:
    """The parts of a step on a batch of noise, by name."""
    height, width = SPEC.canvas_size
    canvas = torch.randint(0, 256, (128, height, width, 3), dtype=torch.uint8)
    keys, native = torch.arange(128), torch.tensor([[150, 70]] * 128)
    draws = draw_batch(keys, native, SPEC)
    batch = cut_batch(canvas, native, draws, SPEC) | {"target": torch.randn(128, 32, 128)}
    kinds = {name: dtype_of(name) for name in require_native(["fp32", "bf16"], torch.device("cpu"))}
    models = {dtype: PersonMAE(size="micro", compute_dtype=kind) for dtype, kind in kinds.items()}
    teachers = {dtype: Teacher(model.encoder, SPEC.grid, kinds[dtype]) for dtype, model in models.items()}

    def teach(dtype: str) -> Callable[[], object]:
        return lambda: teachers[dtype](batch["patches_b"])

    def forward(dtype: str) -> Callable[[], object]:
        return lambda: models[dtype](batch)["loss"]

    def student(form: str, dtype: str) -> Callable[[], object]:
        def run() -> None:
            vit.plain_attention = FORMS[form]  # what Attention.forward calls on a CPU
            models[dtype](batch)["loss"].backward()
            vit.plain_attention = FORMS["plain"]

        return run

    students = {f"student {form} {dtype}": student(form, dtype) for form in FORMS for dtype in kinds}
    return {
        "draw": lambda: draw_batch(keys, native, SPEC),
        "cut by matrices": lambda: cut_batch(canvas, native, draws, SPEC),
        "cut by image": lambda: cut_batch(canvas, native, draws, SPEC, regions.resize_images),
        "resize": lambda: regions.resize_images(
            canvas, native, draws.regions, img_size=SPEC.img_size, max_shift=SPEC.max_shift
        ),
        **{f"teacher {dtype}": teach(dtype) for dtype in kinds},
        **{f"forward {dtype}": forward(dtype) for dtype in kinds},
        **students,
    }


def measure(keep_memory: bool) -> dict[str, float]:
    """Median milliseconds of each part, the parts taken in turn."""
    if keep_memory:
        dist.start(dist.read_world())
    else:
        torch.set_num_threads(dist.usable_cores())
    seconds: dict[str, list[float]] = defaultdict(list)
    todo = parts()
    for repeat in range(REPEATS + WARM_UP):
        for name, run in todo.items():
            start = time.perf_counter()
            run()
            if repeat >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Alternate processes with and without kept memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="processor", choices=list(AS), default="here", help="processor to behave as")
    parser.add_argument("--memory", choices=["kept", "returned"], help="measure once in this process, and print")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(measure(args.memory == "kept")))
        return
    found: dict[str, dict[str, list[float]]] = {"kept": defaultdict(list), "returned": defaultdict(list)}
    environ = os.environ | AS[args.processor]
    for _ in range(ROUNDS):
        for memory, values in found.items():
            command = [sys.executable, __file__, "--memory", memory]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ, encoding="utf-8")
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                values[name].append(value)
    medians = {memory: {n: round(statistics.median(v), 1) for n, v in values.items()} for memory, values in found.items()}
    entry = {"commit": environment.git_commit(), "hardware": environment.describe_hardware(), "milliseconds": medians}
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**record, args.processor: entry}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()

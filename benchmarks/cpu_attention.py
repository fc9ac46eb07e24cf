"""Which attention form, and which precision, trains fastest on this CPU: each alternates with the others within one run.

    python benchmarks/cpu_attention.py               # about a minute on idle cores

Writes ``benchmarks/results/cpu_attention.json``: milliseconds of forward plus backward of the quickstart's student at
a batch of 128 (9 visible and 41 decoder tokens), the median of alternating repeats.
"""

import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from personmae import dist, metrics
from personmae.model import vit
from personmae.model.personmae import PersonMAE, View, cut_batch, draw_batch

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_attention.json"
REPEATS, WARM_UP = 20, 3
FORMS = {"plain": vit.plain_attention, "sdpa": F.scaled_dot_product_attention}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_batch() -> dict[str, torch.Tensor]:
    """A batch of noise with targets, cut as the quickstart cuts it."""
    view = View((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
    height, width = view.canvas_size
    canvas = torch.randint(0, 256, (128, height, 3, width), dtype=torch.uint8)
    batch = cut_batch(canvas, draw_batch(torch.arange(128), torch.tensor([[200, 90]] * 128), view), view)
    return batch | {"target": torch.randn(128, 32, 128)}


def main() -> None:
    """Measure all four combinations in turn, many times."""
    dist.start(dist.read_world())
    batch = make_batch()
    seconds: dict[str, list[float]] = {f"{form} {dtype}": [] for form in FORMS for dtype in DTYPES}
    models = {dtype: PersonMAE(size="micro", compute_dtype=kind) for dtype, kind in DTYPES.items()}
    chosen = vit.plain_attention
    for repeat in range(REPEATS + WARM_UP):
        for form, attend in FORMS.items():
            vit.plain_attention = attend  # what Attention.forward calls on a CPU
            for dtype, model in models.items():
                start = time.perf_counter()
                model(batch)["loss"].backward()
                if repeat >= WARM_UP:
                    seconds[f"{form} {dtype}"].append(time.perf_counter() - start)
    vit.plain_attention = chosen
    medians = {name: round(1000 * statistics.median(values), 1) for name, values in seconds.items()}
    record = {"commit": metrics.git_commit(), "hardware": metrics.describe_hardware(), "milliseconds": medians}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    dist.stop()


if __name__ == "__main__":
    main()

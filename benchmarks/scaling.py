"""What more GPUs are worth: a calculator. It is arithmetic, and nothing in it was measured on a GPU.

    python benchmarks/scaling.py                              # the paper's configurations on H100s, eight in a node
    python benchmarks/scaling.py --gpu "NVIDIA A100-SXM4-80GB" --network-gbits 200 --reached 0.5 --plot scaling.png

The operations and bytes of a step are counted (personmae/flops.py, personmae/bench/counts.py). They are divided by what data
sheets promise, and the bytes of the gradients by the bandwidth between GPUs. docs/scaling.md has the equations.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from personmae import config, flops
from personmae.batch_plan import BatchPlan, plan_batch
from personmae.bench.counts import Stage, Work, count_params, count_stages
from personmae.errors import UserError, run_program
from personmae.model.inputs import RegionSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = tuple(ROOT / "configs" / f"pretrain_vit_{size}.yaml" for size in ("small", "base"))  # the paper's
WORLD_SIZES = tuple(2**n for n in range(10))
LUPERSON_IMAGES = 4_180_243
ONCE = ("optimizer", "average")  # stages of a step that come once, after all micro-batches
GRADIENT_BYTES = 4  # of a parameter: ranks add fp32 gradients
# Bytes a second from the makers' data sheets: of the memory, and of NVLink in one direction. Operations are in flops.py.
DATA_SHEETS: Final = {
    "NVIDIA A100-SXM4-80GB": (2.039e12, 300e9),
    "NVIDIA H100 80GB HBM3": (3.35e12, 450e9),
    "NVIDIA H200": (4.8e12, 450e9),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations and bytes a second of a GPU, and of what joins GPUs and nodes."""

    matrix_rate: float
    memory_bandwidth: float
    link_bandwidth: float  # of a GPU to the others of its node, one way
    network_bandwidth: float  # of a node to the others, one way
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A step on so many GPUs, in seconds; the all-reduce is hidden by the computation at best, or comes after it."""

    gpus: int
    nodes: int
    global_batch_size: int
    compute: float
    all_reduce: float

    @property
    def best_rate(self) -> float:
        """Images a second where the all-reduce goes on beside the computation."""
        return self.global_batch_size / max(self.compute, self.all_reduce)

    @property
    def plain_rate(self) -> float:
        """Images a second where it comes after the computation."""
        return self.global_batch_size / (self.compute + self.all_reduce)


def compute_seconds(stages: dict[str, Stage], batch: BatchPlan, machine: Machine) -> float:
    """What a GPU computes in a step: each stage at whichever ceiling it meets."""
    times = {
        name: stage.seconds(batch.micro_batch_size, machine.matrix_rate, machine.memory_bandwidth)
        for name, stage in stages.items()
    }
    return sum(seconds * (1 if name in ONCE else batch.grad_accum_steps) for name, seconds in times.items())


def all_reduce_seconds(num_bytes: float, gpus: int, machine: Machine) -> float:
    """A ring in each node, 2 (g - 1) / g of the bytes over a link, and one among nodes over the network; no latencies."""
    inside, nodes = min(gpus, machine.gpus_per_node), math.ceil(gpus / machine.gpus_per_node)
    within = 2 * (inside - 1) / inside * num_bytes / machine.link_bandwidth
    return within + 2 * (nodes - 1) / nodes * num_bytes / machine.network_bandwidth


def count_rows(work: Work, machine: Machine, global_batch_size: int, max_micro_batch_size: int) -> list[Row]:
    """A row for each number of GPUs that can take equal parts of the global batch."""
    stages, gradients = count_stages(work), GRADIENT_BYTES * count_params(work)[0]
    rows = []
    for gpus in WORLD_SIZES:
        if global_batch_size % gpus == 0:
            batch = plan_batch(global_batch_size, gpus, max_micro_batch_size)
            compute = compute_seconds(stages, batch, machine)
            reduce = all_reduce_seconds(gradients, gpus, machine)
            rows.append(Row(gpus, math.ceil(gpus / machine.gpus_per_node), global_batch_size, compute, reduce))
    return rows


def print_rows(title: str, rows: list[Row], images: float) -> None:
    """A table; ``images`` is how many the whole run sees."""
    columns = ("GPUs", "nodes", "images a GPU", "compute ms", "all-reduce ms", "images/s at best", "efficiency")
    table = Table(*columns, "images/s, not hidden", "efficiency", "hours, from - to", title=title)
    for row in rows:
        best, plain = (rate / (rows[0].best_rate * row.gpus / rows[0].gpus) for rate in (row.best_rate, row.plain_rate))
        table.add_row(
            *(str(row.gpus), str(row.nodes), str(row.global_batch_size // row.gpus)),
            *(f"{1000 * row.compute:,.1f}", f"{1000 * row.all_reduce:,.1f}"),
            *(f"{row.best_rate:,.0f}", f"{best:.0%}", f"{row.plain_rate:,.0f}", f"{plain:.0%}"),
            f"{images / row.best_rate / 3600:,.1f} - {images / row.plain_rate / 3600:,.1f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Images a second over GPUs: a band from the all-reduce not hidden to hidden, beside a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, rows in tables.items():
        gpus = [row.gpus for row in rows]
        (line,) = axes.plot(gpus, [row.best_rate for row in rows], "o-", markersize=4, label=name)
        axes.fill_between(gpus, [r.plain_rate for r in rows], [r.best_rate for r in rows], color=line.get_color(), alpha=0.2)
        axes.plot(gpus, [rows[0].best_rate * n for n in gpus], ":", color=line.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, calculated, not measured", xticks=WORLD_SIZES)
    axes.set_xticklabels([str(n) for n in WORLD_SIZES])
    axes.minorticks_off()
    axes.legend(title="dotted: linear", frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def machine_of(name: str, network_gbits: float, gpus_per_node: int, reached: float) -> Machine:
    """A GPU of ``DATA_SHEETS`` that reaches a share of its operations and of its memory's bandwidth."""
    if not 0 < reached <= 1 or network_gbits <= 0 or gpus_per_node < 1:
        raise UserError("--reached must be above 0 and at most 1, --network-gbits above 0 and --gpus-per-node at least 1")
    peak, (memory, link) = flops.peak_flops(name, "bf16"), DATA_SHEETS[name]
    assert peak, f"flops.py has no peak of {name}"
    return Machine(reached * peak, reached * memory, link, network_gbits * 1e9 / 8, gpus_per_node)


def run(args: argparse.Namespace) -> None:
    """Print a table for each configuration, and draw them."""
    machine = machine_of(args.gpu, args.network_gbits, args.gpus_per_node, args.reached)
    tables = {}
    for path in args.configs:
        settings = config.load(config.Pretrain, path)
        spec, batch = RegionSpec(**settings.region_arguments()), args.global_batch or settings.train.global_batch_size
        work = Work(settings.model.size, spec, decoder_depth=settings.decoders.depth)
        tables[path.stem] = rows = count_rows(work, machine, batch, settings.train.max_micro_batch_size)
        title = f"{path.stem}, {batch} images a step, {args.gpu}: arithmetic, nothing was measured on a GPU"
        print_rows(title, rows, (settings.train.epochs or 1) * args.images)
    if args.plot:
        draw(tables, args.plot)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("configs", nargs="*", type=Path, default=CONFIGS, help="of pre-training (default: the paper's two)")
    add("--gpu", choices=DATA_SHEETS, default="NVIDIA H100 80GB HBM3", help="whose data sheet (default %(default)s)")
    add("--gpus-per-node", type=int, default=8, help="GPUs that NVLink joins (default 8)")
    add("--network-gbits", type=float, default=400, help="Gbit/s of a node to the others, an assumption (default 400)")
    add("--reached", type=float, default=1.0, help="share of the GPU's ceilings that a step reaches, an assumption (default 1)")
    add("--global-batch", type=int, help="images a step over all GPUs (default: the configuration's)")
    add("--images", type=float, default=LUPERSON_IMAGES, help="images of the data set, for the hours (default LUPerson's)")
    add("--plot", type=Path, help="draw the tables to this file")
    args = parser.parse_args(argv)
    return run_program(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

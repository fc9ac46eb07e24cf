"""Scaling, planned: a model of a run on 1 to 512 GPUs and 1 to 1,000 M images, fitted to measured points of this machine.

    python benchmarks/scaling.py measure          # four minutes on 2 idle cores; on a GPU machine with one GPU
    python benchmarks/scaling.py predict

``measure`` writes ``benchmarks/results/scaling_points.json`` (``scaling_points_cuda.json`` on a GPU). ``predict`` fits the
constants to the points that are not held out, tells the error on those that are, and predicts; it writes ``scaling.json`` there
and ``docs/scaling.png``. No prediction for GPUs is measured: which constant was, and where, stands above the tables.
"""

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scaling_model import FREE, HOUR, Machine, Plan, Point, fit, predict, run_seconds, step_times
from scaling_points import describe, measure

from personmae import flops
from personmae.batch_plan import admissible_world_sizes
from personmae.errors import UserError
from personmae.monitor import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POINTS = {"cpu": RESULTS / "scaling_points.json", "cuda": RESULTS / "scaling_points_cuda.json"}
WORLD_SIZES = tuple(2**n for n in range(10))
MILLIONS = (1, 4.2, 50, 1000)
SIZES = ("small", "base", "large")
GPU = "NVIDIA H100 80GB HBM3"

# Where a fit starts; all that it does not determine on a CPU is not used there.
CORE = Machine(
    seconds_per_kernel=1e-5,
    flops_per_second=1e11,
    bytes_per_second=1e10,
    update_bytes_per_second=1e10,
    asynchronous=False,
    contention=1.0,
    node_latency=1e-4,
    node_bandwidth=1e9,
    images_per_core=5e3,
    copy_bandwidth=1e10,
)
# Of what a GPU can do at most, what a step's kernels reach of it: both assumed.
REACHED = {"flops_per_second": 0.6, "bytes_per_second": 0.75, "update_bytes_per_second": 0.75}
# One GPU of eight in a host, unmeasured, as far as there are no points of one.
ASSUMED = {
    "seconds_per_kernel": (5e-6, "assumed: a kernel started by Python each 5 µs; CUDA graphs and compiling start fewer"),
    "flops_per_second": (
        REACHED["flops_per_second"] * (flops.peak_flops(GPU, "bf16") or 0),
        f"assumed: {REACHED['flops_per_second']:.0%} of the data sheet's peak of an {GPU}",
    ),
    **{
        name: (REACHED[name] * 3.35e12, f"assumed: {REACHED[name]:.0%} of the data sheet's 3.35 TB/s")
        for name in ("bytes_per_second", "update_bytes_per_second")
    },
    "contention": (1.0, "assumed: GPUs share no memory"),
    "node_latency": (5e-6, "assumed"),
    "node_bandwidth": (400e9, "assumed: NVLink, 450 GB/s each way on the data sheet"),
    "images_per_core": (5e3, "assumed"),
    "copy_bandwidth": (20e9, "assumed: PCIe to pinned memory"),
    "network_latency": (20e-6, "assumed"),
    "network_bandwidth": (50e9, "assumed: 400 Gb/s for a host"),
    "devices_per_node": (8, "assumed"),
    "cores_per_device": (16.0, "assumed"),
    "store_bandwidth": (2.5e9, "assumed: 20 Gb/s for a host"),
    "cache_bytes": (4e12, "assumed: a disk of 4 TB in a host"),
    "mtbf_hours": (10_000.0, "assumed"),
    "restart_seconds": (300.0, "assumed"),
}
Sources = dict[str, str]
Row = dict[str, Any]


def read_points(path: Path) -> tuple[dict[str, Any], list[Point]]:
    """The record of a measurement, and its points.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"measured points are required; {path} is missing: python benchmarks/scaling.py measure")
    record = json.loads(path.read_text(encoding="utf-8"))
    return record, [Point.read(point) for point in record["points"]]


def errors_of(points: list[Point], machine: Machine, precision: str, *, held_out: bool) -> list[Row]:
    """What the model says of each point that was not fitted, or that was, and its error as a share of the measured time."""
    held = [(point, predict(point, machine, precision)) for point in points if point.held_out == held_out]
    return [
        {"point": describe(p), "kind": p.kind, "measured": p.seconds, "predicted": s, "error": s / p.seconds - 1}
        for p, s in held
    ]


def measured_ceilings() -> dict[str, tuple[float, str]]:
    """What a GPU did at most by the last of the results that says so, and which GPU; nothing where none says so."""
    found: dict[str, tuple[float, str]] = {}
    for path in sorted(RESULTS.rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("ceilings") and record.get("hardware", {}).get("gpus"):
            ceilings, which = record["ceilings"], f"{record['hardware']['gpus'][0]} ({path.name})"
            rates = dict.fromkeys(("bytes_per_second", "update_bytes_per_second"), ceilings["bandwidth"])
            found = {
                name: (rate, which) for name, rate in {"flops_per_second": ceilings["matrix_rate"]["bf16"], **rates}.items()
            }
    return found


def gpu_machine(core: Machine, where: str, changed: dict[str, float]) -> tuple[Machine, Sources]:
    """The machine of the predictions, and where each of its constants comes from; ``changed`` are the user's own.

    Ceilings that ``personmae bench step`` has measured on a GPU replace those of the data sheet, points of a GPU both. Decoding
    is done by cores, so theirs counts where no GPU host was measured.
    """
    values, sources = ({name: of[i] for name, of in ASSUMED.items()} for i in range(2))
    machine = Machine(**values, asynchronous=True)
    machine, sources["images_per_core"] = replace(machine, images_per_core=core.images_per_core), f"measured on {where}"
    for name, (most, which) in measured_ceilings().items():
        machine = replace(machine, **{name: REACHED[name] * most})
        sources[name] = f"assumed: {REACHED[name]:.0%} of {most:.3g}, measured on {which}"
    if POINTS["cuda"].exists():
        record, points = read_points(POINTS["cuda"])
        machine = fit(points, machine, record["settings"]["precision"])
        for name in {name for point in points for name in FREE[point.kind]}:
            sources[name] = f"measured on {record['hardware']['gpus'][0]}"
    wrong = [name for name in changed if name not in values]
    if wrong:
        raise UserError(f"--set takes {', '.join(values)}; got {wrong[0]}")
    return replace(machine, **changed), sources | dict.fromkeys(changed, "given")


def predicted(plan: Plan, machine: Machine, price: float) -> list[Row]:
    """A row for each number of GPUs: a step, and a run over each number of images, with its price."""
    rows: list[Row] = []
    for world_size in WORLD_SIZES:
        try:
            step = step_times(plan, world_size, machine)
        except UserError:  # told below the table: these GPUs cannot take equal parts
            continue
        rate = plan.global_batch_size / step.total
        runs = {}
        for millions in MILLIONS:
            hours = run_seconds(replace(plan, num_images=millions * 1e6), world_size, machine) / HOUR
            runs[f"{millions:g} M"] = {"hours": hours, "price": hours * world_size * price}
        ideal = rows[0]["images_per_second"] * world_size / rows[0]["gpus"] if rows else rate
        times = asdict(step) | {"total": step.total, "bound": step.bound}
        rows.append({"gpus": world_size, "images_per_second": rate, "of_linear": rate / ideal, "step": times, "runs": runs})
    return rows


def _show_errors(console: Console, errors: list[Row]) -> dict[str, float]:
    table = Table("held out", "measured ms", "predicted ms", "error", title="points that were not fitted")
    for row in errors:
        times = (f"{1000 * row[name]:.4g}" for name in ("measured", "predicted"))
        table.add_row(row["point"], *times, f"{row['error']:+.1%}")
    console.print(table)
    kinds = {row["kind"]: [abs(other["error"]) for other in errors if other["kind"] == row["kind"]] for row in errors}
    means = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    console.print(
        "mean error: " + ", ".join(f"{kind} {mean:.1%} (worst {max(kinds[kind]):.1%})" for kind, mean in means.items())
    )
    return means


def _show_constants(console: Console, core: Machine, gpu: Machine, sources: Sources, where: str) -> None:
    table = Table("constant", f"fitted on {where}", "for GPUs", "which is", title="constants")
    fitted = {name for names in FREE.values() for name in names}
    for field in fields(Machine):
        if field.name in sources:
            here = f"{getattr(core, field.name):.4g}" if field.name in fitted else ""
            table.add_row(field.name, here, f"{getattr(gpu, field.name):.4g}", sources[field.name])
    console.print(table)


def _show_rows(console: Console, plan: Plan, rows: list[Row], price: float) -> None:
    title = (
        f"{plan.size}, {plan.global_batch_size} images a step, {plan.epochs:g} epochs: predicted, not measured; "
        f"hours, and price at {price:g} a GPU hour"
    )
    table = Table(
        "GPUs", "images a GPU", "images/s", "of linear", "bound by", *(f"{m:g} M images" for m in MILLIONS), title=title
    )
    for row in rows:
        runs = (f"{run['hours']:,.1f} h  {run['price']:,.0f}" for run in row["runs"].values())
        each = f"{plan.global_batch_size // row['gpus']}"
        table.add_row(
            str(row["gpus"]), each, f"{row['images_per_second']:,.0f}", f"{row['of_linear']:.0%}", row["step"]["bound"], *runs
        )
    console.print(table)


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Images per second over GPUs for each encoder, beside a line that is straight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for size, rows in tables.items():
        gpus, rates = [row["gpus"] for row in rows], [row["images_per_second"] for row in rows]
        (line,) = axes.plot(gpus, rates, "o-", markersize=4, label=f"ViT {size}")
        axes.plot(gpus, [rates[0] * n / gpus[0] for n in gpus], ":", color=line.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, predicted", xticks=WORLD_SIZES)
    axes.set_xticklabels([str(n) for n in WORLD_SIZES])
    axes.minorticks_off()
    axes.legend(title="dotted: linear", frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run_predict(args: argparse.Namespace) -> None:
    """Fit, tell the error, predict, and write both."""
    record, points = read_points(POINTS["cpu"])
    precision, cpu = record["settings"]["precision"], f"a core of {record['hardware']['cpu']}"
    core = fit(points, CORE, precision)
    gpu, sources = gpu_machine(core, cpu, dict(args.set))
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 160))
    fitted_errors = [abs(row["error"]) for row in errors_of(points, core, precision, held_out=False)]
    console.print(f"{len(fitted_errors)} points are fitted, with a mean error of {sum(fitted_errors) / len(fitted_errors):.1%}")
    errors = errors_of(points, core, precision, held_out=True)
    means = {"cpu": _show_errors(console, errors)}
    if POINTS["cuda"].exists():
        other, cuda_points = read_points(POINTS["cuda"])
        used = fit(cuda_points, gpu, other["settings"]["precision"])
        cuda_errors = errors_of(cuda_points, used, other["settings"]["precision"], held_out=True)
        means["cuda"] = _show_errors(console, cuda_errors)
        errors += cuda_errors
    _show_constants(console, core, gpu, sources, cpu)
    plan = Plan("", 0, args.global_batch, args.micro_batch, args.epochs, image_bytes=record["image_bytes"])
    tables = {size: predicted(replace(plan, size=size), gpu, args.price_per_gpu_hour) for size in SIZES}
    for size, rows in tables.items():
        _show_rows(console, replace(plan, size=size), rows, args.price_per_gpu_hour)
    taken = ", ".join(str(n) for n in admissible_world_sizes(args.global_batch, WORLD_SIZES[-1]))
    console.print(
        f"a global batch of {args.global_batch} can be shared by {taken} GPUs and no other number up to {WORLD_SIZES[-1]}"
    )
    found = {
        "commit": environment.git_commit(),
        "points": {"commit": record["commit"], "hardware": record["hardware"], "image_bytes": record["image_bytes"]},
        "fitted": asdict(core),
        "gpu": {name: {"value": getattr(gpu, name), "source": source} for name, source in sources.items()},
        "mean_error_of_fitted": sum(fitted_errors) / len(fitted_errors),
        "held_out": errors,
        "mean_error": means,
        "price_per_gpu_hour": args.price_per_gpu_hour,
        "plan": asdict(plan) | {"size": list(SIZES), "num_images": [m * 1e6 for m in MILLIONS]},
        "predicted": tables,
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(tables, args.image)


def run_measure(args: argparse.Namespace) -> None:
    """Measure and write the points."""
    record = measure(args.rounds)
    out = args.out or POINTS[record["settings"]["device"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    """Two verbs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    measuring = verbs.add_parser("measure", help="time the points on this machine")
    measuring.add_argument("--rounds", type=int, default=3, help="turns of each point, of which the median counts")
    measuring.add_argument("--out", type=Path, help="default: scaling_points.json beside the other results")
    measuring.set_defaults(run=run_measure)
    predicting = verbs.add_parser("predict", help="fit, tell the error on held-out points, predict")
    predicting.add_argument("--price-per-gpu-hour", type=float, default=2.5, help="an assumption (default 2.5)")
    predicting.add_argument("--global-batch", type=int, default=2048, help="images a step over all GPUs (default 2048)")
    predicting.add_argument("--micro-batch", type=int, default=256, help="most images of a GPU at once (default 256)")
    predicting.add_argument("--epochs", type=float, default=100, help="passes over the images (default 100, the paper's)")
    predicting.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a constant of the GPUs"
    )
    predicting.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    predicting.add_argument("--image", type=Path, default=ROOT / "docs" / "scaling.png")
    predicting.set_defaults(run=run_predict)
    args = parser.parse_args()
    try:
        args.run(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

"""``personmae report``, ``bench`` and ``doctor``: results of runs, and measurements and checks of a machine."""

import argparse
from pathlib import Path

from personmae.commands.arguments import Renamed, Verbs, counting, place, positive, size
from personmae.errors import UserError
from personmae.monitor.progress import log, log_to_stderr


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them. The measurement checks them."""
    return tuple(name.strip() for name in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    return tuple(counting(part) for part in text.split(","))


_REPORT = """\
Writes RUN/report.html and RUN/figure.png of all runs and results directly in RUN.
Results are in one table where their data are the same, by digest. Runs that differ by their seed are one row.
The page says what is not finished, which people are synthetic, and what to run next.
Data is found from any folder. Where something that a run names is gone, the exit code is 1.
"""


def add_report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "report",
        help="one self-contained HTML page of runs: tables, curves, images, rank lists, durations",
        description=_REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="directory that holds the runs, e.g. runs/quickstart")

    def run(args: argparse.Namespace) -> None:
        log("report: starting ...")
        from personmae.report import report

        report.run(args.run_dir)

    verb.set_defaults(run=run)


def add_bench(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser("bench", help="measure this machine: reading shards, a step, a checkpoint, ranking, clustering")
    actions = bench.add_subparsers(dest="action", metavar="ACTION", required=True)
    assert isinstance(actions, Verbs)
    actions.renamed["rank"] = "retrieval"
    _bench_data(actions)
    _bench_step(actions)
    _bench_counts(actions)
    _bench_checkpoint(actions)
    _bench_retrieval(actions)
    _bench_cluster(actions)


def _bench_retrieval(actions: argparse._SubParsersAction) -> None:
    retrieval = actions.add_parser(
        "retrieval", help="scoring a retrieval, next to its matrix product and to the baseline's argsort and loops"
    )
    retrieval.add_argument("size", choices=["market", "msmt17"], help="the benchmark whose size is used. Features are random")
    retrieval.add_argument("--rounds", type=counting, default=3, help="measurements of each way, in turn (default 3)")
    retrieval.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from personmae.bench.retrieval import PRESETS, run_retrieval

        run_retrieval(replace(PRESETS[args.size], rounds=args.rounds), args.out)

    retrieval.set_defaults(run=run)


def _bench_cluster(actions: argparse._SubParsersAction) -> None:
    cluster = actions.add_parser("cluster", help="pseudo-labels, next to a dense baseline")
    cluster.add_argument(
        "--preset",
        default="market",
        choices=["market", "large"],
        help="12,936 or 100,000 images, these without a baseline",
    )
    cluster.add_argument("--rounds", type=counting, help="measurements of each way, in turn (default: the preset's)")
    cluster.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from personmae.bench.cluster import PRESETS, run_cluster

        bench = PRESETS[args.preset]
        run_cluster(replace(bench, rounds=args.rounds or bench.rounds), args.out)

    cluster.set_defaults(run=run)


def _bench_step(actions: argparse._SubParsersAction) -> None:
    step = actions.add_parser(
        "step", help="images/s, parts, share of this machine and memory of a step, over a grid of settings"
    )
    step.add_argument("--sizes", type=names, default=("micro",), help="of micro, tiny, small, base, large (default micro)")
    step.add_argument("--batches", type=counts, default=(32,), metavar="N,...", help="images a step (default 32)")
    step.add_argument(
        "--engines",
        type=names,
        default=("native",),
        help="of native, 'deepspeed 0' to 'deepspeed 3', fsdp, and plain, a loop without an engine (default native)",
    )
    step.add_argument("--compile", type=names, default=("off",), help="of off, on, and graph, with CUDA graphs (default off)")
    step.add_argument(
        "--precision",
        type=names,
        default=("auto",),
        help="of bf16, fp32, auto (default auto: the native one of this machine)",
    )
    step.add_argument("--checkpointing", type=names, default=("none",), help="of none, selective, full (default none)")
    step.add_argument("--crop-backends", type=names, default=("torch",), help="of torch, triton (default torch)")
    step.add_argument("--cutters", type=names, action=Renamed, dest="crop_backends", help=argparse.SUPPRESS)
    step.add_argument("--img-size", type=size, default=(256, 128), metavar="HxW", help="pixels (default 256x128)")
    step.add_argument("--shards", type=place, metavar="DIR", help="also measure the whole pipeline, with these shards")
    step.add_argument("--steps", type=counting, default=20, help="steps of each cell in a round (default 20)")
    step.add_argument("--rounds", type=counting, default=3, help="measurements of each cell. The median counts (default 3)")
    step.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from personmae.bench.step import StepBench, run_step

        settings = StepBench(
            sizes=args.sizes,
            batches=args.batches,
            engines=args.engines,
            compile=args.compile,
            precisions=args.precision,
            checkpointing=args.checkpointing,
            crop_backends=args.crop_backends,
            img_size=args.img_size,
            shards=args.shards,
            num_steps=args.steps,
            rounds=args.rounds,
        )
        run_step(settings, args.out)

    step.set_defaults(run=run)


def _bench_counts(actions: argparse._SubParsersAction) -> None:
    verb = actions.add_parser("counts", help="operations and bytes of each stage of a step, and the least time that they take")
    verb.add_argument("--batch", type=counting, default=256, help="images a step (default 256)")
    verb.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        help="of the matrix products (default bf16, and with --measure the native one of this machine)",
    )
    verb.add_argument("--rate", type=positive, metavar="TFLOPS", help="10^12 operations per second of a machine")
    verb.add_argument("--bandwidth", type=positive, metavar="GB/S", help="10^9 bytes per second that it moves")
    verb.add_argument("--measure", action="store_true", help="take both from this machine")
    verb.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from personmae import dist
        from personmae.bench.ceilings import Ceilings, measure_alone, require_native
        from personmae.bench.counts import CountBench, run_counts

        if (args.rate is None) != (args.bandwidth is None) or (args.rate and args.measure):
            raise UserError("--rate and --bandwidth belong together, and replace --measure")
        precision, ceilings = args.precision or "bf16", None
        if args.measure:
            log_to_stderr("bench counts: measuring the most that this machine can do ...")
            (precision,) = require_native([args.precision or "auto"], dist.read_world().device)
            ceilings = measure_alone([precision])
        if args.rate:
            ceilings = Ceilings({precision: 1e12 * args.rate}, 1e9 * args.bandwidth)
        run_counts(CountBench(batch_size=args.batch, precision=precision), ceilings, args.out)

    verb.set_defaults(run=run)


def _bench_checkpoint(actions: argparse._SubParsersAction) -> None:
    verb = actions.add_parser(
        "checkpoint", help="how long saving the whole state holds up training, and when the save is committed"
    )
    verb.add_argument(
        "--size", default="base", choices=["micro", "tiny", "small", "base", "large"], help="encoder (default base)"
    )
    verb.add_argument("--saves", type=counting, default=4, help="how many. The median without the first counts (default 4)")
    verb.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from personmae.bench.checkpoint import CheckpointBench, run_checkpoint

        run_checkpoint(CheckpointBench(args.size, args.saves), args.out)

    verb.set_defaults(run=run)


def _bench_data(actions: argparse._SubParsersAction) -> None:
    data = actions.add_parser("data", help="reading and decoding shards, next to StreamingDataset + PIL + DataLoader")
    data.add_argument("shards", type=place, metavar="SHARDS", help="a directory of shards")
    data.add_argument(
        "--remote", type=place, metavar="URL", help="the same shards in an object store, read with an empty and a full cache"
    )
    data.add_argument("--images", type=counting, default=10_000, help="images per measurement (default 10000)")
    data.add_argument(
        "--rounds", type=counting, default=3, help="measurements of each way, in turn. The median counts (default 3)"
    )
    data.add_argument(
        "--rate",
        type=positive,
        default=6000,
        help="images/s of the consumer whose wait is measured (default 6000, as a GPU with ViT-B)",
    )
    data.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from personmae.bench.data import DataBench, run_data

        settings = DataBench(args.shards, args.remote, num_images=args.images, rounds=args.rounds, rate=args.rate)
        run_data(settings, args.out)

    data.set_defaults(run=run)


def add_doctor(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("doctor", help="what this machine has, and which commands would fail and why")
    what = verb.add_mutually_exclusive_group()
    what.add_argument("--shards", type=place, help="also try to read shards at a directory or s3://bucket/prefix")
    what.add_argument(
        "--data",
        metavar="PATH",
        type=Path,
        help="instead: count the benchmarks in a folder, open their files, and describe their crops",
    )
    what.add_argument("--quickstart", action="store_true", help="instead: how long 'make quickstart' takes on this machine")
    verb.add_argument("--config", type=Path, metavar="FILE", help="also estimate a configuration on this machine")

    def run(args: argparse.Namespace) -> None:
        if args.config and (args.data or args.quickstart):
            raise UserError("--config goes with no option but --shards. Leave out the other")
        if args.data:
            from personmae.inspect import inventory

            inventory.run(args.data)
            return
        from personmae.inspect import doctor

        if args.quickstart:
            doctor.print_quickstart()
        else:
            doctor.run(shards=args.shards, config_path=args.config and str(args.config))

    verb.set_defaults(run=run)

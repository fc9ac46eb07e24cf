"""``personmae report``, ``bench`` and ``doctor``: looking at runs and at machines."""

import argparse
from pathlib import Path

from personmae.commands.arguments import counting, named, positive


def add_report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("report", help="one self-contained HTML page of a run: curves, pictures, rank lists, the table")
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="directory that holds the runs, e.g. runs/quickstart")

    def run(args: argparse.Namespace) -> None:
        from personmae.apply import report

        report.run(args.run_dir)

    verb.set_defaults(run=run)


def add_bench(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser("bench", help="measure this machine: reading shards, a step of each engine, ranking, clustering")
    actions = bench.add_subparsers(dest="action", metavar="ACTION", required=True)
    _bench_data(actions)
    _bench_step(actions)
    _bench_rank(actions)
    _bench_cluster(actions)


def _bench_rank(actions: argparse._SubParsersAction) -> None:
    rank = actions.add_parser("rank", help="scoring a retrieval, beside its matrix product and the usual argsort and loops")
    rank.add_argument("size", choices=["market", "msmt17"], help="of which benchmark; features are drawn")
    rank.add_argument("--rounds", type=counting, default=3, help="times each way is measured, in turn (default 3)")
    rank.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from personmae.bench.rank import PRESETS, run_rank

        run_rank(replace(PRESETS[args.size], rounds=args.rounds), args.out)

    rank.set_defaults(run=run)


def _bench_cluster(actions: argparse._SubParsersAction) -> None:
    cluster = actions.add_parser("cluster", help="pseudo-labels, beside the usual dense way")
    cluster.add_argument(
        "--preset", default="market", choices=["market", "large"], help="12,936 or 100,000 images, the latter ours alone"
    )
    cluster.add_argument("--rounds", type=counting, help="times each way is measured, in turn (default: the preset's)")
    cluster.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from personmae.bench.cluster import PRESETS, run_cluster

        bench = PRESETS[args.preset]
        run_cluster(replace(bench, rounds=args.rounds or bench.rounds), args.out)

    cluster.set_defaults(run=run)


def _bench_step(actions: argparse._SubParsersAction) -> None:
    step = actions.add_parser("step", help="what each engine costs beyond a plain loop, and how long a checkpoint pauses")
    step.add_argument("--size", default="micro", choices=["micro", "small", "base", "large"], help="encoder (default micro)")
    step.add_argument("--batch-size", type=counting, default=32, help="images a step (default 32)")
    step.add_argument("--steps", type=counting, default=20, help="steps of each engine a round (default 20)")
    step.add_argument("--rounds", type=counting, default=3, help="times the engines are taken in turn (default 3)")
    step.add_argument("--precision", default="fp32", choices=["bf16", "fp32"], help="of the matrix products (default fp32)")
    step.add_argument("--compile", action="store_true", help="compile student and teacher")
    step.add_argument("--checkpoint-size", default="base", choices=["micro", "small", "base", "large"], help="(default base)")
    step.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from personmae.bench.step import StepBench, run_step

        settings = StepBench(
            args.size,
            args.batch_size,
            num_steps=args.steps,
            rounds=args.rounds,
            precision=args.precision,
            compile=args.compile,
            checkpoint_size=args.checkpoint_size,
        )
        run_step(settings, args.out)

    step.set_defaults(run=run)


def _bench_data(actions: argparse._SubParsersAction) -> None:
    data = actions.add_parser("data", help="reading and decoding shards, beside StreamingDataset + PIL + DataLoader")
    data.add_argument("shards", metavar="SHARDS", help="a directory of shards")
    data.add_argument("--remote", metavar="URL", help="the same shards in an object store, read with an empty and a full cache")
    data.add_argument("--images", type=counting, default=10_000, help="pictures per measurement (default 10000)")
    data.add_argument(
        "--rounds", type=counting, default=3, help="times each way is measured, in turn; the median counts (default 3)"
    )
    data.add_argument(
        "--rate",
        type=positive,
        default=6000,
        help="images/s of the consumer whose wait is told (default 6000, a GPU on ViT-B)",
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
    what.add_argument("--shards", help="also try to read shards at a directory or s3://bucket/prefix")
    what.add_argument("--data", metavar="PATH", type=named, help="instead: count the benchmarks in a folder, open their files")

    def run(args: argparse.Namespace) -> None:
        if args.data:
            from personmae.apply import inventory

            inventory.run(args.data)
        else:
            from personmae.apply import doctor

            doctor.run(shards=args.shards)

    verb.set_defaults(run=run)

"""The console script: verbs, one line of help each. Nothing heavy is imported before a verb is chosen."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from personmae.errors import UserError, run_program


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the verb; returns the exit code."""
    parser = Parser(prog="personmae", description="Person re-identification pre-training, from a bucket of crops to a table.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for add in (_synth, _shards, _pretrain, _finetune, _unsupervised, _evaluate, _report, _bench, _doctor):
        add(verbs)
    args = parser.parse_args(argv)
    return run_program(lambda: args.run(args), quiet=os.environ.get("RANK", "0") != "0")


class Parser(argparse.ArgumentParser):
    """A parser that points at ``--help`` and exits with the code of a user error."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {message}; see '{self.prog} --help'", file=sys.stderr)
        sys.exit(78)


def _synth(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("synth", help="draw synthetic pedestrians: an unlabelled pool and two ReID benchmarks")
    verb.add_argument("out", type=Path, metavar="OUT", help="directory to create")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--pool-images", type=int, default=20_000, help="size of the unlabelled pool (default 20000)")
    verb.add_argument("--processes", type=int, default=os.cpu_count() or 1)

    def run(args: argparse.Namespace) -> None:
        from personmae.data.synthetic import SynthSettings, write_synthetic

        settings = SynthSettings(seed=args.seed, pool_images=args.pool_images)
        with _progress("synth", "pictures") as progress:
            counts = write_synthetic(args.out, settings, num_processes=args.processes, progress=progress)
        for split, count in counts.items():
            print(f"{split:40} {count:>8,} images")
        print(f"contact sheet: {args.out / 'contact_sheet.png'}")

    verb.set_defaults(run=run)


def _shards(verbs: argparse._SubParsersAction) -> None:
    shards = verbs.add_parser("shards", help="write, verify or describe MDS shards in a directory or s3://bucket/prefix")
    actions = shards.add_subparsers(dest="action", metavar="ACTION", required=True)
    _shards_write_arguments(actions)
    for action, help_text in (("verify", "read every sample back and check it"), ("stats", "counts, bytes, sizes")):
        verb = actions.add_parser(action, help=help_text)
        verb.add_argument("root", metavar="SHARDS", help="directory or s3://bucket/prefix")
        verb.add_argument("--cache-dir", type=Path, help="where remote shards are kept (default: a temporary directory)")
        verb.set_defaults(run=_shards_verify if action == "verify" else _shards_stats)


_SHARDS_WRITE = """\
SRC is one of
  a folder         every .jpg and .jpeg below it, at any depth; a picture's name is its path below SRC
  an LMDB          name -> JPEG bytes, as LUPerson is kept: a directory with data.mdb, or a .mdb or .lmdb file
  tars             an uncompressed .tar, or a directory of them (WebDataset); a name is TAR/MEMBER

Pictures are kept byte for byte. Those that cannot be decoded are left out and listed in DEST/rejects.jsonl.
Interrupted or killed at any moment, the same command goes on where it was and ends with the same bytes.
"""
_SHARDS_WRITE_EXAMPLES = """\
examples:
  personmae shards write CROPS/ s3://bucket/crops
  personmae shards write lmdb/ s3://bucket/luperson --max-side 384
  personmae shards write lmdb/ SHARDS --list CFS_list.pkl --trust-pickle-list --first 0.5
  personmae shards write lmdb/ SHARDS --fraction 0.25 --seed 0
"""


def _shards_write_arguments(actions: argparse._SubParsersAction) -> None:
    write = actions.add_parser(
        "write",
        help="a folder of .jpg files, an LMDB or tars -> shards",
        description=_SHARDS_WRITE,
        epilog=_SHARDS_WRITE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    write.add_argument("source", type=_named, metavar="SRC", help="where the pictures are")
    write.add_argument("destination", metavar="DEST", help="directory or s3://bucket/prefix; must be empty or unfinished")
    write.add_argument(
        "--shard-mb", type=_positive, default=64, metavar="N", help="largest size of a shard in MiB (default 64)"
    )
    write.add_argument("--max-side", type=int, metavar="N", help="shrink pictures whose longer side exceeds N pixels")
    write.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="(default: one a CPU core)")
    write.add_argument("--if-missing", action="store_true", help="do nothing when DEST already holds a complete data set")
    which = write.add_argument_group("which pictures (default: all)")
    which.add_argument("--list", type=Path, metavar="FILE", help="only those named in FILE: text, one name a line")
    which.add_argument(
        "--trust-pickle-list", action="store_true", help="let FILE be a pickled list of names; no code in it is run"
    )
    which.add_argument("--first", type=float, default=1.0, metavar="SHARE", help="only the first share of FILE, e.g. 0.5")
    which.add_argument("--fraction", type=float, default=1.0, metavar="SHARE", help="only a random share of those, e.g. 0.25")
    which.add_argument("--seed", type=int, default=0, help="which random share (default 0); smaller shares lie in larger ones")
    write.set_defaults(run=_shards_write)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def _counting(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")


def _named(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _shards_write(args: argparse.Namespace) -> None:
    from personmae.data import importer, storage
    from personmae.data.sources import Selection

    if args.if_missing and importer.INDEX in (files := _files_at(args.destination)) and importer.PLAN not in files:
        print(f"{args.destination} already holds a data set")
        return
    selection = Selection(
        list_file=args.list, trust_pickle=args.trust_pickle_list, first=args.first, fraction=args.fraction, seed=args.seed
    )
    with _progress("shards write", "pictures") as progress:
        count = importer.write(
            args.source,
            args.destination,
            shard_bytes=int(args.shard_mb * 2**20),
            max_side=args.max_side,
            selection=selection,
            num_processes=args.processes,
            progress=progress,
        )
    num_rejects = (storage.read(args.destination, importer.REJECTS) or b"").count(b"\n")
    where = f"{args.destination.rstrip('/')}/{importer.REJECTS}"
    rejected = f"; {num_rejects:,} could not be read and are listed in {where}" if num_rejects else ""
    print(f"{count:,} pictures written to {args.destination}{rejected}")


def _files_at(destination: str) -> dict[str, int]:
    from personmae.data import storage

    if not storage.is_remote(destination) and not Path(destination).exists():
        return {}
    return storage.list_sizes(destination) or {}


def _shards_verify(args: argparse.Namespace) -> None:
    from personmae.data import shards

    with _cache_dir(args.cache_dir) as cache, _progress("shards verify", "pictures") as progress:
        count = shards.verify(args.root, cache_dir=cache, keep=bool(args.cache_dir), progress=progress)
    print(f"{count:,} samples of {args.root} are whole")


def _shards_stats(args: argparse.Namespace) -> None:
    from personmae.data import shards

    with _cache_dir(args.cache_dir) as cache, _progress("shards stats", "pictures") as progress:
        stats = shards.describe(args.root, cache_dir=cache, keep=bool(args.cache_dir), progress=progress)
    mean = stats.num_bytes / max(1, stats.num_samples)
    print(f"{stats.num_samples:,} samples in {stats.num_shards} shards, {stats.num_bytes:,} bytes, {mean:,.0f} a sample")
    for band, count in stats.heights.items():
        print(f"  height {band:>14} {count:>9,} {'#' * round(60 * count / stats.num_samples)}")


def _pretrain(verbs: argparse._SubParsersAction) -> None:
    _program(verbs, "pretrain", "PersonMAE pre-training on shards")


def _finetune(verbs: argparse._SubParsersAction) -> None:
    _program(verbs, "finetune", "supervised ReID on one benchmark, from an encoder or from random weights")


def _unsupervised(verbs: argparse._SubParsersAction) -> None:
    _program(verbs, "unsupervised", "ReID without labels: from a pre-trained (USL) or a fine-tuned encoder (UDA)")


def _program(verbs: argparse._SubParsersAction, name: str, help_text: str) -> None:
    verb = verbs.add_parser(name, help=help_text)
    verb.add_argument("config", metavar="CONFIG", help="a YAML file; see configs/")
    add_program_arguments(verb)
    verb.set_defaults(run=lambda args: run_config(name, args.config, args))


def add_program_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``personmae X CONFIG`` and ``launcher/X.py --config CONFIG`` share."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="set a key of the configuration")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run",
        type=_counting,
        nargs="?",
        const=1,
        metavar="RANKS",
        help="pretrain: print the plan for so many ranks and stop",
    )


def run_config(name: str, path: str, args: argparse.Namespace) -> None:
    """Load the configuration of the program ``name`` and run it, or print it."""
    from personmae import config

    kinds: dict[str, type[config.Section]] = {
        "pretrain": config.Pretrain,
        "finetune": config.Finetune,
        "unsupervised": config.Unsupervised,
    }
    settings = config.load(kinds[name], path, args.overrides)
    if args.print_config:
        print(config.dump_yaml(settings), end="")
        return
    import importlib

    program = importlib.import_module(f"personmae.{name}")
    if args.dry_run is None:
        program.run(settings)
    elif hasattr(program, "dry_run"):
        program.dry_run(settings, args.dry_run)
    else:
        raise UserError(f"--dry-run is for pretrain; {name} has no plan to print: leave it out")


def _evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("evaluate", help="a fine-tuned checkpoint (or 'histogram') on a benchmark -> mAP, CMC, mINP")
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="a fine-tuning run, a checkpoint, or 'histogram'")
    verb.add_argument("benchmark", metavar="BENCHMARK", help="its name, e.g. market1501 or folder; see configs/README.md")
    verb.add_argument("root", metavar="ROOT", help="directory of the benchmark")
    verb.add_argument("--out", type=Path, help="write the result as JSON")
    verb.add_argument(
        "--pool", choices=["mean", "cls", "cls_mean"], help="take a pre-trained encoder as it is, tokens pooled so"
    )
    verb.add_argument(
        "--rerank",
        choices=["none", "aqe", "k_reciprocal"],
        default="none",
        help="query expansion or k-reciprocal re-ranking; the field's tables have neither (default none)",
    )

    def run(args: argparse.Namespace) -> None:
        from personmae import evaluate

        evaluate.run(args.checkpoint, args.benchmark, args.root, out=args.out, pool=args.pool, rerank=args.rerank)

    verb.set_defaults(run=run)


def _report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("report", help="one self-contained HTML page of a run: curves, pictures, rank lists, the table")
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="directory that holds the runs, e.g. runs/quickstart")

    def run(args: argparse.Namespace) -> None:
        from personmae.apply import report

        report.run(args.run_dir)

    verb.set_defaults(run=run)


def _bench(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser("bench", help="measure this machine: reading shards, a step of each engine, ranking, clustering")
    actions = bench.add_subparsers(dest="action", metavar="ACTION", required=True)
    _bench_data(actions)
    _bench_step(actions)
    _bench_rank(actions)


def _bench_rank(actions: argparse._SubParsersAction) -> None:
    rank = actions.add_parser("rank", help="scoring a retrieval, beside its matrix product and the usual argsort and loops")
    rank.add_argument("size", choices=["market", "msmt17"], help="of which benchmark; features are drawn")
    rank.add_argument("--rounds", type=_counting, default=3, help="times each way is measured, in turn (default 3)")
    rank.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from dataclasses import replace

        from personmae.bench.rank import PRESETS, run_rank

        run_rank(replace(PRESETS[args.size], rounds=args.rounds), args.out)

    rank.set_defaults(run=run)


def _bench_step(actions: argparse._SubParsersAction) -> None:
    step = actions.add_parser("step", help="what each engine costs beyond a plain loop, and how long a checkpoint pauses")
    step.add_argument("--size", default="micro", choices=["micro", "small", "base", "large"], help="encoder (default micro)")
    step.add_argument("--batch-size", type=_counting, default=32, help="images a step (default 32)")
    step.add_argument("--steps", type=_counting, default=20, help="steps of each engine a round (default 20)")
    step.add_argument("--rounds", type=_counting, default=3, help="times the engines are taken in turn (default 3)")
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
    data.add_argument("--images", type=_counting, default=10_000, help="pictures per measurement (default 10000)")
    data.add_argument(
        "--rounds", type=_counting, default=3, help="times each way is measured, in turn; the median counts (default 3)"
    )
    data.add_argument(
        "--rate",
        type=_positive,
        default=6000,
        help="images/s of the consumer whose wait is told (default 6000, a GPU on ViT-B)",
    )
    data.add_argument("--out", type=Path, help="write the record as JSON")

    def run(args: argparse.Namespace) -> None:
        from personmae.bench.data import DataBench, run_data

        settings = DataBench(args.shards, args.remote, num_images=args.images, rounds=args.rounds, rate=args.rate)
        run_data(settings, args.out)

    data.set_defaults(run=run)


def _doctor(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("doctor", help="what this machine has, and which commands would fail and why")
    what = verb.add_mutually_exclusive_group()
    what.add_argument("--shards", help="also try to read shards at a directory or s3://bucket/prefix")
    what.add_argument("--data", metavar="PATH", type=_named, help="instead: count the benchmarks in a folder, open their files")

    def run(args: argparse.Namespace) -> None:
        if args.data:
            from personmae.apply import inventory

            inventory.run(args.data)
        else:
            from personmae.apply import doctor

            doctor.run(shards=args.shards)

    verb.set_defaults(run=run)


class _progress:  # noqa: N801 - used like a function
    """A bar on a terminal, a line every ten per cent elsewhere, with rate and time to go; called with (done, total)."""

    def __init__(self, title: str, unit: str):
        self._title, self._unit, self._bar, self._task, self._tenth = title, unit, None, None, 0
        self._first: tuple[int, float] | None = None  # where a resumed work began, and when

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        if console.is_terminal:
            columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[pace]}")
            texts = [TextColumn(column) if isinstance(column, str) else column for column in columns]
            self._bar = Progress(*texts, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, pace="")
        return self._update

    def _update(self, done: int, total: int) -> None:
        pace = self._pace(done, total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, pace=pace)
        elif done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            print(f"{self._title}: {done:,} of {total:,} {self._unit}{pace}", file=sys.stderr, flush=True)

    def _pace(self, done: int, total: int) -> str:
        """Rate and time to go since the first call."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        rate = (done - self._first[0]) / max(1e-9, now - self._first[1])
        if rate == 0:
            return ""
        left = timedelta(seconds=round((total - done) / rate))
        return f", {rate:,.0f} a second" + (f", {left} to go" if left else "")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class _cache_dir:  # noqa: N801 - used like a function
    """The given directory, or a temporary one that is removed again."""

    def __init__(self, given: Path | None):
        self._given, self._temporary = given, None

    def __enter__(self) -> Path:
        import tempfile

        if self._given:
            return self._given
        self._temporary = tempfile.TemporaryDirectory(prefix="personmae-shards-")
        return Path(self._temporary.name)

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._temporary.cleanup()


if __name__ == "__main__":
    sys.exit(main())

"""``personmae synth`` and ``personmae shards``."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from personmae.commands.arguments import Progress, add_max_rejects, counting, natural, place, positive
from personmae.monitor.progress import counted, ending, log_to_stderr, stamped

_SHARDS_WRITE = """\
SRC is a folder, a file, or a bucket s3://BUCKET/PREFIX. All images below it are taken:
  image files      .jpg .jpeg .png .webp .bmp at any depth. An image is named by its path below SRC
  tars             uncompressed, also of WebDataset. A name is TAR/MEMBER
  an LMDB          name -> image, as LUPerson has it: data.mdb, or a .mdb or .lmdb file (not in a bucket)
  MDS shards       written by others, also compressed. A name is SHARD/ROW
  parquet files    as Hugging Face publishes images. A name is FILE/ROW

Other files are passed over and counted by kind. In names, bytes that are not UTF-8 are written as \\xNN.
JPEGs are kept byte for byte. Other images are encoded as JPEG: quality 95, 4:4:4, no alpha, 8 bits.
Images that cannot be decoded are left out and listed in DEST/rejects.jsonl. If they are more than --max-rejects,
the index is not written and the exit code is 1. The same command with a larger share then ends at once.
After an interruption or a kill the same command continues, and it ends with the same bytes.
On a complete import it says so and ends with 0.
"""


_SHARDS_WRITE_EXAMPLES = """\
examples:
  personmae shards write CROPS/ s3://bucket/crops
  personmae shards write s3://bucket/crops SHARDS
  personmae shards write s3://bucket/crops s3://bucket/shards --part 2/8     the second of eight hosts
  personmae shards write lmdb/ s3://bucket/luperson --max-side 384
  personmae shards write lmdb/ SHARDS --list CFS_list.pkl --trust-pickle-list --first 0.5
  personmae shards write lmdb/ SHARDS --fraction 0.25 --seed 0
"""


def add_synth(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("synth", help="draw synthetic pedestrians: an unlabelled pool and two ReID benchmarks")
    verb.add_argument("out", type=Path, metavar="OUT", help="directory to create")
    verb.add_argument("--seed", type=natural, default=0)
    verb.add_argument(
        "--pool-images", type=counting, default=20_000, metavar="N", help="size of the unlabelled pool (default 20000)"
    )
    verb.add_argument(
        "--people",
        type=counting,
        default=300,
        metavar="N",
        help="of market1501 to train on. All else of both benchmarks is in proportion (default 300: 9,700 images)",
    )
    verb.add_argument("--processes", type=counting, default=os.cpu_count() or 1, metavar="N")
    verb.add_argument(
        "--cameras",
        choices=["usual", "hard"],
        default="usual",
        help="usual: statistics near those of published benchmarks. hard: strong colour casts (default usual)",
    )

    def run(args: argparse.Namespace) -> None:
        from personmae.synthetic.benchmarks import write_synthetic
        from personmae.synthetic.plan import SynthSettings, counts_of

        began = time.monotonic()
        people = counts_of(args.people)
        settings = SynthSettings(seed=args.seed, pool_images=args.pool_images, cameras=args.cameras, **people)
        with Progress("synth", "images") as progress:
            counts = write_synthetic(args.out, settings, num_processes=args.processes, progress=progress)
        for split, count in counts.items():
            print(f"{split:40} {count:>8,} images")
        print(f"contact sheet: {args.out / 'contact_sheet.png'}")
        pool, target = shlex.quote(str(args.out / "pool")), shlex.quote(str(args.out.parent / "shards"))
        where, following = f"the people are in {args.out}", f"personmae shards write {pool} {target}"
        log_to_stderr(ending("synth", time.monotonic() - began, where, following))

    verb.set_defaults(run=run)


def add_shards(verbs: argparse._SubParsersAction) -> None:
    shards = verbs.add_parser("shards", help="write, verify or describe MDS shards in a directory or s3://bucket/prefix")
    actions = shards.add_subparsers(dest="action", metavar="ACTION", required=True)
    _shards_write_arguments(actions)
    for action, help_text in (("verify", "read every sample back and check it"), ("stats", "counts, bytes, sizes")):
        verb = actions.add_parser(action, help=help_text)
        verb.add_argument("root", type=place, metavar="SHARDS", help="directory or s3://bucket/prefix")
        verb.add_argument("--cache-dir", type=Path, help="where remote shards are kept (default: a temporary directory)")
        verb.set_defaults(run=_shards_verify if action == "verify" else _shards_stats)


def _shards_write_arguments(actions: argparse._SubParsersAction) -> None:
    write = actions.add_parser(
        "write",
        help="a folder, bucket, LMDB, tars, parquet or MDS -> shards",
        description=_SHARDS_WRITE,
        epilog=_SHARDS_WRITE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    write.add_argument("source", type=place, metavar="SRC", help="where the images are: a path or s3://bucket/prefix")
    write.add_argument(
        "destination", type=place, metavar="DEST", help="directory or s3://bucket/prefix, empty or with an unfinished import"
    )
    write.add_argument("--shard-mb", type=positive, default=64, metavar="N", help="largest size of a shard in MiB (default 64)")
    write.add_argument("--max-side", type=int, metavar="N", help="shrink images whose longer side exceeds N pixels")
    write.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="(default: one a CPU core)")
    add_max_rejects(write)
    write.add_argument("--if-missing", action="store_true", help="do nothing when DEST already holds a complete data set")
    write.add_argument("--column", metavar="NAME", help="the column of images in MDS shards and parquet files")
    write.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="write the I-th of N parts. Hosts share DEST, and the last writes the index",
    )
    which = write.add_argument_group("which images (default: all)")
    which.add_argument("--list", type=Path, metavar="FILE", help="only those named in FILE: text, one name a line")
    which.add_argument(
        "--trust-pickle-list", action="store_true", help="let FILE be a pickled list of names. No code in it is run"
    )
    which.add_argument("--first", type=float, default=1.0, metavar="SHARE", help="only the first share of FILE, e.g. 0.5")
    which.add_argument("--fraction", type=float, default=1.0, metavar="SHARE", help="only a random share of those, e.g. 0.25")
    which.add_argument("--seed", type=int, default=0, help="which random share (default 0). Larger ones contain smaller ones")
    write.set_defaults(run=_shards_write)


def _shards_write(args: argparse.Namespace) -> None:
    from personmae.data import importer, rejects
    from personmae.data.selection import Selection
    from personmae.synthetic.benchmarks import pass_mark_on

    began = time.monotonic()
    if args.if_missing and importer.INDEX in (files := _files_at(args.destination)) and importer.PLAN not in files:
        pass_mark_on(args.source, args.destination)
        print(f"{args.destination} already holds a data set")
        return
    selection = Selection(
        list_file=args.list, trust_pickle=args.trust_pickle_list, first=args.first, fraction=args.fraction, seed=args.seed
    )
    part = importer.Part(*args.part) if args.part else importer.WHOLE
    with Progress("shards write", "images") as progress:
        outcome = importer.carry_out(
            args.source,
            args.destination,
            shard_bytes=int(args.shard_mb * 2**20),
            max_side=args.max_side,
            column=args.column,
            selection=selection,
            max_rejects=args.max_rejects,
            part=part,
            num_processes=args.processes,
            progress=progress,
            log=lambda line: print(stamped(f"shards write: {line}"), file=sys.stderr, flush=True),
        )
    passed_over = f". Passed over: {outcome.passed_over}" if outcome.passed_over else ""
    if not outcome.finished:
        are = "is" if outcome.num_missing == 1 else "are"
        missing = f"{counted(outcome.num_missing, 'shard')} of other parts {are} missing"
        others = missing if outcome.num_missing else "another part ends it"
        print(f"part {part}: {counted(outcome.num_images, 'image')} written to {args.destination}; {others}{passed_over}")
        return
    where = f"{args.destination.rstrip('/')}/{rejects.REJECTS}"
    left_out = rejects.read(args.destination)
    rejected = f". {len(left_out):,} left out, listed in {where}: {rejects.summary(left_out)}" if left_out else ""
    if pass_mark_on(args.source, args.destination):
        passed_over += ". The people are synthetic"
    what = "already complete: {} in" if outcome.was_complete else "{} written to"
    print(f"{what.format(counted(outcome.num_images, 'image'))} {args.destination}{rejected}{passed_over}")
    seconds, where = time.monotonic() - began, f"the shards are in {args.destination}"
    log_to_stderr(ending("shards write", seconds, where, _pretrain(args.destination)))


def _pretrain(shards: str) -> str:
    """The command that trains on shards."""
    return f"personmae pretrain configs/pretrain_vit_small.yaml {shlex.quote(f'data.shards={shards}')} run_dir=RUN"


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text!r}")


def _files_at(destination: str) -> dict[str, int]:
    from personmae.system import storage

    if not storage.is_remote(destination) and not Path(destination).exists():
        return {}
    return storage.list_sizes(destination) or {}


def _shards_verify(args: argparse.Namespace) -> None:
    from personmae.data import shards

    began = time.monotonic()
    with CacheDir(args.cache_dir) as cache, Progress("shards verify", "images") as progress:
        count = shards.verify(args.root, cache_dir=cache, keep=bool(args.cache_dir), progress=progress)
    print(f"{count:,} samples of {args.root} are whole")
    seconds, where = time.monotonic() - began, f"nothing in {args.root} is damaged"
    log_to_stderr(ending("shards verify", seconds, where, _pretrain(args.root)))


def _shards_stats(args: argparse.Namespace) -> None:
    from personmae.data import shards

    with CacheDir(args.cache_dir) as cache, Progress("shards stats", "images") as progress:
        stats = shards.describe(args.root, cache_dir=cache, keep=bool(args.cache_dir), progress=progress)
    mean = stats.num_bytes / max(1, stats.num_samples)
    there = f"{counted(stats.num_samples, 'sample')} in {counted(stats.num_shards, 'shard')}"
    print(f"{there}, {stats.num_bytes:,} bytes, {mean:,.0f} a sample")
    for band, count in stats.heights.items():
        print(f"  height {band:>14} {count:>9,} {'#' * round(60 * count / stats.num_samples)}")


class CacheDir:
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

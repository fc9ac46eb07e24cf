"""``personmae export`` and ``extract``: a model for other people's tools, and features of many images."""

import argparse
import shlex
import time
from pathlib import Path

from personmae.commands.arguments import Progress, add_max_rejects, add_unfinished, counting, place
from personmae.monitor.progress import counted, ending, log, log_to_stderr

_EXPORT = """\
RUN is a run, a checkpoint, or a folder that export or import wrote. OUT is a folder that is not there yet:
  model.safetensors   the whole model, with personmae.json. personmae.load(OUT) reads it
  timm/               for timm.create_model("local-dir:OUT/timm", pretrained=True)
  huggingface/        for the transformers library, with a model card from the run's own record
  onnx/               unit.onnx takes RGB in 0 ... 1 (Ultralytics), imagenet.onnx what is normalised so (BoxMOT)
  reid/               for roboflow's reid
  transreid/          a flat dictionary for the TransReID family's PRETRAIN_PATH
  torch_export/       for torch.export.load

Each file is loaded by its own library and run on 32 drawn people. Where a feature's cosine with the checkpoint's is
below 0.9999 in fp32, nothing is written and the exit code is 1. OUT/README.md has the figures, and says which files hold
a ViT without the model's head. ONNX files need 'personmae[export]'.
"""
_EXTRACT = """\
SRC is what 'shards write' takes: a folder, a bucket, tars, an LMDB, MDS shards, parquet files, one image. Or it is a list: a
.txt file of paths, one a line, absolute or below its own folder. With --boxes it is a folder of a video's frames, and a
tracker's boxes are cut out of them.

OUT.parquet has the columns id and feature (and frame and track of boxes). OUT.npy has the features, and OUT.ids.txt their ids.
Images that cannot be read are left out and listed in OUT.rejects.jsonl. Killed at any moment, the same command goes on, and
ends with the same bytes.
"""


def add_export(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("export", help="a trained model for timm, transformers, ONNX, trackers", description=_EXPORT)
    verb.add_argument("run_dir", type=place, metavar="RUN", help="a run, a checkpoint, or an exported folder")
    verb.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    verb.add_argument("--formats", metavar="A,B", help="only these: timm, huggingface, onnx, reid, transreid, torch_export")
    verb.add_argument(
        "--precision",
        choices=["fp32", "bf16", "int8"],
        default="fp32",
        help="of the weights. bf16: all but model.safetensors and torch_export. int8: ONNX alone (default fp32)",
    )
    verb.add_argument(
        "--benchmark",
        nargs=2,
        metavar=("NAME", "ROOT"),
        help="also compare mAP of the checkpoint and of an exported file on a benchmark",
    )
    add_unfinished(verb)
    verb.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    log("export: starting ...")  # PyTorch takes seconds to load
    from personmae.weights import export

    began = time.monotonic()
    formats = [name.strip() for name in args.formats.split(",")] if args.formats else export.FORMATS
    written = export.run(
        args.run_dir,
        args.out,
        formats=formats,
        precision=args.precision,
        benchmark=tuple(args.benchmark) if args.benchmark else None,
        unfinished=args.unfinished,
        log=lambda line: log(f"export: {line}"),
    )
    where = f"{len(written)} checked files are in {args.out}, and how each is loaded in {args.out / 'README.md'}"
    following = f"personmae extract IMAGES features.parquet --model {shlex.quote(str(args.out))}"
    log_to_stderr(ending("export", time.monotonic() - began, where, following))


def add_extract(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("extract", help="images -> features with their names, as parquet or npy", description=_EXTRACT)
    verb.add_argument("source", type=place, metavar="SRC", help="where the images are, or a list of them")
    verb.add_argument("out", type=Path, metavar="OUT", help="the file to make: .parquet or .npy")
    verb.add_argument("--model", type=place, required=True, metavar="RUN", help="a run, a checkpoint, or an exported folder")
    verb.add_argument("--boxes", type=Path, metavar="FILE", help="a tracker's boxes, in lines FRAME,TRACK,X,Y,WIDTH,HEIGHT")
    verb.add_argument("--column", metavar="NAME", help="the column of images in MDS shards and parquet files")
    verb.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="fp32 gives what evaluate gives (default). bf16 is faster"
    )
    verb.add_argument("--processes", type=counting, metavar="N", help="(default: one a CPU core, or one a GPU)")
    add_max_rejects(verb)
    add_unfinished(verb)
    verb.set_defaults(run=_extract)


def _extract(args: argparse.Namespace) -> None:
    began = time.monotonic()
    with Progress("extract", "images") as progress:
        from personmae.data import import_workers, rejects

        import_workers.prepare("personmae.weights.extract_parts")  # before torch is imported here, which takes as long
        from personmae.weights import extract

        outcome = extract.run(
            args.source,
            args.out,
            model=args.model,
            boxes=args.boxes,
            column=args.column,
            precision=args.precision,
            num_processes=args.processes,
            max_rejects=args.max_rejects,
            unfinished=args.unfinished,
            progress=progress,
            log=lambda line: log_to_stderr(f"extract: {line}"),
        )
    left_out, listed = outcome.rejects, extract.rejects_beside(args.out)
    rejected = f". {len(left_out):,} left out, listed in {listed}: {rejects.summary(left_out)}" if left_out else ""
    passed_over = f". Passed over: {outcome.passed_over}" if outcome.passed_over else ""
    what = "already complete: {} in" if outcome.was_complete else "{} written to"
    features = f"{counted(outcome.num_images, 'feature')} of {outcome.dim:,} numbers"
    print(f"{what.format(features)} {args.out}{rejected}{passed_over}")
    log_to_stderr(f"extract: done in {time.monotonic() - began:.1f} s")

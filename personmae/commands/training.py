"""``personmae pretrain``, ``finetune``, ``unsupervised`` and ``evaluate``. ``launcher/X.py`` ends here too."""

import argparse
import os
from pathlib import Path

from personmae.commands.arguments import counting, place, size
from personmae.errors import UserError
from personmae.monitor.progress import log


def add_pretrain(verbs: argparse._SubParsersAction) -> None:
    _program(verbs, "pretrain", "PersonMAE pre-training on shards")


def add_finetune(verbs: argparse._SubParsersAction) -> None:
    _program(verbs, "finetune", "supervised ReID on one benchmark, from an encoder or from random weights")


def add_unsupervised(verbs: argparse._SubParsersAction) -> None:
    _program(verbs, "unsupervised", "ReID without labels: from a pre-trained (USL) or a fine-tuned encoder (UDA)")


def _program(verbs: argparse._SubParsersAction, name: str, help_text: str) -> None:
    verb = verbs.add_parser(name, help=help_text)
    verb.add_argument("config", type=place, metavar="CONFIG", help="a YAML file, as in configs/")
    add_program_arguments(verb, dry_run=name == "pretrain")
    verb.set_defaults(run=lambda args: run_config(name, args.config, args))


def add_program_arguments(parser: argparse.ArgumentParser, *, dry_run: bool = True) -> None:
    """What ``personmae X CONFIG`` and ``launcher/X.py --config CONFIG`` share. Only pre-training has a plan to show."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="set a key of the configuration")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    if dry_run:
        parser.add_argument(
            "--dry-run",
            type=counting,
            nargs="?",
            const=1,
            metavar="RANKS",
            help="print the plan for so many ranks and stop",
        )


def run_config(name: str, path: str, args: argparse.Namespace) -> None:
    """Load the configuration of the program ``name`` and run it, or print it."""
    from personmae import config

    settings = config.load(config.PROGRAMS[name], path, args.overrides)
    if args.print_config:
        print(config.dump_yaml(settings), end="")
        return
    import importlib

    if os.environ.get("RANK", "0") == "0":
        log(f"{name}: starting ...")  # PyTorch takes seconds to load
    program = importlib.import_module(f"personmae.{name}")
    num_ranks = vars(args).get("dry_run")
    if num_ranks is None:
        program.run(settings)
    elif name == "pretrain":
        importlib.import_module("personmae.dry_run").show(settings, num_ranks)
    else:
        raise UserError(f"--dry-run is for pretrain. {name} has no plan to print: leave it out")


_EVALUATE = """\
CHECKPOINT is a run of finetune or unsupervised, or one of its checkpoints. It is one of pretrain with --pool or --probe.
'random' is an encoder of random weights, the control of both. Three baselines need no training: 'histogram', 'thumbnail'
and 'thumbnail+histogram'. A model has to beat the best of them.

A fine-tuned run may be tested on any benchmark: on another than its own this is zero shot, and the record says what it was
trained on.

--probe takes seconds and trains nothing. It compares rows of patch tokens in two ways. "rows" whitens them per camera and
needs no labels. "LDA" knows the training identities and no camera. docs/method.md defines both.
"""


def add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="a trained model, frozen features or a baseline on a benchmark -> mAP, CMC, mINP",
        description=_EVALUATE,
    )
    verb.add_argument("checkpoint", type=place, metavar="CHECKPOINT", help="a run, a checkpoint, 'random' or a baseline")
    verb.add_argument("benchmark", metavar="BENCHMARK", help="its name, e.g. market1501 or folder (configs/README.md)")
    verb.add_argument("root", type=place, metavar="ROOT", help="directory of the benchmark")
    verb.add_argument("--out", type=Path, metavar="DIR", help="write result.json and rank_lists.json there")
    verb.add_argument("--probe", action="store_true", help="test the frozen rows of a pre-trained encoder, read in two ways")
    verb.add_argument(
        "--pool",
        choices=["mean", "cls", "cls_mean", "rows"],
        help="use a pre-trained encoder without training, with its tokens pooled so. rows: means of the middle of each row",
    )
    verb.add_argument(
        "--per-camera",
        choices=["none", "standardise", "whiten"],
        help="what is removed from features within each camera, without labels (default none, for baselines standardise)",
    )
    verb.add_argument(
        "--rerank",
        choices=["none", "aqe", "k_reciprocal"],
        default="none",
        help="query expansion or k-reciprocal re-ranking. Published tables have neither (default none)",
    )
    verb.add_argument(
        "--unfinished", action="store_true", help="accept a run whose training is not finished. The record says so"
    )
    verb.add_argument(
        "--latency", action="store_true", help="also measure the model alone: ms of one image, images/s of a batch"
    )
    drawn = verb.add_argument_group("of 'random'")
    drawn.add_argument("--size", choices=["micro", "tiny", "small", "base", "large"], help="of the encoder (default base)")
    drawn.add_argument("--img-size", type=size, metavar="HxW", help="pixels (default 256x128)")
    drawn.add_argument("--seed", type=int, help="of its weights (default 0)")

    def run(args: argparse.Namespace) -> None:
        log("evaluate: starting ...")
        from personmae import evaluate

        names = ("pool", "per_camera", "probe", "rerank", "latency", "size", "img_size", "seed")
        options = evaluate.Options(**{name: vars(args)[name] for name in names})
        evaluate.run(args.checkpoint, args.benchmark, args.root, out=args.out, options=options, unfinished=args.unfinished)

    verb.set_defaults(run=run)

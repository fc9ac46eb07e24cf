"""``personmae visualise``: pictures of what a model sees and finds."""

import argparse
from pathlib import Path

from personmae.commands.arguments import add_unfinished, counting, place
from personmae.monitor.progress import log

_VISUALISE = """\
RUN is a run of finetune, unsupervised or pretrain, a checkpoint, an exported folder, or imported weights.
A run of finetune or unsupervised knows its benchmark. Others need --benchmark and --data, as 'evaluate' takes them.

Writes RUN/visualise: index.html, which needs nothing else, and a PNG of each picture. --sections takes some of
reconstructions, attention, correspondence, ranks, map and errors. What cannot be drawn is left out, and the page says why.
Scores are those of 'personmae evaluate'. Without a head, features are rows of tokens, as with its --pool rows. Imported
weights of other projects have the class token or what timm pools.
"""


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them. The program checks them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_visualise(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "visualise",
        help="pictures of what a model sees, finds and confuses -> PNGs and one HTML page",
        description=_VISUALISE,
    )
    verb.add_argument("run_dir", type=place, metavar="RUN", help="a run, a checkpoint, a folder of weights, or a file")
    verb.add_argument("--benchmark", metavar="NAME", help="its name, e.g. market1501 or folder (default the run's own)")
    verb.add_argument("--data", type=place, metavar="ROOT", help="directory of the benchmark")
    verb.add_argument("--out", type=Path, metavar="DIR", help="write there (default RUN/visualise)")
    verb.add_argument("--sections", type=names, metavar="A,B", help="draw only these (default all)")
    verb.add_argument(
        "--queries", type=counting, default=5, metavar="N", help="images, and queries of each kind of rank list (default 5)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of what is drawn by chance (default 0)")
    verb.add_argument("--table", type=Path, metavar="CSV", help="how much of a query is hidden: columns id and occlusion")
    verb.add_argument(
        "--per-camera",
        choices=["none", "standardise", "whiten"],
        help="what is removed from features within each camera, without labels (default as the run was evaluated)",
    )
    add_unfinished(verb)
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    log("visualise: starting ...")
    from personmae.visualise import visualise

    given = ("benchmark", "data", "queries", "seed", "table", "per_camera", "unfinished")
    options = {name: vars(args)[name] for name in given} | ({} if args.sections is None else {"sections": args.sections})
    visualise.run(args.run_dir, visualise.Options(**options), out=args.out)

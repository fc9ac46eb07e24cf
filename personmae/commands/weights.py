"""``personmae import``: weights of other projects."""

import argparse
from pathlib import Path

from personmae.commands.arguments import place, size
from personmae.monitor.progress import log

_IMPORT = """\
SRC is a .safetensors file, a .pth file of tensors alone, or timm:NAME for one of timm's Vision Transformers.
Its family is found by the names in it: MAE, HAP, DINO, TransReID-SSL, PASS, PersonViT, CION, TransReID, CLIP-ReID, CLIP, or
timm's own. OUT is a new folder. init=OUT starts finetune, unsupervised and pretrain, and personmae.load(OUT) gives features.

What was found, left out and kept is printed: tensors, positions and the normalisation that the weights want.
"""


def add_import(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("import", help="weights of another project -> an encoder to start from", description=_IMPORT)
    verb.add_argument("source", type=place, metavar="SRC", help="a file, or timm:NAME")
    verb.add_argument("out", type=Path, metavar="OUT", help="a new folder for the encoder")
    verb.add_argument(
        "--img-size", type=size, metavar="HxW", help="images that the encoder is to be fed with (default that of its training)"
    )
    for name in ("mean", "std"):
        verb.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar="X",
            help=f"{name} of red, green and blue, on the scale 0 ... 1 (default the family's)",
        )
    verb.add_argument("--file", type=Path, help="weights of timm:NAME, instead of those in timm's cache")

    def run(args: argparse.Namespace) -> None:
        log("import: starting ...")
        from personmae.weights import importer

        mean, std = (tuple(values) if values else None for values in (args.mean, args.std))
        options = importer.Options(img_size=args.img_size, mean=mean, std=std, file=args.file)
        importer.run(args.source, args.out, options)

    verb.set_defaults(run=run)

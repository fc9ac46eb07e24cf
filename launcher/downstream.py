"""One benchmark in a pod: the program, then its result into the bucket, where the suite and people find it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in launcher/pretrain.py

from personmae.system import signals

if __name__ == "__main__":  # before all that takes time
    signals.answer_early()

import argparse
import os

from launcher.cluster import bucket
from personmae.commands.arguments import Parser
from personmae.commands.training import add_program_arguments, run_config
from personmae.errors import UserError, leave, run_program


def main() -> int:
    """Run ``--program`` and upload its ``result.json`` to ``--result``; returns the exit code."""
    parser = Parser(prog="launcher/downstream.py")
    parser.add_argument("--config", required=True, metavar="CONFIG", help="a YAML file; see configs/")
    parser.add_argument("--program", required=True, choices=("finetune", "unsupervised"))
    parser.add_argument("--result", required=True, metavar="URL", help="s3://bucket/name.json")
    add_program_arguments(parser, dry_run=False)
    args = parser.parse_args()
    return run_program(lambda: _run(args), quiet=os.environ.get("RANK", "0") != "0")


def _run(args: argparse.Namespace) -> None:
    run_config(args.program, args.config, args)
    if os.environ.get("RANK", "0") != "0":
        return
    from personmae import config

    kind = {"finetune": config.Finetune}.get(args.program) or getattr(config, args.program.capitalize())
    path = Path(config.load(kind, args.config, args.overrides).run_dir) / "result.json"
    if not path.is_file():
        raise UserError(f"{args.program} has ended without {path}; see its output above")
    bucket.write(args.result, path.read_bytes())
    print(f"result: {args.result}", flush=True)


if __name__ == "__main__":
    leave(main())

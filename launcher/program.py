"""The command line that ``launcher/pretrain.py`` and its neighbours share."""

import argparse
import os

from personmae.commands.arguments import Parser, place
from personmae.commands.training import add_program_arguments, run_config
from personmae.errors import OtherProgram, run_program


def main(name: str) -> int:
    """Run the program ``name`` under ``deepspeed``, ``torchrun`` or plain Python; returns the exit code."""
    parser = Parser(prog=f"launcher/{name}.py")
    parser.add_argument("--config", required=True, type=place, metavar="CONFIG", help="a YAML file; see configs/")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    add_program_arguments(parser, dry_run=name == "pretrain")
    args = parser.parse_args()
    return run_program(lambda: _run(name, args), quiet=os.environ.get("RANK", "0") != "0")


def _run(name: str, args: argparse.Namespace) -> None:
    try:
        run_config(name, args.config, args)
    except OtherProgram as error:
        if error.program == "suite":
            raise
        raise OtherProgram(error.path, error.program, f"launcher/{error.program}.py --config {error.path}") from None

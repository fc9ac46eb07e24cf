"""The command line that ``launcher/pretrain.py`` and its neighbours share."""

import argparse
import os

from personmae.commands.arguments import Parser
from personmae.commands.training import add_program_arguments, run_config
from personmae.errors import run_program


def main(name: str) -> int:
    """Run the program ``name`` under ``deepspeed``, ``torchrun`` or plain Python; returns the exit code."""
    parser = Parser(prog=f"launcher/{name}.py")
    parser.add_argument("--config", required=True, metavar="CONFIG", help="a YAML file; see configs/")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    add_program_arguments(parser, dry_run=name == "pretrain")
    args = parser.parse_args()
    return run_program(lambda: run_config(name, args.config, args), quiet=os.environ.get("RANK", "0") != "0")

"""The console script: verbs, one line of help each. Nothing heavy is imported before a verb is chosen."""

import os
import sys
from typing import NoReturn

from personmae.system import signals

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "personmae":  # the console script imports this
    signals.answer_early()

from personmae.commands import about, data, export, gallery, inspect, serve, training, visualise, weights
from personmae.commands.arguments import Parser
from personmae.errors import EXIT_COMPLETE, run_command, run_program

VERBS = (
    *(data.add_synth, data.add_shards),
    *(training.add_pretrain, training.add_finetune, training.add_unsupervised, training.add_evaluate),
    weights.add_import,
    *(export.add_export, export.add_extract),
    *(gallery.add_gallery, serve.add_serve),
    *(inspect.add_report, visualise.add_visualise, inspect.add_bench, inspect.add_doctor),
)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the verb; returns the exit code."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return EXIT_COMPLETE
    args = parser.parse_args(argv)
    return run_program(lambda: args.run(args), quiet=os.environ.get("RANK", "0") != "0")


def build_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser(prog="personmae", description="Person re-identification pre-training, from a bucket of crops to a table.")
    about.add_version(parser)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for add in VERBS:
        add(verbs)
    from launcher.cluster.cli import add_commands

    add_commands(verbs)
    for add_of in (about.add_keys, about.add_help, about.add_completion):
        add_of(verbs, parser)
    about.describe(parser)
    return parser


def console() -> NoReturn:
    """What the console script calls."""
    run_command(main)


if __name__ == "__main__":
    console()

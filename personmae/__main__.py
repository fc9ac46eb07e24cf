"""The console script: verbs, one line of help each. Nothing heavy is imported before a verb is chosen."""

import os

from personmae.commands import data, looking, training
from personmae.commands.arguments import Parser
from personmae.errors import leave, run_program

VERBS = (
    *(data.add_synth, data.add_shards),
    *(training.add_pretrain, training.add_finetune, training.add_unsupervised, training.add_evaluate),
    *(looking.add_report, looking.add_bench, looking.add_doctor),
)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the verb; returns the exit code."""
    parser = Parser(prog="personmae", description="Person re-identification pre-training, from a bucket of crops to a table.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for add in VERBS:
        add(verbs)
    from launcher.submit import add_verbs

    add_verbs(verbs)
    args = parser.parse_args(argv)
    return run_program(lambda: args.run(args), quiet=os.environ.get("RANK", "0") != "0")


if __name__ == "__main__":
    leave(main())

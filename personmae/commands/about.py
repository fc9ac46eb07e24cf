"""``personmae keys``, ``help`` and ``completion``: what the other verbs and their configurations take."""

import argparse
import difflib
from pathlib import Path
from typing import cast

from personmae.commands.arguments import Parser, Verbs, place
from personmae.errors import UserError


class _Version(argparse.Action):
    """``--version``, which is looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("personmae")
        except metadata.PackageNotFoundError:
            version = "of a checkout that is not installed"
        print(f"personmae {version}")
        parser.exit()


def add_version(parser: Parser) -> None:
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")


def describe(parser: argparse.ArgumentParser) -> None:
    """Begin each verb's help with its line in the list of verbs."""
    for action in verbs_of(parser):
        for listed in action._choices_actions:
            verb = action.choices[listed.dest]
            verb.description = verb.description or listed.help
            describe(verb)


def verbs_of(parser: argparse.ArgumentParser) -> list[Verbs]:
    return [action for action in parser._actions if isinstance(action, Verbs)]


def add_keys(verbs: argparse._SubParsersAction, _: Parser) -> None:
    verb = verbs.add_parser("keys", help="list configuration keys with type, default and meaning")
    verb.add_argument(
        "words",
        nargs="*",
        metavar="[PROGRAM] [WORD]",
        help="pretrain, finetune or unsupervised, then words in a key's name or description",
    )
    verb.add_argument("--markdown", action="store_true", help="print docs/keys.md: all keys of all programs")
    verb.set_defaults(run=lambda args: print_keys(args.words, markdown=args.markdown))


_PAGE = """\
# Configuration keys

This page is made from the configuration models. Do not edit it. Write it again with:

```
personmae keys --markdown > docs/keys.md
```

A key is set in a YAML file, or on the command line as `section.key=value`. `personmae keys` prints
the same in a terminal, and `personmae keys pretrain batch` only the keys of `pretrain` with that
word. Each key below has its type and its default in brackets. The equations are those of the paper."""


def print_keys(words: list[str], *, markdown: bool = False) -> None:
    """Print the keys of a program, or of all, that have all the words in their name or description.

    Raises:
        UserError: there is none, or words were given with ``markdown``, which prints the page of all keys.
    """
    from personmae import config
    from personmae.keys.table import keys_of, to_markdown, to_table

    if markdown:
        if words:
            raise UserError(f"--markdown prints the keys of all programs and takes no words. Got '{' '.join(words)}'")
        print(to_markdown(config.PROGRAMS, _PAGE), end="")
        return
    program = words[0] if words and words[0] in config.PROGRAMS else None
    wanted = [word.lower() for word in (words[1:] if program else words)]
    found = False
    for name in [program] if program else config.PROGRAMS:
        keys = [k for k in keys_of(config.PROGRAMS[name]) if all(w in f"{k.name} {k.description}".lower() for w in wanted)]
        if keys:
            print(f"{name}:\n{to_table(keys)}", end="")
            found = True
    if not found:
        known = [key.name for name in config.PROGRAMS for key in keys_of(config.PROGRAMS[name])]
        near = difflib.get_close_matches(" ".join(wanted), [*known, *config.PROGRAMS], n=1, cutoff=0.0)[0]
        raise UserError(f"no key has '{' '.join(wanted)}' in its name or description. The nearest is '{near}'")


def add_help(verbs: argparse._SubParsersAction, parser: Parser) -> None:
    verb = verbs.add_parser("help", help="the help of a verb")
    verb.add_argument("words", nargs="*", metavar="VERB", help="e.g. finetune, or shards write")
    verb.set_defaults(run=lambda args: print(find(parser, args.words).format_help(), end=""))


def find(parser: Parser, words: list[str]) -> Parser:
    """The parser of a verb, e.g. of ``shards write``. Ends the program for a word that is no verb."""
    for word in words:
        actions = verbs_of(parser)
        if not actions:
            raise UserError(f"'{parser.prog}' has no verbs of its own. Got '{word}': leave it out")
        try:
            parser._check_value(actions[0], word)
        except argparse.ArgumentError as error:
            parser.error(str(error))
        parser = cast(Parser, actions[0].choices[actions[0].renamed.get(word, word)])
    return parser


def add_completion(verbs: argparse._SubParsersAction, parser: Parser) -> None:
    verb = verbs.add_parser("completion", help="print a script that completes verbs, options and files in a shell")
    verb.add_argument("shell", choices=("bash", "zsh"), help='bash or zsh, e.g. eval "$(personmae completion bash)"')
    verb.set_defaults(run=lambda args: print(completion(parser, args.shell)))


def completion(parser: Parser, shell: str) -> str:
    """The script for a shell, made by shtab from the parser itself."""
    import shtab

    _mark_files(parser)
    return shtab.complete(parser, shell=shell)


def _mark_files(parser: argparse.ArgumentParser) -> None:
    """Let paths be completed as files."""
    import shtab

    for action in verbs_of(parser):
        for each in action.choices.values():
            _mark_files(each)
    for action in parser._actions:
        if action.type in (Path, place):
            action.complete = shtab.FILE  # type: ignore[attr-defined]

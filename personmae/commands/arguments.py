"""Parts of every command line: the parser, types of values, old names, and progress on standard error."""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personmae.commands.examples import closing
from personmae.errors import UserError
from personmae.keys.renamed import print_new_name
from personmae.monitor.progress import EVERY_SECONDS, Pace, duration, stamped
from personmae.system import locations


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest verb and option, expands paths, points at ``--help``, and exits as a user error does.

    Its help ends with an example, and with the main keys where the verb has a configuration.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.register("type", Path, local_path)
        self.register("action", "parsers", Verbs)

    def format_help(self) -> str:
        self.epilog = self.epilog or closing(self.prog)
        return super().format_help()

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """As argparse, with the nearest verb instead of a list of all."""
        if isinstance(action, Verbs) and value in action.renamed:
            return
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            meant = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, f"unknown verb '{value}'. {meant}")
        super()._check_value(action, value)

    def error(self, message: str) -> None:  # type: ignore[override]
        pointer = f"{'' if message.endswith('?') else '.'} See '{self.prog} --help'"
        print(f"error: {message}{pointer}", file=sys.stderr)
        sys.exit(78)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse, but ``a.b=c`` may follow options too."""
        found, rest = super().parse_known_args(args, namespace)
        self._refuse_unknown_options(rest)
        late = [text for text in rest if "=" in text and not text.startswith("-")] if hasattr(found, "overrides") else []
        if late:
            found.overrides = [*found.overrides, *late]
        return found, [text for text in rest if text not in late]

    def _refuse_unknown_options(self, rest: list[str]) -> None:
        """End here, where the options are known that an unknown one may mean, rather than in the parser above."""
        for text in rest:
            name = text.partition("=")[0]
            if name.startswith("--") and len(name) > 2:
                near = difflib.get_close_matches(name, list(self._option_string_actions), n=1)
                self.error(f"unknown option '{name}'" + (f". Did you mean '{near[0]}'?" if near else ""))


class Verbs(argparse._SubParsersAction):
    """The verbs of a parser. ``renamed`` has old names, which work and print the new name, and no help lists them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.renamed: dict[str, str] = {}

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        name, *rest = values
        if new := self.renamed.get(name):
            print_new_name(f"{parser.prog} {name}", f"{parser.prog} {new}")
        super().__call__(parser, namespace, [new or name, *rest], option_string)


class Renamed(argparse.Action):
    """An option under its old name: it sets ``dest`` and prints the new name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, default=argparse.SUPPRESS)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        print_new_name(str(option_string), f"--{self.dest.replace('_', '-')}")
        setattr(namespace, self.dest, values)


def local_path(text: str) -> Path:
    """A path with ``~`` and ``$VAR`` expanded. The type ``Path`` of any argument means this."""
    expanded = place(text)
    if locations.is_remote(expanded):
        raise argparse.ArgumentTypeError(f"must be on a disk of this machine. {expanded} is in an object store: give a path")
    return Path(expanded)


def place(text: str) -> str:
    """A directory or a location in an object store, with ``~`` and ``$VAR`` expanded."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return locations.location(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def counting(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")


def natural(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")


def size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from "256x128"."""
    height, _, width = text.lower().partition("x")
    with contextlib.suppress(argparse.ArgumentTypeError):
        return counting(height), counting(width)
    raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, such as 256x128, got {text!r}")


class Progress:
    """A bar on a terminal, lines elsewhere: the first at once, then one every ten seconds, with the rate of the last minute
    and the time to go. Called with (done, total)."""

    def __init__(self, title: str, unit: str):
        self._title, self._unit, self._bar, self._task = title, unit, None, None
        self._pace: Pace | None = None  # from the first call on, where a resumed work may have done a part already

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        if console.is_terminal:
            columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[pace]}")
            texts = [TextColumn(column) if isinstance(column, str) else column for column in columns]
            self._bar = Progress(*texts, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, pace="")
        else:
            self._print(f"{self._title}: preparing ...")
        return self._update

    def _update(self, done: int, total: int) -> None:
        is_first = self._pace is None
        self._pace = self._pace or Pace(done)
        is_due = is_first or done == total or self._pace.seconds_since_mark >= (1 if self._bar else EVERY_SECONDS)
        if is_due and not is_first:
            self._pace.mark(done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
            if is_due:
                self._bar.update(self._task, pace=self._pace_text(total))
        elif is_due:
            self._print(f"{self._title}: {done:,} of {total:,} {self._unit}{self._pace_text(total)}")

    def _pace_text(self, total: int) -> str:
        left = self._pace.left(total) if self._pace else None
        if not self._pace or left is None:
            return ""
        return f", {self._pace.rate:,.0f} a second" + (f", {duration(left)} to go" if left else "")

    def _print(self, text: str) -> None:
        print(stamped(text), file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def add_max_rejects(parser: argparse.ArgumentParser) -> None:
    """``--max-rejects``, of the verbs that read images of all kinds."""
    parser.add_argument(
        "--max-rejects",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="largest share of unreadable images (default 0.05). Above it the exit code is 1",
    )


def add_unfinished(parser: argparse.ArgumentParser) -> None:
    """``--unfinished``, of the verbs that take a run."""
    parser.add_argument("--unfinished", action="store_true", help="accept a run whose training is not finished")

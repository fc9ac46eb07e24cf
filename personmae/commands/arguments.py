"""What command lines share: the parser, the kinds of values, and progress on standard error."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """A parser that points at ``--help`` and exits with the code of a user error."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {message}; see '{self.prog} --help'", file=sys.stderr)
        sys.exit(78)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse, but ``a.b=c`` may stand behind options too."""
        found, rest = super().parse_known_args(args, namespace)
        late = [text for text in rest if "=" in text and not text.startswith("-")] if hasattr(found, "overrides") else []
        if late:
            found.overrides = [*found.overrides, *late]
        return found, [text for text in rest if text not in late]


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


def named(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


class Progress:
    """A bar on a terminal, a line every ten per cent elsewhere, with rate and time to go; called with (done, total)."""

    def __init__(self, title: str, unit: str):
        self._title, self._unit, self._bar, self._task, self._tenth = title, unit, None, None, 0
        self._first: tuple[int, float] | None = None  # where a resumed work began, and when

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
        return self._update

    def _update(self, done: int, total: int) -> None:
        pace = self._pace(done, total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, pace=pace)
        elif done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            print(f"{self._title}: {done:,} of {total:,} {self._unit}{pace}", file=sys.stderr, flush=True)

    def _pace(self, done: int, total: int) -> str:
        """Rate and time to go since the first call."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        rate = (done - self._first[0]) / max(1e-9, now - self._first[1])
        if rate == 0:
            return ""
        left = timedelta(seconds=round((total - done) / rate))
        return f", {rate:,.0f} a second" + (f", {left} to go" if left else "")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

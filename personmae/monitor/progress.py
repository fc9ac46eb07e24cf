"""What people see of work under way: time stamps, durations, and the time to go by the recent rate."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

EVERY_SECONDS = 10.0  # a line at least so often
_WINDOW_SECONDS = 60.0  # what counts as recent


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, and days before them: ``00:12:34``, ``3 d 04:10:00``."""
    days, rest = divmod(max(0, round(seconds)), 86400)
    return (f"{days} d " if days else "") + f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def counted(number: int, what: str) -> str:
    """A number of things in words: ``1 shard``, ``1,000 shards``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def stamped(text: str) -> str:
    """Lines with the time of day before the first one, for logs."""
    return f"{time.strftime('%H:%M:%S')} {text}"


def say(text: str) -> None:
    """Print to standard error what begins or has ended; standard output is left to results."""
    _print(text, sys.stderr)


def log(text: str) -> None:
    """Print a line of a program's log to standard output."""
    _print(text, sys.stdout)


@contextmanager
def repeated(announce: Callable[[str], None], text: Callable[[], str]) -> Iterator[None]:
    """Announce a text at once, and as it is by then every ten seconds until the work within ends."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(EVERY_SECONDS):
            announce(text())

    announce(text())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed before the program was started
        return
    print(text if stream.isatty() else stamped(text), file=stream, flush=True)


def ending(program: str, seconds: float, result: str, following: str) -> str:
    """The last line of a program: where its result is, how long it took, and the command that comes next."""
    return f"{program}: done in {duration(seconds)}; {result}\nnext: {following}"


class Pace:
    """How fast a work went lately: over the last minute, or since the last mark but one where marks are rarer.

    The time until the first mark is left out as soon as there is a second one: setting up and compiling fall into it.
    """

    def __init__(self, done: int, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock = clock or time.monotonic
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)])
        self._is_warm = False

    def mark(self, done: int) -> None:
        """So much is done by now."""
        now = self._clock()
        if len(self._marks) == 2 and not self._is_warm:
            self._marks.popleft()
            self._is_warm = True
        self._marks.append((now, done))
        while len(self._marks) > 2 and self._marks[1][0] <= now - _WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def seconds_since_mark(self) -> float:
        return self._clock() - self._marks[-1][0]

    @property
    def rate(self) -> float:
        """Pieces a second; 0 before anything is done."""
        (start, before), (now, done) = self._marks[0], self._marks[-1]
        return max(0, done - before) / max(1e-9, now - start)

    def left(self, total: int) -> float | None:
        """Seconds to go; None while there is no rate to tell it from."""
        return (total - self._marks[-1][1]) / self.rate if self.rate else None

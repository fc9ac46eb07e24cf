"""Log lines about work in progress: time stamps, durations, and the time to go at the recent rate."""

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
    """Log lines with the time of day before the first one."""
    return f"{time.strftime('%H:%M:%S')} {text}"


def log(text: str) -> None:
    """Write a line of a program's log to standard output."""
    _write(text, sys.stdout)


def log_to_stderr(text: str) -> None:
    """Write a log line to standard error, so that standard output holds results alone."""
    _write(text, sys.stderr)


@contextmanager
def repeated(log: Callable[[str], None], text: Callable[[], str]) -> Iterator[None]:
    """Log a text at once, then its current state every ten seconds until the work within ends."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(EVERY_SECONDS):
            log(text())

    log(text())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed before the program was started
        return
    print(text if stream.isatty() else stamped(text), file=stream, flush=True)


def ending(program: str, seconds: float, result: str, following: str) -> str:
    """The last lines of a program: where its result is, how long it took, and the command to run next."""
    return f"{program}: done in {duration(seconds)}; {result}\nnext: {following}"


class Pace:
    """The recent rate of some work: over the last minute, or since the last mark but one where marks are rarer.

    The time before the first mark holds setting up and compiling. It is left out as soon as there is a second mark.
    """

    def __init__(self, done: int, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock = clock or time.monotonic
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)])
        self._is_warm = False

    def mark(self, done: int) -> None:
        """Record that ``done`` pieces are done."""
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
        """Pieces a second, 0 before anything is done."""
        (start, before), (now, done) = self._marks[0], self._marks[-1]
        return max(0, done - before) / max(1e-9, now - start)

    def left(self, total: int) -> float | None:
        """Seconds to go. None before there is a rate."""
        return (total - self._marks[-1][1]) / self.rate if self.rate else None

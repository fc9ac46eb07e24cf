"""What answers SIGTERM and Ctrl-C from a program's first line on, until it has a handler of its own.

The seconds in which torch is imported are the likeliest ones for a pod that is taken back at once. Nothing is begun then, so
the process ends with the code that says "run it again", instead of dying of the signal.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from personmae.errors import EXIT_INTERRUPTED, EXIT_STOPPED, NOTHING_LEFT, Terminated, is_running

_IMPORTING = "<frozen importlib"
_PACKAGE = Path(__file__).resolve().parents[1]
# Files whose functions are there before a program has begun: they import it.
_STARTING = tuple(f"{_PACKAGE}{os.sep}{name}" for name in ("commands", "__main__.py", "errors.py", "system"))
_LATER_SECONDS = 0.1
_first: list[int] = []  # the process that asked for this. A child that was forked from it is none of the answer's business
_undoing: list[Callable[[], object]] = []  # what takes back that which is begun
_beating: list[object] = []  # the heartbeat of the first seconds, which is kept until the program's own


def answer_early() -> None:
    """Answer SIGTERM, and Ctrl-C unless it is ignored, from now on. An agent hears that this rank has started.

    A process of a pool answers nothing: a terminal sends Ctrl-C to all processes, and the parent says what follows.
    """
    if _first:
        return
    if _is_of_a_pool():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    _first.append(os.getpid())
    signal.signal(signal.SIGTERM, _answer)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _answer)
    from personmae.monitor.heartbeat import DIRECTORY, Heartbeat

    if os.environ.get(DIRECTORY):
        _beating.append(Heartbeat())


@contextlib.contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Within, a signal during an import calls ``undo``: no exception is raised there that could do it on its way."""
    _undoing.append(undo)
    try:
        yield
    finally:
        _undoing.remove(undo)


def _is_of_a_pool() -> bool:
    """Whether this is a process of multiprocessing's, which imports the main module once more."""
    loaded = sys.modules.get("multiprocessing.process")
    return loaded is not None and loaded.current_process().name != "MainProcess"


def end_quietly() -> None:
    """Let Ctrl-C end this process of a pool without a word, in the middle of work that nobody waits for any more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def log(text: str) -> None:
    """Print a line from within a handler, once a host: unbuffered, since the buffer may be in use just now."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            os.write(2, (("\n" if os.isatty(2) else "") + text + "\n").encode())
        except OSError:  # the terminal is gone, which may be why the signal came
            return


def _answer(number: int, frame: FrameType | None) -> None:
    if os.getpid() not in _first:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    outside = _outside_imports(frame)
    if is_running() and outside is frame:
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
    if _undoing:  # code in C does not survive an exception while it is imported
        os._exit(_undone(number))
    if is_running() and _has_begun(outside):
        later = threading.Timer(_LATER_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number))
        later.daemon = True
        later.start()
        return
    log("stopped: before anything was begun. Run this again")
    os._exit(EXIT_STOPPED)


def _undone(number: int) -> int:
    """Take back what is begun, say how the program ends, and return its exit code: as ``run_program`` does."""
    for undo in reversed(_undoing):
        undo()
    by_whom, code = ("Ctrl-C", EXIT_INTERRUPTED) if number == signal.SIGINT else ("SIGTERM", EXIT_STOPPED)
    log(f"stopped: by {by_whom}. {NOTHING_LEFT}")
    return code


def _outside_imports(frame: FrameType | None) -> FrameType | None:
    """The frame that asked for the outermost of the imports under way. ``frame`` itself where there is none."""
    outside, inner = frame, frame
    while inner:
        if inner.f_code.co_filename.startswith(_IMPORTING):
            outside = inner.f_back
        inner = inner.f_back
    return outside


def _has_begun(frame: FrameType | None) -> bool:
    """Whether a program's own function is at work, rather than only imported."""
    while frame:
        name = os.path.abspath(frame.f_code.co_filename)
        if name.startswith(f"{_PACKAGE}{os.sep}") and not name.startswith(_STARTING):
            return True
        frame = frame.f_back
    return False

"""What answers SIGTERM and Ctrl-C from a program's first line on, until it has a handler of its own.

The seconds in which torch is imported are the likeliest ones for a pod that is taken back at once. Nothing is begun then, so
the process ends with the code that says "run it again", instead of dying of the signal.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from personmae.errors import EXIT_STOPPED, Terminated, is_running

_IMPORTING = "<frozen importlib"
_first: list[int] = []  # the process that asked for this. A child that was forked from it is none of the answer's business
_undoing: list[Callable[[], object]] = []  # what takes back that which is begun
_beating: list[object] = []  # the heartbeat of the first seconds, which is kept until the program's own


def answer_early() -> None:
    """Answer SIGTERM, and Ctrl-C unless it is ignored, from now on. An agent hears that this rank has started."""
    if _first:
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
    elif is_running() and not _is_importing(frame):
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
    else:  # code in C does not survive an exception while it is imported
        os._exit(_undone(number))


def _undone(number: int) -> int:
    """Take back what is begun, say how the program ends, and return its exit code: as ``run_program`` does."""
    for undo in reversed(_undoing):
        undo()
    if _undoing and number == signal.SIGINT:
        log("stopped: interrupted by the keyboard")
        return 130  # as by SIGINT
    log(f"stopped: {'by SIGTERM' if _undoing else 'before anything was begun'}. Run this again")
    return EXIT_STOPPED


def _is_importing(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False

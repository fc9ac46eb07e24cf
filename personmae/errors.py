"""How a program ends: the exit codes, and the one error that the user can fix."""

import atexit
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TextIO

EXIT_COMPLETE = 0  # the work is finished
EXIT_FAILED = 1  # counts against a restart budget
EXIT_STOPPED = 75  # stopped early with its state saved: run it again
EXIT_USER_ERROR = 78  # wrong configuration or data: running it again cannot help

_CALLED = {
    "pretrain": "a pre-training",
    "finetune": "a fine-tuning",
    "unsupervised": "an unsupervised-training",
    "suite": "a suite",
}


class UserError(ValueError):
    """Wrong configuration or data. The message says what was required, what came and what to do, in one line."""


class RankError(UserError):
    """A user error that one rank alone has seen, so that rank tells it."""


class OtherProgram(UserError):  # noqa: N818 - what was found
    """A configuration file that is for another program than the one that was given it."""

    def __init__(self, path: str, program: str, command: str = ""):
        verb = "submit --local" if program == "suite" else program
        super().__init__(f"{path} is {_CALLED[program]} file: {command or f'personmae {verb} {path}'}")
        self.path, self.program = path, program


class Unavailable(Exception):  # noqa: N818 - a way to end
    """What is needed is there and cannot be read at present; trying again may help. The message is one line."""


class RankUnavailable(Unavailable):
    """The same where one rank alone has seen it, so that rank tells it."""


class Diverged(Exception):  # noqa: N818 - a way to end
    """The loss is no longer a finite number."""


class TooManyRejects(Exception):  # noqa: N818 - a way to end
    """More of a source was left out than was allowed; what could be used is written and the result is not yet complete."""


class Incomplete(Exception):  # noqa: N818 - a way to end
    """What could be done is done, and a part of what was asked for is missing. The message is one line."""


class Stopped(Exception):  # noqa: N818 - a way to end, not an error
    """The run was asked to stop, has saved its state, and can be continued."""


class Terminated(KeyboardInterrupt):  # whatever makes room for Ctrl-C does so for this
    """SIGTERM, where the program has no better answer."""


_OS_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission was denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file stands where a directory is needed",
    errno.EEXIST: "something else is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links lead in a circle",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_running: list[object] = []  # programs within ``run_program``
# A disk or a network file system that fails now and may answer later; not every system has every name.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EAGAIN"),
    )
    if hasattr(errno, name)
)


def is_passing(error: BaseException | None) -> bool:
    """Whether the operating system's error may be gone when the same is tried again."""
    return isinstance(error, OSError) and error.errno in _PASSING


def run_program(program: Callable[[], None], *, quiet: bool = False) -> int:
    """Run ``program`` and return its exit code; a user error becomes one line on stderr.

    ``quiet`` keeps back what all ranks say alike: every rank but the first sets it, so that it is printed once.
    """
    _print_any_name()
    _running.append(program)
    try:
        program()
    except UserError as error:
        message, code, quiet = f"error: {error}", EXIT_USER_ERROR, quiet and not isinstance(error, RankError)
    except Unavailable as error:
        message, code, quiet = f"error: {error}", EXIT_FAILED, quiet and not isinstance(error, RankUnavailable)
    except OSError as error:
        told = _explained(error)
        if told is None:
            raise
        message, code, quiet = *told, False
    except UnicodeEncodeError as error:
        if error.encoding.lower().replace("-", "") == "utf8":
            raise
        lacking = error.object[error.start : error.start + 1]
        message = f"error: the locale's coding, {error.encoding}, has no {lacking!r}, which stands in a name; "
        message, code = message + "set PYTHONUTF8=1 and run this again", EXIT_USER_ERROR
    except (Diverged, TooManyRejects) as error:
        message, code = f"error: {error}", EXIT_FAILED
    except Incomplete as part:
        message, code = f"incomplete: {part}", EXIT_FAILED
    except Stopped as stop:
        message, code = f"stopped: {stop}", EXIT_STOPPED
    except Terminated:
        message, code = "stopped: by SIGTERM; run this again", EXIT_STOPPED
    except KeyboardInterrupt:
        message, code = "stopped: interrupted by the keyboard", 130
    else:
        return EXIT_COMPLETE
    finally:
        _running.pop()
    if not quiet:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code


def is_running() -> bool:
    """Whether a program is within ``run_program``, which tells how it ends."""
    return bool(_running)


def _print_any_name() -> None:
    """Let a file's name be printed whatever the terminal's coding, and names that are no UTF-8: with escapes, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explained(error: OSError) -> tuple[str, int] | None:
    """The line for an error of the operating system and its exit code; None where a traceback says more."""
    if is_passing(error):
        told = f"error: {error.strerror} at {error.filename}; this may pass: run this again"
        return (told, EXIT_FAILED) if error.filename else None
    if error.errno not in _OS_ERRORS:
        return None
    where = f" at {error.filename}" if error.filename else ""
    advice = "make room there or choose another place" if error.errno in _FULL else "mend it or choose another place"
    return f"error: {_OS_ERRORS[error.errno]}{where}; {advice}, then run this again", EXIT_USER_ERROR


def leave(code: int) -> NoReturn:
    """End this process with ``code``; one of several ranks ends at once, with nothing left to finish.

    While the interpreter of a rank shuts down, threads of its process group may still want it, and then it dies of SIGABRT
    ("terminate called without an active exception"): seen in one of five runs over ssh, and in one of eight under torchrun.
    Whoever started it would take that for a failure. A single process waits for its threads and does what it has registered
    for its end, but takes nothing apart after that: Triton's library would print 30 lines of its leaks below our last one.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the code is settled, and an interpreter that ends gives its handlers up
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - what the interpreter itself does first
        atexit._run_exitfuncs()
    told = [_flush(stream) for stream in (sys.stdout, sys.stderr)]
    os._exit(code if all(told) else code or EXIT_FAILED)


def _flush(stream: TextIO | None) -> bool:
    """Get out what was printed; returns whether it got as far as somebody still reads."""
    try:
        if stream:  # it was not closed before this program was started
            stream.flush()
    except (BrokenPipeError, ValueError):  # nobody reads any more, or it is closed
        return True
    except OSError:  # a full disk
        return False
    return True

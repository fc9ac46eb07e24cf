"""How a program ends: the exit codes, and the one error that the user can fix."""

import atexit
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TextIO

EXIT_COMPLETE = 0  # the work is finished
EXIT_FAILED = 1  # counts against a restart budget
EXIT_STOPPED = 75  # stopped early with its state saved: run it again
EXIT_USER_ERROR = 78  # wrong configuration or data: running it again cannot help
EXIT_INTERRUPTED = 130  # as by SIGINT: Ctrl-C, and the same command starts over
EXIT_UNREAD = 141  # as by SIGPIPE: nobody reads the output any more, as of a command before "head"

FIRST_RANK_SECONDS = 10.0  # how much later than another rank the first may find what all find
NOTHING_LEFT = "Nothing half-written is left. Run the same command again"  # not how it goes on: a run may have checkpoints
_CALLED = {
    "pretrain": "a pre-training",
    "finetune": "a fine-tuning",
    "unsupervised": "an unsupervised-training",
    "suite": "a suite",
}


class UserError(ValueError):
    """Wrong configuration or data. The message says what was required, what came and what to do, in one line."""


class RankError(UserError):
    """A user error that only one rank has seen, so that rank prints it."""


class OtherProgram(UserError):  # noqa: N818 - what was found
    """A configuration file that is for another program than the one that got it."""

    def __init__(self, path: str, program: str, command: str = ""):
        verb = "submit --local" if program == "suite" else program
        super().__init__(f"{path} is {_CALLED[program]} file: {command or f'personmae {verb} {path}'}")
        self.path, self.program = path, program


class Unavailable(Exception):  # noqa: N818 - a way to end
    """Something exists but cannot be read at present. A retry may help. The message is one line."""


class RankUnavailable(Unavailable):
    """The same for an error that only one rank has seen, so that rank prints it."""


class Diverged(Exception):  # noqa: N818 - a way to end
    """The loss is no longer a finite number."""


class TooManyRejects(Exception):  # noqa: N818 - a way to end
    """More of a source was left out than allowed. The usable part is written, and the result is incomplete."""


class Incomplete(Exception):  # noqa: N818 - a way to end
    """All that was possible is done, and a part of the request is missing. The message is one line."""


class Stopped(Exception):  # noqa: N818 - a way to end, not an error
    """The run was asked to stop, has saved its state, and can be continued."""


class Terminated(KeyboardInterrupt):  # so that code which handles Ctrl-C handles this too
    """SIGTERM, where the program has no handler of its own."""


_OS_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission was denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "there is a file where a directory is needed",
    errno.EEXIST: "something else is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links lead in a circle",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_running: list[object] = []  # programs within ``run_program``
# A disk or a network file system that fails now and may answer later. Not every system has every name.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EAGAIN"),
    )
    if hasattr(errno, name)
)


def is_passing(error: BaseException | None) -> bool:
    """Whether an error of the operating system may be gone in a retry."""
    return isinstance(error, OSError) and error.errno in _PASSING


def run_program(program: Callable[[], None], *, quiet: bool = False) -> int:
    """Run ``program`` and return its exit code. A user error becomes one line on stderr.

    Every rank but the first sets ``quiet``, so that an error of all ranks is printed once.
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
        if isinstance(error, BrokenPipeError) and has_lost_reader(sys.stdout):
            _discard_output()
            return EXIT_UNREAD
        explained = _explained(error)
        if explained is None:
            raise
        message, code, quiet = *explained, False
    except UnicodeEncodeError as error:
        if error.encoding.lower().replace("-", "") == "utf8":
            raise
        lacking = error.object[error.start : error.start + 1]
        message = f"error: the locale's encoding, {error.encoding}, has no {lacking!r}, which is in a name. "
        message, code = message + "Set PYTHONUTF8=1 and run this again", EXIT_USER_ERROR
    except (Diverged, TooManyRejects) as error:
        message, code = f"error: {error}", EXIT_FAILED
    except Incomplete as part:
        message, code = f"incomplete: {part}", EXIT_FAILED
    except Stopped as stop:
        message, code = f"stopped: {stop}", EXIT_STOPPED
    except Terminated:
        message, code = f"stopped: by SIGTERM. {NOTHING_LEFT}", EXIT_STOPPED
    except KeyboardInterrupt as stop:
        message, code = f"stopped: by Ctrl-C. {str(stop) or NOTHING_LEFT}", EXIT_INTERRUPTED
    else:
        return EXIT_COMPLETE
    finally:
        _running.pop()
    if not quiet:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    elif code in (EXIT_FAILED, EXIT_USER_ERROR):
        _let_first_rank_speak()
    return code


def _let_first_rank_speak() -> None:
    """Stay until the launcher ends this rank: it ends all ranks as soon as one has failed, also the one that will say why."""
    before = signal.signal(signal.SIGTERM, _end_now)
    try:
        time.sleep(FIRST_RANK_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_now(*_: object) -> NoReturn:
    raise Terminated


def has_lost_reader(stream: TextIO) -> bool:
    """Whether what is written to ``stream`` goes to a pipe that nobody reads any more."""
    try:
        watched = select.poll()
        watched.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # none, closed, or not of the operating system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def _discard_output() -> None:
    """Let what is still in the buffer of standard output go nowhere, as the interpreter flushes it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def is_running() -> bool:
    """Whether a program is within ``run_program``."""
    return bool(_running)


def _print_any_name() -> None:
    """Print file names in any encoding, and those that are not UTF-8, with escapes instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explained(error: OSError) -> tuple[str, int] | None:
    """The line for an error of the operating system and its exit code. None where a traceback is more useful."""
    if is_passing(error):
        message = f"error: {error.strerror} at {error.filename}. This may pass: run this again"
        return (message, EXIT_FAILED) if error.filename else None
    if error.errno not in _OS_ERRORS:
        return None
    where = f" at {error.filename}" if error.filename else ""
    advice = "Make room there or choose another place" if error.errno in _FULL else "Fix it or choose another place"
    return f"error: {_OS_ERRORS[error.errno]}{where}. {advice}, then run this again", EXIT_USER_ERROR


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command's ``main`` and leave with its code, also where its parser has ended it, after a help for one."""
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_FAILED if end.code else EXIT_COMPLETE
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process with ``code``. One of several ranks ends at once, with nothing left to finish.

    While the interpreter of a rank shuts down, threads of its process group may still use it. Then it dies of SIGABRT
    ("terminate called without an active exception"), as seen in one of five runs over ssh and one of eight under torchrun.
    Its parent would take that for a failure. A single process waits for its threads and runs its exit functions. It frees
    nothing after that, since Triton's library would print 30 lines about its leaks below our last line.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the code is settled, and an interpreter that ends drops its handlers
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - what the interpreter itself does first
        atexit._run_exitfuncs()
    flushed = [_flush(stream) for stream in (sys.stdout, sys.stderr)]
    os._exit(code if all(flushed) else code or EXIT_FAILED)


def _flush(stream: TextIO | None) -> bool:
    """Flush a stream. False where its output is lost though somebody may still read it."""
    try:
        if stream:  # it was not closed before this program was started
            stream.flush()
    except (BrokenPipeError, ValueError):  # nobody reads any more, or it is closed
        return True
    except OSError:  # a full disk
        return False
    return True

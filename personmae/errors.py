"""How a program of this package ends: the exit codes and the one error that is the user's to mend."""

import errno
import sys
from collections.abc import Callable

EXIT_COMPLETE = 0  # the work is finished
EXIT_STOPPED = 75  # stopped early with its state saved: run it again
EXIT_USER_ERROR = 78  # wrong configuration or data: running it again cannot help


class UserError(ValueError):
    """Wrong configuration or data. The message says what was required, what came and what to do, in one line."""


class Stopped(Exception):  # noqa: N818 - a way to end, not an error
    """The run was asked to stop, has saved its state, and can be continued."""


def run_program(program: Callable[[], None], *, quiet: bool = False) -> int:
    """Run ``program`` and return its exit code; a user error becomes one line on stderr.

    ``quiet`` keeps that line back: every rank but the first sets it, so that it is printed once.
    """
    try:
        program()
    except UserError as error:
        message, code = f"error: {error}", EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        message = f"error: the disk is full{where}; free some space or choose another directory, then run this again"
        code = EXIT_USER_ERROR
    except Stopped as stop:
        message, code = f"stopped: {stop}", EXIT_STOPPED
    except KeyboardInterrupt:
        message, code = "stopped: interrupted by the keyboard", 130
    else:
        return EXIT_COMPLETE
    if not quiet:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code

"""How programs end: codes, and one line for what the user can mend."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from personmae import errors
from personmae.errors import (
    EXIT_COMPLETE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    Diverged,
    RankError,
    Stopped,
    Unavailable,
    UserError,
    run_program,
)


def ending(error: BaseException | None, capsys: pytest.CaptureFixture[str], *, quiet: bool = False) -> tuple[int, str]:
    def program() -> None:
        if error:
            raise error

    code = run_program(program, quiet=quiet)
    printed = capsys.readouterr()
    assert printed.out == ""
    return code, printed.err


def test_the_exit_codes_are_those_that_launchers_know():
    assert (EXIT_COMPLETE, EXIT_STOPPED, EXIT_USER_ERROR) == (0, 75, 78)


def test_a_program_that_ends_is_complete_and_says_nothing(capsys):
    assert ending(None, capsys) == (0, "")


def test_a_user_error_is_one_line_and_78(capsys):
    assert ending(UserError("a is wrong;\n   do b"), capsys) == (78, "error: a is wrong; do b\n")


def test_a_stop_is_one_line_and_75(capsys):
    assert ending(Stopped("at step 3"), capsys) == (75, "stopped: at step 3\n")


def test_the_keyboards_interrupt_is_one_line_and_130(capsys):
    code, line = ending(KeyboardInterrupt(), capsys)
    assert (code, line.startswith("stopped: by Ctrl-C. Nothing half-written is left.")) == (130, True)
    code, line = ending(KeyboardInterrupt("The last checkpoint stands"), capsys)
    assert (code, line) == (130, "stopped: by Ctrl-C. The last checkpoint stands\n")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "permission was denied"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOTDIR, "there is a file where a directory is needed"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_user_error_that_names_the_file(capsys, number, said):
    code, line = ending(OSError(number, "as the system says it", "/data/run/x"), capsys)
    assert code == 78
    advice = "Make room there" if "full" in said or "quota" in said else "Fix it"
    assert line.startswith(f"error: {said} at /data/run/x. {advice} or choose another place, then run this again")
    assert line.count("\n") == 1
    assert ending(OSError(number, "as the system says it"), capsys)[1].startswith(f"error: {said}. {advice}")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("a bug"), RuntimeError("a bug")])
def test_what_is_not_the_users_to_fix_keeps_its_traceback(error):
    def program() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_program(program)
    assert caught.value is error


def test_other_ranks_end_with_the_same_code_in_silence(capsys, monkeypatch):
    monkeypatch.setattr(errors, "FIRST_RANK_SECONDS", 0.01)
    assert ending(UserError("wrong"), capsys, quiet=True) == (78, "")
    assert ending(Stopped("now"), capsys, quiet=True) == (75, "")


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(("error", "code"), [(UserError("wrong"), 78), (Unavailable("away"), 1), (Diverged("lost"), 1)])
def test_a_quiet_rank_that_fails_stays_until_it_is_ended(capsys, error, code):
    """A launcher that sees its end would end the first rank, which may not have said why yet."""
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    ender = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    ender.start()
    assert ending(error, capsys, quiet=True) == (code, "")
    assert 0.5 <= time.monotonic() - began < errors.FIRST_RANK_SECONDS
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_quiet_rank_tells_only_what_it_alone_has_seen(capsys, monkeypatch):
    monkeypatch.setattr(errors, "FIRST_RANK_SECONDS", 0.01)

    def shared() -> None:
        raise UserError("all ranks see this")

    def own() -> None:
        raise RankError("rank 3: this shard is broken")

    assert run_program(shared, quiet=True) == run_program(own, quiet=True) == 78
    assert capsys.readouterr().err == "error: rank 3: this shard is broken\n"


def test_a_diverged_run_fails_with_one_line(capsys):
    def program() -> None:
        raise Diverged("the loss is not finite by step 7")

    assert run_program(program) == 1
    assert capsys.readouterr().err == "error: the loss is not finite by step 7\n"


@pytest.mark.parametrize(("world_size", "left"), [("1", "at leisure"), ("2", "")])
def test_one_of_several_ranks_leaves_without_a_shutdown_that_could_abort_it(world_size, left):
    program = (
        "import atexit; from personmae.errors import leave; atexit.register(print, 'at leisure'); print('last word'); leave(75)"
    )
    environment = os.environ | {"WORLD_SIZE": world_size}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert done.stdout.split("\n", 1) == ["last word", f"{left}\n" if left else ""]


@pytest.mark.parametrize("code", [0, 75])
@pytest.mark.parametrize(("how", "whole"), [(">&-", True), ("2>&-", True), ("| true", True), ("> /dev/full", False)])
def test_the_exit_code_is_that_of_the_program_whatever_has_become_of_its_output(code, how, whole):
    program = f"import time; from personmae.errors import leave; print('word'); time.sleep(0.2); leave({code})"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    shell = f"set -o pipefail; {shlex.join([sys.executable, '-c', program])} {how}"
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (code if whole else code or 1)
    assert "Traceback" not in done.stderr

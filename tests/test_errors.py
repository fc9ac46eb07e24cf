"""How programs end: codes, and one line for what the user can mend."""

import errno

import pytest

from personmae.errors import EXIT_COMPLETE, EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError, run_program


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
    assert ending(KeyboardInterrupt(), capsys) == (130, "stopped: interrupted by the keyboard\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error_that_names_the_file(capsys, number):
    code, line = ending(OSError(number, "No space left on device", "/data/run/x"), capsys)
    assert code == 78
    assert line.startswith("error: the disk is full while writing /data/run/x; free some space")
    assert line.count("\n") == 1
    assert ending(OSError(number, "No space left on device"), capsys)[1].startswith("error: the disk is full; free")


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), ValueError("a bug"), RuntimeError("a bug")])
def test_what_is_not_the_users_to_mend_keeps_its_traceback(error):
    def program() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_program(program)
    assert caught.value is error


def test_other_ranks_end_with_the_same_code_in_silence(capsys):
    assert ending(UserError("wrong"), capsys, quiet=True) == (78, "")
    assert ending(Stopped("now"), capsys, quiet=True) == (75, "")


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)

"""Warm processes end, print and are signalled as those of ``subprocess`` are."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('a'); import sys; print('b', file=sys.stderr)", 0),
        ("import sys; sys.exit(75)", 75),
        ("import sys; sys.exit('a last word')", 1),
        ("raise SystemExit(None)", 0),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import atexit; atexit.register(print, 'at the end'); print('before')", 0),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('later'))).start()", 0),
        ("import os; os._exit(3)", 3),
    ],
)
def test_a_program_ends_and_prints_as_in_a_new_interpreter(code: str, expected: int) -> None:
    ours = warm.run(["-c", code])
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ours.returncode == theirs.returncode == expected
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


def test_an_error_is_a_traceback_and_code_1() -> None:
    done = warm.run(["-c", "1 / 0"])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_it_has_its_own_environment_directory_and_arguments(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ.get('ONLY_HERE'), 'HOME' in os.environ, sys.argv, __name__)"
    kept = {name: value for name, value in os.environ.items() if name != "HOME"} | warm.FIXED
    done = warm.run(["-c", code, "x", 3], cwd=tmp_path, env=kept | {"ONLY_HERE": "1"})
    assert done.stdout == f"{tmp_path} 1 False ['-c', 'x', '3'] __main__\n"
    (tmp_path / "script.py").write_text("import sys; print(sys.argv[1:], sys.path[0])", encoding="utf-8")
    assert warm.run([tmp_path / "script.py", "y"]).stdout == f"['y'] {tmp_path}\n"


def test_it_reads_and_writes_pipes_and_dies_of_a_signal() -> None:
    echo = "import sys, time\nfor line in sys.stdin: print(line.upper(), end='', flush=True)\ntime.sleep(60)"
    pipe = subprocess.PIPE
    with warm.start(["-c", echo], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == "HELLO\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
        assert process.poll() == -signal.SIGTERM
        process.kill()  # of one that has ended: nothing


def test_what_was_read_at_the_start_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="OMP_NUM_THREADS"):
        warm.start(["-c", ""], env=os.environ | {"OMP_NUM_THREADS": "3"})

"""Asked to stop, a program answers at once and ends with 75, from its first line on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from personmae import dist
from personmae.monitor import heartbeat

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = "import sys; sys.argv[0] = '/usr/bin/personmae'; from personmae.__main__ import console; sys.exit(console())"
PROGRAMS = {
    "python -m personmae": ["-m", "personmae", "pretrain", "configs/quickstart.yaml"],
    "personmae": ["-c", CONSOLE, "finetune", "configs/quickstart_random.yaml"],
    "pretrain": ["launcher/pretrain.py", "--config", "configs/quickstart.yaml"],
    "finetune": ["launcher/finetune.py", "--config", "configs/quickstart_random.yaml"],
    "unsupervised": ["launcher/unsupervised.py", "--config", "configs/usl_market1501.yaml", "root=x", "init=y"],
    "downstream": [
        "launcher/downstream.py",
        "--program=finetune",
        "--result=s3://b/r",
        "--config=configs/quickstart_random.yaml",
    ],
    "agent": ["-m", "launcher.elastic", "run", "--", "launcher/pretrain.py"],
}
NOTHING_LEFT = "Nothing half-written is left. Run the same command again\n"
LINE = "stopped: before anything was begun. Run this again\n"


def ended(arguments: list[str], number: int, folder: Path, **environ: str) -> tuple[int, str]:
    """Code and standard error of a program that gets a signal when it says that it is ready for it."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | environ
    env["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT)))
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        try:
            while (line := process.stdout.readline()) != "ready\n":  # it may say that it is starting
                assert line, process.stderr.read()
            process.send_signal(number)
            return process.wait(timeout=60), process.stderr.read()
        finally:
            process.kill()


def slow_import(folder: Path, module: str) -> None:
    """Let the import of a module take a minute."""
    (folder / f"{module}.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_while_the_first_modules_are_imported_ends_with_75(program: str, number: int, tmp_path: Path) -> None:
    slow_import(tmp_path, "argparse")
    assert ended(PROGRAMS[program], number, tmp_path) == (75, LINE)


@pytest.mark.parametrize("program", ["python -m personmae", "pretrain"])
def test_a_signal_while_torch_is_imported_ends_with_75(program: str, tmp_path: Path) -> None:
    slow_import(tmp_path, "torch")
    assert ended(PROGRAMS[program], signal.SIGTERM, tmp_path) == (75, LINE)


def test_of_several_ranks_one_a_host_says_so_and_all_have_told_the_agent_that_they_start(tmp_path: Path) -> None:
    slow_import(tmp_path, "argparse")
    ranks = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", heartbeat.DIRECTORY: str(tmp_path)}
    assert ended(PROGRAMS["pretrain"], signal.SIGTERM, tmp_path, **ranks) == (75, "")
    beat = heartbeat.read_beat(tmp_path, 1)
    assert beat is not None
    assert beat.phase == "start"


AT_WORK = """
from personmae.system import signals
signals.answer_early()
import multiprocessing, os, sys, time
from personmae.errors import leave, run_program
def work():
    read, write = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: (os.write(write, b"."), time.sleep(60)))
    child.start()
    os.read(read, 1)
    child.terminate()  # a child that was forked from a program dies of the signal as any other does
    child.join()
    assert child.exitcode == -15, child.exitcode
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", file=sys.stderr)
leave(run_program(work))
"""


def test_a_program_without_an_answer_of_its_own_cleans_up_and_ends_with_75(tmp_path: Path) -> None:
    output = f"cleaned up\nstopped: by SIGTERM. {NOTHING_LEFT}"
    assert ended(["-c", AT_WORK], signal.SIGTERM, tmp_path) == (75, output)
    output = f"cleaned up\nstopped: by Ctrl-C. {NOTHING_LEFT}"
    assert ended(["-c", AT_WORK], signal.SIGINT, tmp_path) == (130, output)


BEGUN = """
from personmae.system import signals
signals.answer_early()
import sys
from pathlib import Path
from personmae.errors import leave, run_program
from personmae.weights.staging import partial_folder
def work():
    with partial_folder(Path(sys.argv[1]), keep=False) as folder:
        (folder / "half").write_text("written")
        import slow
leave(run_program(work))
"""


@pytest.mark.parametrize(
    ("number", "code", "by_whom"),
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_a_signal_during_a_late_import_leaves_nothing_half_written(
    number: int, code: int, by_whom: str, tmp_path: Path
) -> None:
    slow_import(tmp_path, "slow")
    assert ended(["-c", BEGUN, str(tmp_path / "out")], number, tmp_path) == (code, f"stopped: by {by_whom}. {NOTHING_LEFT}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != "") == ["slow.py"]


def test_a_program_at_work_that_imports_something_ends_in_good_order_after_that_import(tmp_path: Path) -> None:
    """A function of the package is at work, so it has begun: an end on the spot would pass over all that ends it well."""
    (tmp_path / "late.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(1)\nprint('imported', flush=True)\n")
    at_work = """
from personmae.system import signals
signals.answer_early()
import sys
from personmae.errors import leave, run_program
def work():
    try:
        at_work(lambda: __import__("late"))
        signals.threading.Event().wait(60)
    finally:
        print("cleaned up", file=sys.stderr)
code = compile("def at_work(function): function()", signals._PACKAGE / "evaluate.py", "exec")
exec(code)
leave(run_program(work))
"""
    for number, code, by_whom in ((signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")):
        assert ended(["-c", at_work], number, tmp_path) == (code, f"cleaned up\nstopped: by {by_whom}. {NOTHING_LEFT}")


@pytest.fixture
def _handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGTERM, "SIGKILL ends at once"), (signal.SIGINT, "Ctrl-C again ends at once")]
)
def test_the_first_signal_is_answered_on_the_spot_and_once(
    number: int, again: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    stop = dist.StopSignal()
    os.kill(os.getpid(), number)
    assert capfd.readouterr().err == f"stopping after this step. {again}\n"
    assert stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not (other := dist.StopSignal()).requested
    os.kill(os.getpid(), number)
    assert other.requested
    assert capfd.readouterr().err == ""

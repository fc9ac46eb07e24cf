"""Stopped by a signal under any launcher, a run saves at a step boundary, and the next one goes on as if nothing had been.

docs/operations.md has the table of launchers that these tests back.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from closeness import assert_allclose
from programs import ROOT, SETTINGS, environment, losses, pretrain

from personmae.checkpoint import portable

pytestmark = [pytest.mark.integration, pytest.mark.slow]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(21000 + os.getpid() % 9000)],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"],
    "elastic": [sys.executable, "-m", "launcher.elastic", "run", "--nproc-per-node", "2", "--settle-seconds", "0.2"],
    "personmae": [sys.executable, "-m", "personmae", "pretrain"],
}


@dataclass
class Run:
    """A pre-training run under one of the launchers, in a process group of its own as a terminal gives it."""

    folder: Path
    shards: Path
    others: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, launcher: str) -> subprocess.Popen[str]:
        command = list(LAUNCHERS[launcher])
        if launcher == "elastic":
            command += ["--store", self.store(), "--"]
        command += ["configs/quickstart.yaml"] if launcher == "personmae" else ["launcher/pretrain.py", "--config"]
        command += [] if launcher == "personmae" else ["configs/quickstart.yaml"]
        command += [f"data.shards={self.shards}", f"run_dir={self.folder}", *SETTINGS, "checkpoint.every_steps=1000"]
        with open(f"{self.folder}.log", "w") as log:
            run = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        self.others.append(run)
        return run

    def store(self) -> str:
        command = [sys.executable, "-m", "launcher.elastic", "store", "--port", "0"]
        store = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.others.append(store)
        assert store.stdout
        with store.stdout as lines:
            return "127.0.0.1:" + lines.readline().rsplit(" ", 1)[1].strip()

    def said(self) -> str:
        return Path(f"{self.folder}.log").read_text()

    def wait_for_step(self, run: subprocess.Popen[str], step: int) -> None:
        log, deadline = self.folder / "metrics.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= step):
            assert run.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def processes(self) -> list[int]:
        """Ranks and launchers of the run, orphans too."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if f"run_dir={self.folder}".encode() in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def wait_for_end(self) -> None:
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, (left, self.said())
            time.sleep(0.1)


@pytest.fixture
def run(tmp_path: Path, shard_dir: Path) -> Iterator[Run]:
    there = Run(tmp_path / "run", shard_dir)
    yield there
    for process in there.others:
        process.kill()
        process.wait()
    for pid in there.processes():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.kill(pid, signal.SIGKILL)


def to_main(run: subprocess.Popen[str], number: int) -> None:
    """``kill PID``, or what a pod's first process gets."""
    os.kill(run.pid, number)


def to_group(run: subprocess.Popen[str], number: int) -> None:
    """Ctrl-C at a terminal."""
    os.killpg(run.pid, number)


def to_child(run: subprocess.Popen[str], number: int) -> None:
    """The process that has started the ranks, where that is not the launcher's first."""
    (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(child), number)


Send = Callable[[subprocess.Popen[str], int], None]
STOPS = [
    ("personmae", to_main, signal.SIGTERM, 75),
    ("personmae", to_group, signal.SIGINT, 75),
    ("elastic", to_main, signal.SIGTERM, 75),
    ("elastic", to_group, signal.SIGINT, 75),
    ("torchrun", to_main, signal.SIGTERM, 1),
    ("torchrun", to_group, signal.SIGINT, 1),
    ("deepspeed", to_child, signal.SIGTERM, 1),
    ("deepspeed", to_group, signal.SIGINT, -signal.SIGINT),
]


@pytest.mark.parametrize(("launcher", "send", "number", "code"), STOPS)
def test_one_signal_saves_at_a_step_boundary_under_every_launcher(
    launcher: str, send: Send, number: int, code: int, run: Run, native_run: Path
) -> None:
    started = run.start(launcher)
    run.wait_for_step(started, 3)
    send(started, number)
    ended = started.wait(timeout=120)
    # Ctrl-C reaches deepspeed's two processes and its ranks at once; which of them is first decides between these.
    assert ended in ((code, 1) if launcher == "deepspeed" else (code,)), run.said()
    run.wait_for_end()
    done = portable.newest(run.folder)
    assert done is not None, run.said()
    assert portable.step_of(done.name) == len(losses(run.folder)) < 20
    assert f"stopped: at step {len(losses(run.folder))} of 20, state saved" in run.said()
    go_on(run, native_run)


@pytest.mark.parametrize(("launcher", "send", "number"), [STOPS[i][:3] for i in (1, 2, 4, 6)])  # each launcher once
def test_a_second_signal_spoils_nothing(launcher: str, send: Send, number: int, run: Run, native_run: Path) -> None:
    started = run.start(launcher)
    run.wait_for_step(started, 3)
    send(started, number)
    time.sleep(0.3)
    if started.poll() is None:
        send(started, number)
    started.wait(timeout=120)
    run.wait_for_end()
    if (launcher, number) != ("personmae", signal.SIGINT):  # there a second Ctrl-C ends the run at once
        assert "state saved" in run.said()
    go_on(run, native_run)


def test_the_deepspeed_command_leaves_its_ranks_alone_when_only_it_is_told_to_stop(run: Run) -> None:
    started = run.start("deepspeed")
    run.wait_for_step(started, 3)
    to_main(started, signal.SIGTERM)
    assert started.wait(timeout=60) == -signal.SIGTERM
    before = len(losses(run.folder))
    assert run.processes()  # which go on to train
    run.wait_for_end()
    assert len(losses(run.folder)) == 20 > before


def go_on(run: Run, native_run: Path) -> None:
    """What is left must be whole: another run takes it up, on one rank, and ends as an undisturbed one."""
    pretrain(run.shards, run.folder, "engine.name=native", "checkpoint.every_steps=1000")
    assert_allclose(losses(run.folder), losses(native_run), rtol=1e-5)
    partial = list((run.folder / "checkpoints").glob(".*"))
    assert partial == [], partial

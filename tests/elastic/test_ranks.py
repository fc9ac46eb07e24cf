"""Ranks as processes: started, listened to and ended, whatever they print and however the disk below them is."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from agents import ROOT, Start

from launcher.elastic.ranks import Ranks, reserve_port
from launcher.elastic.traces import ask_flight_record, flight_environment, process_state, read_traces
from personmae.monitor import heartbeat

pytestmark = pytest.mark.integration


def environment(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"}


def test_a_line_that_never_ends_is_shown_and_not_kept(start: Start) -> None:
    agent = start("import time; print('x' * 70_000, end='', flush=True); time.sleep(99)")
    agent.wait_for("x{60000}")


def test_a_rank_goes_on_when_its_log_file_cannot_be_written(start: Start, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/round-1-rank-0.log").symlink_to("/dev/full")
    agent = start("for i in range(3000): print('line', i, '.' * 40, flush=True)", "--log-dir", str(tmp_path / "logs"))
    assert agent.code() == 0, agent.output()
    assert "round-1-rank-0.log is not written any further: No space left on device" in agent.output()
    assert "[0] line 2999" in agent.output()


def test_an_agent_whose_own_log_cannot_be_written_goes_on_and_keeps_its_exit_code(store: str) -> None:
    options = ["--store", store, "--run-id", "full", "--settle-seconds", "0.2"]
    command = [sys.executable, "-m", "launcher.elastic", "run", *options, "--", sys.executable, "-c", "print(1)"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_when_one_rank_cannot_be_started_the_others_are_ended(tmp_path: Path) -> None:
    script = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(99)"
    command = [sys.executable, "-c", script, str(tmp_path / "pid")]
    (tmp_path / "beats").mkdir()
    before = children()
    with pytest.raises(ValueError, match="null"):
        Ranks(command, [environment(0), environment(1) | {"X": "\0"}], tmp_path / "beats", None)
    assert children() <= before


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_a_reserved_port_is_for_a_rank_and_for_nobody_else() -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    with reserve_port("127.0.0.1") as held, socket.socket() as other:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        assert TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False).port == port


STUCK = """
import time
from personmae.monitor.heartbeat import Heartbeat
beats = Heartbeat()
def stuck_here():
    print("ready", flush=True)
    time.sleep(99)
stuck_here()
"""


@pytest.mark.parametrize("by", ["py-spy", "the rank itself"])
def test_the_stacks_of_a_stuck_rank_are_read(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by != "py-spy":
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    environ = os.environ | {heartbeat.DIRECTORY: str(tmp_path), "LOCAL_RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", STUCK], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        traces = read_traces(process.pid, heartbeat.stacks_file(tmp_path, 0))
        alone = read_traces(process.pid, tmp_path / "none")
        process.send_signal(signal.SIGSTOP)
        while process_state(process.pid) != "T (stopped)":
            time.sleep(0.01)
        stopped = read_traces(process.pid, tmp_path / "none")
        process.kill()
    if by == "py-spy" and ", by py-spy" not in traces:
        pytest.skip("py-spy is not installed, or may not look at other processes here")
    assert ("by py-spy" in traces) == (by == "py-spy")
    assert traces.startswith(("state S", "state R"))
    assert "stuck_here" in traces
    assert stopped.startswith("state T (stopped)")
    if by == "py-spy":
        assert "stuck_here" in stopped  # it needs no answer from the rank
    else:
        assert "no traces: the rank has no heartbeat" in alone


RECORDER = """
import os
pipe = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + os.environ["RANK"] + ".pipe"
os.mkfifo(pipe)
reader = os.open(pipe, os.O_RDONLY)
asked = os.read(reader, 100)
open(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + os.environ["RANK"], "wb").write(b"record")
"""


def test_a_flight_record_is_asked_for_by_the_pipe_that_nccl_opens(tmp_path: Path) -> None:
    """Without a GPU, a process that does what torch documents of NCCL's watcher stands for it."""
    environ = flight_environment(tmp_path, tmp_path, 3) | {"RANK": "1"}
    assert ask_flight_record(environ) is None  # nobody has opened a pipe: NCCL is not in use
    with subprocess.Popen([sys.executable, "-c", RECORDER], env=os.environ | environ):
        deadline, record = time.monotonic() + 20, None
        while not record and time.monotonic() < deadline:
            record = ask_flight_record(environ)
            time.sleep(0.02)
    assert record
    assert record == tmp_path / "flight-round-3-rank-1"
    assert record.read_bytes() == b"record"
    assert ask_flight_record(environ) is None  # the pipe is there, its reader is gone

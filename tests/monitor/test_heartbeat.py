"""What a rank tells its agent, and what that costs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calls import num_calls

from launcher.elastic.__main__ import build_parser
from launcher.elastic.ranks import Limits
from personmae.monitor import heartbeat
from personmae.monitor.heartbeat import Beat, Heartbeat, read_beat


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(heartbeat.DIRECTORY, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    return tmp_path


def test_without_an_agent_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(heartbeat.DIRECTORY, raising=False)
    monkeypatch.chdir(tmp_path)
    Heartbeat().beat("step", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_beat_is_read_as_it_was_sent(directory: Path) -> None:
    assert read_beat(directory, 3) is None
    beats = Heartbeat()
    begun = read_beat(directory, 3)
    assert begun is not None
    assert (begun.phase, begun.step) == ("start", 0)
    for phase in heartbeat.PHASES:
        before = time.monotonic()
        beats.beat(phase, 2**40)
        beat = read_beat(directory, 3)
        assert beat is not None
        assert beat == Beat(phase, 2**40, beat.time)
        assert before - 1e-3 <= beat.time <= time.monotonic() + 1e-3


def test_a_beat_is_a_few_calls_and_opens_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = Heartbeat()
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(os, "open", None)
    assert num_calls(lambda: beats.beat("step", 1)) < 10


def test_every_phase_has_a_limit_of_its_own() -> None:
    limits = Limits(1, 2, 3, 4, 5, 6)
    assert [limits.of(phase) for phase in heartbeat.PHASES] == [1, 2, 3, 4, 5, 6]
    args = build_parser().parse_args(
        ["run", *(f"--{phase.replace('_', '-')}-seconds=7" for phase in heartbeat.PHASES), "--", "x"]
    )
    assert [getattr(args, f"{phase}_seconds") for phase in heartbeat.PHASES] == [7] * 6


@pytest.mark.integration
def test_a_full_disk_is_an_error_at_the_start_and_no_crash_at_a_beat(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        (disk / "others").write_bytes(bytes(4096))
        script = "from personmae.monitor.heartbeat import Heartbeat\nHeartbeat().beat('step', 1)"
        environ = os.environ | {heartbeat.DIRECTORY: str(disk), "LOCAL_RANK": "0"}
        done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


STUCK = """
import os, threading, time
from personmae.monitor.heartbeat import Heartbeat
beats = Heartbeat()
def a_thread(): time.sleep(60)
threading.Thread(target=a_thread, daemon=True).start()
def stuck_here():
    print("ready", flush=True)
    threading.Event().wait()
stuck_here()
"""


@pytest.mark.integration
def test_a_stuck_rank_shows_where_all_its_threads_are(tmp_path: Path) -> None:
    environ = os.environ | {heartbeat.DIRECTORY: str(tmp_path), "LOCAL_RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", STUCK], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGUSR1)
        file, deadline = heartbeat.stacks_file(tmp_path, 0), time.monotonic() + 10
        while "stuck_here" not in file.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None
        process.kill()
    assert "stuck_here" in file.read_text()
    assert "a_thread" in file.read_text()

"""Real agents and their store."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from agents import ROOT, Start, Started


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    command = ["-m", "launcher.elastic", "store", "--port", "0"]
    with warm.start(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield "127.0.0.1:" + process.stdout.readline().rsplit(" ", 1)[1].strip()
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.fixture
def start(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts an agent whose ranks run a few lines of Python, or a command."""
    agents: list[Started] = []
    quick = ["--store", store, "--run-id", request.node.name, "--settle-seconds", "0.2", "--backoff-seconds", "0.2"]

    def start(script: str | list[str], *options: str) -> Started:
        command = [sys.executable, "-uc", script] if isinstance(script, str) else script
        agents.append(Started(tmp_path / f"agent-{len(agents)}.log", [*quick, *options], command))
        return agents[-1]

    yield start
    for agent in agents:
        agent.process.send_signal(signal.SIGCONT)
        agent.process.kill()
        agent.process.wait()

"""The commands of docs/clusters.md, word for word, on two hosts, each in a network namespace where the machine allows."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from closeness import assert_allclose
from programs import ROOT, SETTINGS, STEPS, losses
from test_elastic import Cluster, build_hosts, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]
DOCUMENT = ROOT / "docs/clusters.md"
HOSTS = {"host-0": "a", "host-1": "b"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    names, addresses = build_hosts(f"c{os.getpid()}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0" if names else "lo")  # as the document says
    there = Cluster(tmp_path, names, addresses, 20000 + os.getpid() % 9000)
    yield there
    assert there.close() == []


def documented(start: str) -> dict[str, list[str]]:
    """The command that begins so, by host of ``Cluster``."""
    lines = [line.split("$ ", 1) for line in DOCUMENT.read_text().splitlines() if f"$ {start}" in line]
    assert lines, f"{DOCUMENT} has no command {start!r}"
    return {HOSTS[host]: shlex.split(command) for host, command in lines}


def run(cluster: Cluster, host: str, command: list[str], words: dict[str, str]) -> subprocess.Popen[bytes]:
    """A documented command on a host, with the test's own addresses, numbers and paths in place of the document's."""
    for old, new in words.items():
        assert any(old in part for part in command), f"{old!r} is not in {command}"
        command = [part.replace(old, new) for part in command]
    program = [] if command[0] == "python" else [Path(sys.executable).parent / command[0]]
    return cluster.start(host, f"{host}.log", *program, *command[1:])


@dataclass
class Training:
    """What the document leaves open, and what must come out."""

    overrides: list[str]
    words: dict[str, str]
    run_dir: Path
    expected: list[float]

    def finish(self, cluster: Cluster, processes: list[subprocess.Popen[bytes]]) -> None:
        """Two hosts must end well, having trained together what one process trains."""
        assert [process.wait(timeout=150) for process in processes] == [0, 0], cluster.logs()
        assert len(losses(self.run_dir)) == STEPS
        assert_allclose(losses(self.run_dir), self.expected, rtol=1e-5)


@pytest.fixture
def training(shard_dir: Path, cluster: Cluster, native_run: Path, tmp_path: Path) -> Training:
    run_dir = tmp_path / "run"
    words = {"CONFIG": "configs/quickstart.yaml", "/shared/run": str(run_dir), "host-0": cluster.addresses["a"]}
    return Training([f"data.shards={shard_dir}", "engine.name=deepspeed", *SETTINGS], words, run_dir, losses(native_run))


def test_deepspeed_without_ssh_trains_on_two_hosts_of_two_ranks(cluster: Cluster, training: Training, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("host-0 slots=2\nhost-1 slots=2\n")
    started = []
    for host, (program, *rest) in documented("deepspeed").items():
        rest[rest.index("hosts")] = str(tmp_path / "hosts")
        command = [program, f"--master_port={cluster.port}", *rest, *training.overrides]
        started.append(run(cluster, host, command, training.words))
    training.finish(cluster, started)


def test_agents_train_on_two_hosts(cluster: Cluster, training: Training) -> None:
    port = {"29400": str(cluster.port)}
    store = run(cluster, "a", documented("python -m launcher.elastic store")["a"], port)
    wait_until(lambda: "serving" in cluster.log("a"), 30, cluster.logs)
    started = []
    for host, command in documented("python -m launcher.elastic run").items():
        command[command.index("--nproc-per-node") + 1] = "1"
        started.append(run(cluster, host, [*command, *training.overrides], training.words | port | {"2048": "16"}))
    training.finish(cluster, started)
    store.terminate()
    assert store.wait(timeout=10) == 0

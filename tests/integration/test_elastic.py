"""Hosts that come and go: real agents, each in a network namespace of its own where the machine allows, and real ranks.

Whatever happens to them, the samples trained on, by step, are those of an undisturbed run; only the steps since the last
checkpoint are done again, and none after an orderly stop. The seconds that each recovery took are printed.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from closeness import assert_allclose
from programs import ROOT, SETTINGS, environment, losses

sys.path.insert(0, str(ROOT / "tests/elastic"))
import worker  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.integration, pytest.mark.slow]
WORKER = "tests/elastic/worker.py"
FAST = ["--nnodes", "1:2", "--settle-seconds", "1", "--keep-alive-seconds", "3", "--backoff-seconds", "0.5"]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


def wait_until(what: Callable[[], Any], seconds: float, failure: Callable[[], str]) -> Any:
    """What ``what`` returns once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise TimeoutError(failure())


@dataclass
class Cluster:
    """Hosts ``a`` and ``b``, and ``s`` for the store; ``names`` are their namespaces, or nothing on a machine without."""

    folder: Path
    names: dict[str, str]
    addresses: dict[str, str]
    port: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def shm(self) -> Path:
        """What the hosts have as /dev/shm."""
        folder = self.folder / "shm"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, host: str, log: str, *args: str | Path) -> subprocess.Popen[bytes]:
        """A process on a host, its output in ``folder``/``log``."""
        command = [sys.executable, *map(str, args)]
        if self.names:
            prepare = f'hostname host-{host} && mount --bind "{self.shm}" /dev/shm && exec "$@"'
            named = ["unshare", "--uts", "sh", "-c", prepare, "sh", *command]
            command = ["ip", "netns", "exec", self.names[host], *named]
        with open(self.folder / log, "ab") as file:
            environ = environment({"TMPDIR": str(self.folder)})
            process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def store(self) -> subprocess.Popen[bytes]:
        process = self.start("s", "store.log", "-m", "launcher.elastic", "store", "--port", str(self.port))
        wait_until(lambda: "serving" in self.log("store"), 30, lambda: self.log("store"))
        return process

    def agent(self, host: str, *options: str | Path, script: list[str | Path]) -> subprocess.Popen[bytes]:
        where = ["--store", f"{self.addresses['s']}:{self.port}", *FAST]
        return self.start(host, f"{host}.log", "-m", "launcher.elastic", "run", *where, *options, "--", *script)

    def log(self, host: str) -> str:
        file = self.folder / f"{host}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def logs(self) -> str:
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-6000:]}" for f in sorted(self.folder.glob("*.log")))

    def lose(self, host: str, agent: subprocess.Popen[bytes]) -> None:
        """A host dies: nobody is told, where it has a network of its own to be cut off."""
        if self.names:
            ip("-n", self.names[host], "link", "set", "eth0", "down")
        agent.kill()
        agent.wait()

    def close(self) -> list[int]:
        """End everything; returns what was still running on a host a while after its agent had ended."""
        ended = all(process.poll() is not None for process in self.started)
        for process in self.started:
            process.kill()
            process.wait()
        deadline = time.monotonic() + (10 if ended else 0.2)  # what was killed with its agent takes a moment to be gone
        while (strays := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(pid, signal.SIGKILL)
        for name in self.names.values():
            ip("netns", "delete", name)
        return strays if ended else []

    def pids(self) -> list[int]:
        """What runs on the hosts."""
        listed = [
            subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=True) for name in self.names.values()
        ]
        return [int(pid) for done in listed for pid in done.stdout.split()]


def build_hosts(tag: str) -> tuple[dict[str, str], dict[str, str]]:
    """Three namespaces on a bridge that lies in the store's; the machine's own network is not touched."""
    names = {host: f"pm{tag}{host}" for host in "sab"}
    addresses = {"s": "10.77.0.1", "a": "10.77.0.2", "b": "10.77.0.3"}
    try:
        for host, name in names.items():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            if host == "s":
                ip("-n", name, "link", "add", "br0", "type", "bridge")
                ip("-n", name, "address", "add", f"{addresses[host]}/24", "dev", "br0")
                ip("-n", name, "link", "set", "br0", "up")
            else:
                ip("-n", names["s"], "link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", names["s"], "link", "set", f"to-{host}", "master", "br0", "up")
                ip("-n", name, "address", "add", f"{addresses[host]}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
    except (OSError, subprocess.CalledProcessError):
        for name in names.values():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)
        return {}, dict.fromkeys("sab", "127.0.0.1")
    return names, addresses


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    names, addresses = build_hosts(str(os.getpid()))
    there = Cluster(tmp_path, names, addresses, 20000 + os.getpid() % 9000)
    yield there
    strays = there.close()
    assert strays == []
    assert list(there.shm.iterdir()) == []


@dataclass
class Run:
    """The run directory of ``worker.py``, and what it says."""

    folder: Path
    cluster: Cluster

    def steps(self) -> dict[int, dict[int, list[int]]]:
        """By round and rank: the steps trained; that each was trained on the right samples is checked here."""
        found: dict[int, dict[int, list[int]]] = {}
        for file in self.folder.glob("trained-*.txt"):
            number, rank, world_size = map(int, file.stem.split("-")[1:])
            lines = [list(map(int, line.split())) for line in file.read_text().splitlines()]
            for step, *ids in lines:
                assert ids == worker.rank_slice(worker.batch_at(step), rank, world_size).tolist()
            found.setdefault(number, {})[rank] = [line[0] for line in lines]
        return dict(sorted(found.items()))

    def world(self, world_size: int, after: int) -> int:
        """Wait for a round beyond ``after`` with so many ranks, all of which have trained for 12 steps; its number."""

        def there() -> int:
            files = [f for f in self.folder.glob(f"trained-*-*-{world_size}.txt") if f.read_text().count("\n") > 12]
            rounds = [int(f.stem.split("-")[1]) for f in files]
            return max((n for n in rounds if n > after and rounds.count(n) == world_size), default=0)

        return wait_until(there, 60, self.cluster.logs)

    def recover(self, what: str, world_size: int, after: int) -> int:
        """Wait for the first step of a new round, and print how long that took from now."""
        begun = time.monotonic()

        def first_step() -> bool:
            files = self.folder.glob(f"trained-*-0-{world_size}.txt")
            return any(int(f.stem.split("-")[1]) > after and f.stat().st_size for f in files)

        wait_until(first_step, 60, self.cluster.logs)
        print(f"\nrecovery: {what}: {time.monotonic() - begun:.1f} s")
        return self.world(world_size, after)

    def lost(self) -> list[int]:
        """Steps done again by each round."""
        rounds = [steps for steps in self.steps().values() if any(steps.values())]
        pairs = itertools.pairwise(rounds)
        return [max(s[-1] for s in old.values() if s) + 1 - min(s[0] for s in new.values() if s) for old, new in pairs]

    def finish(self, *agents: subprocess.Popen[bytes]) -> None:
        """Let the run complete; it must have done every step, and ended with the loss of an undisturbed one."""
        (self.folder / "finish").touch()
        assert [agent.wait(timeout=30) for agent in agents] == [0] * len(agents), self.cluster.logs()
        done = set.union(*(set.intersection(*map(set, steps.values())) for steps in self.steps().values()))
        final = json.loads((self.folder / "state.json").read_text())
        assert done == set(range(final["step"]))
        loss = 0
        for step in range(final["step"]):
            loss = worker.next_loss(loss, int(worker.batch_at(step).sum()))
        assert final["loss"] == loss


@pytest.fixture
def run(cluster: Cluster) -> Run:
    folder = cluster.folder / "run"
    folder.mkdir()
    return Run(folder, cluster)


def test_hosts_are_lost_join_and_are_preempted(cluster: Cluster, run: Run) -> None:
    cluster.store()
    a, b = (cluster.agent(host, script=[WORKER, run.folder]) for host in "ab")
    number = run.recover("forming a world of 2, processes included", 2, 0)

    b.kill()
    number = run.recover("an agent is killed, 2 -> 1", 1, number)
    b.wait()
    b = cluster.agent("b", script=[WORKER, run.folder])
    number = run.recover("it comes back, 1 -> 2", 2, number)

    b.send_signal(signal.SIGTERM)
    number = run.recover("an agent is told to stop, 2 -> 1", 1, number)
    assert b.wait(timeout=10) == 75
    b = cluster.agent("b", script=[WORKER, run.folder])
    number = run.recover("it comes back, 1 -> 2", 2, number)

    cluster.lose("a", a)
    run.recover("the host of rank 0 is lost, 2 -> 1", 1, number)
    run.finish(b)

    lost = run.lost()
    assert lost[1:4] == [0, 0, 0]
    assert max(lost[0], lost[4]) <= worker.EVERY_STEPS
    assert "failure" not in cluster.log("a") + cluster.log("b")  # nothing was charged to the budget


def test_a_rank_hangs_a_rank_crashes_and_the_store_is_restarted(cluster: Cluster, run: Run) -> None:
    store = cluster.store()
    agents = [cluster.agent(host, "--step-seconds", "3", script=[WORKER, run.folder]) for host in "ab"]
    number = run.world(2, 0)

    pid = int((run.folder / "pid-1").read_text())
    os.kill(pid, signal.SIGSTOP)
    number = run.recover("a rank is stopped and taken for hung after 3 s", 2, number)
    output = cluster.log("a") + cluster.log("b")
    assert "state T (stopped)" in output
    assert "all_reduce" in output  # the other rank's stack

    (run.folder / "crash").touch()
    wait_until(lambda: "a fault of rank 1" in cluster.log("a") + cluster.log("b"), 20, cluster.logs)
    (run.folder / "crash").unlink()
    number = run.recover("a rank crashes", 2, number)
    for host in "ab":
        assert re.search(r"first failure: worker_error: rank 1 on .* ended with code 1", cluster.log(host))

    store.kill()
    store.wait()
    before = max(run.steps()[number][0])
    (cluster.folder / "store.log").unlink()
    wait_until(lambda: max(run.steps()[number][0]) > before + 50, 20, cluster.logs)
    cluster.store()  # empty: the agents tell it what they know
    time.sleep(1.5)
    os.kill(int((run.folder / "pid-0").read_text()), signal.SIGKILL)
    run.recover("a rank is killed after the store came back empty", 2, number)
    run.finish(*agents)
    assert max(run.lost()) <= worker.EVERY_STEPS


def test_without_a_store_ranks_save_and_agents_end_in_bounded_time(cluster: Cluster, run: Run) -> None:
    store = cluster.store()
    agents = [cluster.agent(host, "--store-seconds", "3", script=[WORKER, run.folder]) for host in "ab"]
    number = run.world(2, 0)
    store.kill()
    begun = time.monotonic()
    assert [agent.wait(timeout=20) for agent in agents] == [75, 75], cluster.logs()
    print(f"\nthe store is gone for good: agents ended after {time.monotonic() - begun:.1f} s")
    last = {steps[-1] for steps in run.steps()[number].values()}
    assert json.loads((run.folder / "state.json").read_text())["step"] == last.pop() + 1
    for host in "ab":
        assert "has been silent for 3 s" in cluster.log(host)
    alone = cluster.agent("a", "--store-seconds", "2", script=[WORKER, run.folder])
    assert alone.wait(timeout=20) == 1
    assert "ends with code 1: the store is gone" in cluster.log("a")


@pytest.mark.timeout(240)
def test_pretraining_goes_on_with_one_host_where_two_were(
    cluster: Cluster, shard_dir: Path, native_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"data.shards={shard_dir}", f"run_dir={run_dir}", "engine.name=deepspeed", "checkpoint.every_steps=1000"]
    script = ["launcher/pretrain.py", "--config", "configs/quickstart.yaml", *SETTINGS, *overrides]
    cluster.store()
    a, b = (cluster.agent(host, "--admissible-batch", "16", script=[*script]) for host in "ab")
    log = run_dir / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 4, 120, cluster.logs)
    b.send_signal(signal.SIGTERM)
    assert b.wait(timeout=60) == 75, cluster.logs()
    assert a.wait(timeout=120) == 0, cluster.logs()
    assert "resuming at step" in cluster.log("a")
    assert_allclose(losses(run_dir), losses(native_run), rtol=1e-5)

"""What an agent serves beside its own numbers: those of ranks that come and go."""

import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from agents import Start
from calls import num_calls
from prometheus_client import generate_latest

from launcher.elastic.http import Metrics, Probes, serve
from launcher.elastic.membership import Node, Record, Round
from launcher.elastic.ranks import Ranks
from personmae.data.counters import StreamCounters
from personmae.errors import UserError
from personmae.monitor import heartbeat
from personmae.monitor.rank_metrics import RankMetrics

SCRIPT = """
import os, sys, time
from personmae.monitor.rank_metrics import RankMetrics
metrics = RankMetrics("pretrain")
first, last = map(int, sys.argv[1:3])
metrics.beat("data_wait", first)
for step in range(first, last):
    metrics.beat("step", step)
    metrics.count(step + 1, 16)
metrics.beat(sys.argv[3], last)
if metrics.run:
    metrics.run.record(last, {"loss": 0.5}, 1.0)
metrics._export.write()
print("told", flush=True)
time.sleep(60)
"""
# The same without torch and without numbers: its heartbeat alone.
STEPS_ALONE = """
import sys, time
from personmae.monitor.heartbeat import Heartbeat
beats = Heartbeat()
beats.beat(sys.argv[3], int(sys.argv[2]))
print("told", flush=True)
time.sleep(60)
"""


class Host:
    """One host's ranks and what its agent makes of them."""

    def __init__(self, beats: Path, log_dir: Path) -> None:
        self.beats, self.log_dir = beats, log_dir
        self.metrics = Metrics(1, 2, beats)
        self.ranks = Ranks([], [], beats, None)
        self.number = 0
        node = Node("a", "host-a", "127.0.0.1", 1234, 2)
        self.record = Record(round=replace(Round(), number=1, nodes=(node,), shares=(2,), active=("a",)))

    def start(
        self, first: int, last: int, phase: str, *, ranks: tuple[int, ...] = (0, 1), known: int = 0, script: str = SCRIPT
    ) -> None:
        """A round, from a step to a step; ``known`` is the step that the record has."""
        self.number += 1
        self.ranks.kill()
        self.metrics.begin(1.5, self.ranks, known)
        environs = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(local),
                "TORCHELASTIC_RESTART_COUNT": str(self.number),
                heartbeat.DIRECTORY: str(self.beats),
            }
            for local, rank in enumerate(ranks)
        ]
        command = [sys.executable, "-c", script, str(first), str(last), phase]
        self.ranks = Ranks(command, environs, self.beats, self.log_dir)
        deadline = time.monotonic() + 60
        while not all("told" in rank.tail_now() for rank in self.all()):
            assert time.monotonic() < deadline, [rank.tail_now() for rank in self.all()]
            time.sleep(0.02)
        self.show(running=True)

    def all(self) -> "list[Told]":
        return [Told(self.log_dir / f"round-{self.number + 1}-rank-{rank.rank}.log") for rank in self.ranks.all]

    def show(self, *, running: bool) -> None:
        self.metrics.update(self.record, self.ranks, 0.0, running=running)

    def values(self) -> dict[str, float]:
        return {
            s.name + "".join(f" {v}" for v in s.labels.values()): s.value
            for metric in self.metrics.registry.collect()
            for s in metric.samples
        }


class Told:
    """A rank's log."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def tail_now(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    for name in ("beats", "logs"):
        (tmp_path / name).mkdir()
    found = Host(tmp_path / "beats", tmp_path / "logs")
    yield found
    found.ranks.kill()


def test_ranks_numbers_go_on_through_a_restart_and_steps_done_again_are_counted(host: Host) -> None:
    host.start(0, 20, "data_wait")
    found = host.values()
    assert found["personmae_steps_total"] == 20
    assert found["personmae_step_duration_seconds_count total total 1"] == 20
    assert found["personmae_rank_phase 0 data_wait"] == found["personmae_rank_phase 0 wait_data"] == 1  # the old name too
    phases = [f"personmae_rank_phase 1 {phase}" for phase in heartbeat.PHASES]
    assert [found[phase] for phase in phases] == [float(phase.endswith("data_wait")) for phase in phases]
    assert found["personmae_last_step"] == 20
    assert found["personmae_last_step_timestamp_seconds"] == pytest.approx(time.time(), abs=60)
    assert found["personmae_lost_steps_total"] == 0
    for rank in host.ranks.all:
        rank.kill()
    host.show(running=False)
    between = host.values()
    assert between["personmae_steps_total"] == 20
    assert between["personmae_last_step"] == 20
    assert between["personmae_world_size"] == 0
    assert not [name for name in between if name.startswith(("personmae_loss", "personmae_rank_phase", "personmae_run_info"))]
    host.start(15, 25, "evaluate")
    after = host.values()
    assert after["personmae_steps_total"] == 30
    assert after["personmae_step_duration_seconds_count total total 1"] == 30
    assert after["personmae_rank_phase 0 evaluate"] == 1
    assert after["personmae_loss"] == 0.5
    assert all(after[name] >= value for name, value in found.items() if name.endswith(("_total", "_count", "_sum")))


def test_lost_steps_are_those_between_what_was_reached_and_where_the_next_round_begins(host: Host) -> None:
    lost = []
    for first, known in ((0, 0), (20, 0), (12, 0), (14, 30)):  # begun, stopped in good order, killed, back from elsewhere
        host.start(first, first or 20, "step", ranks=(0,), known=known, script=STEPS_ALONE)
        lost.append(host.values()["personmae_lost_steps_total"])
    assert lost == [0, 0, 8, 8 + 16]


@pytest.mark.slow  # each rank imports torch
def test_time_between_rounds_is_added_to_the_time_of_the_ranks(host: Host) -> None:
    host.start(0, 1, "step")
    host.start(1, 2, "step")
    found = host.values()
    states = {k.split()[1]: v for k, v in found.items() if k.startswith("personmae_goodput_seconds_total")}
    assert states["rendezvous"] == 3.0
    assert states["init"] > 0.2  # both times the interpreter had to start
    assert set(states) == {"rendezvous", "init", "train", "data_wait", "checkpoint", "evaluate", "restore"}


@pytest.mark.slow  # each rank imports torch
def test_a_host_without_rank_0_tells_nothing_of_the_run(host: Host) -> None:
    host.start(0, 5, "step", ranks=(2, 3))
    found = host.values()
    assert "personmae_steps_total" not in found
    assert found["personmae_step_duration_seconds_count total total 0"] == 5
    assert found["personmae_last_step"] == 5
    host.start(2, 5, "step", ranks=(2, 3))
    assert host.values()["personmae_lost_steps_total"] == 0  # the host of rank 0 counts them


@pytest.mark.slow  # each rank imports torch
def test_ranks_that_a_smaller_round_has_not_leave_their_counters_alone(host: Host) -> None:
    host.start(0, 5, "step")
    assert host.values()["personmae_rank_phase 1 step"] == 1
    host.start(5, 8, "step", ranks=(0,))
    found = host.values()
    assert found["personmae_step_duration_seconds_count total total 0"] == 8
    assert found["personmae_step_duration_seconds_count total total 1"] == 5
    gauges = [name for name in found if re.match(r"personmae_(rank_phase|heartbeat_age_seconds|cuda\w+) 1", name)]
    assert gauges == []
    host.start(8, 9, "step")
    assert host.values()["personmae_step_duration_seconds_count total total 1"] == 6


def test_every_reason_for_a_restart_is_there_before_the_first(host: Host) -> None:
    reasons = {k.split()[1]: v for k, v in host.values().items() if k.startswith("personmae_restarts_total")}
    assert reasons == dict.fromkeys(["peer_lost", "member_joined", "worker_error", "hang", "sigterm", "stopped"], 0.0)


def test_before_the_first_step_there_is_none_that_could_be_long_ago(host: Host) -> None:
    assert not [name for name in host.values() if name.startswith("personmae_last_step")]
    host.start(0, 0, "data_wait", ranks=(0,), script=STEPS_ALONE)
    assert not [name for name in host.values() if name.startswith("personmae_last_step")]
    host.start(5, 5, "step", ranks=(0,), script=STEPS_ALONE)
    assert host.values()["personmae_last_step"] == 5


def ask(port: int, host: str = "127.0.0.1") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host}:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_the_endpoint_is_reached_by_both_protocols_and_its_port_is_nobody_elses() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = serve(0, Metrics(1, 1), Probes, host="all")
    try:
        port = server.server_address[1]
        assert "personmae_nodes_max 1.0" in ask(port)
        assert "personmae_nodes_max 1.0" in ask(port, "[::1]")
        with pytest.raises(UserError, match=f"--port {port} is taken"):
            serve(port, Metrics(1, 1), Probes, host="all")
    finally:
        server.shutdown()
        server.server_close()
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((address, port))


def test_the_endpoint_is_for_its_own_host_unless_all_interfaces_are_asked_for() -> None:
    server = serve(0, Metrics(1, 1), Probes)
    try:
        port = server.server_address[1]
        assert "personmae_nodes_max 1.0" in ask(port)
        with pytest.raises(urllib.error.URLError, match="refused"):
            ask(port, "127.0.0.2")
    finally:
        server.shutdown()
        server.server_close()


def test_gpus_are_not_asked_where_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("launcher.elastic.http.gpu_collectors", lambda log: asked.append(log) or [])
    for gpu in (False, True):
        server = serve(0, Metrics(1, 1), Probes, gpu=gpu)
        server.shutdown()
        server.server_close()
        assert len(asked) == gpu


COMPLETE = """
from personmae.monitor.rank_metrics import RankMetrics
metrics = RankMetrics("finetune")
metrics.beat("step", 0)
metrics.count(1, 64)
metrics.run.record(1, {"loss": 0.5}, 1.0)
metrics.complete()
metrics.close()
"""


def test_a_scrape_of_eight_ranks_is_some_150_calls_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a few percent of a core at most, every ten seconds, in a process of its own: benchmarks/metrics_cost.py."""
    for name, value in ((heartbeat.DIRECTORY, str(tmp_path)), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    metrics, stream = RankMetrics("pretrain"), StreamCounters()
    for outcome in ("ok", "timeout", "throttled"):
        stream.requests.labels("get", outcome).inc()
    metrics.read("stream", stream.registry)
    metrics.count(1, 64)
    metrics.close()
    for rank in range(1, 8):
        shutil.copy(tmp_path / "0.metrics", tmp_path / f"{rank}.metrics")
    agent = Metrics(1, 1, tmp_path)
    text = generate_latest(agent.registry)
    assert text.count(b'personmae_step_duration_seconds_count{local_rank="7"') == 6
    assert num_calls(lambda: generate_latest(agent.registry)) < 150 * len(text.splitlines())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_an_agent_lingers_with_the_last_numbers_of_a_complete_run_until_it_is_told_to_stop(start: Start) -> None:
    agent = start(COMPLETE, "--port", str(port := free_port()), "--linger-seconds", "60")
    agent.wait_for("ends with code 0: complete", seconds=90)
    found = dict(line.rsplit(" ", 1) for line in ask(port).splitlines() if not line.startswith("#"))
    assert (found["personmae_loss"], found["personmae_last_step"]) == ("0.5", "1.0")
    assert float(found["personmae_run_completed_timestamp_seconds"]) == pytest.approx(time.time(), abs=60)
    assert found["personmae_nodes"] == "0.0"
    assert not [name for name in found if name.startswith("personmae_heartbeat_age_seconds")]
    assert agent.process.poll() is None
    agent.process.terminate()
    assert agent.code() == 0


def test_an_agent_lingers_after_nothing_but_a_complete_run(start: Start) -> None:
    lingers = ["--linger-seconds", "60", "--max-restarts", "0"]
    failed = start("raise SystemExit(3)", "--port", str(free_port()), *lingers)
    assert failed.code() == 1
    assert start("", *lingers).code() == 0  # nobody can ask

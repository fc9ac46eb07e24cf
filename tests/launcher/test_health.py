"""What an agent serves beside its own numbers: those of ranks that come and go."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.health import Metrics
from launcher.membership import Node, Round, State
from launcher.ranks import Ranks
from personmae import heartbeat

SCRIPT = """
import os, sys, time
from personmae.meter import Meter
meter = Meter("pretrain")
first, last = map(int, sys.argv[1:3])
meter.beat("wait_data", first)
for step in range(first, last):
    meter.beat("step", step)
    meter.count(step + 1, 16)
meter.beat(sys.argv[3], last)
if meter.run:
    meter.run.show(last, {"loss": 0.5}, 1.0)
meter._export.write()
print("told", flush=True)
time.sleep(60)
"""
# The same without torch and without numbers: its heartbeat alone.
STEPS_ALONE = """
import sys, time
from personmae.heartbeat import Heartbeat
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
        self.state = State(round=replace(Round(), number=1, nodes=(node,), shares=(2,), active=("a",)))

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
        self.metrics.show(self.state, self.ranks, 0.0, running=running)

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
    host.start(0, 20, "wait_data")
    found = host.values()
    assert found["personmae_steps_total"] == 20
    assert found["personmae_step_duration_seconds_count total 1"] == 20
    assert found["personmae_rank_phase 0 wait_data"] == 1
    assert sum(v for k, v in found.items() if k.startswith("personmae_rank_phase 1")) == 1
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
    assert after["personmae_step_duration_seconds_count total 1"] == 30
    assert after["personmae_rank_phase 0 evaluate"] == 1
    assert after["personmae_loss"] == 0.5
    assert all(after[name] >= value for name, value in found.items() if name.endswith(("_total", "_count", "_sum")))


def test_lost_steps_are_those_between_what_was_reached_and_where_the_next_round_begins(host: Host) -> None:
    lost = []
    for first, known in ((0, 0), (20, 0), (12, 0), (14, 30)):  # begun, stopped in good order, killed, back from elsewhere
        host.start(first, first or 20, "step", ranks=(0,), known=known, script=STEPS_ALONE)
        lost.append(host.values()["personmae_lost_steps_total"])
    assert lost == [0, 0, 8, 8 + 16]


def test_time_between_rounds_is_added_to_the_time_of_the_ranks(host: Host) -> None:
    host.start(0, 1, "step")
    host.start(1, 2, "step")
    found = host.values()
    states = {k.split()[1]: v for k, v in found.items() if k.startswith("personmae_goodput_seconds_total")}
    assert states["rendezvous"] == 3.0
    assert states["init"] > 0.2  # both times the interpreter had to start
    assert set(states) == {"rendezvous", "init", "train", "data", "checkpoint", "evaluate", "restore"}


def test_a_host_without_rank_0_tells_nothing_of_the_run(host: Host) -> None:
    host.start(0, 5, "step", ranks=(2, 3))
    found = host.values()
    assert "personmae_steps_total" not in found
    assert found["personmae_step_duration_seconds_count total 0"] == 5
    assert found["personmae_last_step"] == 5
    host.start(2, 5, "step", ranks=(2, 3))
    assert host.values()["personmae_lost_steps_total"] == 0  # the host of rank 0 counts them

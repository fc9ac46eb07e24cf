"""What an agent answers over HTTP while ranks come and go: ``/healthz``, ``/readyz`` and ``/metrics``."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from launcher.elastic.membership import Reason, Record
from launcher.elastic.ranks import Ranks, log
from personmae.errors import UserError
from personmae.monitor import endpoint
from personmae.monitor.exporter import GOODPUT, RANK_PHASE, Continued, merge
from personmae.monitor.gpu import gpu_collectors
from personmae.monitor.heartbeat import phase_values

_LAST_STEP, _LAST_STEP_TIME = "personmae_last_step", "personmae_last_step_timestamp_seconds"


@dataclass(slots=True)
class Probes:
    """``sick`` says what is wrong, and is empty while the agent need not be replaced; ``ready`` means that ranks train."""

    sick: str = ""
    ready: bool = False


class Metrics(Collector):
    """The agent's own numbers, and with them those of its ranks below ``beats``; see personmae/monitor/exporter.py."""

    def __init__(self, min_nodes: int, max_nodes: int, beats: Path | None = None) -> None:
        disable_created_metrics()
        self.registry, self._own = CollectorRegistry(), CollectorRegistry()
        self._ranks = Continued(beats) if beats else None
        gauge = self._gauge
        self.world_size = gauge("world_size", "Ranks of the running round; 0 between rounds")
        self.nodes = gauge("nodes", "Agents of the running round; 0 between rounds")
        gauge("nodes_min", "Fewest agents to run with").set(min_nodes)
        gauge("nodes_max", "Most agents to run with").set(max_nodes)
        self.last_step = gauge(_LAST_STEP.removeprefix("personmae_"), "Highest step that a rank of this host has reported")
        self.last_step_time = gauge(_LAST_STEP_TIME.removeprefix("personmae_"), "When this host first heard of that step")
        self.failures = gauge("restart_budget_used", "Counted failures since the last progress")
        self.store_lost = gauge("store_silence_seconds", "Time since the rendezvous store last answered")
        self.heartbeat_age = gauge("heartbeat_age_seconds", "Time since the last heartbeat of a rank", "local_rank")
        self.phase = gauge("rank_phase", RANK_PHASE, "local_rank", "phase")
        self.restarts = self._counter("restarts", "Rounds ended, by reason", "reason")
        for reason in get_args(Reason):  # or Prometheus would miss the first of each
            self.restarts.labels(reason)
        self.exits = self._counter("rank_exits", "Ranks ended, by exit code", "code")
        self.lost_steps = self._counter("lost_steps", "Steps that had to be done again; exported by the host of rank 0")
        self.goodput = self._counter("goodput_seconds", GOODPUT, "state")
        self.goodput.labels("rendezvous")
        self.rendezvous = Histogram(
            "personmae_rendezvous_duration_seconds",
            "From the end of this host's ranks to the start of the next",
            buckets=(0.5, 1, 2, 5, 10, 20, 60, 300, 900),
            registry=self._own,
        )
        self._step = 0
        self._reached = 0  # by rank 0, when it was last here
        self.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        """One of each name: what the agent knows by itself goes before what a rank exports, and time is added up."""
        unknown = () if self._step else (_LAST_STEP, _LAST_STEP_TIME)  # a 0 would be a run that has stood still since 1970
        found = {metric.name: metric for metric in self._own.collect()}
        for name in unknown:
            found[name].samples.clear()
        for metric in self._ranks.collect() if self._ranks else ():
            if metric.name == "personmae_goodput_seconds":
                metric = merge([found[metric.name], metric])[metric.name]
            elif metric.name in found and metric.name not in unknown:
                continue
            found[metric.name] = metric
        return found.values()

    def keep(self, ranks: Ranks) -> None:
        """The ranks are complete: their last numbers still hold."""
        self._follow(ranks)
        if self._ranks:
            self._ranks.living = True

    def begin(self, seconds: float, ranks: Ranks, step: int) -> None:
        """A round begins, so many seconds after the last one; ``ranks`` are the old ones, ``step`` the run's highest."""
        self.rendezvous.observe(seconds)
        self.goodput.labels("rendezvous").inc(seconds)
        self._reached = max(self._reached, ranks.step(), step)
        self._forget_ranks()
        if self._ranks:
            self._ranks.end()

    def update(self, record: Record, ranks: Ranks, store_silence: float, *, running: bool) -> None:
        """Take over the present numbers; ``running``: the ranks are at work in the record's round."""
        self.world_size.set(record.round.world_size if running else 0)
        self.nodes.set(len(record.round.active) if running else 0)
        self.failures.set(record.budget.failures)
        self.store_lost.set(store_silence)
        if self._ranks:
            self._ranks.living = running
        if not running:
            self._forget_ranks()
        for rank in ranks.all if running else ():
            phase, seconds = rank.silent()
            self.heartbeat_age.labels(rank.local_rank).set(seconds)
            for name, value in phase_values(phase).items():
                self.phase.labels(rank.local_rank, name).set(value)
        if running:
            self._follow(ranks)

    def _forget_ranks(self) -> None:
        self.heartbeat_age.clear()
        self.phase.clear()

    def _follow(self, ranks: Ranks) -> None:
        """Where rank 0 is, and whether it has fallen behind what was reached: then the steps between are done again."""
        step = ranks.step()
        if step and step != self._step:
            self._step = step
            self.last_step.set(step)
            self.last_step_time.set_to_current_time()
        first = next((rank for rank in ranks.all if rank.rank == 0), None)
        beat = first.beat() if first else None
        if beat and beat.phase != "start":
            self.lost_steps.inc(max(0, self._reached - beat.step))
            self._reached = beat.step

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"personmae_{name}", text, labels, registry=self._own)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"personmae_{name}", text, labels, registry=self._own)


def serve(
    port: int, metrics: Metrics, probes: Callable[[], Probes], *, host: str = endpoint.LOOPBACK, gpu: bool = True
) -> ThreadingHTTPServer:
    """Answer in the background until ``shutdown`` is called on what this returns; GPUs' numbers are added to ``metrics``.

    Raises:
        UserError: the port is taken or not allowed, or ``host`` is no address of this host.
    """
    for gpus in gpu_collectors(log) if gpu else ():
        metrics.registry.register(gpus)
    answers = {
        "/healthz": lambda: endpoint.health(probes().sick),
        "/readyz": lambda: endpoint.readiness(probes().ready),
        "/metrics": lambda: (200, generate_latest(metrics.registry)),
    }
    try:
        return endpoint.serve(host, port, answers)
    except OSError as error:
        raise UserError(
            f"--port {port} is taken or not allowed at --host {host} ({error.strerror}); give another one"
        ) from error


def linger(seconds: float, stopped: Callable[[], bool]) -> None:
    """Leave what is served to be scraped, until ``stopped``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stopped():
        time.sleep(0.1)

"""What an agent answers over HTTP while ranks come and go: ``/healthz``, ``/readyz`` and ``/metrics``."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from launcher.membership import State
from launcher.ranks import Ranks
from personmae.errors import UserError


@dataclass(slots=True)
class Health:
    """``sick`` says what is wrong, and is empty while the agent need not be replaced; ``ready`` means that ranks train."""

    sick: str = ""
    ready: bool = False


class Metrics:
    """The agent's own numbers; a registry of its own, since the ranks have theirs."""

    def __init__(self, min_nodes: int, max_nodes: int) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        gauge = self._gauge
        self.world_size = gauge("world_size", "Ranks of the running round; 0 between rounds")
        self.nodes = gauge("nodes", "Agents of the running round")
        gauge("nodes_min", "Fewest agents to run with").set(min_nodes)
        gauge("nodes_max", "Most agents to run with").set(max_nodes)
        self.last_step = gauge("last_step", "Highest step that a rank of this host has told")
        self.failures = gauge("restart_budget_used", "Counted failures since the last progress")
        self.store_lost = gauge("store_silence_seconds", "Time since the rendezvous store last answered")
        self.heartbeat_age = Gauge(
            "personmae_heartbeat_age_seconds",
            "Time since a rank of this host last told anything",
            ["local_rank"],
            registry=self.registry,
        )
        self.restarts = Counter("personmae_restarts_total", "Rounds ended, by reason", ["reason"], registry=self.registry)
        self.exits = Counter("personmae_rank_exits_total", "Ranks ended, by exit code", ["code"], registry=self.registry)
        self.rendezvous = Histogram(
            "personmae_rendezvous_duration_seconds",
            "From the end of this host's ranks to the start of the next",
            buckets=(0.5, 1, 2, 5, 10, 20, 60, 300, 900),
            registry=self.registry,
        )

    def show(self, state: State, ranks: Ranks, store_silence: float, *, running: bool) -> None:
        """Take over what is so at present; ``running``: the ranks are at work in the record's round."""
        self.world_size.set(state.round.world_size if running else 0)
        self.nodes.set(len(state.round.active) if running else 0)
        self.failures.set(state.budget.failures)
        self.store_lost.set(store_silence)
        if running and (step := ranks.step()):
            self.last_step.set(step)
        if not running:
            self.heartbeat_age.clear()
        for rank in ranks.all if running else ():
            self.heartbeat_age.labels(rank.local_rank).set(rank.silent()[1])

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"personmae_{name}", text, registry=self.registry)


def serve(port: int, metrics: Metrics, check: Callable[[], Health]) -> ThreadingHTTPServer:
    """Answer in the background until ``shutdown`` is called on what this returns."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # for a client that opens a connection and says nothing

        def do_GET(self) -> None:
            health = check()
            answers = {
                "/metrics": lambda: (200, generate_latest(metrics.registry)),
                "/healthz": lambda: (503 if health.sick else 200, (health.sick or "ok").encode() + b"\n"),
                "/readyz": lambda: (200 if health.ready else 503, b"training\n" if health.ready else b"not training\n"),
            }
            code, body = answers.get(self.path, lambda: (404, b"/healthz, /readyz or /metrics\n"))()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise UserError(f"--port {port} is taken or not allowed ({error.strerror}); give another one") from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True, name="health").start()
    return server

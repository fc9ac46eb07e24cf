"""Export of metrics to Prometheus, through one endpoint per host. docs/metrics.md lists the names.

Under an agent each rank writes its numbers every two seconds to a file next to its heartbeat. The agent serves them. It
continues the counters of ranks that have ended. Without an agent local rank 0 serves its own numbers.

There is no torch here, because the agent imports this module too. The multi-process files of prometheus_client are not
used. They keep a sample for every process that ever existed, allow neither collectors nor removal, and every observation
costs four times as much.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from personmae.errors import UserError
from personmae.monitor import endpoint, heartbeat

INTERVAL_SECONDS = 2.0
SHARED = "host"  # the source that speaks for a host, and on the first one for the run
GOODPUT = "Time of the host by what it was used for. State data_wait was data before"
RANK_PHASE = "1 for the phase of a rank, 0 for the others. wait_data is the old name of data_wait"
_SUFFIX = ".metrics"
_KEPT = ("counter", "histogram")


class Ledger:
    """The numbers of a source that may end and start again. Counters continue where it ended, and gauges end with it."""

    def __init__(self) -> None:
        self._incarnation = self._ended = ""
        self._now: dict[str, Metric] = {}
        self._before: dict[str, Metric] = {}

    def update(self, incarnation: str, metrics: Iterable[Metric]) -> None:
        """Take over the numbers of a source. Another ``incarnation`` started at zero."""
        if incarnation == self._ended:  # its file is still there
            return
        if incarnation != self._incarnation:
            self.end()
        self._incarnation, self._now = incarnation, {metric.name: metric for metric in metrics}

    def end(self) -> None:
        """End the source."""
        for name, metric in self._now.items():
            if metric.type in _KEPT:
                self._before[name] = _sum(metric, self._before.get(name))
        self._ended, self._incarnation, self._now = self._incarnation or self._ended, "", {}

    def collect(self, *, gauges: bool = True) -> Iterator[Metric]:
        """All incarnations together. Without ``gauges``, what only a living source has is left out."""
        for name, metric in self._now.items():
            if metric.type not in _KEPT and not gauges:
                continue
            yield _sum(metric, self._before.get(name) if metric.type in _KEPT else None)
        yield from (metric for name, metric in self._before.items() if name not in self._now)


def _sum(now: Metric, before: Metric | None) -> Metric:
    total = Metric(now.name, now.documentation, now.type)
    values = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in before.samples} if before else {}
    for sample in now.samples:
        if sample.name.endswith("_created"):
            continue
        value = sample.value + values.pop((sample.name, tuple(sorted(sample.labels.items()))), 0)
        total.add_sample(sample.name, sample.labels, value)
    for (name, labels), value in values.items():
        total.add_sample(name, dict(labels), value)
    return total


def merge(metrics: Iterable[Metric], **labels: str) -> dict[str, Metric]:
    """Merge metrics of several sources by name, and add ``labels`` to every sample."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        into = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        into.samples += [Sample(s.name, {**s.labels, **labels}, s.value) for s in metric.samples] if labels else metric.samples
    return found


class Continued(Collector):
    """The numbers of all ranks with files in a directory. Threads may share it.

    While ``living`` is false there are no gauges, since the last values of ended ranks are no longer true.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.living = False
        self._ledgers: dict[str, Ledger] = {}
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            self._read()
            labelled = []
            for source, ledger in sorted(self._ledgers.items()):
                labels = {} if source == SHARED else {"local_rank": source}
                labelled += merge(ledger.collect(gauges=self.living), **labels).values()
        yield from merge(labelled).values()

    def end(self) -> None:
        """End all ranks, before their files are removed."""
        with self._lock:
            self._read()
            for ledger in self._ledgers.values():
                ledger.end()

    def _read(self) -> None:
        for file in self._directory.glob(f"*{_SUFFIX}"):
            try:
                incarnation, _, text = file.read_text(encoding="utf-8").partition("\n")
            except FileNotFoundError:  # the agent has ended
                continue
            self._ledgers.setdefault(file.stem, Ledger()).update(incarnation, text_string_to_metric_families(text))


class Several(Collector):
    """Several registries as one. A new one under an old name continues its counters."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[str, Collector]] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._lock = threading.Lock()
        self._num_incarnations = 0

    def describe(self) -> Iterable[Metric]:
        return []

    def put(self, name: str, source: Collector) -> None:
        """Add a source under a name, or replace the one of that name."""
        with self._lock:
            self._read()
            self._num_incarnations += 1
            self._sources[name] = str(self._num_incarnations), source
            self._ledgers.setdefault(name, Ledger())

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            self._read()
            found = merge(metric for ledger in self._ledgers.values() for metric in ledger.collect())
        yield from found.values()

    def _read(self) -> None:
        for name, (incarnation, source) in self._sources.items():
            self._ledgers[name].update(incarnation, source.collect())


class Export:
    """Exports a rank's numbers: to files for the agent, or without an agent to an endpoint of its own at ``port``.

    ``own`` are this rank's numbers, ``shared`` those of the host or of the run. A thread reads both. Only ``local_rank`` 0
    has an endpoint, at the address ``host``, with ``answers`` besides ``/metrics``.

    Raises:
        UserError: the port is taken or not allowed, or ``host`` is not an address of this host.
    """

    def __init__(
        self,
        local_rank: int,
        own: Collector,
        shared: Collector,
        *,
        port: int = 0,
        host: str = endpoint.LOOPBACK,
        answers: Mapping[str, endpoint.Answer] | None = None,
        more: Sequence[Collector] = (),
    ):
        disable_created_metrics()
        self._incarnation = f"# {os.getpid()} {time.monotonic_ns()}"
        self._directory = os.environ.get(heartbeat.DIRECTORY)
        self._sources = {str(local_rank): _registry(own)} | ({SHARED: _registry(shared)} if local_rank == 0 else {})
        self._logged = False
        self._stopped = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self._all = _registry(_Labelled(own, local_rank), shared, *more)
        self._serves = not self._directory and bool(port) and local_rank == 0
        if self._directory:
            thread = threading.Thread(target=self._write_often, name="metrics", daemon=True)
            thread.start()
            self._stop = thread.join
        elif self._serves:
            self._stop = _serve(host, port, self._all, answers or {})

    def close(self, linger_seconds: float = 0.0, stopped: Callable[[], bool] = lambda: False) -> None:
        """Export the last numbers. An own endpoint waits ``linger_seconds`` for a last scrape, unless ``stopped``."""
        deadline = time.monotonic() + linger_seconds
        while self._serves and time.monotonic() < deadline and not stopped():
            time.sleep(0.1)
        self._stopped.set()
        self._stop()
        self._stop = lambda: None

    def record(self, **labels: str) -> bytes:
        """All numbers as an OpenMetrics file with ``labels`` and the time, which Prometheus can import later."""
        now, families = time.time(), CollectorRegistry()
        families.register(_Timed(merge(self._all.collect(), **labels).values(), now))
        return openmetrics.generate_latest(families)

    def _write_often(self) -> None:
        while not self._stopped.wait(INTERVAL_SECONDS):
            self.write()
        self.write()

    def write(self) -> None:
        """Write all numbers to files, each of which is replaced whole."""
        for name, registry in self._sources.items():
            file = Path(self._directory or "") / f"{name}{_SUFFIX}"
            partial = file.with_suffix(".partial")
            try:
                partial.write_bytes(self._incarnation.encode() + b"\n" + generate_latest(registry))
                os.replace(partial, file)
            except OSError as error:  # a full disk: the agent then has old numbers
                if not self._logged:
                    print(f"metrics are not written to {file}: {error.strerror}", flush=True)
                self._logged = True


class _Labelled(Collector):
    """A rank's numbers with the labels that the agent would give them."""

    def __init__(self, own: Collector, local_rank: int) -> None:
        self._own, self._local_rank = own, local_rank

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from merge(self._own.collect(), local_rank=str(self._local_rank)).values()


class _Timed(Collector):
    """Metrics with the time of their values."""

    def __init__(self, metrics: Iterable[Metric], when: float) -> None:
        self._metrics, self._when = metrics, when

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            timed = Metric(metric.name, metric.documentation, metric.type)
            for sample in metric.samples:
                timed.add_sample(sample.name, sample.labels, sample.value, self._when)
            yield timed


def _registry(*sources: Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    for source in sources:
        registry.register(source)
    return registry


def _serve(host: str, port: int, registry: CollectorRegistry, answers: Mapping[str, endpoint.Answer]) -> Callable[[], object]:
    try:
        server = endpoint.serve(host, port, {**answers, "/metrics": lambda: (200, generate_latest(registry))})
    except OSError as error:
        raise UserError(
            f"metrics.port={port} is taken or not allowed, at metrics.host={host} ({error.strerror}). Give another, 0 for none"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop

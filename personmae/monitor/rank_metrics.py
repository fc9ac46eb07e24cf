"""A rank's metrics for Prometheus: the parts of its steps, its time by state, and on rank 0 the run."""

import contextlib
import importlib.metadata
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from personmae import dist
from personmae.monitor import endpoint, heartbeat
from personmae.monitor.exporter import GOODPUT, RANK_PHASE, Export, Several
from personmae.monitor.gpu import gpu_collectors
from personmae.monitor.heartbeat import PATIENCE_SECONDS, Heartbeat, Phase
from personmae.system import files, storage

Part = Literal["data_wait", "inputs", "forward_backward", "optimizer", "other"]
RECORD: Final = "openmetrics.txt"  # a complete run's last numbers
PARTS: Final[tuple[Part, ...]] = get_args(Part)
STATES: Final[dict[Phase, str]] = {
    "start": "init",
    "compile": "init",
    "step": "train",
    "checkpoint": "checkpoint",
    "data_wait": "data_wait",
    "evaluate": "evaluate",
}
_STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STORE_SECONDS = 30.0  # a store that is away does not hold up the end of a run for longer
_RESTORE_SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 900)


class RankMetrics:
    """A program's metrics and its heartbeat. Every method is cheap enough for every step.

    Where no agent serves the metrics they can be scraped at ``port`` of ``host``, 0 for nowhere. With ``gpu`` the endpoint
    has the GPUs too. It stays for ``linger_seconds`` after a complete run.

    Raises:
        UserError: the port is taken or not allowed, or ``host`` is not an address of this host.
    """

    def __init__(
        self,
        job_kind: str,
        *,
        port: int = 0,
        host: str = endpoint.LOOPBACK,
        gpu: bool = True,
        linger_seconds: float = 0.0,
    ) -> None:
        self._heartbeat, self._beat_at = Heartbeat(), time.monotonic()
        self._linger_seconds, self._is_complete = linger_seconds, False
        local_rank, is_first = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("RANK", "0") == "0"
        own, self._shared, self._own = CollectorRegistry(), Several(), Several()
        on_gpu = dist.use_cuda()
        self._timer = StepTimer(own, _new_event if on_gpu else None)
        self._states, self._phase = StateClock(), _PhaseNow()
        self.run = RunNumbers(job_kind) if is_first else None
        self._own.put("own", own)
        self._own.put("phase", self._phase)
        self._shared.put("states", self._states)
        if self.run:
            self._shared.put("run", self.run.registry)
        if on_gpu:
            self._own.put("allocator", _Allocator(local_rank))
        asks = gpu and port and local_rank == 0 and heartbeat.DIRECTORY not in os.environ
        answers = {
            "/healthz": lambda: endpoint.health(self.sick()),
            "/readyz": lambda: endpoint.readiness(self._phase.now not in ("start", "compile")),
        }
        more = gpu_collectors() if asks else []
        self._export = Export(local_rank, self._own, self._shared, port=port, host=host, answers=answers, more=more)

    def beat(self, phase: Phase, step: int) -> None:
        """Record that ``phase`` begins or continues after ``step`` steps, for the agent and for the time by state."""
        self._heartbeat.beat(phase, step)
        self._beat_at, self._phase.now = time.monotonic(), phase
        self._states.enter(STATES[phase])
        self._timer.enter(None if phase in ("start", "evaluate") else "data_wait" if phase == "data_wait" else "other")

    def sick(self) -> str:
        """Why this rank seems to be stuck: it was silent for longer than its phase allows. Empty while it is well."""
        silent, phase = time.monotonic() - self._beat_at, self._phase.now
        is_late = not self._is_complete and silent > PATIENCE_SECONDS[phase]
        return f"the rank has said nothing for {silent:.0f} s in phase {phase}" if is_late else ""

    def enter(self, part: Part) -> None:
        """Begin a part of the step, which ends the one before it."""
        self._timer.enter(part)

    def count(self, step: int, num_images: int) -> None:
        """Count a step that all ranks have done together, with ``num_images`` in all."""
        self._timer.end_step()
        if self.run:
            self.run.count(step, num_images)

    def read(self, source: str, registry: Collector) -> None:
        """Export what a part of the rank counts. A new part under an old name continues its counters."""
        self._own.put(source, registry)

    def read_writer(self, registry: Collector) -> None:
        """Export what the checkpoint writer counts, once for the run."""
        if self.run:
            self._shared.put("checkpoints", _SetGauges(registry))

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Time finding, fetching and reading the state to resume from."""
        start = time.monotonic()
        self._states.enter("restore")
        yield
        self._states.enter("init")
        if self.run:
            self.run.restores.observe(time.monotonic() - start)

    def complete(self, run_dir: str | None = None, upload_to: str | None = None) -> None:
        """Record on rank 0 that the run is complete.

        A run that has just ended in ``run_dir`` writes its numbers there and to ``upload_to``, where they outlive the endpoint.
        A failure to write them is logged, and the run is complete all the same.
        """
        self._is_complete = True
        if not self.run:
            return
        self.run.complete()
        if run_dir:
            agents = heartbeat.DIRECTORY in os.environ
            name = os.environ.get("TORCHELASTIC_RUN_ID") if agents else None  # as Prometheus knows it in Kubernetes
            _leave(self._export.record(run=name or Path(run_dir).resolve().name), run_dir, upload_to)

    def close(self, stopped: Callable[[], bool] | None = None) -> None:
        """Export the last numbers. A complete run waits for a last scrape first, until ``stopped`` where that is given."""
        lingers = self._is_complete and stopped
        self._export.close(self._linger_seconds if lingers else 0.0, stopped or (lambda: True))


class RunNumbers:
    """The run's numbers, on rank 0. A gauge is missing until its value is known, so that no loss of 0 is exported."""

    def __init__(self, job_kind: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._plan: dict[str, float] = {}
        self._num_skipped = 0.0
        versions = {name: _version(name) for name in ("personmae", "torch", "deepspeed")} | {"cuda": torch.version.cuda or ""}
        labels = {"version": versions.pop("personmae"), **versions}
        Gauge("personmae_build_info", "What runs", list(labels), registry=registry).labels(**labels).set(1)
        Gauge("personmae_run_info", "Which program runs", ["job_kind"], registry=registry).labels(job_kind).set(1)
        self.steps = Counter("personmae_steps", "Optimizer steps done, those done again included", registry=registry)
        self.samples = Counter("personmae_samples", "Images trained on", registry=registry)
        self.skipped = Counter("personmae_skipped_steps", "Steps that changed nothing", ["reason"], registry=registry)
        self.skipped.labels("non_finite")
        self.rollbacks = Counter("personmae_rollbacks", "Returns to a checkpoint after a jump of the loss", registry=registry)
        self.restores = Histogram(
            "personmae_restore_duration_seconds",
            "Time to find, fetch and read the state to go on from",
            buckets=_RESTORE_SECONDS,
            registry=registry,
        )

    def plan(
        self,
        *,
        first_step: int,
        total_steps: int,
        world_size: int,
        steps_per_epoch: int = 0,
        checkpoint_steps: int = 0,
        flops_per_image: float = 0.0,
        peak_flops: float | None = None,
    ) -> None:
        """Set what is known before the first step. ``peak_flops`` is of one rank a second, None where it is not known."""
        names = {"first_step": first_step, "checkpoint_interval_steps": checkpoint_steps}
        for name, value in names.items():
            self._set(name, value)
        self._plan = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        self._plan["peak"] = world_size * (peak_flops or 0.0) / flops_per_image if flops_per_image else 0.0  # images a second
        self._num_skipped = 0.0

    def count(self, step: int, num_images: int) -> None:
        self.steps.inc()
        self.samples.inc(num_images)
        self._set("last_step", step)
        self._set("last_step_timestamp_seconds", time.time())

    def record(self, step: int, values: dict[str, float], images_per_second: float) -> None:
        """Set the gauges to the values of a recorded step."""
        for name, key in (("loss", "loss"), ("learning_rate", "lr"), ("grad_norm", "grad_norm")):
            if key in values:
                self._set(name, values[key])
        skipped = values.get("skipped_steps", 0.0)
        self.skipped.labels("non_finite").inc(max(0.0, skipped - self._num_skipped))
        self._num_skipped = skipped
        self._set("images_per_second", images_per_second)
        if total := self._plan.get("total_steps"):
            self._set("progress_ratio", step / total)
        if per_epoch := self._plan.get("steps_per_epoch"):
            self._set("epoch", step / per_epoch)
        if peak := self._plan.get("peak"):
            self._set("model_flops_utilization_ratio", images_per_second / peak)

    def complete(self) -> None:
        """Record that the run is complete: all is done and written."""
        self._set("run_completed_timestamp_seconds", time.time())

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"personmae_{name}", _GAUGES[name], registry=self.registry)
        self._gauges[name].set(value)


_GAUGES: Final = {
    "first_step": "Step that the running ranks went on from",
    "checkpoint_interval_steps": "Steps between two checkpoints",
    "last_step": "Steps done",
    "last_step_timestamp_seconds": "When the last step ended",
    "loss": "Mean loss of the last logged step",
    "learning_rate": "Learning rate of the last logged step",
    "grad_norm": "Norm of the gradient of the last logged step",
    "images_per_second": "Images a second since the log line before",
    "progress_ratio": "Share of the run's steps that is done",
    "epoch": "Passes over the data set that are done",
    "run_completed_timestamp_seconds": "When the run was complete, or was found to be",
    "model_flops_utilization_ratio": "Arithmetic of the model over what the GPUs could do at most",
}


class StateClock(Collector):
    """Seconds of this process by state, from its first instruction on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._state = "init"
        names = ("train", "data_wait", "checkpoint", "evaluate", "restore")
        self._seconds = dict.fromkeys(names, 0.0) | {"init": _process_age()}

    def enter(self, state: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._seconds[self._state] += now - self._since
            self._since, self._state = now, state

    def collect(self) -> Iterator[Metric]:
        total = CounterMetricFamily("personmae_goodput_seconds", GOODPUT, labels=["state"])
        self.enter(self._state)
        for state, seconds in self._seconds.items():
            total.add_metric([state], seconds)
        yield total


class StepTimer:
    """Durations of steps and of their parts.

    With ``new_event`` parts are measured on the GPU, by events in its stream. They are read some steps later, when they
    have happened, and nothing waits for them. ``data_wait`` is measured on the host. Time before the first part belongs
    to no step, nor does time in the part None.
    """

    def __init__(self, registry: CollectorRegistry, new_event: Callable[[], Any] | None = None) -> None:
        histogram = Histogram(
            "personmae_step_duration_seconds",
            "Duration of a step (total) and of its parts. Label phase is the old name of part",
            ["part", "phase"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._observe = {part: histogram.labels(part, part).observe for part in ("total", *PARTS)}
        self._new_event = new_event
        self._part: Part | None = None
        self._since = time.perf_counter()
        self._spent: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._marks: list[tuple[Part | None, Any]] = []
        self._queued: deque[tuple[list[tuple[Part | None, Any]], float]] = deque()
        self._free: list[Any] = []

    def enter(self, part: Part | None) -> None:
        """Begin a part, which ends the one before it."""
        now = time.perf_counter()
        if self._part:
            self._spent[self._part] += now - self._since
        self._since, self._part = now, part
        if self._new_event:
            event = self._free.pop() if self._free else self._new_event()
            event.record()
            self._marks.append((part, event))

    def end_step(self) -> None:
        """End the step, which is done or queued."""
        self.enter("other")
        if self._new_event:
            self._queued.append((self._marks, self._spent["data_wait"]))
            self._marks = self._marks[-1:]  # where the next step begins
            self._drain()
        else:
            self._record(self._spent)
        self._spent = dict.fromkeys(PARTS, 0.0)

    def _drain(self) -> None:
        while self._queued and self._queued[0][0][-1][1].query():
            marks, waited = self._queued.popleft()
            spent: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
            for (part, event), (_, following) in itertools.pairwise(marks):
                if part:
                    spent[part] += event.elapsed_time(following) / 1000
            self._free += [event for _, event in marks[:-1]]
            self._record(spent, waited)

    def _record(self, spent: dict[Part, float], waited: float | None = None) -> None:
        self._observe["total"](sum(spent.values()))
        for part, seconds in spent.items():
            self._observe[part](seconds if waited is None or part != "data_wait" else waited)


class _PhaseNow(Collector):
    """The phase of the rank, for where no agent exports it."""

    now: Phase = "start"

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily("personmae_rank_phase", RANK_PHASE, labels=["phase"])
        for name, value in heartbeat.phase_values(self.now).items():
            gauge.add_metric([name], value)
        yield gauge


class _SetGauges(Collector):
    """A registry without its gauges that were never set."""

    def __init__(self, registry: Collector) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        found = self._registry.collect()
        return [m for m in found if m.type != "gauge" or any(s.value for s in m.samples)]


class _Allocator(Collector):
    """Memory of this rank's GPU as torch keeps it. The device is named, since another may be current in this thread."""

    def __init__(self, local_rank: int) -> None:
        self._device = local_rank

    def collect(self) -> Iterator[Metric]:
        for kind, ask in (("allocated", torch.cuda.memory_allocated), ("reserved", torch.cuda.memory_reserved)):
            text = f"Memory of the rank's GPU that torch has {kind}"
            yield GaugeMetricFamily(f"personmae_cuda_memory_{kind}_bytes", text, value=ask(self._device))


def _leave(text: bytes, run_dir: str, upload_to: str | None) -> None:
    def write() -> None:
        try:
            files.replace(Path(run_dir) / RECORD, text)
            if upload_to:
                storage.write(upload_to, RECORD, text)
        except Exception as error:  # each store's client has errors of its own
            print(f"{RECORD} is not written: {error}", flush=True)

    thread = threading.Thread(target=write, name=RECORD, daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _process_age() -> float:
    """Seconds since this process was started, 0 where the kernel does not say."""
    try:
        ticks = float(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))

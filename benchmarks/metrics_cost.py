"""The cost of metrics in microseconds a step: beats, numbers, their file, and a scrape.

    python benchmarks/metrics_cost.py      # some seconds on one idle CPU core; with a GPU, its events too

``tests/monitor/test_rank_metrics.py`` holds the number of calls down. docs/metrics.md has the figures.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, generate_latest

from launcher.elastic.http import Metrics
from personmae.checkpoint.writer import CheckpointCounters
from personmae.data.counters import StreamCounters
from personmae.monitor import heartbeat
from personmae.monitor.rank_metrics import RankMetrics, StepTimer

STEP_SECONDS, WRITE_SECONDS = 0.02, 2.0  # a short step, and how often the file is written
PLAN: dict[str, Any] = {"first_step": 0, "total_steps": 100, "world_size": 1, "checkpoint_steps": 10}


def metrics_of_a_run() -> tuple[RankMetrics, StreamCounters]:
    """The metrics of a run of pre-training. ``close`` them."""
    metrics, stream, writer = RankMetrics("pretrain"), StreamCounters(), CheckpointCounters()
    metrics.read("stream", stream.registry)
    metrics.read_writer(writer.registry)
    for stage in ("wait", "snapshot", "persist", "upload"):
        writer.seconds.labels(stage).observe(1)
    for outcome in ("ok", "timeout", "throttled"):
        stream.requests.labels("get", outcome).inc()
        stream.retries.labels(outcome).inc()
        stream.bytes.labels(outcome).inc()
    assert metrics.run
    metrics.run.plan(**PLAN, steps_per_epoch=20, flops_per_image=2e9, peak_flops=1e12)
    return metrics, stream


def record_steps(metrics: RankMetrics, stream: StreamCounters, num_steps: int) -> None:
    """Record steps of pre-training with two micro-batches each, of which every fifth is logged."""
    for step in range(num_steps):
        metrics.beat("data_wait", step)
        stream.wait_seconds.inc(0.001)
        metrics.beat("step", step)
        for _ in range(2):
            metrics.beat("data_wait", step)
            stream.queue.set(1024)
            stream.samples.inc(1024)
            stream.wait_seconds.inc(0.001)
            metrics.beat("step", step)
            metrics.enter("inputs")
            metrics.enter("forward_backward")
        metrics.enter("optimizer")
        metrics.count(step + 1, 2048)
        if metrics.run and step % 5 == 0:
            metrics.run.record(step, {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "skipped_steps": 0.0}, 1e5)


def enter_parts(timer: StepTimer, num_steps: int) -> None:
    """The parts of steps with two micro-batches."""
    for _ in range(num_steps):
        for _ in range(11):
            timer.enter("inputs")
        timer.end_step()


def best(work: Callable[[], Any], rounds: int = 9) -> float:
    """Seconds of the quickest call."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Measure each on its own, and print it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {heartbeat.DIRECTORY: folder, "RANK": "0", "LOCAL_RANK": "0"}
        metrics, stream = metrics_of_a_run()
        recording = best(lambda: record_steps(metrics, stream, 500)) / 500
        writing = best(metrics._export.write)
        metrics.close()
        for rank in range(1, 8):
            shutil.copy(Path(folder) / "0.metrics", Path(folder) / f"{rank}.metrics")
        agent = Metrics(1, 1, Path(folder))
        scrape = best(lambda: generate_latest(agent.registry))
    together = recording + STEP_SECONDS / WRITE_SECONDS * writing
    print(
        f"a step is recorded in {1e6 * recording:.1f} us, a write takes {1e3 * writing:.2f} ms: {1e6 * together:.1f} us a step"
    )
    print(f"a scrape of an agent with eight ranks: {1e3 * scrape:.1f} ms")
    if torch.cuda.is_available():
        timer = StepTimer(CollectorRegistry(), lambda: torch.cuda.Event(enable_timing=True))
        print(f"a step with events of the GPU: {1e6 * best(lambda: enter_parts(timer, 200)) / 200:.1f} us")


if __name__ == "__main__":
    main()

"""What a step spends on telling what it does, in microseconds: beats, numbers, their file, a scrape.

    python benchmarks/telling.py         # some seconds on one idle CPU core; with a GPU, its events too

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
from personmae.monitor.rank_metrics import Meter, StepTimer

STEP_SECONDS, WRITE_SECONDS = 0.02, 2.0  # a short step, and how often the file is written
PLAN: dict[str, Any] = {"first_step": 0, "total_steps": 100, "world_size": 1, "checkpoint_steps": 10}


def meter_of_a_run() -> tuple[Meter, StreamCounters]:
    """A meter with all that a run of pre-training has; ``close`` it."""
    meter, stream, writer = Meter("pretrain"), StreamCounters(), CheckpointCounters()
    meter.read("stream", stream.registry)
    meter.read_writer(writer.registry)
    for stage in ("wait", "snapshot", "persist", "upload"):
        writer.seconds.labels(stage).observe(1)
    for outcome in ("ok", "timeout", "throttled"):
        stream.requests.labels("get", outcome).inc()
        stream.retries.labels(outcome).inc()
        stream.bytes.labels(outcome).inc()
    assert meter.run
    meter.run.plan(**PLAN, steps_per_epoch=20, flops_per_image=2e9, peak_flops=1e12)
    return meter, stream


def tell_steps(meter: Meter, stream: StreamCounters, num_steps: int) -> None:
    """All that steps of pre-training tell, with two micro-batches each, and logged as every fifth."""
    for step in range(num_steps):
        meter.beat("wait_data", step)
        stream.wait_seconds.inc(0.001)
        meter.beat("step", step)
        for _ in range(2):
            meter.beat("wait_data", step)
            stream.queue.set(1024)
            stream.samples.inc(1024)
            stream.wait_seconds.inc(0.001)
            meter.beat("step", step)
            meter.enter("inputs")
            meter.enter("forward_backward")
        meter.enter("optimizer")
        meter.count(step + 1, 2048)
        if meter.run and step % 5 == 0:
            meter.run.show(step, {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "skipped_steps": 0.0}, 1e5)


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
        meter, stream = meter_of_a_run()
        telling = best(lambda: tell_steps(meter, stream, 500)) / 500
        writing = best(meter._export.write)
        meter.close()
        for rank in range(1, 8):
            shutil.copy(Path(folder) / "0.metrics", Path(folder) / f"{rank}.metrics")
        metrics = Metrics(1, 1, Path(folder))
        scrape = best(lambda: generate_latest(metrics.registry))
    together = telling + STEP_SECONDS / WRITE_SECONDS * writing
    print(f"a step tells in {1e6 * telling:.1f} us, a write takes {1e3 * writing:.2f} ms: {1e6 * together:.1f} us a step")
    print(f"a scrape of an agent with eight ranks: {1e3 * scrape:.1f} ms")
    if torch.cuda.is_available():
        timer = StepTimer(CollectorRegistry(), lambda: torch.cuda.Event(enable_timing=True))
        print(f"a step with events of the GPU: {1e6 * best(lambda: enter_parts(timer, 200)) / 200:.1f} us")


if __name__ == "__main__":
    main()

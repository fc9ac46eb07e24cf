"""What a rank tells Prometheus: right numbers, that go on when it begins anew, at next to no cost."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from torch.utils.flop_counter import FlopCounterMode

from personmae import heartbeat, metrics
from personmae.data.counters import StreamCounters
from personmae.keeper import CheckpointCounters
from personmae.meter import Meter, RunNumbers, StateClock, StepTimer
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.model.vit import SIZES, grid_coords
from personmae.telemetry import Continued, Ledger, Several

ROOT = Path(__file__).resolve().parents[1]
PLAN: dict[str, Any] = {"first_step": 0, "total_steps": 100, "world_size": 1, "checkpoint_steps": 10}


def values(found: Iterable[Metric]) -> dict[str, float]:
    """Samples by name and labels, without buckets."""
    return {
        s.name + "".join(f" {v}" for v in s.labels.values()): s.value
        for metric in found
        for s in metric.samples
        if not s.name.endswith("_bucket")
    }


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of rank 0 below an agent; returns the agent's directory."""
    for name, value in ((heartbeat.DIRECTORY, str(tmp_path)), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    return tmp_path


def source(steps: int, loss: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("steps", "", registry=registry).inc(steps)
    Gauge("loss", "", registry=registry).set(loss)
    Histogram("seconds", "", ["part"], buckets=(1, 10), registry=registry).labels("all").observe(steps)
    return registry


def test_counters_go_on_where_an_earlier_life_ended_and_gauges_do_not() -> None:
    ledger = Ledger()
    for life, steps, loss in (("a", 5, 0.5), ("a", 7, 0.4), ("b", 2, 0.9), ("c", 1, 0.8)):
        ledger.update(life, source(steps, loss).collect())
    assert values(ledger.collect()) == {"steps_total": 10, "loss": 0.8, "seconds_count all": 3, "seconds_sum all": 10}
    buckets = {s.labels["le"]: s.value for m in ledger.collect() for s in m.samples if s.name == "seconds_bucket"}
    assert buckets == {"1.0": 1, "10.0": 3, "+Inf": 3}


def test_what_has_ended_is_counted_once_though_its_file_is_still_there() -> None:
    ledger = Ledger()
    ledger.update("a", source(5, 0.5).collect())
    ledger.end()
    ledger.update("a", source(5, 0.5).collect())
    assert values(ledger.collect())["steps_total"] == 5
    assert "loss" not in values(ledger.collect())


def test_a_registry_that_takes_anothers_place_goes_on_with_its_counters() -> None:
    several = Several()
    first = CheckpointCounters()
    several.put("checkpoints", first.registry)
    first.bytes.inc(100)
    first.bytes.inc(20)  # after the last look at it
    second = CheckpointCounters()
    several.put("checkpoints", second.registry)
    second.bytes.inc(3)
    assert values(several.collect())["personmae_checkpoint_bytes_total"] == 123


def test_a_rank_that_is_killed_and_started_again_leaves_no_gap(rank_0: Path) -> None:
    script = (
        "import os, sys, time\nfrom personmae.meter import Meter\nmeter = Meter('pretrain')\n"
        "for step in range(5):\n    meter.count(step + 1, 16)\nmeter.run.show(5, {'loss': 0.5}, 1.0)\n"
        "meter._export.write()\nprint('told', flush=True)\ntime.sleep(60)"
    )
    continued = Continued(rank_0)
    for life in (1, 2):
        continued.living = True
        with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "told\n"
            found = values(continued.collect())
            assert (found["personmae_steps_total"], found["personmae_samples_total"]) == (5 * life, 80 * life)
            assert found["personmae_loss"] == 0.5
            assert found["personmae_step_duration_seconds_count total 0"] == 5 * life
            process.kill()
        continued.living = False
        continued.end()
        found = values(continued.collect())
        assert found["personmae_steps_total"] == 5 * life
        assert "personmae_loss" not in found
        for file in rank_0.iterdir():
            file.unlink()


def test_parts_of_a_step_add_up_to_the_whole() -> None:
    registry = CollectorRegistry()
    timer = StepTimer(registry)
    for _ in range(3):
        timer.enter("data_wait")
        time.sleep(0.02)
        timer.enter("forward_backward")
        time.sleep(0.03)
        timer.end_step()
    found = values(registry.collect())
    name = "personmae_step_duration_seconds_sum"
    parts = {key.split()[1]: value for key, value in found.items() if key.startswith(name)}
    total = parts.pop("total")
    assert sum(parts.values()) == pytest.approx(total, abs=1e-6)
    assert 0.06 <= parts["data_wait"] < parts["forward_backward"]
    assert parts["inputs"] == parts["optimizer"] == 0


def test_what_lies_before_the_first_step_and_between_steps_belongs_to_none() -> None:
    registry = CollectorRegistry()
    timer = StepTimer(registry)
    time.sleep(0.1)
    timer.enter("inputs")
    timer.end_step()
    timer.enter(None)
    time.sleep(0.1)
    timer.enter("inputs")
    timer.end_step()
    found = values(registry.collect())
    assert found["personmae_step_duration_seconds_count total"] == 2
    assert found["personmae_step_duration_seconds_sum total"] < 0.05


class Late:
    """An event in a queue that is worked off behind the host: it happens when ``done`` says so, at the time of its number."""

    made = 0
    done = 0

    def record(self) -> None:
        Late.made += 1
        self.number = Late.made

    def query(self) -> bool:
        return self.number <= Late.done

    def elapsed_time(self, end: "Late") -> float:
        return 1000.0 * (end.number - self.number)


def test_events_are_read_when_they_have_happened_and_never_waited_for() -> None:
    registry = CollectorRegistry()
    timer = StepTimer(registry, Late)

    def observed(phase: str) -> tuple[float, float]:
        found, name = values(registry.collect()), "personmae_step_duration_seconds"
        return found[f"{name}_count {phase}"], found[f"{name}_sum {phase}"]

    for _ in range(3):
        timer.enter("data_wait")
        timer.enter("forward_backward")
        timer.enter("optimizer")
        timer.end_step()
    assert observed("total") == (0, 0)
    Late.done = 8  # two steps of four events each
    timer.end_step()
    assert observed("total") == (2, 3 + 4)  # the first step begins with its first event
    assert observed("forward_backward") == (2, 2)
    assert observed("data_wait")[1] < 0.5  # of the host's clock
    Late.done = 100
    timer.end_step()
    assert observed("forward_backward")[0] == 5


@pytest.mark.gpu
def test_parts_of_a_step_are_measured_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    registry = CollectorRegistry()
    timer = StepTimer(registry, lambda: torch.cuda.Event(enable_timing=True))
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        timer.enter("forward_backward")
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
        timer.enter("optimizer")
        timer.end_step()
    torch.cuda.synchronize()
    timer.end_step()
    found = values(registry.collect())
    assert found["personmae_step_duration_seconds_sum forward_backward"] > 0.003
    assert found["personmae_step_duration_seconds_sum optimizer"] < 0.001


def test_time_is_counted_by_state_from_the_start_of_the_process() -> None:
    clock = StateClock()
    start, before = time.monotonic(), sum(values(clock.collect()).values())
    for state, seconds in (("data", 0.02), ("train", 0.05), ("checkpoint", 0.01)):
        clock.enter(state)
        time.sleep(seconds)
    found = values(clock.collect())
    assert sum(found.values()) - before == pytest.approx(time.monotonic() - start, abs=0.005)
    assert 0.05 <= found["personmae_goodput_seconds_total train"] < 0.2
    assert before > 0.5  # pytest itself took longer to start


def test_the_run_is_told_as_it_is_logged_and_nothing_before_it_is_known() -> None:
    run = RunNumbers("pretrain")
    assert "personmae_loss" not in values(run.registry.collect())
    run.plan(**PLAN, steps_per_epoch=20, flops_per_image=2e9, peak_flops=1e12)
    run.show(10, {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "skipped_steps": 3.0}, 100.0)
    run.show(20, {"loss": float("nan"), "lr": 1e-3, "skipped_steps": 4.0}, 50.0)
    found = values(run.registry.collect())
    assert found["personmae_skipped_steps_total non_finite"] == 4
    assert found["personmae_model_flops_utilization_ratio"] == pytest.approx(50 * 2e9 / 1e12)
    assert found["personmae_progress_ratio"] == 0.2
    assert found["personmae_epoch"] == 1.0
    assert found["personmae_grad_norm"] == 2.0
    assert found["personmae_loss"] != found["personmae_loss"]
    run.plan(**PLAN)  # after a rollback another guard counts
    run.show(21, {"loss": 0.1, "skipped_steps": 1.0}, 50.0)
    assert values(run.registry.collect())["personmae_skipped_steps_total non_finite"] == 5


def test_an_unknown_gpu_has_no_utilisation() -> None:
    run = RunNumbers("pretrain")
    run.plan(**PLAN, flops_per_image=2e9, peak_flops=metrics.peak_flops("Some GPU", "bf16"))
    run.show(10, {"loss": 0.5}, 100.0)
    assert "personmae_model_flops_utilization_ratio" not in values(run.registry.collect())
    assert metrics.peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert metrics.peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert metrics.peak_flops("NVIDIA L40", "bf16") is None
    assert metrics.peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None


@pytest.mark.parametrize("feature_weight", [1.0, 0.0])
def test_the_arithmetic_of_a_picture_is_what_torch_counts(feature_weight: float) -> None:
    size, grid, num_visible = "micro", (16, 8), 32
    model = PersonMAE(size=size, feature_weight=feature_weight)
    teacher = Teacher(model.encoder, grid)
    coords = grid_coords(grid).expand(2, -1, -1)
    batch = {"patches_a": torch.randn(2, num_visible, 768), "patches_b": torch.randn(2, 128, 768)}
    batch |= {"coords_a": coords[:, :num_visible], "coords_b": coords}
    with FlopCounterMode(display=False) as counter:
        if feature_weight:
            batch["target"] = teacher(batch["patches_b"])
        model(batch)["loss"].backward()
    width = SIZES[size]["embed_dim"]
    ours = metrics.pretrain_flops(
        num_visible=num_visible,
        num_patches=128,
        patch_size=16,
        embed_dim=width,
        depth=SIZES[size]["depth"],
        decoder_depth=2,
        pixel_dim=width,
        feature_dim=width if feature_weight else None,
    )
    assert 2 * ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def step_cost(meter: Meter, stream: StreamCounters, num_steps: int) -> float:
    """Seconds that a step of pre-training spends on telling what it does, with two micro-batches, and logged as every fifth."""
    start = time.perf_counter()
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
    return (time.perf_counter() - start) / num_steps


def test_what_a_step_tells_costs_less_than_100_microseconds(rank_0: Path) -> None:
    """0.5 % of 20 ms; with the share of the thread that writes, which a step of 20 ms has a hundredth of."""
    meter = Meter("pretrain")
    stream, writer = StreamCounters(), CheckpointCounters()
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
    try:
        telling = min(step_cost(meter, stream, 500) for _ in range(7))
        writing = []
        for _ in range(9):
            start = time.perf_counter()
            meter._export.write()
            writing.append(time.perf_counter() - start)
    finally:
        meter.close()
    per_step = telling + 0.02 / 2.0 * min(writing)
    print(f"a step: {1e6 * telling:.1f} us, a write: {1e3 * min(writing):.2f} ms, together {1e6 * per_step:.1f} us a step")
    assert per_step < 100e-6


def test_events_are_kept_in_order_for_less_than_50_microseconds_a_step() -> None:
    """What a GPU's timer costs beside the calls of CUDA, for the twelve events of a step with two micro-batches."""

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: "Event") -> float:
            return 1.0

    def cost(timer: StepTimer) -> float:
        start = time.perf_counter()
        for _ in range(500):
            for _ in range(11):
                timer.enter("inputs")
            timer.end_step()
        return (time.perf_counter() - start) / 500

    extra = min(cost(StepTimer(CollectorRegistry(), Event)) for _ in range(7))
    extra -= min(cost(StepTimer(CollectorRegistry())) for _ in range(7))
    print(f"events: {1e6 * extra:.1f} us a step")
    assert extra < 50e-6


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_measured_for_less_than_100_microseconds() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    timer = StepTimer(CollectorRegistry(), lambda: torch.cuda.Event(enable_timing=True))

    def cost() -> float:
        start = time.perf_counter()
        for _ in range(200):
            for _ in range(11):
                timer.enter("inputs")
            timer.end_step()
        return (time.perf_counter() - start) / 200

    best = min(cost() for _ in range(7))
    print(f"a step with events: {1e6 * best:.1f} us")
    assert best < 100e-6


def test_another_rank_tells_of_itself_alone(rank_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    meter = Meter("pretrain")
    meter.count(1, 64)
    meter.close()
    assert sorted(p.name for p in rank_0.glob("*.metrics")) == ["3.metrics"]
    assert "personmae_steps_total" not in (rank_0 / "3.metrics").read_text()


def test_a_full_disk_below_the_file_does_not_end_a_run(rank_0: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("pretrain")
    os.mkdir(rank_0 / "host.metrics")
    for _ in range(2):
        meter._export.write()
    meter.close()
    assert capsys.readouterr().out.count("metrics are not written to") == 1
    assert generate_latest(meter.run.registry) if meter.run else False

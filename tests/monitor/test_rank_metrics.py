"""What a rank tells Prometheus: right numbers, that go on when it begins anew, at next to no cost."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from calls import num_calls
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from torch.utils.flop_counter import FlopCounterMode

from personmae import flops
from personmae.checkpoint.writer import CheckpointCounters
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.model.vit import SIZES, grid_coords
from personmae.monitor import heartbeat, rank_metrics
from personmae.monitor.exporter import Continued, Ledger, Several
from personmae.monitor.rank_metrics import RankMetrics, RunNumbers, StateClock, StepTimer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # which is no package
metrics_cost: Any = importlib.import_module("metrics_cost")
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
        "import os, sys, time\nfrom personmae.monitor.rank_metrics import RankMetrics\nmetrics = RankMetrics('pretrain')\n"
        "for step in range(5):\n    metrics.count(step + 1, 16)\nmetrics.run.record(5, {'loss': 0.5}, 1.0)\n"
        "metrics._export.write()\nprint('told', flush=True)\ntime.sleep(60)"
    )
    continued = Continued(rank_0)
    for life in (1, 2):
        continued.living = True
        with warm.start(["-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "told\n"
            found = values(continued.collect())
            assert (found["personmae_steps_total"], found["personmae_samples_total"]) == (5 * life, 80 * life)
            assert found["personmae_loss"] == 0.5
            assert found["personmae_step_duration_seconds_count total total 0"] == 5 * life
            process.kill()
        continued.living = False
        continued.end()
        found = values(continued.collect())
        assert found["personmae_steps_total"] == 5 * life
        assert "personmae_loss" not in found
        for file in rank_0.iterdir():
            file.unlink()


class Clock:
    """Stands in for the clocks that durations are measured by, and goes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 1000.0
        ours = dict.fromkeys(("perf_counter", "monotonic"), lambda: self._now)
        monkeypatch.setattr(rank_metrics, "time", SimpleNamespace(**vars(time) | ours))

    def pass_by(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_parts_of_a_step_add_up_to_the_whole(clock: Clock) -> None:
    registry = CollectorRegistry()
    timer = StepTimer(registry)
    for _ in range(3):
        timer.enter("data_wait")
        clock.pass_by(2)
        timer.enter("forward_backward")
        clock.pass_by(3)
        timer.end_step()
    found = values(registry.collect())
    name = "personmae_step_duration_seconds_sum"
    parts = {key.split()[1]: value for key, value in found.items() if key.startswith(name)}
    total = parts.pop("total")
    assert (total, parts["data_wait"], parts["forward_backward"]) == (15, 6, 9)
    assert parts["inputs"] == parts["optimizer"] == 0
    assert sum(parts.values()) == total


def test_what_lies_before_the_first_step_and_between_steps_belongs_to_none(clock: Clock) -> None:
    registry = CollectorRegistry()
    timer = StepTimer(registry)
    clock.pass_by(100)
    timer.enter("inputs")
    clock.pass_by(2)
    timer.end_step()
    timer.enter(None)
    clock.pass_by(100)
    timer.enter("inputs")
    clock.pass_by(3)
    timer.end_step()
    found = values(registry.collect())
    assert found["personmae_step_duration_seconds_count total total"] == 2
    assert found["personmae_step_duration_seconds_sum total total"] == 5


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


def test_events_are_read_when_they_have_happened_and_never_waited_for(clock: Clock) -> None:
    registry = CollectorRegistry()
    timer = StepTimer(registry, Late)

    def observed(part: str) -> tuple[float, float]:
        found, name = values(registry.collect()), "personmae_step_duration_seconds"
        return found[f"{name}_count {part} {part}"], found[f"{name}_sum {part} {part}"]

    for _ in range(3):
        timer.enter("data_wait")
        clock.pass_by(0.25)
        timer.enter("forward_backward")
        timer.enter("optimizer")
        timer.end_step()
    assert observed("total") == (0, 0)
    Late.done = 8  # two steps of four events each
    timer.end_step()
    assert observed("total") == (2, 3 + 4)  # the first step begins with its first event
    assert observed("forward_backward") == (2, 2)
    assert observed("data_wait")[1] == 2 * 0.25  # of the host's clock
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
    sums = {part: found[f"personmae_step_duration_seconds_sum {part} {part}"] for part in ("forward_backward", "optimizer")}
    assert sums["forward_backward"] > sums["optimizer"] >= 0  # sixty products against nothing


def test_time_is_counted_by_state_from_the_start_of_the_process(clock: Clock) -> None:
    states = StateClock()
    before = sum(values(states.collect()).values())
    assert before > 0  # pytest itself took some time to start
    for state, seconds in (("data_wait", 2), ("train", 5), ("checkpoint", 1)):
        states.enter(state)
        clock.pass_by(seconds)
    found = values(states.collect())
    assert sum(found.values()) - before == pytest.approx(8)
    assert [found[f"personmae_goodput_seconds_total {state}"] for state in ("data_wait", "train", "checkpoint")] == [2, 5, 1]


def test_the_run_is_told_as_it_is_logged_and_nothing_before_it_is_known() -> None:
    run = RunNumbers("pretrain")
    assert "personmae_loss" not in values(run.registry.collect())
    run.plan(**PLAN, steps_per_epoch=20, flops_per_image=2e9, peak_flops=1e12)
    run.record(10, {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "skipped_steps": 3.0}, 100.0)
    run.record(20, {"loss": float("nan"), "lr": 1e-3, "skipped_steps": 4.0}, 50.0)
    found = values(run.registry.collect())
    assert found["personmae_skipped_steps_total non_finite"] == 4
    assert found["personmae_model_flops_utilization_ratio"] == pytest.approx(50 * 2e9 / 1e12)
    assert found["personmae_progress_ratio"] == 0.2
    assert found["personmae_epoch"] == 1.0
    assert found["personmae_grad_norm"] == 2.0
    assert found["personmae_loss"] != found["personmae_loss"]
    run.plan(**PLAN)  # after a rollback another guard counts
    run.record(21, {"loss": 0.1, "skipped_steps": 1.0}, 50.0)
    assert values(run.registry.collect())["personmae_skipped_steps_total non_finite"] == 5


def test_an_unknown_gpu_has_no_utilisation() -> None:
    run = RunNumbers("pretrain")
    run.plan(**PLAN, flops_per_image=2e9, peak_flops=flops.peak_flops("Some GPU", "bf16"))
    run.record(10, {"loss": 0.5}, 100.0)
    assert "personmae_model_flops_utilization_ratio" not in values(run.registry.collect())
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert flops.peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert flops.peak_flops("NVIDIA L40", "bf16") is None
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None


@pytest.mark.parametrize(("feature_weight", "identity_dim"), [(1.0, None), (0.0, None), (1.0, 64), (0.0, 64)])
def test_the_arithmetic_of_an_image_is_what_torch_counts(feature_weight: float, identity_dim: int | None) -> None:
    size, grid, num_visible = "micro", (16, 8), 32
    identity = {"identity_weight": 1.0, "identity_dim": identity_dim, "identity_group": 2} if identity_dim else {}
    model = PersonMAE(size=size, feature_weight=feature_weight, **identity)
    teacher = Teacher(model.encoder, grid, class_token=identity_dim is not None)
    coords = grid_coords(grid).expand(2, -1, -1)
    batch = {"patches_a": torch.randn(2, num_visible, 768), "patches_b": torch.randn(2, 128, 768)}
    batch |= {"coords_a": coords[:, :num_visible], "coords_b": coords}
    with FlopCounterMode(display=False) as counter:
        if model.needs_teacher:
            batch["target"] = teacher(batch["patches_b"])
        model(batch)["loss"].backward()
    width = SIZES[size]["embed_dim"]
    ours = flops.pretrain_flops(
        num_visible=num_visible,
        num_patches=128,
        patch_size=16,
        embed_dim=width,
        depth=SIZES[size]["depth"],
        decoder_depth=2,
        pixel_dim=width,
        feature_dim=width if feature_weight else None,
        identity_dim=identity_dim,
    )
    assert 2 * ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_what_a_step_tells_is_some_two_hundred_calls_and_its_file_is_written_beside_it(rank_0: Path) -> None:
    """benchmarks/metrics_cost.py has the microseconds."""
    metrics, stream = metrics_cost.metrics_of_a_run()
    try:
        metrics_cost.record_steps(metrics, stream, 5)
        written = (rank_0 / "0.metrics").stat().st_mtime_ns if (rank_0 / "0.metrics").exists() else 0
        assert num_calls(lambda: metrics_cost.record_steps(metrics, stream, 10)) <= 10 * 220
        assert num_calls(metrics._export.write) < 20_000
        assert (rank_0 / "0.metrics").stat().st_mtime_ns > written
    finally:
        metrics.close()


def test_events_are_kept_in_order_for_five_calls_a_part_of_a_step() -> None:
    """What a GPU's timer costs beside the calls of CUDA, for the twelve events of a step with two micro-batches."""

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: "Event") -> float:
            return 1.0

    with_events, without = StepTimer(CollectorRegistry(), Event), StepTimer(CollectorRegistry())
    found = []
    for timer in (with_events, without):
        metrics_cost.enter_parts(timer, 3)
        found.append(num_calls(lambda timer=timer: metrics_cost.enter_parts(timer, 10)) / 10)
    assert found[1] < found[0] <= found[1] + 12 * 5


def test_another_rank_tells_of_itself_alone(rank_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    metrics = RankMetrics("pretrain")
    metrics.count(1, 64)
    metrics.close()
    assert sorted(p.name for p in rank_0.glob("*.metrics")) == ["3.metrics"]
    assert "personmae_steps_total" not in (rank_0 / "3.metrics").read_text()


def test_a_full_disk_below_the_file_does_not_end_a_run(rank_0: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = RankMetrics("pretrain")
    os.mkdir(rank_0 / "host.metrics")
    for _ in range(2):
        metrics._export.write()
    metrics.close()
    assert capsys.readouterr().out.count("metrics are not written to") == 1
    assert generate_latest(metrics.run.registry) if metrics.run else False

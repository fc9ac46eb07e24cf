"""``personmae bench step``, ``counts`` and ``checkpoint`` on small cases."""

import gc
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import one_line_error, personmae

from personmae.bench.ceilings import Ceilings
from personmae.bench.checkpoint import CheckpointBench, run_checkpoint
from personmae.bench.counts import Work
from personmae.bench.loop import MOMENTUM, PARTS, PLAIN, SYNTHETIC, Cell, Loop, Repeat, open_loop
from personmae.bench.step import StepBench, _Alone, _summary, run_step
from personmae.errors import UserError

pytestmark = pytest.mark.integration
CEILINGS = Ceilings({"bf16": 1e11, "fp32": 2e10}, 1e10)
BENCH = StepBench(batches=(4,), precisions=("fp32",), img_size=(128, 64), num_steps=2, rounds=1)
NAMES = ("before", "student", "teacher")
CELL = Cell("micro", 4, "native", "off", "fp32", "none", (128, 64))


def test_each_cell_is_measured_on_synthetic_canvases_and_on_real_shards(
    shard_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "step.json"
    bench = replace(BENCH, engines=(PLAIN, "native"), shards=str(shard_dir))
    record = run_step(bench, out, ceilings=CEILINGS)
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert record["ceilings"] == asdict(CEILINGS)
    assert record["settings"]["shards"] == shard_dir.name
    rows = record["measured"]
    assert [(row["engine"], row["source"]) for row in rows] == [
        *((PLAIN, "synthetic"), (PLAIN, "shards")),
        *(("native", "synthetic"), ("native", "shards")),
    ]
    flops = Work("micro", CELL.spec, "fp32").flops
    for row in rows:
        assert row["failed"] is None
        assert list(row["parts_milliseconds"]) == list(PARTS)
        assert min(row["parts_milliseconds"].values()) > 0
        assert sum(row["parts_milliseconds"].values()) == pytest.approx(row["milliseconds"])  # a median of two is their mean
        assert row["images_per_second"] == pytest.approx(4000 / row["milliseconds"])
        assert row["mfu"] == pytest.approx(row["images_per_second"] * flops / 2e10)
        assert row["first_step_seconds"] > 0
        assert 25e6 < row["peak_bytes"] < 4e9  # 16 bytes for each of 1.7 million parameters
    printed = capsys.readouterr().out
    assert "bench step 1/1: micro, 4 images, native, fp32, eager, shards: " in printed
    assert "over the plain loop" in printed
    assert "micro, 4 images, fp32, eager, 128x64" in printed


@pytest.mark.slow  # each cell is a process of its own, which imports all
def test_a_cell_that_does_not_fit_is_told_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = replace(BENCH, batches=(1 << 24, 4))
    huge, usual = run_step(bench, tmp_path / "step.json", ceilings=CEILINGS)["measured"]
    assert (huge["batch_size"], huge["failed"]) == (1 << 24, "out of memory")
    assert "milliseconds" not in huge
    assert usual["milliseconds"] > 0
    assert "not measured: micro, 16777216 images, native, fp32, eager, synthetic: out of memory" in capsys.readouterr().out


def test_a_process_that_is_killed_fails_alone_and_is_asked_nothing_more() -> None:
    with _Alone() as process:
        assert process.ask(os.getpid) != os.getpid()
        assert process.ask(os._exit, 9) is None
        assert "ended from outside" in process.failed
        assert process.ask(os.getpid) is None


@pytest.mark.slow  # each cell is a process of its own, which imports all
def test_graphs_of_another_engine_are_a_cell_that_fails_in_one_line() -> None:
    with _Alone() as process:
        assert process.ask(open_loop, replace(CELL, engine="fsdp", compile="graph"), None) is None
        assert process.failed == "CUDA graphs need the native engine, got fsdp"


def graphs_and_frozen() -> tuple[bool, int]:
    """Whether the compiler's CUDA graphs are imported, and how many objects a collection no longer goes over."""
    return "torch._inductor.cudagraph_trees" in sys.modules, gc.get_freeze_count()


@pytest.mark.slow  # each cell is a process of its own, which imports all
def test_an_eager_loop_is_without_graphs_and_frozen_after_its_first_step() -> None:
    with _Alone() as process:
        assert process.ask(open_loop, CELL, None), process.failed
        graphs, num_frozen = process.ask(graphs_and_frozen) or (True, 0)
    assert not graphs
    assert num_frozen > 50_000


def one_step(engines: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What one step of each engine makes of the same model, in this process."""
    found = {}
    for engine in engines:
        loop = Loop(replace(CELL, engine=engine), None)
        before = [p.clone() for p in loop._teacher.encoder.parameters()]
        with loop.batches(SYNTHETIC) as batches:
            loop.run(batches, 1)
        with loop._engine.full_params(loop._model.encoder) as params:
            student = [p.detach().cpu().clone() for p in params]
        teacher = [p.cpu().clone() for p in loop._teacher.encoder.parameters()]
        left = [name for name, p in loop._model.named_parameters() if p.grad is not None]
        found[engine] = {"before": [p.cpu() for p in before], "student": student, "teacher": teacher, "grads": left}
        loop.close()
    return found


@pytest.mark.slow  # each cell is a process of its own, which imports all
def test_every_engine_does_a_whole_step_and_the_same_one() -> None:
    with _Alone() as process:
        found = process.ask(one_step, (PLAIN, "native", "fsdp"))
    assert found, process.failed
    for engine, state in found.items():
        before, student, teacher = (torch.cat([p.flatten() for p in state[name]]).double() for name in NAMES)
        assert state["grads"] == [], engine
        assert (student - before).norm() > 1e-3, engine
        assert (teacher - before).norm() == pytest.approx((1 - MOMENTUM) * (student - before).norm().item(), rel=0.05), engine
        for ours, plain in zip(state["student"], found[PLAIN]["student"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_wait_that_comes_now_and_then_counts_in_images_a_second_and_not_in_the_median() -> None:
    quiet = [1.0, 2.0, 3.0, 4.0, 0.0]
    rounds = [
        Repeat([quiet, quiet, [101.0, *quiet[1:]]], 5, None),
        Repeat([quiet] * 3, 7, None),
        Repeat([[9.0] * 5] * 3, 9, None),
    ]
    found = _summary(CELL, rounds, CEILINGS, ["NVIDIA L4"])
    assert found["milliseconds"] == 10.0
    assert found["parts_milliseconds"] == dict(zip(PARTS, quiet, strict=True))
    assert found["images_per_second"] == pytest.approx(4 * 3 / 0.130)  # of the first round: 130 ms
    assert found["peak_bytes"] == 5
    assert found["mfu_of_data_sheet"] is None  # the sheet says bf16


def test_what_is_not_known_or_not_possible_is_refused_before_anything_is_measured(shard_dir: Path) -> None:
    for wrong, text in (
        ({"engines": ("native", "fast")}, "--engines takes plain, native, .*. Got 'fast'"),
        ({"sizes": ("nano",)}, "--sizes takes micro, tiny, small, base, large. Got 'nano'"),
        ({"compile": ("yes",)}, "--compile takes off, on, graph. Got 'yes'"),
        ({"crop_backends": ("kernel",)}, "--crop-backends takes torch, triton. Got 'kernel'"),
        ({"crop_backends": ("torch", "triton")}, "crop_backend=triton needs a GPU and there is none"),
        ({"img_size": (128, 60)}, "--img-size must be multiples of 16, got 128x60"),
        ({"shards": str(shard_dir), "batches": (4, 51)}, "at least 51 samples in .* are required, got 50"),
        ({"shards": "/nowhere"}, "/nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=text):
            run_step(replace(BENCH, **wrong), ceilings=CEILINGS)  # type: ignore[arg-type]


def test_a_machine_without_bf16_is_not_measured_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ceiling in bf16 would take minutes there, whatever precision the step is asked in."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(UserError, match=r"bf16 cannot be measured here, since .*. Give fp32"):
        run_step(replace(BENCH, precisions=("bf16",)))
    small = replace(BENCH, batches=(1,), num_steps=1)
    record = run_step(replace(small, precisions=("bf16", "fp32")), tmp_path / "step.json")
    assert list(record["ceilings"]["matrix_rate"]) == ["fp32"]
    assert [(row["precision"], row["failed"]) for row in record["measured"]] == [("fp32", None)]
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("bf16 is left out: ")
    assert second == "measuring the most that this machine can do, in fp32 ..."


def test_graphs_without_a_gpu_are_refused_in_one_line() -> None:
    line = one_line_error(personmae("bench", "step", "--compile", "off,graph", "--img-size", "128x64", "--batches", "4,8"))
    assert "--compile graph needs a GPU and there is none" in line


def test_counts_are_printed_for_every_size_with_the_least_time(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    done = personmae("bench", "counts", "--batch", "64", "--rate", "400", "--bandwidth", "2000", "--out", out)
    assert done.returncode == 0, done.stderr
    counted = json.loads(out.read_text())["counted"]
    assert list(counted) == ["micro", "tiny", "small", "base", "large"]
    for size, values in counted.items():
        assert f"{size} at {values['img_size'][0]}x{values['img_size'][1]}, bf16, a step of 64 images" in done.stdout
        rows = values["stages"].values()
        assert sum(row["flops"] for row in rows) == pytest.approx(values["flops_per_image"], rel=0.01)
        least = sum(row["least_seconds"] for row in rows)
        assert f"at most {64 / least:,.0f} images/s" in done.stdout
        assert least >= 64 * values["flops_per_image"] / 400e12
    assert "belong together" in one_line_error(personmae("bench", "counts", "--rate", "400"))


def test_the_pause_of_a_checkpoint_is_measured_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = run_checkpoint(CheckpointBench("micro", saves=3), tmp_path / "checkpoint.json")
    assert os.listdir(tmp_path) == ["checkpoint.json"]
    measured = record["measured"]
    assert measured["bytes"] > 4 * 4 * 1_000_000
    assert 0 < measured["pause_milliseconds"] < 1000 * measured["committed_seconds"]


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_is_measured_eager_and_with_graphs(shard_dir: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    grid = {"precisions": ("bf16",), "compile": ("off", "graph"), "crop_backends": ("torch", "triton")}
    bench = replace(BENCH, shards=str(shard_dir), **grid)
    rows = run_step(bench, ceilings=CEILINGS)["measured"]
    assert [(row["compile"], row["crop_backend"], row["source"], row["failed"]) for row in rows] == [
        (how, crop_backend, source, None)
        for how in ("off", "graph")
        for crop_backend in ("torch", "triton")
        for source in ("synthetic", "shards")
    ]
    for row in rows:
        assert 0 < row["peak_bytes"] <= row["reserved_bytes"]
        assert sum(row["parts_milliseconds"].values()) == pytest.approx(row["milliseconds"])

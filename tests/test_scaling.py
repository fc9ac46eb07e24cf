"""The model of scaling: limits that can be computed by hand, what must grow with what, and an honest fit."""

import importlib
import itertools
import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_allclose

from personmae import flops
from personmae.errors import UserError
from personmae.model.vit import SIZES

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))  # which is no package
model, work_of, measuring, scaling = (
    importlib.import_module(name) for name in ("scaling_model", "scaling_work", "scaling_points", "scaling")
)

SMALL = (128, 64)
PLAN = model.Plan("micro", 1e6, img_size=SMALL)
GPU = replace(
    model.Machine(**{name: value for name, (value, _) in scaling.ASSUMED.items()}, asynchronous=True), devices_per_node=8
)
FREE_OF_CHARGE = {"seconds_per_kernel": 1e-30, "flops_per_second": 1e30, "bytes_per_second": 1e30, "images_per_core": 1e30}
FREE_OF_CHARGE |= {"node_bandwidth": 1e30, "network_bandwidth": 1e30, "node_latency": 0.0, "network_latency": 0.0}
INSTANT = replace(GPU, **FREE_OF_CHARGE, update_bytes_per_second=1e30)


def micro():
    return work_of.count_work("micro", SMALL, "bf16")


def test_the_counted_operations_are_those_of_the_formula_and_of_cutting_the_regions():
    dim = SIZES["micro"]["embed_dim"]
    formula = flops.pretrain_flops(
        num_visible=32,
        num_patches=128,
        patch_size=16,
        embed_dim=dim,
        depth=SIZES["micro"]["depth"],
        decoder_depth=2,
        pixel_dim=min(512, dim),
        feature_dim=dim,
    )
    (canvas_h, canvas_w), (height, width) = work_of.spec_of((256, 128)).canvas_size, (256 + 64, 128 + 32)
    cutting = 2 * 3 * canvas_h * width * (canvas_w + height)
    assert work_of.count_work("micro", (256, 128), "bf16").flops.sum() == formula + cutting


def test_a_kernel_is_what_computes_and_a_view_is_none():
    left, right, kernels = work_of.torch.zeros(6, 4), work_of.torch.zeros(6, 3), work_of._Kernels()
    with kernels:
        _ = left.t()[:] @ right[None].expand(1, -1, -1)[0]
    assert kernels.rows == [(2 * 4 * 6 * 3, 4 * (24 + 18 + 12))]


def test_bytes_of_any_batch_follow_from_the_two_that_were_counted():
    work, spec = micro(), work_of.spec_of(SMALL)
    with work_of.torch.device("meta"):
        student = work_of.PersonMAE(size="micro", compute_dtype=work_of.torch.bfloat16)
        teacher = work_of.Teacher(student.encoder, spec.grid, work_of.torch.bfloat16)
    counted = work_of._count_kernels(student, teacher, spec, 7)
    assert_allclose(np.array(counted.rows)[:, 1], work.fixed_bytes + 7 * work.image_bytes)
    assert 0 < work.num_forward < len(work.flops)
    assert (work.image_bytes >= 0).all()


def test_a_step_without_arithmetic_and_traffic_is_starting_kernels_and_otherwise_the_slower_of_both():
    starts = len(micro().flops) * 1e-3
    starting = replace(INSTANT, seconds_per_kernel=1e-3)
    assert model.compute_seconds(micro(), 8, starting) == pytest.approx(starts)
    computing = replace(INSTANT, flops_per_second=1e9)
    products = 8 * micro().flops.sum() / 1e9
    assert model.compute_seconds(micro(), 8, computing) == pytest.approx(products)
    both = replace(starting, flops_per_second=1e9)
    assert model.compute_seconds(micro(), 8, both) == pytest.approx(max(starts, products))
    assert model.compute_seconds(micro(), 8, replace(both, asynchronous=False)) == pytest.approx(starts + products)


def test_a_kernel_is_bound_by_memory_or_by_arithmetic_not_by_both():
    work = replace(
        micro(), flops=np.array([6.0, 1.0]), image_bytes=np.array([1.0, 5.0]), fixed_bytes=np.array([1.0, 7.0]), num_forward=1
    )
    machine = replace(INSTANT, flops_per_second=1.0, bytes_per_second=1.0)
    assert model.compute_seconds(work, 2, machine) == pytest.approx(max(12, 2 + 1) + max(2, 10 + 7))


def test_an_all_reduce_takes_what_its_rings_take_by_hand():
    machine = replace(INSTANT, node_latency=1.0, node_bandwidth=10.0, network_latency=100.0, network_bandwidth=5.0)
    assert model.all_reduce_seconds(80, 1, machine) == 0
    assert model.all_reduce_seconds(80, 2, machine) == pytest.approx(2 * (1 + 40 / 10))
    assert model.all_reduce_seconds(80, 8, machine) == pytest.approx(14 * (1 + 10 / 10))
    assert model.all_reduce_seconds(80, 16, machine) == pytest.approx(14 * (1 + 10 / 10) + 2 * (100 + 40 / 5))
    assert model.all_reduce_seconds(80, 64, machine) == pytest.approx(14 * 2 + 2 * (3 * 100 + 80 / 5))  # a tree is quicker


def test_gradients_travel_behind_the_backward_pass_but_for_the_last_bucket():
    work = replace(micro(), num_params=4 * model.BUCKET_BYTES // 4)  # four buckets
    machine = replace(INSTANT, node_bandwidth=float(model.BUCKET_BYTES))  # a second each between two devices
    assert model.exposed_seconds(work, 8, 2, machine) == pytest.approx(4)
    rate = 8 * work.flops[work.num_forward :].sum()
    assert model.exposed_seconds(work, 8, 2, replace(machine, flops_per_second=rate / 2.5)) == pytest.approx(1.5)
    assert model.exposed_seconds(work, 8, 2, replace(machine, flops_per_second=rate / 1000)) == pytest.approx(1)
    assert model.exposed_seconds(work, 8, 2, replace(machine, asynchronous=False)) == pytest.approx(4)


def test_data_are_bound_by_cores_or_by_the_store_whose_shards_every_host_fetches():
    machine = replace(INSTANT, images_per_core=10.0, cores_per_device=4.0, store_bandwidth=1000.0)
    assert model.step_times(PLAN, 4, machine).total == pytest.approx(2048 / (10 * 4 * 4))
    for world_size in (8, 512):
        cold = model.step_times(replace(PLAN, image_bytes=10_000), world_size, machine, cold=True)
        assert cold.total == pytest.approx(2048 * 10_000 / 1000)
        assert cold.bound == "data"


@pytest.mark.parametrize("images", [1e6, 1e9])
def test_a_run_without_failures_is_its_steps_and_its_pauses(images):
    machine = replace(INSTANT, images_per_core=10.0, cores_per_device=1.0, store_bandwidth=1e4, mtbf_hours=1e30)
    plan = replace(PLAN, num_images=images, epochs=3, image_bytes=10_000)
    warm, cold = 2048 / 80, 2048 * 10_000 / 1e4
    steps, cold_epochs = images / 2048, 1 if images * 10_000 <= machine.cache_bytes else 3
    pauses = 3 * steps / 1000 * model.state_bytes(micro()) / machine.copy_bandwidth
    expected = steps * (cold_epochs * cold + (3 - cold_epochs) * warm) + pauses
    assert model.run_seconds(plan, 8, machine) == pytest.approx(expected)


def test_failures_cost_what_a_run_that_is_played_through_loses():
    plan = replace(PLAN, num_images=4e8, epochs=1, checkpoint_steps=100)
    machine = replace(INSTANT, flops_per_second=1e10, mtbf_hours=2.0, restart_seconds=60.0, copy_bandwidth=1e30)
    step = model.step_times(plan, 16, machine).total
    rng, clock, done = random.Random(0), 0.0, 0
    fails = rng.expovariate(1 / 3600)  # two hosts of two hours each
    total = round(4e8 / 2048)
    while done < total:
        ahead = min(100 * step, (total - done) * step)
        if fails >= clock + ahead:
            clock, done = clock + ahead, done + 100
        else:
            clock = fails + 60
            fails = clock + rng.expovariate(1 / 3600)
    assert clock / (total * step) > 1.02, "failures must matter here"
    assert model.run_seconds(plan, 16, machine) == pytest.approx(clock, rel=0.02)
    with pytest.raises(UserError, match="save more often than 100 steps"):
        model.run_seconds(plan, 16, replace(machine, mtbf_hours=0.01))


def test_more_gpus_are_never_more_efficient_and_more_images_never_quicker():
    rows = scaling.predicted(PLAN, GPU, price=2.0)
    assert [row["gpus"] for row in rows] == list(scaling.WORLD_SIZES)
    efficiency = [row["of_linear"] for row in rows]
    assert efficiency[0] == 1
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(efficiency))
    for row in rows:
        hours = [run["hours"] for run in row["runs"].values()]
        assert hours == sorted(hours)
        assert all(run["price"] == pytest.approx(2 * row["gpus"] * run["hours"]) for run in row["runs"].values())


@pytest.mark.parametrize(
    "name", ["flops_per_second", "bytes_per_second", "update_bytes_per_second", "network_bandwidth", "images_per_core"]
)
def test_nothing_gets_quicker_by_a_slower_machine(name):
    for world_size in (1, 16, 512):
        usual = model.step_times(PLAN, world_size, GPU).total
        slower = model.step_times(PLAN, world_size, replace(GPU, **{name: getattr(GPU, name) / 100})).total
        assert slower >= usual
    assert (
        model.step_times(PLAN, 16, replace(GPU, **{name: getattr(GPU, name) / 1e5})).total
        > model.step_times(PLAN, 16, GPU).total
    )


def test_gpus_that_cannot_share_the_batch_are_left_out():
    with pytest.raises(UserError, match="must be a multiple of the world size 64"):
        model.step_times(replace(PLAN, global_batch_size=96), 64, GPU)
    rows = scaling.predicted(replace(PLAN, global_batch_size=96), GPU, price=1.0)
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32]


TRUTH = replace(
    scaling.CORE,
    seconds_per_kernel=2.5e-6,
    flops_per_second=3e11,
    bytes_per_second=2.2e10,
    update_bytes_per_second=4e10,
    contention=1.3,
    node_latency=3e-4,
    node_bandwidth=0.5e9,
    images_per_core=4e3,
    copy_bandwidth=5e9,
)


def points():
    """What a machine would measure that does as the equations say; two points are wrong by half, and held out."""
    cases = [model.Point("step", 0, False, "micro", size, n) for size in (SMALL, (256, 128)) for n in (4, 32, 128)]
    cases += [
        model.Point("update", 0, False, "micro"),
        model.Point("data", 0, False),
        model.Point("pause", 0, False, num_bytes=10**8),
    ]
    cases += [model.Point("all_reduce", 0, False, num_bytes=n, world_size=2) for n in (1 << 12, 1 << 24)]
    cases += [model.Point("ranks", 0, False, "micro", SMALL, 16, world_size=2)]
    found = [replace(case, seconds=model.predict(case, TRUTH, "bf16")) for case in cases]
    odd = [model.Point("step", 0, True, "micro", SMALL, 64), model.Point("data", 0, True, threads=2)]
    return [*found, *(replace(case, seconds=2 * model.predict(case, TRUTH, "bf16")) for case in odd)]


def test_a_fit_finds_the_constants_that_made_the_points_and_leaves_the_others():
    fitted = model.fit(points(), scaling.CORE, "bf16")
    for name, value in asdict(TRUTH).items():
        assert getattr(fitted, name) == pytest.approx(value, rel=1e-4), name
    held = scaling.errors_of(points(), fitted, "bf16", held_out=True)
    assert [row["error"] for row in held] == pytest.approx([-0.5, -0.5], abs=1e-4)


def test_points_that_are_held_out_never_move_a_fit_and_the_others_do():
    usual = model.fit(points(), scaling.CORE, "bf16")
    wild = [replace(point, seconds=point.seconds * 1000) if point.held_out else point for point in points()]
    assert model.fit(wild, scaling.CORE, "bf16") == usual
    longer = [replace(point, seconds=point.seconds * 2) if not point.held_out else point for point in points()]
    assert model.fit(longer, scaling.CORE, "bf16").flops_per_second == pytest.approx(TRUTH.flops_per_second / 2, rel=1e-3)


def test_too_few_points_of_a_kind_are_refused():
    few = [point for point in points() if point.kind != "step" or point.held_out or point.batch_size == 4]
    with pytest.raises(UserError, match="3 points or more of kind 'step' are required to fit, got 2"):
        model.fit(few, scaling.CORE, "bf16")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_measured_suffices_for_the_constants_and_leaves_something_to_check_them(device):
    held = {"step": [case[-1] for case in measuring.STEPS[device]], "update": [case[-1] for case in measuring.UPDATED]}
    held |= {"data": [case[-1] for case in measuring.READ[device]], "pause": [case[-1] for case in measuring.SAVED]}
    if device == "cpu":
        held |= {"ranks": [case[-1] for case in measuring.RANKS], "all_reduce": [case[-1] for case in measuring.REDUCED]}
        assert set(held) == set(model.FREE)
    for kind, flags in held.items():
        assert flags.count(False) >= len(model.FREE[kind]), kind
        assert any(flags), kind


def test_a_real_step_and_a_real_update_become_points_that_json_keeps(monkeypatch):
    monkeypatch.setattr(measuring.dist, "barrier", lambda: None)  # another test may have left a process group
    step, update = model.Point("step", 0.0, False, "micro", SMALL, 16), model.Point("update", 0.0, True, "micro")
    device = work_of.torch.device("cpu")
    assert min(measuring._step_seconds(step, device), measuring._update_seconds(update, device)) > 0
    assert model.Point.read(json.loads(json.dumps(asdict(step)))) == step
    assert [measuring.describe(point) for point in (step, update)] == [
        "step of micro, 128x64, 16 images",
        "update and moving average of micro",
    ]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """What ``predict`` writes and prints, from points of a machine that does as the equations say."""
    record = {"commit": "c", "hardware": {"cpu": "A CPU", "gpus": []}, "settings": {"precision": "bf16"}, "image_bytes": 12_000}
    path = tmp_path / "points.json"
    path.write_text(json.dumps(record | {"points": [asdict(point) for point in points()]}))
    monkeypatch.setattr(scaling, "POINTS", {"cpu": path, "cuda": tmp_path / "absent.json"})
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(scaling, "SIZES", ("micro",))

    def run(*arguments):
        out, image = tmp_path / "out.json", tmp_path / "image.png"
        monkeypatch.setattr(sys, "argv", ["scaling.py", "predict", f"--out={out}", f"--image={image}", *arguments])
        scaling.main()
        assert image.stat().st_size > 1000
        return json.loads(out.read_text())

    return run


def test_no_constant_of_a_gpu_is_called_measured_where_none_was(written, capsys):
    found = written("--set", "mtbf_hours=500", "--price-per-gpu-hour", "3")
    sources = {name: of["source"] for name, of in found["gpu"].items()}
    assert sources.pop("images_per_core") == "measured on a core of A CPU"
    assert sources.pop("mtbf_hours") == "given"
    assert all(source.startswith("assumed") for source in sources.values())
    assert found["gpu"]["images_per_core"]["value"] == pytest.approx(TRUTH.images_per_core, rel=1e-4)
    assert found["mean_error_of_fitted"] == pytest.approx(0, abs=1e-4)
    assert found["mean_error"]["cpu"] == pytest.approx({"step": 0.5, "data": 0.5}, abs=1e-4)
    run = found["predicted"]["micro"][3]["runs"]["4.2 M"]
    assert run["price"] == pytest.approx(3 * 8 * run["hours"])
    assert "predicted, not measured" in " ".join(capsys.readouterr().out.split())


def test_ceilings_and_points_of_a_gpu_take_the_place_of_the_data_sheets_numbers(written, tmp_path):
    (tmp_path / "results").mkdir()
    ceilings = {"matrix_rate": {"bf16": 7e14, "fp32": 5e13}, "bandwidth": 2e12}
    record = {"hardware": {"gpus": ["A GPU"]}, "ceilings": ceilings}
    (tmp_path / "results" / "grid.json").write_text(json.dumps(record))
    (tmp_path / "results" / "step.json").write_text(json.dumps(record | {"hardware": {"gpus": []}}))
    found = written()
    assert found["gpu"]["flops_per_second"]["value"] == pytest.approx(0.6 * 7e14)
    assert found["gpu"]["flops_per_second"]["source"] == "assumed: 60% of 7e+14, measured on A GPU (grid.json)"
    assert found["gpu"]["bytes_per_second"]["value"] == pytest.approx(0.75 * 2e12)

    gpu = replace(GPU, flops_per_second=2e13, update_bytes_per_second=1.5e12, bytes_per_second=1e12, seconds_per_kernel=2e-5)
    cases = [point for point in points() if point.kind == "step"]
    cases += [model.Point("step", 0, False, "micro", (256, 128), n) for n in (1024, 4096)]
    cases += [model.Point("update", 0, False, "micro")]
    taken = [replace(case, seconds=model.predict(case, gpu, "bf16")) for case in cases]
    record = json.loads((tmp_path / "points.json").read_text()) | {"hardware": {"cpu": "Another CPU", "gpus": ["A GPU"]}}
    (tmp_path / "absent.json").write_text(json.dumps(record | {"points": [asdict(point) for point in taken]}))
    found = written()
    for name in (*model.FREE["step"], *model.FREE["update"]):
        assert found["gpu"][name]["source"] == "measured on A GPU"
        assert found["gpu"][name]["value"] == pytest.approx(getattr(gpu, name), rel=1e-3)
    assert found["gpu"]["node_bandwidth"]["source"].startswith("assumed")
    assert found["mean_error"]["cuda"]["step"] == pytest.approx(0, abs=1e-3)


def test_a_constant_that_does_not_exist_and_points_that_are_missing_are_one_line(written, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --set takes .*network_bandwidth.*; got speed$"):
        written("--set", "speed=1")
    (tmp_path / "points.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: measured points are required"):
        written()

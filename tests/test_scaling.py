"""The calculator of scaling, beside the same arithmetic written out by hand."""

import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from personmae import flops
from personmae.batch_plan import plan_batch
from personmae.bench.counts import Stage, Work, count_params, spec_at
from personmae.model.personmae import PersonMAE

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # which is no package
scaling: Any = importlib.import_module("scaling")

MACHINE = scaling.Machine(matrix_rate=2.0, memory_bandwidth=1.0, link_bandwidth=10.0, network_bandwidth=5.0, gpus_per_node=8)
BASE = Work("base", spec_at((256, 128)))


def test_a_step_is_its_micro_batches_and_one_update() -> None:
    stages = {"student forward": Stage(6, 1, 4), "losses": Stage(0, 5), "optimizer": Stage(0, 0, 10), "average": Stage(0, 0, 7)}
    batch = plan_batch(8, 1, max_micro_batch_size=4)
    assert (batch.micro_batch_size, batch.grad_accum_steps) == (4, 2)
    forward = 4 * 6 / 2  # 12 s of operations, beside (4 * 1 + 4) / 1 = 8 s of bytes
    losses = 4 * 5 / 1
    assert scaling.compute_seconds(stages, batch, MACHINE) == pytest.approx(2 * (forward + losses) + 10 + 7)


@pytest.mark.parametrize(
    ("gpus", "seconds"),
    [
        (1, 0.0),
        (2, 2 * 1 / 2 * 80 / 10),
        (8, 2 * 7 / 8 * 80 / 10),
        (16, 2 * 7 / 8 * 80 / 10 + 2 * 1 / 2 * 80 / 5),  # two nodes
        (64, 2 * 7 / 8 * 80 / 10 + 2 * 7 / 8 * 80 / 5),
    ],
)
def test_an_all_reduce_is_a_ring_in_the_node_and_one_among_nodes(gpus: int, seconds: float) -> None:
    assert scaling.all_reduce_seconds(80, gpus, MACHINE) == pytest.approx(seconds)


def test_a_row_is_bound_by_the_longer_of_both_at_best_and_by_their_sum_otherwise() -> None:
    row = scaling.Row(gpus=16, nodes=2, global_batch_size=96, compute=3.0, all_reduce=5.0)
    assert row.best_rate == pytest.approx(96 / 5)
    assert row.plain_rate == pytest.approx(96 / 8)


def test_what_is_reduced_are_the_parameters_of_the_real_model() -> None:
    with torch.device("meta"):
        model = PersonMAE(size="base")
    assert count_params(BASE) == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.encoder.parameters()),
    )


def test_one_h100_with_endless_memory_bandwidth_does_its_data_sheet_in_operations() -> None:
    machine = scaling.Machine(flops.peak_flops("NVIDIA H100 80GB HBM3", "bf16"), 1e30, 1e30, 1e30)
    first = scaling.count_rows(BASE, machine, 2048, 256)[0]
    canvas_height = BASE.spec.canvas_size[0]
    resize = 2 * 4 * 3 * (canvas_height * (128 + 32) + (256 + 64) * (128 + 32))  # four taps of rows, four of columns
    assert first.compute == pytest.approx(2048 * (BASE.flops + resize) / 989e12)
    assert first.all_reduce == 0


def test_more_gpus_are_never_more_efficient_and_those_that_cannot_share_the_batch_are_left_out() -> None:
    machine = scaling.machine_of("NVIDIA H100 80GB HBM3", 400, 8, 1.0)
    rows = scaling.count_rows(BASE, machine, 2048, 256)
    assert [row.gpus for row in rows] == list(scaling.WORLD_SIZES)
    assert [row.nodes for row in rows] == [1, 1, 1, 1, 2, 4, 8, 16, 32, 64]
    for rate in ("best_rate", "plain_rate"):
        per_gpu = [getattr(row, rate) / row.gpus for row in rows]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(per_gpu))
    assert [row.gpus for row in scaling.count_rows(BASE, machine, 96, 256)] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", scaling.DATA_SHEETS)
def test_a_gpu_has_its_data_sheets_numbers_and_the_share_that_is_assumed(name: str) -> None:
    memory, link = scaling.DATA_SHEETS[name]
    machine = scaling.machine_of(name, 400, 8, 0.5)
    assert machine == scaling.Machine(0.5 * (flops.peak_flops(name, "bf16") or 0), 0.5 * memory, link, 50e9, 8)


def test_it_says_that_nothing_was_measured_and_its_numbers_are_those_of_the_document(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert scaling.main([f"--plot={tmp_path / 'scaling.png'}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing was measured on a GPU") == 2
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    small, base = cells[: len(cells) // 2], cells[len(cells) // 2 :]
    document = (ROOT / "docs/scaling.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d,]+) \| (\d+%) \| ([\d,]+) \| (\d+%) \|$", document, re.MULTILINE)
    assert len(rows) == len(scaling.WORLD_SIZES)
    assert rows == [(s[0], s[1], s[5], s[6], b[5], b[6]) for s, b in zip(small, base, strict=True)]


@pytest.mark.parametrize("wrong", ["--reached=0", "--reached=1.5", "--network-gbits=0", "--gpus-per-node=0"])
def test_numbers_that_cannot_be_are_one_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([wrong]) == 78
    assert capsys.readouterr().err.startswith("error: --reached must be above 0")

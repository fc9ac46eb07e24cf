"""What a dry run tells: the world sizes that can share a batch, and how much memory a rank needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import one_line_error, personmae
from torch.profiler import ProfilerActivity, profile

from personmae.__main__ import main
from personmae.batch_plan import admissible_world_sizes
from personmae.dry_run import count_kept
from personmae.model.inputs import RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher

SPEC = RegionSpec((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)


def test_admissible_world_sizes_are_the_divisors_of_the_batch():
    assert admissible_world_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert admissible_world_sizes(2048, most=64) == [1, 2, 4, 8, 16, 32, 64]


def test_activations_grow_with_the_model_and_shrink_when_they_are_computed_again():
    shallow, deep = (count_kept(PersonMAE(size="micro", decoder_depth=depth), SPEC).per_image for depth in (1, 3))
    again = PersonMAE(size="micro", decoder_depth=1)
    again.encoder.activation_checkpointing = "full"
    assert 0 < count_kept(again, SPEC).per_image < shallow < deep
    tokens = 32 + 8  # one fp32 matrix of all tokens of a decoder is the least that a block keeps
    assert deep - shallow > 2 * 2 * tokens * 128 * 4


def allocated_bytes(model: PersonMAE, num_images: int) -> int:
    """What torch's allocator has given out and not got back while the losses are alive; the profiler tells."""
    teacher = Teacher(model.encoder, SPEC.grid, model.compute_dtype)
    size = torch.tensor([SPEC.canvas_size] * num_images)
    canvas = torch.zeros(num_images, *SPEC.canvas_size, 3, dtype=torch.uint8)
    draws = draw_batch(torch.arange(num_images), size, SPEC)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = cut_batch(canvas, size, draws, SPEC)
        batch["target"] = teacher(batch["patches_b"])
        losses = model(batch)
    del losses
    return sum(event.self_cpu_memory_usage for event in profiler.events() or ())


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(("size", "dtype"), [("micro", torch.float32), ("small", torch.float32), ("micro", torch.bfloat16)])
def test_what_is_told_is_what_the_allocator_gives_out(size: str, dtype: torch.dtype, mode: Any):
    """2% is 10 times what was found: 0.2%, the random numbers' states that checkpointing keeps."""
    model = PersonMAE(size=size, compute_dtype=dtype)
    model.encoder.activation_checkpointing = mode
    kept = count_kept(model, SPEC)
    assert kept.fixed + 8 * kept.per_image == pytest.approx(allocated_bytes(model, 8), rel=0.02)


def test_selective_checkpointing_keeps_less_than_none_and_more_than_full():
    found = []
    for mode in ("none", "selective", "full"):
        model = PersonMAE(size="micro")
        model.encoder.activation_checkpointing = mode
        found.append(count_kept(model, SPEC).per_image)
    none, selective, full = found
    products = 4 * (8 + 1) * (3 + 1 + 4 + 1) * 128 * 4  # of four blocks' linear layers, for the visible tokens, fp32
    assert full + products <= selective < none


@pytest.mark.integration
def test_a_dry_run_tells_batch_memory_and_worlds_and_writes_nothing(shard_dir: Path, tmp_path: Path):
    arguments = ["pretrain", "configs/quickstart.yaml", f"data.shards={shard_dir}", f"run_dir={tmp_path / 'run'}"]
    done = personmae(
        *arguments, "train.global_batch_size=12", "train.max_micro_batch_size=4", "train.total_steps=1600", "--dry-run", "3"
    )
    assert done.returncode == 0, done.stderr
    assert "12 images a step = 3 ranks x 1 micro-batches x 4 images" in done.stdout
    assert "50 samples" in done.stdout
    assert "1,600 steps, 19,200 images, 384.0 epochs" in done.stdout
    rows = [line.split("│")[1:4] for line in done.stdout.splitlines() if line.startswith("│") and line.count("│") == 4]
    assert [tuple(int(cell) for cell in row) for row in rows] == [
        (1, 3, 4),
        (2, 2, 3),
        (3, 1, 4),
        (4, 1, 3),
        (6, 1, 2),
        (12, 1, 1),
    ]
    assert not (tmp_path / "run").exists()
    line = one_line_error(personmae(*arguments, "train.global_batch_size=12", "--dry-run", "5"))
    assert "must be a multiple of the world size 5" in line


@pytest.mark.integration
def test_a_dry_run_names_a_run_with_brackets_as_it_is(shard_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("COLUMNS", "300")
    run_dir = tmp_path / "[x]" / "[bold]"
    arguments = ["pretrain", "configs/quickstart.yaml", f"data.shards={shard_dir}", f"run_dir={run_dir}"]
    assert main([*arguments, "train.global_batch_size=8", "--dry-run", "1"]) == 0
    assert str(run_dir) in capsys.readouterr().out

"""What a dry run tells: the world sizes that can share a batch, and how much memory a rank needs."""

from pathlib import Path

import pytest
from programs import one_line_error, personmae

from personmae.model.personmae import PersonMAE, View
from personmae.plan import admissible_world_sizes, saved_bytes_per_image

VIEW = View((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)


def test_admissible_world_sizes_are_the_divisors_of_the_batch():
    assert admissible_world_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert admissible_world_sizes(2048, most=64) == [1, 2, 4, 8, 16, 32, 64]


def test_activations_grow_with_the_model_and_shrink_when_they_are_computed_again():
    shallow, deep = (saved_bytes_per_image(PersonMAE(size="micro", decoder_depth=depth), VIEW) for depth in (1, 3))
    again = PersonMAE(size="micro", decoder_depth=1)
    again.encoder.activation_checkpointing = "full"
    assert 0 < saved_bytes_per_image(again, VIEW) < shallow < deep
    tokens = 32 + 8  # one fp32 matrix of all tokens of a decoder is the least that a block keeps
    assert deep - shallow > 2 * 2 * tokens * 128 * 4


@pytest.mark.integration
def test_a_dry_run_tells_batch_memory_and_worlds_and_writes_nothing(shard_dir: Path, tmp_path: Path):
    arguments = ["pretrain", "configs/quickstart.yaml", f"data.shards={shard_dir}", f"run_dir={tmp_path / 'run'}"]
    done = personmae(*arguments, "train.global_batch_size=12", "train.max_micro_batch_size=4", "--dry-run", "3")
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

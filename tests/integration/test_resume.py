"""Killed or stopped at any moment, a run goes on where it was and ends as if nothing had happened."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import warm
from programs import losses, pretrain, start_pretrain

from personmae.checkpoint import portable, run_lock
from personmae.data import importer

pytestmark = pytest.mark.integration


def wait_for_step(run: warm.Process, run_dir: Path, step: int) -> None:
    """Return once a step is logged."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert run.poll() is None, Path(f"{run_dir}.log").read_text()
        if (run_dir / "metrics.jsonl").exists() and len(losses_so_far(run_dir)) >= step:
            return
        time.sleep(0.01)
    raise TimeoutError(Path(f"{run_dir}.log").read_text())


def losses_so_far(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_killed_run_goes_on_and_ends_with_the_same_losses(shard_dir: Path, native_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = start_pretrain(shard_dir, run_dir, "engine.name=native", "checkpoint.every_steps=3")
    wait_for_step(run, run_dir, 8)
    run.kill()
    run.wait()
    done = portable.newest(run_dir)
    assert done is not None
    assert 3 <= int(done.name.removeprefix("step-")) < 20
    pretrain(shard_dir, run_dir, "engine.name=native", "checkpoint.every_steps=3")
    np.testing.assert_array_equal(losses(run_dir), losses(native_run))


def test_a_finished_run_says_so_and_does_nothing(shard_dir: Path, native_run: Path, tmp_path: Path) -> None:
    before = (native_run / "metrics.jsonl").stat().st_mtime_ns
    pretrain(shard_dir, native_run, "engine.name=native", "checkpoint.every_steps=5")
    assert "is complete: 20 of 20 steps are done" in Path(f"{native_run}.log").read_text()
    assert (native_run / "metrics.jsonl").stat().st_mtime_ns == before


def copy_of(run_dir: Path, to: Path) -> Path:
    """A run directory with the same checkpoints."""
    shutil.copytree(run_dir / "checkpoints", to / "checkpoints")
    return to


def test_a_run_is_not_continued_with_other_settings(shard_dir: Path, native_run: Path, tmp_path: Path) -> None:
    run_dir = copy_of(native_run, tmp_path / "run")
    other = ["engine.name=native", "mask.kind=random", "optim.lr=1e-4"]
    run = start_pretrain(shard_dir, run_dir, *other)
    assert run.wait(timeout=60) == 78
    said = Path(f"{run_dir}.log").read_text()
    assert "mask.kind=block (now random)" in said
    assert "optim.lr=0.002 (now 0.0001)" in said
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_run_is_not_continued_on_the_same_images_in_other_shards(
    shard_dir: Path, images: Path, native_run: Path, tmp_path: Path
) -> None:
    importer.write(images, str(tmp_path / "other"), shard_bytes=30_000)  # another order follows from other shards
    run_dir = copy_of(native_run, tmp_path / "run")
    run = start_pretrain(tmp_path / "other", run_dir, "engine.name=native")
    assert run.wait(timeout=60) == 78
    assert "data.index=" in Path(f"{run_dir}.log").read_text()


def test_a_run_directory_belongs_to_one_process(shard_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    held = run_lock.lock(run_dir)
    run = start_pretrain(shard_dir, run_dir, "engine.name=native")
    assert run.wait(timeout=60) == 78
    assert "Another process is at work in" in Path(f"{run_dir}.log").read_text()
    held.close()
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(shard_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = start_pretrain(shard_dir, run_dir, "engine.name=native", "optim.lr=1e30", "checkpoint.every_steps=5")
    assert run.wait(timeout=60) == 1
    assert "error: the gradient was not finite in 10 steps in a row, up to step 11" in Path(f"{run_dir}.log").read_text()
    assert portable.newest(run_dir) is None

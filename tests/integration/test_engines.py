"""Every engine and world size trains the same model: real launchers, real process groups, losses compared."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from closeness import assert_allclose
from programs import ROOT, SETTINGS, STEPS, launch, losses, pretrain

from personmae.checkpoint import portable

pytestmark = pytest.mark.integration
GOLDEN = ROOT / "tests/golden/pretrain_20_steps.json"


def deepspeed(shard_dir: Path, run_dir: Path, num_ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """``deepspeed launcher/pretrain.py`` on so many ranks of this host."""
    port = str(20000 + (os.getpid() * 7 + num_ranks) % 20000)
    options = ["--num_gpus", str(num_ranks), "--master_port", port]
    arguments = ["--config", "configs/quickstart.yaml", f"data.shards={shard_dir}", f"run_dir={run_dir}", *SETTINGS]
    return launch("deepspeed", *options, "launcher/pretrain.py", *arguments, *overrides)


def test_the_first_20_losses_are_the_golden_ones(native_run: Path) -> None:
    """The file is rewritten with WRITE_GOLDEN=true, which a change of the method must explain."""
    if os.environ.get("WRITE_GOLDEN") == "true":
        GOLDEN.write_text(json.dumps(losses(native_run), indent=1) + "\n")
    assert_allclose(losses(native_run), json.loads(GOLDEN.read_text()), rtol=2e-3)


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_deepspeed_gives_the_losses_of_the_plain_loop(
    num_ranks: int, shard_dir: Path, native_run: Path, tmp_path: Path
) -> None:
    result = deepspeed(shard_dir, tmp_path / "run", num_ranks, "engine.name=deepspeed")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(tmp_path / "run")) == STEPS
    assert_allclose(losses(tmp_path / "run"), losses(native_run), rtol=1e-5)


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(
    shard_dir: Path, native_run: Path, tmp_path: Path
) -> None:
    pretrain(shard_dir, tmp_path / "run", "engine.name=deepspeed", "train.max_micro_batch_size=4")
    assert_allclose(losses(tmp_path / "run"), losses(native_run), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        ["engine.name=deepspeed"],
        ["engine.name=deepspeed", "engine.deepspeed.zero_stage=3"],
        ["engine.name=fsdp", "train.activation_checkpointing=selective"],
    ],
    ids=["zero0", "zero3", "fsdp"],
)
def test_a_checkpoint_of_one_engine_is_resumed_by_another_on_two_ranks(
    engine: list[str], shard_dir: Path, native_run: Path, tmp_path: Path
) -> None:
    stopped = ["train.total_steps=20", "checkpoint.every_steps=5"]
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    kept = sorted((native_run / "checkpoints").glob("step-*"))[0]
    assert kept.name == "step-00000015"
    (run_dir / "checkpoints" / kept.name).symlink_to(kept)
    result = deepspeed(shard_dir, run_dir, 2, *engine, *stopped)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_allclose(losses(run_dir), losses(native_run)[15:], rtol=1e-5)
    # What the engine has written is the state of the plain loop, the teacher included.
    ours, theirs = (folder / "checkpoints/step-00000020" for folder in (run_dir, native_run))
    num_files = 1 if engine == ["engine.name=deepspeed"] else 2  # engines that shard have every rank write its share
    assert len([*ours.glob("student*.safetensors")]) == num_files
    for kind in ("student", "teacher", "exp_avg", "exp_avg_sq"):
        written, expected = (portable.read_kind(folder, kind) for folder in (ours, theirs))
        assert written.keys() == expected.keys()
        ours_flat, theirs_flat = (torch.cat([t[name].flatten() for name in expected]) for t in (written, expected))
        assert (ours_flat - theirs_flat).norm() < 1e-4 * theirs_flat.norm(), kind


@pytest.mark.slow
def test_a_batch_that_the_ranks_cannot_share_is_named_with_what_would_work(shard_dir: Path, tmp_path: Path) -> None:
    result = deepspeed(shard_dir, tmp_path / "run", 2, "train.global_batch_size=15")
    assert result.returncode == 78, result.stdout + result.stderr
    said = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "train.global_batch_size=15 must be a multiple of the world size 2" in said[0]
    assert "14 or 16" in said[0]
    assert not (tmp_path / "run").exists()

"""Runs with the options beside the paper: they resume bit for bit, and do not depend on how a batch is split."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_allclose
from programs import ROOT, SETTINGS, losses

from personmae import config, pretrain
from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.monitor import run_log

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restore_signals")]
OPTIONS = [
    "mask.kind=person",
    "mask.block_ratio=0.5",
    "decoders.visible_positions=true",
    "target.features=image_centred",
    "target.reduction=sum",
    "loss.feature_weight=0.01",
    "loss.identity_weight=0.5",
    "loss.identity_dim=32",
    "loss.identity_group=4",
]
STEPS, EVERY = 8, 4


def run(shard_dir: Path, run_dir: Path, *overrides: str) -> None:
    given = [f"data.shards={shard_dir}", f"run_dir={run_dir}", *SETTINGS, "engine.name=native", f"train.total_steps={STEPS}"]
    given += [*OPTIONS, f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=9", *overrides]
    pretrain.run(config.load(config.Pretrain, ROOT / "configs/quickstart.yaml", given))


@pytest.fixture(scope="module")
def whole_run(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted, with all options."""
    run_dir = tmp_path_factory.mktemp("options") / "run"
    run(shard_dir, run_dir)
    return run_dir


def test_a_run_with_all_options_goes_on_bit_for_bit(shard_dir: Path, whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    newest = portable.newest(run_dir)
    assert newest is not None
    before = portable.read(newest)
    shutil.rmtree(newest)
    run(shard_dir, run_dir)
    np.testing.assert_array_equal(losses(run_dir), losses(whole_run))
    after = portable.read(newest)
    assert after.tensors.keys() == before.tensors.keys() == {"student", "teacher", "centre", "exp_avg", "exp_avg_sq"}
    assert before.tensors["centre"]["mean"].abs().max() > 0.1
    assert int(before.tensors["centre"]["num_updates"]) == STEPS
    for kind, tensors in before.tensors.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(after.tensors[kind][name].numpy(), tensor.numpy(), err_msg=f"{kind} {name}")
    assert any(name.startswith("identity_head.") for name in before.tensors["student"])


def test_micro_batches_of_whole_groups_train_as_the_whole_batch_does(shard_dir: Path, whole_run: Path, tmp_path: Path) -> None:
    run(shard_dir, tmp_path / "run", "train.max_micro_batch_size=4")
    assert_allclose(losses(tmp_path / "run"), losses(whole_run), rtol=1e-5)
    for ours, theirs in zip(run_log.read_records(tmp_path / "run"), run_log.read_records(whole_run), strict=True):
        for name in ("pixel_loss", "feature_loss", "identity_loss", "floor_position", "floor_hue"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert ours["target_std"] == pytest.approx(theirs["target_std"], rel=0.05)


def test_the_floor_is_known_when_enough_was_seen_and_stays_known(whole_run: Path) -> None:
    records = run_log.read_records(whole_run)
    assert ["floor_hue" in record for record in records] == [False] * (STEPS - 1) + [True]  # 128 images are less than 512
    assert 0 < records[-1]["floor_hue"] < records[-1]["floor_position"] < 1.1
    newest = portable.newest(whole_run)
    assert newest is not None
    floor = portable.read_state(newest)["floor"]
    assert floor == {
        "position": records[-1]["floor_position"],
        "hue": records[-1]["floor_hue"],
        "num_images": 16 * STEPS,
    }


def test_a_run_on_the_floor_ends_with_one_warning(shard_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(shard_dir, tmp_path / "run", "train.total_steps=2")
    out, err = capsys.readouterr()
    assert "pretrain: floor of the pixel loss: " in out
    warned = [line for line in err.splitlines() if "warning: the pixel loss has ended at" in line]
    assert len(warned) == 1
    assert "Try more steps" in warned[0]


def test_groups_that_do_not_fill_a_micro_batch_are_refused_before_the_first_step(shard_dir: Path, tmp_path: Path) -> None:
    wanted = r"loss\.identity_group=5 must divide a rank's micro-batch, which is 16 \(16 images a step = 1 ranks"
    with pytest.raises(UserError, match=wanted):
        run(shard_dir, tmp_path / "run", "loss.identity_group=5")
    assert not (tmp_path / "run" / "checkpoints").exists()

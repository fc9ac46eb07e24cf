"""Runs of before positions were x first: golden losses from permuted weights, and a run that goes on from its checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from closeness import assert_allclose
from older import MICRO, make_old, positions_of_before
from programs import ROOT, SETTINGS, losses

from personmae import config, pretrain
from personmae.checkpoint import portable
from personmae.model.personmae import PersonMAE
from personmae.model.positions import x_first

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restore_signals")]
GOLDEN_BEFORE = ROOT / "tests/golden/pretrain_20_steps_y_first.json"  # written when positions were y first


def run(shard_dir: Path, run_dir: Path, *overrides: str) -> None:
    given = [f"data.shards={shard_dir}", f"run_dir={run_dir}", *SETTINGS, "engine.name=native", *overrides]
    pretrain.run(config.load(config.Pretrain, ROOT / "configs/quickstart.yaml", given))


def test_the_golden_losses_of_before_come_from_the_same_weights_permuted(
    shard_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = pretrain.build_model

    def permuted(*args: Any) -> PersonMAE:
        model = built(*args)
        model.load_state_dict(x_first(model.state_dict(), MICRO))
        return model

    monkeypatch.setattr(pretrain, "build_model", permuted)
    run(shard_dir, tmp_path / "run")
    assert_allclose(losses(tmp_path / "run"), json.loads(GOLDEN_BEFORE.read_text()), rtol=2e-3)


def test_a_run_of_before_is_resumed_with_the_losses_it_would_have_had(shard_dir: Path, tmp_path: Path) -> None:
    run_dir, every = tmp_path / "run", ("checkpoint.every_steps=12", "checkpoint.keep_last=9")
    with positions_of_before():
        run(shard_dir, run_dir, *every)
    whole = losses(run_dir)
    newest = portable.newest(run_dir)
    assert newest is not None
    make_old(newest.with_name("step-00000012"))
    shutil.rmtree(newest)
    run(shard_dir, run_dir, *every)
    assert_allclose(losses(run_dir), whole, rtol=1e-5)
    assert portable.read_state(newest)["format"] == portable.FORMAT

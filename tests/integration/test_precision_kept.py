"""A run that is resumed where ``auto`` would choose the other precision keeps its own, and says so."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from on_disk import write_checkpoint
from people import FEW_CLUSTERS, draw_few_people

from personmae.__main__ import main
from personmae.checkpoint import portable

pytestmark = pytest.mark.integration
NO_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # read by us at each start, by oneDNN once a process
OLD_KEYS = ("precision", "precision_by_hand")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, in_checkout: None) -> None:
    for name in NO_BF16:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of 4 identities to train and to test on."""
    return draw_few_people(tmp_path_factory.mktemp("synth"), 4, distractors=2, junk=1) / "market1501"


def pretraining(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    small = ["train.global_batch_size=4", "train.total_steps=2", "train.log_every=1", "checkpoint.every_steps=1"]
    where = [f"data.shards={shards}", f"run_dir={run_dir}", "data.num_threads=1", "data.shuffle_block_size=32"]
    return ["pretrain", "configs/quickstart.yaml", "engine.name=native", *where, *small, *overrides]


def finetuning(root: Path, run_dir: Path, *overrides: str) -> list[str]:
    small = ["batch.num_ids=2", "batch.num_instances=2", "train.bn_group_size=4", "train.epochs=1", "checkpoint.every_steps=1"]
    return ["finetune", "configs/quickstart_random.yaml", f"root={root}", f"run_dir={run_dir}", *small, *overrides]


def last_state(run_dir: Path) -> dict[str, Any]:
    newest = portable.newest(run_dir)
    assert newest is not None
    return portable.read(newest).state


def cut_short(run_dir: Path, *, drop: tuple[str, ...] = ()) -> None:
    """Take a finished run's end away; without the states ``drop`` it is one of a version that did not know them."""
    (run_dir / "result.json").unlink(missing_ok=True)
    *_, before, last = sorted((run_dir / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    if drop:
        saved = portable.read(before)
        shutil.rmtree(before)
        state = {name: value for name, value in saved.state.items() if name not in drop}
        write_checkpoint(run_dir, portable.Checkpoint(saved.step, saved.tensors, state), keep_last=1)


@pytest.mark.parametrize("drop", [(), OLD_KEYS], ids=["of now", "of before"])
@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_a_run_in_bf16_goes_on_in_it_where_auto_would_not_choose_it(
    program: str,
    drop: tuple[str, ...],
    shard_dir: Path,
    market: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = pretraining(shard_dir, tmp_path) if program == "pretrain" else finetuning(market, tmp_path)
    assert main([*command, "train.precision=bf16"]) == 0
    assert f"{program}: precision bf16 (as set" in capsys.readouterr().out
    state = last_state(tmp_path)
    assert (state["precision"], state["precision_by_hand"], state["identity"]["train.precision"]) == ("bf16", True, "bf16")
    cut_short(tmp_path, drop=drop)
    for name, value in NO_BF16.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "resuming at step" in output
    assert f"{program}: precision bf16 (kept from the checkpoint" in output
    assert "checkpoint.resume=none train.precision=fp32 starts anew" in output
    state = last_state(tmp_path)
    assert (state["precision"], state["precision_by_hand"]) == ("bf16", False)
    assert main(command) == 0  # complete, whatever this machine would choose
    assert "complete" in capsys.readouterr().out
    assert main([*command, "train.precision=fp32"]) == 78
    assert "train.precision=bf16 (now fp32)" in capsys.readouterr().err


def test_auto_records_what_it_came_to_and_says_why(
    shard_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in NO_BF16.items():
        monkeypatch.setenv(name, value)
    assert main(pretraining(shard_dir, tmp_path)) == 0
    assert "pretrain: precision fp32 (auto: " in capsys.readouterr().out
    state = last_state(tmp_path)
    assert (state["precision"], state["precision_by_hand"], state["identity"]["train.precision"]) == ("fp32", False, "fp32")
    cut_short(tmp_path)
    assert main(pretraining(shard_dir, tmp_path, "train.precision=fp32")) == 0  # what auto came to, now by hand
    assert "precision fp32 (as set)" in capsys.readouterr().out


def test_an_encoder_of_another_image_size_is_told_and_of_another_architecture_refused(
    shard_dir: Path, market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(pretraining(shard_dir, tmp_path / "start", "train.precision=fp32")) == 0
    usl = ["batch.num_ids=2", "batch.num_instances=2", "train.bn_group_size=4", "train.epochs=1", "train.iters_per_epoch=1"]
    usl += [*FEW_CLUSTERS, "cluster.eps=0.99", "cluster.per_camera=none"]
    programs = {
        "finetune": ["configs/quickstart_random.yaml", *finetuning(market, tmp_path / "tuned")[4:]],
        "unsupervised": ["configs/quickstart_usl.yaml", *usl],
    }
    for program, arguments in programs.items():
        for wrong, line in (
            ("model.size=small", "model.size=small must be that of"),
            ("model.patch_size=32", "model.patch_size=32 must be that of"),
        ):
            common = [f"root={market}", f"run_dir={tmp_path / program}", f"init={tmp_path / 'start'}", "train.precision=fp32"]
            assert main([program, *arguments, *common, wrong]) == 78
            assert line in capsys.readouterr().err
        code = main([program, *arguments, *common, "model.img_size=[256,128]"])
        output = capsys.readouterr()
        (start,) = (line for line in output.out.splitlines() if f"{program}: " in line and "The head starts new" in line)
        assert "It was trained at 128x64 and now sees 256x128" in start
        assert code == 0 or "clusters a batch are required" in output.err  # random weights may find too few

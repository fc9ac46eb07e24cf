"""A loss that jumps: back to a checkpoint from before, and on without the batches in between."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from closeness import largest
from on_disk import write_checkpoint

from personmae import config, dist, pretrain, pretrain_state
from personmae.checkpoint import portable, remote
from personmae.errors import Diverged, UserError
from personmae.keys.pretraining import Optim
from personmae.model.inputs import prepare_batch
from personmae.pretrain_state import PretrainState, Spiked, roll_back

pytestmark = pytest.mark.integration
SPIKE, EVERY, TOTAL = 13, 4, 24


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The sample keys of every batch that is trained on."""
    keys: list[np.ndarray] = []

    def recording(canvas: Any, size: Any, native_size: Any, batch_keys: Any, spec: Any) -> Any:
        keys.append(batch_keys.numpy().copy())
        return prepare_batch(canvas, size, native_size, batch_keys, spec)

    monkeypatch.setattr(pretrain, "choose_prepare", lambda *_, **__: recording)
    return keys


def break_step(monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    """Make the update after ``SPIKE`` steps a leap, the first ``times`` times, as a fault in memory would."""
    left = [times]
    scale_at = pretrain.lr_scale_at

    def faulty(settings: config.Pretrain, step: int, total_steps: int) -> float:
        if step == SPIKE and left[0]:
            left[0] -= 1
            return 1e6
        return scale_at(settings, step, total_steps)

    monkeypatch.setattr(pretrain, "lr_scale_at", faulty)


def settings_for(shards: Path, run_dir: Path, **train: Any) -> config.Pretrain:
    return config.Pretrain.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"shards": str(shards), "num_threads": 1, "shuffle_block_size": 16},
            "model": {"size": "micro", "img_size": (64, 32)},
            "decoders": {"depth": 1},
            "regions": {"max_shift": 16},
            "train": {
                "global_batch_size": 8,
                "total_steps": TOTAL,
                "log_every": 2,
                "precision": "fp32",
                "compile": False,
                "spike_factor": 3,
                **train,
            },
            "engine": {"name": "native"},
            "checkpoint": {"every_steps": EVERY, "keep_last": 3},
        }
    )


def test_a_spike_is_undone_and_its_batches_are_left_out(shard_dir, tmp_path, monkeypatch, read, capsys):
    pretrain.run(settings_for(shard_dir, tmp_path / "long", total_steps=TOTAL + 2 * EVERY))
    whole = [*read]
    read.clear()
    break_step(monkeypatch, times=1)
    run_dir = tmp_path / "run"
    pretrain.run(settings_for(shard_dir, run_dir))
    output = capsys.readouterr().out
    # Broken at step 14, told with the line of step 16; that of 14 was taken before the broken weights were used.
    assert (
        "the loss has jumped by step 16, above 3 times what it was before: back to step 12, and on without the 4 batches"
        in output
    )
    assert len(read) == TOTAL + 4
    for i, (got, wanted) in enumerate(zip(read, whole, strict=False)):
        np.testing.assert_array_equal(got, wanted, err_msg=f"batch {i}")
    newest = portable.newest(run_dir)
    assert newest is not None
    assert (portable.step_of(newest.name), portable.read(newest).state["cursor"]) == (TOTAL, TOTAL + 4)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(2, TOTAL + 1, 2)]
    assert largest(record["loss"] for record in records) < 2 * records[0]["loss"]


def test_a_loss_that_jumps_again_and_again_ends_the_run(shard_dir, tmp_path, monkeypatch):
    break_step(monkeypatch, times=100)
    run_dir = tmp_path / "run"
    with pytest.raises(Diverged, match=r"after 2 rollbacks. Lower optim\.base_lr"):
        pretrain.run(settings_for(shard_dir, run_dir, max_rollbacks=2))
    newest = portable.newest(run_dir)
    assert newest is not None


def test_a_jump_soon_after_a_rollback_is_one_too(shard_dir, tmp_path, monkeypatch):
    """The guard compares with what was usual before the first jump, not with the first interval after it."""
    break_step(monkeypatch, times=2)
    run_dir = tmp_path / "run"
    settings = settings_for(shard_dir, run_dir, log_every=6)
    settings = settings.model_copy(update={"checkpoint": config.Checkpoint(every_steps=EVERY, keep_last=9)})
    pretrain.run(settings)
    newest = portable.newest(run_dir)
    assert newest is not None
    assert portable.read(newest).state["cursor"] > TOTAL + 6


def test_nothing_is_deleted_where_no_checkpoint_is_from_before(shard_dir, tmp_path, monkeypatch):
    break_step(monkeypatch, times=1)
    run_dir = tmp_path / "run"
    settings = settings_for(shard_dir, run_dir, log_every=8)
    settings = settings.model_copy(update={"checkpoint": config.Checkpoint(every_steps=1, keep_last=1)})
    with pytest.raises(Diverged, match="has no checkpoint from before"):
        pretrain.run(settings)
    assert portable.newest(run_dir) is not None


def test_without_an_earlier_checkpoint_the_run_ends(shard_dir, tmp_path, monkeypatch):
    break_step(monkeypatch, times=1)
    settings = settings_for(shard_dir, tmp_path / "run")
    settings = settings.model_copy(update={"checkpoint": config.Checkpoint(every_steps=1000)})
    with pytest.raises(Diverged, match=r"has no checkpoint from before. Raise checkpoint\.keep_last"):
        pretrain.run(settings)


@pytest.mark.parametrize("where", ["steps", "delete"])
def test_a_store_that_fails_at_a_rollback_ends_all_ranks_alike(shard_dir, tmp_path, monkeypatch, where):
    """The other ranks wait for the first: whatever it meets must reach them."""
    shared: list[BaseException | None] = []

    def on_first_rank(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            shared.append(error)
            raise

    def refuse(*_: Any) -> Any:
        raise UserError("refused (AccessDenied)")

    monkeypatch.setattr(remote, "steps", lambda _: [])
    monkeypatch.setattr(remote, where, refuse)
    monkeypatch.setattr(dist, "on_first_rank", on_first_rank)
    run_dir = tmp_path / "run"
    for step in (8, 12, 14):
        write_checkpoint(run_dir, portable.Checkpoint(step, {}, {}), keep_last=9)
    settings = settings_for(shard_dir, run_dir)
    settings = settings.model_copy(update={"checkpoint": config.Checkpoint(upload_to="s3://nowhere/run")})
    run = SimpleNamespace(settings=settings, step=16, cursor=16, loss_ema=1.0, world=SimpleNamespace(is_first=True))
    with pytest.raises(UserError, match="refused"):
        roll_back(cast("PretrainState", run), Spiked(12), 0)
    assert [str(error) for error in shared] == ["refused (AccessDenied)"]


def test_one_that_cannot_be_given_up_keeps_no_other_and_ends_the_run(tmp_path, monkeypatch):
    given_up: list[int] = []

    def delete(_: str, step: int) -> None:
        if step == 14:
            raise UserError("refused (AccessDenied)")
        given_up.append(step)

    for step in (14, 15, 20, 21):
        write_checkpoint(tmp_path, portable.Checkpoint(step, {}, {}), keep_last=9)
    (portable.folder(tmp_path) / "passed-over").write_text("in the way of what is moved")
    monkeypatch.setattr(remote, "delete", delete)
    monkeypatch.setattr(remote, "set_aside", lambda _, step: given_up.append(step))
    with pytest.raises(OSError, match="passed-over"):
        pretrain_state._give_up(str(tmp_path), "s3://nowhere/run", [14, 15, 20, 21], at=16)
    assert given_up == [15, 20, 21]
    assert portable.local_steps(tmp_path) == [20, 21]


def test_after_too_many_skipped_steps_the_state_is_kept_for_a_look(shard_dir, tmp_path):
    run_dir = tmp_path / "run"
    settings = settings_for(shard_dir, run_dir, max_skipped_steps=4)
    settings = settings.model_copy(update={"optim": Optim(lr=1e30, warmup_fraction=0)})
    with pytest.raises(
        Diverged, match="in 4 steps in a row, up to step 5, which read batch 4 of the order: the loss was not finite"
    ):
        pretrain.run(settings)
    dumped = portable.newest(run_dir / "diverged")
    assert dumped is not None
    assert portable.step_of(dumped.name) == 5
    assert portable.read(dumped).tensors["student"]

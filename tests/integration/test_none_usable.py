"""Checkpoints that are there and cannot be used are not the same as none: no run starts anew over them, none is deleted."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from personmae import pretrain
from personmae.__main__ import main
from personmae.checkpoint import portable, run_lock
from personmae.checkpoint import writer as writer_module
from personmae.errors import Unavailable, UserError
from personmae.monitor import run_log

pytestmark = pytest.mark.integration
PRETRAIN = [
    *("pretrain", "configs/quickstart.yaml", "train.global_batch_size=8", "train.log_every=1", "train.precision=fp32"),
    *("train.total_steps=6", "data.shuffle_block_size=16", "data.num_threads=1", "engine.name=native", "train.compile=false"),
    *("checkpoint.every_steps=2", "checkpoint.keep_last=2"),
]
MOMENTS = "exp_avg.safetensors"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, restore_signals: None) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def half(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut short: steps 2 and 4 of 6 are saved."""
    run_dir = tmp_path_factory.mktemp("half") / "run"
    os.chdir(Path(__file__).parents[2])
    assert main([*PRETRAIN, f"data.shards={shard_dir}", f"run_dir={run_dir}", "checkpoint.keep_last=9"]) == 0
    shutil.rmtree(portable.folder(run_dir) / "step-00000006")
    return run_dir


@pytest.fixture
def run_dir(half: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.fixture
def go_on(shard_dir: Path, run_dir: Path) -> Callable[..., int]:
    """Runs the same command again; returns the exit code."""
    return lambda *overrides: main([*PRETRAIN, f"data.shards={shard_dir}", f"run_dir={run_dir}", *overrides])


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def in_all(run_dir: Path, name: str) -> list[Path]:
    return [path / name for path in portable.folders(run_dir)]


def content(run_dir: Path) -> dict[str, bytes]:
    """Every file below the checkpoints, but the pointer."""
    files = [path for path in portable.folder(run_dir).rglob("*") if path.is_file() and path.name != "LATEST"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def error_line(captured: Any) -> str:
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("file", ["student.safetensors", "state.json", "manifest.json", MOMENTS])
def test_a_run_whose_checkpoints_are_all_damaged_ends_with_78_and_leaves_them(run_dir, go_on, capsys, file):
    for path in in_all(run_dir, file):
        flip(path)
    before, metrics = content(run_dir), (run_dir / "metrics.jsonl").read_bytes()
    assert go_on() == 78
    line = error_line(capsys.readouterr())
    for step in (2, 4):
        assert f"checkpoints/step-0000000{step}: " in line
    assert f"{file} does not have the size and hash" in line or "its manifest.json is not JSON" in line
    assert "start anew with checkpoint.resume=none" in line
    assert ("checkpoint.rebuild_moments=true" in line) == (file == MOMENTS)
    assert content(run_dir) == before
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_fault_that_may_pass_ends_with_1_and_the_run_goes_on_when_it_has_passed(run_dir, go_on, capsys, monkeypatch, number):
    before = content(run_dir)

    def failing(path: Path) -> str:
        raise OSError(number, os.strerror(number))  # without a name, as reading has it

    with monkeypatch.context() as patch:
        patch.setattr(portable, "_sha256", failing)
        assert go_on() == 1
    line = error_line(capsys.readouterr())
    assert line.count(f"cannot be read: {os.strerror(number)}") == 2
    assert "run this again" in line
    assert content(run_dir) == before
    assert go_on() == 0
    assert steps_of(run_dir) == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="where reading gives a real EIO")
def test_an_input_output_error_of_the_manifest_itself_falls_back_as_others_do(run_dir, go_on, capsys):
    manifests = in_all(run_dir, "manifest.json")
    kept = [path.read_bytes() for path in manifests]
    for path in manifests:
        path.unlink()
        path.symlink_to("/proc/self/mem")  # reading its first byte is EIO: nothing is mapped there
    assert go_on() == 1
    line = error_line(capsys.readouterr())
    assert line.count("manifest.json cannot be read: Input/output error") == 2
    manifests[1].unlink()
    manifests[1].write_bytes(kept[1])
    assert go_on() == 0
    output = capsys.readouterr().out
    assert "step-00000004 is passed over: manifest.json cannot be read: Input/output error" in output
    assert "resuming at step 2 of 6" in output
    assert os.readlink(portable.folder(run_dir) / "passed-over" / "step-00000004" / "manifest.json") == "/proc/self/mem"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(run_dir, go_on, capsys, monkeypatch, number):
    real = os.listdir

    def failing(path: Any = ".") -> list[str]:
        if Path(path) == portable.folder(run_dir):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    before = content(run_dir)
    monkeypatch.setattr(os, "listdir", failing)
    assert go_on() == 1
    assert f"{portable.folder(run_dir)} cannot be listed: {os.strerror(number)}" in error_line(capsys.readouterr())
    with pytest.raises(OSError, match=os.strerror(number)):
        portable.locate(run_dir)
    monkeypatch.undo()
    assert content(run_dir) == before


def test_a_run_that_is_started_anew_keeps_what_was_there_and_says_so_once(run_dir, go_on, capsys):
    for path in in_all(run_dir, "student.safetensors"):
        flip(path)
    before = {name.replace("checkpoints/", "checkpoints/passed-over/"): file for name, file in content(run_dir).items()}
    assert go_on("checkpoint.resume=none") == 0
    output = capsys.readouterr().out
    assert output.count("kept, though this run does not go on from them") == 1
    assert before.items() <= content(run_dir).items()
    assert [path.name for path in portable.folders(run_dir)] == ["step-00000006", "step-00000004"]
    assert steps_of(run_dir) == [1, 2, 3, 4, 5, 6]


def test_moments_that_are_damaged_are_made_anew_where_that_is_asked_for(run_dir, go_on, capsys):
    for path in in_all(run_dir, MOMENTS):
        flip(path)
    assert go_on("checkpoint.rebuild_moments=true") == 0
    output = capsys.readouterr().out
    assert "step-00000004: its moments cannot be used, the optimizer goes on with new ones" in output
    assert "resuming at step 4 of 6" in output
    newest = portable.newest(run_dir)
    assert newest is not None
    saved = portable.read(newest)
    assert (saved.step, saved.state["num_updates"]) == (6, 2)  # the optimizer counts from its new beginning
    assert saved.tensors["exp_avg"]


@pytest.mark.parametrize("older", [MOMENTS, "student.safetensors", "unreadable"])
def test_what_is_passed_over_below_one_with_new_moments_is_kept(run_dir, go_on, capsys, monkeypatch, older):
    flip(in_all(run_dir, MOMENTS)[0])
    second = portable.folder(run_dir) / "step-00000002"
    if older != "unreadable":
        flip(second / older)
    before = {name.replace("checkpoints/", "checkpoints/passed-over/"): file for name, file in content(run_dir).items()}
    real = portable._sha256

    def failing(path: Path) -> str:
        if older == "unreadable" and path.parent == second:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(portable, "_sha256", failing)
    assert go_on("checkpoint.rebuild_moments=true", "checkpoint.keep_last=1") == 0
    output = capsys.readouterr().out
    assert "resuming at step 4 of 6" in output
    kept = {name: file for name, file in before.items() if second.name in name}
    assert kept
    assert kept.items() <= content(run_dir).items()
    assert output.count("kept, though this run does not go on from them") == 1
    assert [path.name for path in portable.folders(run_dir)] == ["step-00000006"]


def test_moments_are_not_made_anew_where_an_older_checkpoint_is_whole(run_dir, go_on, capsys):
    flip(in_all(run_dir, MOMENTS)[0])
    assert go_on("checkpoint.rebuild_moments=true") == 0
    assert "resuming at step 2 of 6" in capsys.readouterr().out


def test_moments_are_not_made_anew_where_weights_are_damaged_too(run_dir, go_on, capsys):
    for name in (MOMENTS, "student.safetensors"):
        for path in in_all(run_dir, name):
            flip(path)
    assert go_on("checkpoint.rebuild_moments=true") == 78
    assert "student.safetensors does not have" in error_line(capsys.readouterr())


def test_a_complete_run_without_its_moments_is_complete_and_an_unfinished_one_is_not_gone_on_with(run_dir, go_on, capsys):
    for path in [*in_all(run_dir, MOMENTS), *in_all(run_dir, "exp_avg_sq.safetensors")]:
        path.unlink()
    assert go_on() == 78
    assert "checkpoint.rebuild_moments=true" in error_line(capsys.readouterr())
    assert go_on("checkpoint.rebuild_moments=true") == 0
    for path in [*in_all(run_dir, MOMENTS), *in_all(run_dir, "exp_avg_sq.safetensors")]:
        path.unlink(missing_ok=True)
    before = content(run_dir)
    capsys.readouterr()
    assert go_on() == 0
    assert "is complete: 6 of 6 steps are done" in capsys.readouterr().out
    assert content(run_dir) == before
    assert portable.read_encoder(run_dir)[0]


class Killed(Exception):  # noqa: N818 - a way to end
    """Ends a run as a crash would."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have the next run end before the update after ``step`` steps."""

    def dying(settings: Any, now: int, total_steps: int) -> float:
        if now == step:
            raise Killed
        return 1.0

    monkeypatch.setattr(pretrain, "lr_scale_at", dying)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("name", "died_at", "count", "goes_on_at"),
    [
        (None, 1, "1", 0),  # before its first checkpoint
        (None, 3, "1", 2),
        ("market-1", 3, "0", 2),  # the agent itself is started again, and its store is new
    ],
)
def test_a_run_that_its_agent_starts_again_goes_on_from_its_own_and_never_from_what_it_set_aside(
    run_dir, go_on, capsys, monkeypatch, damaged, name, died_at, count, goes_on_at
):
    if damaged:
        for path in in_all(run_dir, "student.safetensors"):
            flip(path)
    before = {name.replace("checkpoints/", "checkpoints/passed-over/"): file for name, file in content(run_dir).items()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    if name:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        die_at(patch, died_at)
        assert go_on("checkpoint.resume=none") == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    capsys.readouterr()
    assert go_on("checkpoint.resume=none") == 0
    output = capsys.readouterr().out
    assert "this start has begun anew before, so it goes on" in output
    assert (f"resuming at step {goes_on_at} of 6" if goes_on_at else "pretrain: 6 steps") in output
    assert before.items() <= content(run_dir).items()
    assert steps_of(run_dir) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in portable.folders(run_dir)] == ["step-00000006", "step-00000004"]


@pytest.mark.parametrize("environ", [{}, {"TORCHELASTIC_RUN_ID": "second", "TORCHELASTIC_RESTART_COUNT": "0"}])
def test_another_start_begins_anew_once_more(run_dir, go_on, capsys, monkeypatch, environ):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert go_on("checkpoint.resume=none", "train.total_steps=2") == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert go_on("checkpoint.resume=none", "train.total_steps=2") == 0
    aside = portable.folder(run_dir) / "passed-over"
    assert sorted(path.name for path in aside.iterdir()) == [
        "records",
        "records.2",
        "step-00000002",
        "step-00000002.2",
        "step-00000004",
    ]


def test_the_option_given_again_after_a_start_without_it_begins_anew(run_dir, go_on, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for options in (["checkpoint.resume=none"], [], ["checkpoint.resume=none"]):
        assert go_on("train.total_steps=2", *options) == 0
    assert capsys.readouterr().out.count("kept, though this run does not go on from them") == 2


def test_the_records_of_the_old_run_are_kept_when_a_run_is_started_anew(run_dir, go_on, capsys):
    (run_dir / "clusters.jsonl").write_text('{"epoch": 0, "step": 0}\n')
    (run_dir / "result.json").write_text('{"mAP": 0.5}\n')
    names = ("metrics.jsonl", "clusters.jsonl", "run.json", "config.yaml", "result.json")
    before = {name: (run_dir / name).read_bytes() for name in names}
    assert b'"step": 6' in before["metrics.jsonl"]
    assert go_on("checkpoint.resume=none") == 0
    kept = portable.folder(run_dir) / "passed-over" / "records"
    assert {name: (kept / name).read_bytes() for name in names} == before
    assert list((kept / "tensorboard").iterdir())
    assert capsys.readouterr().out.count(str(kept)) == 1
    assert not (run_dir / "result.json").exists()
    assert len(json.loads((run_dir / "run.json").read_bytes())["sessions"]) == 1


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, Unavailable), (None, UserError)])
def test_whoever_wants_the_weights_of_a_run_is_told_the_same(run_dir, monkeypatch, number, kind):
    if number is None:
        for path in in_all(run_dir, "student.safetensors"):
            flip(path)
    else:
        monkeypatch.setattr(portable, "_sha256", lambda path: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(
        kind, match=r"2 checkpoints that cannot be used, and none that can \(.*step-00000004: .*step-00000002: "
    ):
        portable.locate(run_dir)
    with pytest.raises(kind, match="step-00000002"):
        portable.locate(portable.folder(run_dir) / "step-00000002")


def test_the_lock_is_free_after_every_refusal(run_dir, go_on):
    for path in in_all(run_dir, "student.safetensors"):
        flip(path)
    assert go_on() == 78
    run_lock.lock(run_dir).close()


def test_a_log_that_cannot_be_closed_keeps_no_checkpoint_from_being_waited_for(run_dir, go_on, monkeypatch, capsys):
    closed: list[bool] = []
    real, real_log = writer_module.Writer.close, run_log.RunLog.close

    def full(log: run_log.RunLog) -> None:
        real_log(log)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_log.RunLog, "close", full)
    monkeypatch.setattr(writer_module.Writer, "close", lambda writer: (real(writer), closed.append(writer.busy)))
    die_at(monkeypatch, 5)
    assert go_on() == 78  # a full disk
    assert closed == [False]

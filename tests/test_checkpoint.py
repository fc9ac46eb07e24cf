"""The portable checkpoint: bit-exact, committed by its manifest, never lost to a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from personmae import checkpoint
from personmae.checkpoint import Checkpoint
from personmae.errors import UserError


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    student = {
        "encoder.a": torch.randn(3, 4, generator=generator),
        "encoder.b": torch.tensor([float("inf"), -0.0, 1e-42]),
        "decoder.c": torch.randn(5, generator=generator),
    }
    teacher = {"a": torch.randn(3, 4, generator=generator), "b": torch.zeros(3), "count": torch.tensor(7)}
    return Checkpoint(step, {"student": student, "teacher": teacher}, {"seed": 3, "total_steps": 4, "model": {"size": "micro"}})


def write(run: Path, *steps: int, keep_last: int = 2) -> list[Path]:
    return [checkpoint.write(run, make(step), keep_last=keep_last) for step in steps]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run).iterdir())


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_is_read_is_what_was_written_bit_by_bit(tmp_path):
    written = make(12)
    path = checkpoint.write(tmp_path, written, keep_last=2)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    read = checkpoint.read(path)
    assert read.step == 12
    assert read.state == {"step": 12} | written.state
    assert read.tensors.keys() == written.tensors.keys()
    for kind, tensors in written.tensors.items():
        assert read.tensors[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read.tensors[kind][name].dtype == tensor.dtype
            assert read.tensors[kind][name].numpy().tobytes() == tensor.numpy().tobytes()


def test_nothing_in_it_is_a_pickle(tmp_path):
    (path,) = write(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_tensors_that_share_memory_or_are_strided_are_written_whole(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tied = {"a": base.T, "b": base[:, ::2], "c": base.clone().requires_grad_()}
    read = checkpoint.read(checkpoint.write(tmp_path, Checkpoint(1, {"student": tied}, {}), keep_last=1))
    for name, tensor in tied.items():
        assert torch.equal(read.tensors["student"][name], tensor)


def test_the_newest_is_found_and_latest_points_at_it(tmp_path):
    paths = write(tmp_path, 1, 2, 10)
    assert checkpoint.newest(tmp_path) == paths[-1]
    assert (checkpoint.folder(tmp_path) / "LATEST").read_text() == "step-00000010"


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_only_the_last_few_are_kept(tmp_path, keep_last):
    write(tmp_path, 1, 2, 3, 4, keep_last=keep_last)
    assert names(tmp_path) == ["LATEST", *(f"step-{step:08}" for step in range(5 - keep_last, 5))]


@pytest.mark.parametrize("file", ["student.safetensors", "teacher.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["spoiled", "missing", "truncated"])
def test_a_damaged_newest_is_passed_over_and_named(tmp_path, capsys, file, damage):
    older, newer = write(tmp_path, 1, 2)
    if damage == "spoiled":
        spoil(newer / file)
    elif damage == "missing":
        (newer / file).unlink()
    else:
        (newer / file).write_bytes((newer / file).read_bytes()[:-1])
    assert checkpoint.newest(tmp_path) == older
    printed = capsys.readouterr().out
    assert f"checkpoint {newer} is passed over: {file}" in printed
    assert checkpoint.find_fault(older) is None


def test_without_a_manifest_or_with_half_of_one_it_does_not_count(tmp_path):
    older, newer = write(tmp_path, 1, 2)
    manifest = newer / "manifest.json"
    manifest.write_text(manifest.read_text()[:-5])
    assert checkpoint.find_fault(newer) == "its manifest.json is not JSON"
    manifest.unlink()
    assert checkpoint.find_fault(newer) == "it has no manifest.json"
    assert checkpoint.newest(tmp_path) == older


def test_the_manifest_lists_every_file_and_is_written_last(tmp_path):
    (path,) = write(tmp_path, 1)
    files = {file.name: file.stat() for file in path.iterdir()}
    manifest = json.loads((path / "manifest.json").read_text())
    assert files.keys() == manifest.keys() | {"manifest.json"}
    last = files.pop("manifest.json").st_mtime_ns
    assert all(stat.st_mtime_ns <= last for stat in files.values())
    assert {name: stat.st_size for name, stat in files.items()} == {n: entry["bytes"] for n, entry in manifest.items()}


@pytest.mark.parametrize("moment", ["_save_tensors", "_write_synced", "_fingerprint"])
def test_an_error_while_writing_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch, moment):
    (older,) = write(tmp_path, 1)
    calls, real = [], getattr(checkpoint, moment)

    def fails_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(5, "the disk is gone")
        return real(*args)

    monkeypatch.setattr(checkpoint, moment, fails_the_second_time)
    with pytest.raises(OSError, match="the disk is gone"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["LATEST", "step-00000001"]
    assert checkpoint.newest(tmp_path) == older


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from personmae import checkpoint
moment, run = sys.argv[1], Path(sys.argv[2])
state = checkpoint.Checkpoint(2, {"student": {"a": torch.ones(3)}, "teacher": {"a": torch.ones(3)}}, {})
calls, real = [], checkpoint._write_synced
def write(path, text):
    if path.name == moment:
        path.write_text(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, text)
checkpoint._write_synced = write
checkpoint.write(run, state, keep_last=2)
"""


@pytest.mark.integration
@pytest.mark.parametrize(("moment", "expected"), [("state.json", 1), ("manifest.json", 1), (".LATEST", 2)])
def test_a_kill_at_any_moment_leaves_a_run_that_goes_on(tmp_path, moment, expected):
    write(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.read(newest).step == expected
    write(tmp_path, 2, 3)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["LATEST", "step-00000002", "step-00000003"]


def test_a_step_written_again_replaces_the_earlier_one(tmp_path):
    write(tmp_path, 5)
    other = Checkpoint(5, {"student": {"x": torch.ones(1)}}, {})
    path = checkpoint.write(tmp_path, other, keep_last=2)
    assert checkpoint.newest(tmp_path) == path
    assert list(checkpoint.read(path).tensors["student"]) == ["x"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_run_that_fell_back_does_not_delete_what_it_writes(tmp_path, keep_last):
    paths = write(tmp_path, 1, 2, 3, keep_last=3)
    for path in paths[1:]:
        spoil(path / "student.safetensors")  # the run goes on from step 1 and saves before it reaches step 2 again
    written = checkpoint.write(tmp_path, Checkpoint(1, make(1).tensors, {"again": True}), keep_last=keep_last)
    assert written.exists()
    assert checkpoint.newest(tmp_path) == written


def test_a_checkpoint_is_located_by_its_folder_or_its_run(tmp_path):
    older, newer = write(tmp_path, 1, 2)
    assert checkpoint.locate(tmp_path) == newer
    assert checkpoint.locate(str(older)) == older


def test_a_damaged_folder_given_by_name_is_refused(tmp_path):
    _, newer = write(tmp_path, 1, 2)
    spoil(newer / "teacher.safetensors")
    with pytest.raises(UserError, match=r"step-00000002 is damaged: teacher\.safetensors .*; use another one of its run"):
        checkpoint.locate(newer)


def test_a_place_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has none: train it first"):
        checkpoint.locate(tmp_path)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_an_encoder_is_read_by_timms_names_with_its_model_settings(tmp_path, kind):
    write(tmp_path, 4)
    tensors, model = checkpoint.read_encoder(tmp_path, kind)
    assert model == {"size": "micro"}
    written = make(4).tensors[kind]
    assert tensors.keys() == ({"a", "b"} if kind == "student" else {"a", "b", "count"})
    assert all(torch.equal(tensors[n], written[f"encoder.{n}" if kind == "student" else n]) for n in tensors)


def test_an_encoder_of_an_unfinished_run_must_be_asked_for_by_its_checkpoint(tmp_path):
    (path,) = write(tmp_path, 3)
    with pytest.raises(UserError, match=rf"{tmp_path} must be a finished run and is at step 3 of 4; .*{path}"):
        checkpoint.read_encoder(tmp_path)
    tensors, _ = checkpoint.read_encoder(path)
    assert torch.equal(tensors["a"], make(3).tensors["student"]["encoder.a"])


def test_the_encoder_of_a_run_that_is_not_finished_is_refused_unless_the_checkpoint_is_named(tmp_path):
    half = make(4)
    path = checkpoint.write(tmp_path, Checkpoint(4, half.tensors, half.state | {"total_steps": 9}), keep_last=1)
    with pytest.raises(UserError, match=r"must be a finished run and is at step 4 of 9; .*name the checkpoint itself"):
        checkpoint.read_encoder(tmp_path)
    assert checkpoint.read_encoder(path)[1] == {"size": "micro"}


def test_weights_that_do_not_fit_are_told_by_name_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(4), "1.weight": torch.ones(1, 3), "extra": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        checkpoint.load_strictly(model, given, "some/run")
    assert str(caught.value) == (
        "the weights of some/run must fit the model, but: 1 missing (1.bias); 1 not known (extra); "
        "1 of another shape (0.bias); use the configuration they were trained with"
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_that_fit_are_loaded():
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.load_strictly(model, dict(other.state_dict()), "x")
    assert torch.equal(model.weight, other.weight)


def test_copies_on_the_cpu_are_fp32_and_do_not_change_with_the_original():
    source = {"w": torch.ones(3, dtype=torch.bfloat16, requires_grad=True), "n": torch.tensor(3)}
    copy = checkpoint.to_cpu(source)
    with torch.no_grad():
        source["w"].add_(1)
    assert (copy["w"].dtype, copy["n"].dtype) == (torch.float32, torch.int64)
    assert copy["w"].tolist() == [1.0] * 3
    assert not copy["w"].requires_grad


def test_a_full_disk_is_told_as_such(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint._write_synced(Path("/dev/full"), "x" * 100_000)
    assert caught.value.errno == 28


def test_versions_name_what_computes():
    assert checkpoint.versions()["torch"] == torch.__version__.split("+")[0] or checkpoint.versions()["torch"]
    assert {"personmae", "torch", "deepspeed"} <= checkpoint.versions().keys()


def test_a_copied_run_is_still_whole(tmp_path):
    write(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    found = checkpoint.newest(tmp_path / "copy")
    assert found is not None
    assert checkpoint.read(found).step == 1

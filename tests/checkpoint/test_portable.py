"""The portable checkpoint: bit-exact, committed by its manifest, never lost to a kill."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from on_disk import write_checkpoint
from safetensors.torch import load_file
from torch import nn

from personmae.checkpoint import commit, host_copy, portable
from personmae.checkpoint.portable import Checkpoint
from personmae.errors import RankError, UserError


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
    return [write_checkpoint(run, make(step), keep_last=keep_last) for step in steps]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in portable.folder(run).iterdir())


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_is_read_is_what_was_written_bit_by_bit(tmp_path):
    written = make(12)
    path = write_checkpoint(tmp_path, written, keep_last=2)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    read = portable.read(path)
    assert read.step == 12
    assert read.state == {"step": 12, "format": portable.FORMAT} | written.state
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
    read = portable.read(write_checkpoint(tmp_path, Checkpoint(1, {"student": tied}, {}), keep_last=1))
    for name, tensor in tied.items():
        assert torch.equal(read.tensors["student"][name], tensor)


def test_the_newest_is_found_and_latest_points_at_it(tmp_path):
    paths = write(tmp_path, 1, 2, 10)
    assert portable.newest(tmp_path) == paths[-1]
    assert (portable.folder(tmp_path) / "LATEST").read_text() == "step-00000010"


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert portable.newest(tmp_path) is None
    assert portable.newest(tmp_path / "nowhere") is None


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
    assert portable.newest(tmp_path) == older
    printed = capsys.readouterr().out
    assert f"checkpoint {newer} is passed over: {file}" in printed
    assert portable.find_fault(older) is None


def test_without_a_manifest_or_with_half_of_one_it_does_not_count(tmp_path):
    older, newer = write(tmp_path, 1, 2)
    manifest = newer / "manifest.json"
    manifest.write_text(manifest.read_text()[:-5])
    assert str(portable.find_fault(newer)) == "its manifest.json is not JSON"
    manifest.unlink()
    assert str(portable.find_fault(newer)) == "it has no manifest.json"
    assert portable.newest(tmp_path) == older


def test_the_manifest_lists_every_file_and_is_written_last(tmp_path):
    (path,) = write(tmp_path, 1)
    files = {file.name: file.stat() for file in path.iterdir()}
    manifest = json.loads((path / "manifest.json").read_text())
    assert files.keys() == manifest.keys() | {"manifest.json"}
    last = files.pop("manifest.json").st_mtime_ns
    assert all(stat.st_mtime_ns <= last for stat in files.values())
    assert {name: stat.st_size for name, stat in files.items()} == {n: entry["bytes"] for n, entry in manifest.items()}


@pytest.mark.parametrize(("module", "moment"), [(host_copy, "_put"), (commit, "_write_synced")])
def test_an_error_while_writing_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch, module, moment):
    (older,) = write(tmp_path, 1)
    calls, real = [], getattr(module, moment)

    def fails_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(5, "the disk is gone")
        return real(*args)

    monkeypatch.setattr(module, moment, fails_the_second_time)
    with pytest.raises(OSError, match="the disk is gone"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["LATEST", "step-00000001"]
    assert portable.newest(tmp_path) == older


def test_a_step_written_again_replaces_the_earlier_one(tmp_path):
    write(tmp_path, 5)
    other = Checkpoint(5, {"student": {"x": torch.ones(1)}}, {})
    path = write_checkpoint(tmp_path, other, keep_last=2)
    assert portable.newest(tmp_path) == path
    assert list(portable.read(path).tensors["student"]) == ["x"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_run_that_fell_back_does_not_delete_what_it_writes(tmp_path, keep_last):
    paths = write(tmp_path, 1, 2, 3, keep_last=3)
    for path in paths[1:]:
        spoil(path / "student.safetensors")  # the run goes on from step 1 and saves before it reaches step 2 again
    written = write_checkpoint(tmp_path, Checkpoint(1, make(1).tensors, {"again": True}), keep_last=keep_last)
    assert written.exists()
    assert portable.newest(tmp_path) == written


def test_a_checkpoint_is_located_by_its_folder_or_its_run(tmp_path):
    older, newer = write(tmp_path, 1, 2)
    assert portable.locate(tmp_path) == newer
    assert portable.locate(str(older)) == older


def test_a_damaged_folder_given_by_name_is_refused(tmp_path):
    _, newer = write(tmp_path, 1, 2)
    spoil(newer / "teacher.safetensors")
    with pytest.raises(UserError, match=r"step-00000002 is damaged: teacher\.safetensors .*\. Use another one of its run"):
        portable.locate(newer)


def test_a_place_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has none: train it first"):
        portable.locate(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/typo does not exist"):
        portable.locate(tmp_path / "typo")


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_an_encoder_is_read_by_timms_names_with_its_model_settings(tmp_path, kind):
    write(tmp_path, 4)
    tensors, model = portable.read_encoder(tmp_path, kind)
    assert model == {"size": "micro"}
    written = make(4).tensors[kind]
    assert tensors.keys() == ({"a", "b"} if kind == "student" else {"a", "b", "count"})
    assert all(torch.equal(tensors[n], written[f"encoder.{n}" if kind == "student" else n]) for n in tensors)


def test_an_encoder_of_an_unfinished_run_must_be_asked_for_by_its_checkpoint(tmp_path):
    (path,) = write(tmp_path, 3)
    with pytest.raises(UserError, match=rf"{tmp_path} must be a finished run and is at step 3 of 4\. .*{path}"):
        portable.read_encoder(tmp_path)
    tensors, _ = portable.read_encoder(path)
    assert torch.equal(tensors["a"], make(3).tensors["student"]["encoder.a"])


def test_the_encoder_of_a_run_that_is_not_finished_is_refused_unless_the_checkpoint_is_named(tmp_path):
    half = make(4)
    path = write_checkpoint(tmp_path, Checkpoint(4, half.tensors, half.state | {"total_steps": 9}), keep_last=1)
    with pytest.raises(UserError, match=r"must be a finished run and is at step 4 of 9\. .*name the checkpoint itself"):
        portable.read_encoder(tmp_path)
    assert portable.read_encoder(path)[1] == {"size": "micro"}


def test_weights_that_do_not_fit_are_told_by_name_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(4), "1.weight": torch.ones(1, 3), "extra": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        portable.load_strictly(model, given, "some/run")
    assert str(caught.value) == (
        "the weights of some/run must fit the model, but: 1 missing (1.bias); 1 not known (extra); "
        "1 of another shape (0.bias). Use the configuration they were trained with"
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_that_fit_are_loaded():
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    portable.load_strictly(model, dict(other.state_dict()), "x")
    assert torch.equal(model.weight, other.weight)


# --- parts of several ranks ---


def part_of(state: Checkpoint, rank: int) -> host_copy.HostCopy:
    """Every second tensor."""
    taken = host_copy.HostCopy()
    taken.take({kind: dict(list(tensors.items())[rank::2]) for kind, tensors in state.tensors.items()})
    return taken


def commit_parts(run: Path) -> Path:
    """Two ranks, one after the other."""
    partial = portable.folder(run) / ".partial-step-00000005"
    barriers = iter([lambda: commit._write_part(partial, part_of(make(5), 1), 1, 2), lambda: None])
    return commit.commit(run, 5, part_of(make(5), 0), make(5).state, world_size=2, barrier=lambda: next(barriers)())


def test_parts_of_several_ranks_are_joined(tmp_path):
    state, path = make(5), commit_parts(tmp_path)
    assert (path / "student-00002-of-00002.safetensors").is_file()
    assert portable.newest(tmp_path) == path
    read = portable.read(path)
    assert read.tensors.keys() == state.tensors.keys()
    for kind, tensors in state.tensors.items():
        assert {n: t.tolist() for n, t in read.tensors[kind].items()} == {n: t.tolist() for n, t in tensors.items()}
        assert portable.read_kind(path, kind).keys() == tensors.keys()


def test_a_rank_may_have_no_tensor_of_a_kind(tmp_path):
    none = host_copy.HostCopy()
    none.take({kind: {} for kind in make(5).tensors})
    partial, whole = portable.folder(tmp_path) / ".partial-step-00000005", host_copy.HostCopy()
    whole.take(make(5).tensors)
    barriers = iter([lambda: commit._write_part(partial, none, 1, 2), lambda: None])
    path = commit.commit(tmp_path, 5, whole, {}, world_size=2, barrier=lambda: next(barriers)())
    assert portable.newest(tmp_path) == path
    assert load_file(path / "student-00002-of-00002.safetensors") == {}
    assert portable.read(path).tensors["student"].keys() == make(5).tensors["student"].keys()


def test_a_part_that_is_missing_is_a_fault_even_where_the_manifest_does_not_know(tmp_path):
    path = commit_parts(tmp_path)
    files = json.loads((path / "manifest.json").read_text())
    del files["teacher-00001-of-00002.safetensors"]
    (path / "manifest.json").write_text(json.dumps(files))
    assert str(portable.find_fault(path)) == "teacher-00001-of-00002.safetensors is missing"


def test_without_the_part_of_a_rank_nothing_is_committed(tmp_path):
    taken = host_copy.HostCopy()
    taken.take(make(5).tensors)
    with pytest.raises(RankError, match=r"needs the parts of all 2 ranks\. 1 are in .*: see the other ranks' errors"):
        commit.commit(tmp_path, 5, taken, {}, world_size=2)
    assert names(tmp_path) == []


def test_a_rank_whose_first_rank_could_not_begin_says_where_to_look(tmp_path):
    with pytest.raises(RankError, match=r"\.partial-step-00000005 is not there: see the first rank's error"):
        commit.commit(tmp_path, 5, part_of(make(5), 1), {}, rank=1, world_size=2)


# --- what is found ---


def test_a_folder_that_was_being_replaced_is_still_found(tmp_path):
    (path,) = write(tmp_path, 5)
    path.rename(path.with_name(f".old-{path.name}"))
    found = portable.newest(tmp_path)
    assert found is not None
    assert portable.read(found).step == 5
    (path,) = write(tmp_path, 5)
    assert portable.newest(tmp_path) == path
    assert names(tmp_path) == ["LATEST", path.name]


ENTRY = '{"bytes": 1, "sha256": ""}'


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", '{"state.json": 3}', f'{{"../state.json": {ENTRY}}}', '{"state.json": {"bytes": "1", "sha256": ""}}'),
        *(f'{{"state.json": {ENTRY}, "{name}": {ENTRY}}}' for name in ("..", ".", "", "manifest.json")),
    ],
)
def test_a_manifest_of_another_form_is_a_fault(tmp_path, content):
    (path,) = write(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    assert portable.parse_manifest(content.encode())[0] == {}
    assert str(portable.find_fault(path)).startswith("its manifest.json ")


@pytest.mark.parametrize(
    ("error", "output"),
    [(OSError(5, "Input/output error"), "cannot be read: Input/output error"), (FileNotFoundError(2, "gone"), "is missing")],
)
def test_a_file_that_the_disk_does_not_give_back_or_that_is_deleted_meanwhile_is_passed_over(
    tmp_path, monkeypatch, capsys, error, output
):
    older, newer = write(tmp_path, 1, 2)
    real = portable._sha256

    def fails(path: Path) -> str:
        if path == newer / "teacher.safetensors":
            raise error
        return real(path)

    monkeypatch.setattr(portable, "_sha256", fails)
    assert portable.newest(tmp_path) == older
    assert f"{newer} is passed over: teacher.safetensors {output}" in capsys.readouterr().out


def test_a_file_that_may_not_be_read_is_an_error_and_no_reason_to_go_further_back(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(portable, "_sha256", refused)
    with pytest.raises(PermissionError):
        portable.newest(tmp_path)


def test_tensors_are_mapped_from_the_file_and_take_no_memory_before_they_are_read(tmp_path):
    def anonymous_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    megabytes = 64
    large = {"student": {"w": torch.ones(megabytes << 18)}}
    path = write_checkpoint(tmp_path, Checkpoint(1, large, {}), keep_last=1)
    before = anonymous_kib()
    read = portable.read(path)
    assert read.tensors["student"]["w"].sum() == megabytes << 18
    assert anonymous_kib() - before < megabytes * 1024 // 4


def test_folders_with_other_names_are_left_alone(tmp_path):
    (portable.folder(tmp_path) / "step-by-step").mkdir(parents=True)
    (path,) = write(tmp_path, 1)
    assert portable.newest(tmp_path) == path
    assert portable.local_steps(tmp_path) == [1]
    assert "step-by-step" in names(tmp_path)


def test_versions_name_what_computes():
    """Compared with what the modules say of themselves, where the package's record may add a build."""
    versions = portable.versions()
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert versions["numpy"] == numpy.__version__
    assert {"personmae", "deepspeed", "timm"} <= versions.keys()


def test_a_copied_run_is_still_whole(tmp_path):
    write(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    found = portable.newest(tmp_path / "copy")
    assert found is not None
    assert portable.read(found).step == 1

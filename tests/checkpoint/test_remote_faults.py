"""A store whose checkpoints cannot be used, or that cannot be reached: nothing of it is deleted, no run starts anew over it."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import write_checkpoint

from personmae import dist
from personmae.checkpoint import portable, remote, resume_point, start_anew
from personmae.checkpoint.portable import Checkpoint
from personmae.checkpoint.resume_point import Found
from personmae.checkpoint.writer import Writer
from personmae.errors import Unavailable, UserError
from personmae.system import storage

MOMENTS = "exp_avg.safetensors"


@pytest.fixture
def store(s3_server: Any) -> str:
    return f"s3://{s3_server.bucket('runs')}/run"


@pytest.fixture
def objects(s3_server: Any) -> Any:
    """Everything in the store, by key."""

    def read() -> dict[str, bytes]:
        return {key: s3_server.client.get_object(Bucket="runs", Key=key)["Body"].read() for key in s3_server.keys("runs")}

    return read


def make(step: int, total_steps: int = 9) -> Checkpoint:
    tensors = {kind: {"w": torch.full((4,), float(step))} for kind in ("student", "exp_avg")}
    return Checkpoint(step, tensors, {"total_steps": total_steps})


def send(run: Path, store: str, *steps: int) -> None:
    for step in steps:
        path = write_checkpoint(run, make(step), keep_last=99)
        remote.send(store, path, step, set())


def spoil(s3_server: Any, step: int, name: str = "student.safetensors") -> None:
    key = f"run/{portable.name_of(step)}/{name}"
    content = bytearray(s3_server.client.get_object(Bucket="runs", Key=key)["Body"].read())
    content[-1] ^= 1
    s3_server.client.put_object(Bucket="runs", Key=key, Body=bytes(content))


def test_a_store_whose_checkpoints_are_all_damaged_is_an_error_that_names_each(tmp_path, store, s3_server, objects):
    send(tmp_path / "lost", store, 1, 2)
    for step in (1, 2):
        spoil(s3_server, step)
    before = objects()
    with pytest.raises(UserError) as caught:
        resume_point.newest(tmp_path / "run", store)
    for step in (1, 2):
        assert f"{store}/step-0000000{step}: student.safetensors does not have" in str(caught.value)
    assert "checkpoint.resume=none" in str(caught.value)
    assert objects() == before


def test_an_upload_that_was_cut_short_is_no_checkpoint_that_was_lost(tmp_path, store, capsys):
    path = write_checkpoint(tmp_path / "lost", make(1), keep_last=1)
    storage.upload(f"{store}/step-00000001", "student.safetensors", path / "student.safetensors")
    assert resume_point.newest(tmp_path / "run", store) is None
    assert f"{store}/step-00000001 is passed over: it has no manifest.json" in capsys.readouterr().out


def test_a_store_that_cannot_be_reached_is_not_an_empty_one_and_may_come_back(tmp_path, store, monkeypatch, fresh_s3_client):
    write_checkpoint(tmp_path / "run", make(1), keep_last=1)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fresh_s3_client()
    with pytest.raises(Unavailable, match=rf"listing {store} failed: .*run this again"):
        resume_point.newest(tmp_path / "run", store)


@pytest.mark.parametrize("content", [b"", b"step-", b"\xff\xfe", b"passed-over"])
def test_a_pointer_that_names_nothing_is_damage_and_a_missing_one_is_not(tmp_path, store, monkeypatch, content):
    monkeypatch.setattr(storage, "list_folders", lambda _: None)
    assert resume_point.newest(tmp_path / "run", store) is None
    storage.write(store, "LATEST", content)
    with pytest.raises(UserError, match="LATEST must name a checkpoint like step-00001000 and has"):
        resume_point.newest(tmp_path / "run", store)


def test_what_a_run_passes_over_in_its_store_is_moved_and_never_deleted(tmp_path, store, s3_server, objects, capsys):
    send(tmp_path / "lost", store, 1, 2, 3)
    for step in (2, 3):
        spoil(s3_server, step)
    passed = {key.replace("run/", "run/passed-over/"): file for key, file in objects().items() if "step-00000001" not in key}
    passed.pop("run/passed-over/LATEST")
    found = resume_point.newest(tmp_path / "run", store)
    assert found is not None
    writer = Writer(tmp_path / "run", keep_last=1, upload_to=store, resumed=found.path)
    for step in (2, 4):  # one of a step that was passed over, one beyond
        writer.save(make(step), wait=True)
        while writer._queue or writer._in_upload:
            assert writer._uploading
            assert writer._uploading.is_alive()
    writer.close()
    assert passed.items() <= objects().items()
    assert remote.steps(store) == [4]
    assert storage.read(store, "LATEST") == b"step-00000004"
    assert "kept, though this run does not go on from them" in capsys.readouterr().out


def test_a_run_started_anew_takes_the_place_of_the_old_one_in_the_store(tmp_path, store, objects):
    """Else the next start on an empty disk would go on from the old run, which is further."""
    send(tmp_path / "old", store, 7, 8)
    old = {key: file for key, file in objects().items() if "step-" in key}
    writer = Writer(tmp_path / "run", keep_last=2, upload_to=store)
    writer.save(make(1), wait=True)
    writer.close()
    assert remote.steps(store) == [1]
    assert {key.replace("run/", "run/passed-over/"): file for key, file in old.items()}.items() <= objects().items()
    found = resume_point.newest(tmp_path / "elsewhere", store)
    assert found is not None
    assert found.read().step == 1


def test_a_start_anew_leaves_nothing_to_go_on_from_in_the_store_either(tmp_path, store, objects, monkeypatch, capsys):
    """Before the first step: an agent may start the ranks again before anything is saved."""
    send(tmp_path / "old", store, 7, 8)
    old = {key.replace("run/", "run/passed-over/"): file for key, file in objects().items() if "step-" in key}
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text("{}")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "market-1")
    for number, again in enumerate((False, True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        assert start_anew.may_be_complete(run, "none") is again
        assert start_anew.goes_on(run, resume="none", upload_to=store) is again
        assert resume_point.newest_for_all(run, store) is None
    assert {key: file for key, file in objects().items() if "step-" in key} == old
    assert not (run / "result.json").exists()
    output = capsys.readouterr().out
    assert output.count("kept, though this run does not go on from them") == 1
    assert all(output.count(f"{store}/passed-over/step-0000000{step}") == 1 for step in (7, 8))


def test_a_store_that_cannot_move_what_it_holds_lets_no_run_begin_anew(tmp_path, store, objects, monkeypatch):
    send(tmp_path / "old", store, 7)
    before = objects()
    monkeypatch.setattr(storage, "list_folders", lambda _: None)
    monkeypatch.setattr(storage, "list_sizes", lambda _: None)
    with pytest.raises(UserError, match=r"this store cannot move it\. Move it yourself"):
        start_anew.goes_on(tmp_path / "run", resume="none", upload_to=store)
    assert objects() == before
    assert not start_anew.may_be_complete(tmp_path / "run", "none")


def test_moments_that_the_store_has_lost_are_made_anew_where_that_is_asked_for(tmp_path, store, s3_server):
    send(tmp_path / "lost", store, 3)
    spoil(s3_server, 3, MOMENTS)
    with pytest.raises(UserError, match=r"exp_avg\.safetensors does not have .*checkpoint\.rebuild_moments=true goes on"):
        resume_point.newest(tmp_path / "run", store)
    found = resume_point.newest(tmp_path / "run", store, rebuild_moments=True)
    assert found == Found(portable.folder(tmp_path / "run") / "step-00000003", moments=False)
    assert found is not None
    assert found.read().tensors.keys() == {"student"}


def test_what_is_passed_over_below_new_moments_is_kept_in_the_store_too(tmp_path, store, s3_server, objects):
    send(tmp_path / "lost", store, 1, 2, 3)
    for step, name in ((3, MOMENTS), (2, MOMENTS), (1, "student.safetensors")):
        spoil(s3_server, step, name)
    passed = {key.replace("run/", "run/passed-over/"): file for key, file in objects().items() if "step-00000003" not in key}
    passed.pop("run/passed-over/LATEST")
    found = resume_point.newest_for_all(tmp_path / "run", store, rebuild_moments=True)
    assert found == Found(portable.folder(tmp_path / "run") / "step-00000003", moments=False)
    assert remote.steps(store) == [3]
    writer = Writer(tmp_path / "run", keep_last=1, upload_to=store, resumed=found and found.path)
    writer.save(make(4), wait=True)
    writer.close()
    assert passed.items() <= objects().items()


@pytest.mark.parametrize("total_steps", [3, 9])
def test_only_a_complete_run_may_lack_its_moments_in_the_store(tmp_path, store, s3_server, total_steps):
    path = write_checkpoint(tmp_path / "lost", make(3, total_steps), keep_last=1)
    (path / MOMENTS).unlink()
    remote.send(store, path, 3, set())  # a complete run is uploaded without them too
    if total_steps == 3:
        found = resume_point.newest(tmp_path / "run", store)
        assert found is not None
        assert (found.moments, found.read().step) == (False, 3)
    else:
        with pytest.raises(UserError, match=r"exp_avg\.safetensors is missing"):
            resume_point.newest(tmp_path / "run", store)


def test_what_other_hosts_cannot_see_is_given_to_them_through_the_store(tmp_path, store, monkeypatch):
    """As after a kill before the first upload: the checkpoint is whole on one host and nowhere else."""
    path = write_checkpoint(tmp_path / "run", make(1), keep_last=1)
    answers = iter([(False, False, True), (False, False, False)])
    monkeypatch.setattr(dist, "any_ranks", lambda *_: next(answers))
    assert resume_point.newest_for_all(tmp_path / "run", store) == Found(path)
    assert remote.steps(store) == [1]
    shutil.rmtree(path)
    assert resume_point.newest(tmp_path / "elsewhere", store) is not None


def test_what_no_other_host_can_use_is_an_error_of_all_and_not_a_new_run(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "run", make(1), keep_last=1)
    monkeypatch.setattr(dist, "any_ranks", lambda *_: (False, False, True))
    with pytest.raises(UserError, match=f"{path}: another host can neither see nor fetch it"):
        resume_point.newest_for_all(tmp_path / "run")


# --- the records of a run ---


def record_steps(run: Path, *steps: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps))


def test_a_run_on_an_empty_disk_has_its_whole_records(tmp_path, store):
    record_steps(tmp_path / "lost", 1, 2, 3)
    for name in ("run.json", "config.yaml", "clusters.jsonl"):
        (tmp_path / "lost" / name).write_text(f"{name}\n")
    with (tmp_path / "lost" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # a line that is being written
    send(tmp_path / "lost", store, 3)
    assert resume_point.newest(tmp_path / "run", store)
    assert {name: (tmp_path / "run" / name).read_text() for name in remote.RECORDS} == {
        "metrics.jsonl": "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)),
        **{name: f"{name}\n" for name in ("run.json", "config.yaml", "clusters.jsonl")},
    }


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have reading a file fail."""
    real = Path.read_bytes

    def fail(path: Path) -> None:
        def read(asked: Path) -> bytes:
            if asked == path:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(asked))
            return real(asked)

        monkeypatch.setattr(Path, "read_bytes", read)

    return fail


def test_a_record_that_cannot_be_read_keeps_no_checkpoint_from_its_store(tmp_path, store, failing, capsys):
    lost = tmp_path / "lost"
    record_steps(lost, 1, 2, 3)
    (lost / "clusters.jsonl").write_text("{}\n")
    failing(lost / "clusters.jsonl")
    writer = Writer(lost, keep_last=2, upload_to=store)
    for step in (1, 2):
        writer.save(make(step), wait=True)
        while writer._queue or writer._in_upload:
            assert writer._uploading
            assert writer._uploading.is_alive()
    writer.close()
    assert remote.steps(store) == [1, 2]
    assert storage.read(f"{store}/step-00000002", "metrics.jsonl") == (lost / "metrics.jsonl").read_bytes()
    assert storage.read(f"{store}/step-00000002", "clusters.jsonl") is None
    assert capsys.readouterr().out.count(f"{lost / 'clusters.jsonl'} is not copied with it: [Errno 5]") == 1


def test_a_record_that_the_store_refuses_keeps_no_checkpoint_from_it(tmp_path, store, monkeypatch, capsys):
    real = storage.write

    def write(root: str, name: str, content: bytes) -> None:
        if name == "run.json":
            raise UserError("writing was refused (AccessDenied)")
        real(root, name, content)

    record_steps(tmp_path / "lost", 1)
    (tmp_path / "lost" / "run.json").write_text("{}")
    monkeypatch.setattr(storage, "write", write)
    send(tmp_path / "lost", store, 1)
    assert storage.read(f"{store}/step-00000001", "manifest.json") is not None
    assert "run.json is not copied with it: writing was refused" in capsys.readouterr().out


def test_a_record_that_cannot_be_brought_keeps_no_run_from_going_on(tmp_path, store, failing, capsys):
    record_steps(tmp_path / "lost", 1, 2, 3)
    (tmp_path / "lost" / "run.json").write_text("{}")
    send(tmp_path / "lost", store, 3)
    record_steps(tmp_path / "run", 1)
    here = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    failing(tmp_path / "run" / "metrics.jsonl")
    assert resume_point.newest(tmp_path / "run", store)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().encode() == here  # what cannot be read is not written over
    assert (tmp_path / "run" / "run.json").read_text() == "{}"
    assert "metrics.jsonl is not copied with it: [Errno 5]" in capsys.readouterr().out


@pytest.mark.parametrize(("here", "expected"), [((1, 2), (1, 2, 3)), ((1, 2, 3, 4), (1, 2, 3, 4))])
def test_of_two_records_the_longer_is_kept(tmp_path, store, here, expected):
    record_steps(tmp_path / "lost", 1, 2, 3)
    send(tmp_path / "lost", store, 3)
    record_steps(tmp_path / "run", *here)
    assert resume_point.newest(tmp_path / "run", store)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*expected]


def test_the_records_of_the_old_run_stay_with_its_checkpoint_when_a_run_is_started_anew(tmp_path, store):
    record_steps(tmp_path / "old", 1, 2, 3)
    send(tmp_path / "old", store, 3)
    old = (tmp_path / "old" / "metrics.jsonl").read_bytes()
    writer = Writer(tmp_path / "run", keep_last=2, upload_to=store)
    record_steps(tmp_path / "run", 1)
    writer.save(make(1), wait=True)
    writer.close()
    assert storage.read(f"{store}/passed-over/step-00000003", "metrics.jsonl") == old

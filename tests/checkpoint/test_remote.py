"""Which checkpoint a run resumes, from its directory and an S3 store over real HTTP."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from boto3.session import Session
from on_disk import write_checkpoint

from personmae import dist
from personmae.checkpoint import portable, remote, resume_point
from personmae.checkpoint.portable import Checkpoint
from personmae.checkpoint.resume_point import Found
from personmae.errors import RankError, RankUnavailable, Unavailable, UserError
from personmae.system import storage

BUCKET = "runs"


@pytest.fixture(scope="module")
def client(_moto_endpoint: str) -> Iterator[Any]:
    """A client of the tests' own, and the environment for the package's; both are made once, for that takes long."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("S3_ENDPOINT_URL", _moto_endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage.s3_client.cache_clear()
        made = Session().client("s3", endpoint_url=_moto_endpoint)
        made.create_bucket(Bucket=BUCKET)
        yield made
        made.close()
        storage.s3_client.cache_clear()


@pytest.fixture
def store(client: Any, tmp_path: Path) -> str:
    """A place of the test's own."""
    return f"s3://{BUCKET}/{tmp_path.name}"


def key_of(store: str, step: int, name: str) -> str:
    return f"{storage.split_s3(store)[1]}{portable.name_of(step)}/{name}"


def keys(client: Any, store: str) -> set[str]:
    """Names below a store."""
    prefix = storage.split_s3(store)[1]
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix) for item in found}


def write(run: Path, step: int, *, value: float | None = None) -> Path:
    tensors = {"student": {"w": torch.full((4,), float(step if value is None else value))}, "teacher": {"w": torch.ones(2)}}
    return write_checkpoint(run, Checkpoint(step, tensors, {}), keep_last=9)


def write_both(run: Path, store: str, *steps: int) -> list[Path]:
    paths = [write(run, step) for step in steps]
    for step, path in zip(steps, paths, strict=True):
        remote.send(store, path, step, set())
    return paths


def newest_step(run: Path, store: str | None) -> int | None:
    found = resume_point.newest(run, store)
    if found is None:
        return None
    read = found.read()
    assert read.tensors["student"]["w"].tolist() == [float(read.step)] * 4
    return read.step


def spoil_remote(client: Any, store: str, step: int, name: str) -> None:
    key = key_of(store, step, name)
    content = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    content[-1] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))


def test_what_is_sent_lies_below_its_step_and_latest_names_it(tmp_path, store, client):
    (path,) = write_both(tmp_path, store, 3)
    assert keys(client, store) == {*(f"{path.name}/{file.name}" for file in path.iterdir()), "LATEST"}
    assert storage.read(store, "LATEST") == b"step-00000003"
    assert remote.steps(store) == [3]


def test_the_manifest_is_sent_after_all_files_and_latest_after_it(tmp_path, store, monkeypatch):
    sent = []
    for name in ("upload", "write", "delete"):
        call = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda root, n, *args, call=call: (sent.append(n), call(root, n, *args)))
    path = write(tmp_path, 3)
    remote.send(store, path, 3, set())
    assert set(sent[:-2]) == {"student.safetensors", "teacher.safetensors", "state.json"}
    assert sent[-2:] == ["manifest.json", "LATEST"]
    sent.clear()
    remote.send(store, path, 3, set())
    assert sent == ["LATEST"]


def test_another_checkpoint_of_the_step_is_kept_aside_before_its_place_is_taken(tmp_path, store, client):
    earlier = write(tmp_path / "earlier", 3)
    remote.send(store, earlier, 3, set())
    for value in (8, 9):
        remote.send(store, write(tmp_path / f"{value}", 3, value=value), 3, set())
    found = resume_point.newest(tmp_path / "run", store)
    assert found
    assert found.read().tensors["student"]["w"].tolist() == [9.0] * 4
    for number, value in (("", 3), (".2", 8)):
        kept = {file.name: storage.read(f"{store}/passed-over/step-00000003{number}", file.name) for file in earlier.iterdir()}
        theirs = earlier if value == 3 else tmp_path / f"{value}" / "checkpoints" / earlier.name
        assert kept == {file.name: file.read_bytes() for file in theirs.iterdir()}


def test_a_store_that_cannot_move_what_is_there_is_not_written_over(tmp_path, store, monkeypatch):
    earlier = write(tmp_path / "earlier", 3)
    remote.send(store, earlier, 3, set())
    monkeypatch.setattr(storage, "list_sizes", lambda _: None)
    with pytest.raises(UserError, match=r"step-00000003 is of another run or was passed over, and this store cannot move it"):
        remote.send(store, write(tmp_path / "run", 3, value=9), 3, set())
    assert storage.read(f"{store}/{earlier.name}", "manifest.json") == (earlier / "manifest.json").read_bytes()


def test_a_try_that_was_cut_short_goes_on_with_what_is_left(tmp_path, store, monkeypatch):
    path, sent = write(tmp_path, 3), {"student.safetensors", "state.json"}
    uploaded = []
    monkeypatch.setattr(storage, "upload", lambda _, name, __: uploaded.append(name))
    remote.send(store, path, 3, sent)
    assert uploaded == ["teacher.safetensors"]


@pytest.mark.parametrize(("here", "there", "expected"), [([1, 3], [2], 3), ([1], [1, 2], 2), ([], [4], 4), ([4], [], 4)])
def test_the_newest_of_both_places_wins(tmp_path, store, here, there, expected):
    write_both(tmp_path / "elsewhere", store, *there)
    for step in here:
        write(tmp_path / "run", step)
    assert newest_step(tmp_path / "run", store) == expected
    assert (portable.folder(tmp_path / "run") / portable.name_of(expected)).is_dir()


def test_of_equal_ones_the_local_is_taken_and_nothing_is_fetched(tmp_path, store, monkeypatch):
    (path,) = write_both(tmp_path, store, 1)
    monkeypatch.setattr(remote, "fetch", lambda *_, **__: pytest.fail("nothing needs to be fetched"))
    assert resume_point.newest(tmp_path, store) == Found(path)


def test_nothing_anywhere_is_no_checkpoint(tmp_path, store):
    assert resume_point.newest(tmp_path, store) is None
    assert resume_point.newest(tmp_path, None) is None


def test_a_damaged_local_one_is_replaced_by_that_of_the_store(tmp_path, store, capsys):
    _, path = write_both(tmp_path, store, 1, 2)
    (path / "state.json").write_text("{}")
    assert newest_step(tmp_path, store) == 2
    assert portable.find_fault(path) is None
    assert f"checkpoint {path} is passed over: state.json does not have the size and hash" in capsys.readouterr().out
    assert [p.name for p in portable.folder(tmp_path).iterdir() if p.name.startswith((".old", ".partial"))] == []


@pytest.mark.parametrize("damage", ["spoiled", "missing", "no manifest", "bad manifest", "path outside"])
def test_a_damaged_one_of_the_store_is_passed_over_and_told(tmp_path, store, client, capsys, damage):
    write_both(tmp_path / "elsewhere", store, 1, 2)
    manifest = key_of(store, 2, "manifest.json")
    match damage:
        case "spoiled":
            spoil_remote(client, store, 2, "student.safetensors")
        case "missing":
            client.delete_object(Bucket=BUCKET, Key=key_of(store, 2, "student.safetensors"))
        case "no manifest":
            client.delete_object(Bucket=BUCKET, Key=manifest)
        case "bad manifest":
            client.put_object(Bucket=BUCKET, Key=manifest, Body=b"{")
        case _:
            outside = json.dumps({"state.json": {"bytes": 2, "sha256": ""}, "../../x": {"bytes": 2, "sha256": ""}})
            client.put_object(Bucket=BUCKET, Key=manifest, Body=outside.encode())
    assert newest_step(tmp_path / "run", store) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint {store}/step-00000002 is passed over: ")
    assert [path.name for path in portable.folder(tmp_path / "run").iterdir()] == ["step-00000001"]


def test_a_deleted_one_is_gone(tmp_path, store, client):
    write_both(tmp_path, store, 1, 2)
    remote.delete(store, 1)
    assert remote.steps(store) == [2]
    assert not [key for key in keys(client, store) if "step-00000001" in key]
    remote.delete(store, 1)


def test_a_bucket_that_does_not_exist_is_named(tmp_path, client):
    with pytest.raises(UserError, match=r"s3://nowhere/run was refused .*the bucket does not exist. Create it"):
        resume_point.newest(tmp_path, "s3://nowhere/run")


def test_a_store_that_cannot_list_is_read_by_its_pointer(tmp_path, store, monkeypatch):
    write_both(tmp_path / "elsewhere", store, 1, 2)
    monkeypatch.setattr(storage, "list_folders", lambda _: None)
    assert remote.steps(store) == [2]
    assert newest_step(tmp_path / "run", store) == 2
    assert remote.steps(f"{store}/nothing") == []


def test_a_manifest_that_is_not_plain_does_not_end_the_run_that_fetches(tmp_path, store, client):
    write_both(tmp_path / "elsewhere", store, 1, 2)
    entry = {"bytes": "2", "sha256": ""}
    client.put_object(Bucket=BUCKET, Key=key_of(store, 2, "manifest.json"), Body=json.dumps({"state.json": entry}).encode())
    assert newest_step(tmp_path / "run", store) == 1


# --- all ranks ---


class OtherHost:
    """Makes this process a rank of another host, to which a first rank offers checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *offers: Path):
        output = [json.dumps({"path": str(path), "digest": portable.digest(path), "moments": True}) for path in offers]
        answers = iter([*output, "{}"])
        monkeypatch.setattr(dist, "is_first", lambda: False)
        monkeypatch.setattr(dist, "from_first_rank", lambda _: next(answers))


def hide(run: Path) -> None:
    """What another host does not see."""
    run.rename(run.with_name("hidden"))


def test_what_a_kill_left_under_another_name_is_renamed_before_any_rank_is_told_of_it(tmp_path):
    path = write(tmp_path, 5)
    path.rename(path.with_name(f".old-{path.name}"))
    assert resume_point.newest_for_all(tmp_path) == Found(path)
    assert portable.find_fault(path) is None


@pytest.mark.parametrize(("local_rank", "checks"), [("0", 1), ("3", 0)])
def test_one_rank_of_a_host_checks_the_hashes_for_all(tmp_path, monkeypatch, local_rank, checks):
    path, checked = write(tmp_path, 5), []
    find_fault = portable.find_fault
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(portable, "find_fault", lambda where: (checked.append(where), find_fault(where))[1])
    OtherHost(monkeypatch, path)
    assert resume_point.newest_for_all(tmp_path) == Found(path)
    assert checked == [path] * checks


def test_a_host_fetches_once_for_all_its_ranks_and_keeps_one_only(tmp_path, store, monkeypatch):
    paths = write_both(tmp_path / "first", store, 1, 2)
    OtherHost(monkeypatch, *paths[:1])
    hide(tmp_path / "first")
    found = resume_point.newest_for_all(tmp_path / "second", store)
    assert found == Found(tmp_path / "second" / "fetched" / "step-00000001")
    assert found is not None
    assert portable.find_fault(found.path) is None
    (tmp_path / "hidden").rename(tmp_path / "first")
    OtherHost(monkeypatch, *paths)
    hide(tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "fetch", lambda *_, **__: pytest.fail("it is here already"))
        assert resume_point.newest_for_all(tmp_path / "second", store) == found
    fetched = tmp_path / "second" / "fetched"
    assert resume_point.newest_for_all(tmp_path / "second", store) == Found(fetched / "step-00000002")
    assert [path.name for path in fetched.glob("*step-*")] == ["step-00000002"]


def test_a_host_that_cannot_have_it_makes_all_take_the_next(tmp_path, store, client, monkeypatch, capsys):
    paths = write_both(tmp_path / "first", store, 1, 2)
    spoil_remote(client, store, 2, "teacher.safetensors")
    OtherHost(monkeypatch, paths[1], paths[0])
    hide(tmp_path / "first")
    found = resume_point.newest_for_all(tmp_path / "second", store)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert "step-00000002 is passed over: on this host, teacher.safetensors does not have" in capsys.readouterr().out


def test_another_one_of_the_same_step_is_not_taken_for_it(tmp_path, store, monkeypatch, capsys):
    write_both(tmp_path / "elsewhere", store, 1)
    path = write(tmp_path / "first", 1, value=5)
    OtherHost(monkeypatch, path)
    hide(tmp_path / "first")
    assert resume_point.newest_for_all(tmp_path / "second", store) is None
    assert "on this host, it is not the one that the first host has" in capsys.readouterr().out


def test_without_a_store_all_hosts_must_see_the_run_directory(tmp_path, monkeypatch):
    path = write(tmp_path / "first", 1)
    OtherHost(monkeypatch, path)
    hide(tmp_path / "first")
    with pytest.raises(RankError, match=f"run_dir must lie on storage that all hosts share. This one does not see {path}"):
        resume_point.newest_for_all(tmp_path / "second")


@pytest.mark.parametrize(("passing", "kind"), [(False, UserError), (True, Unavailable)])
def test_an_error_of_the_first_rank_is_raised_on_all(tmp_path, monkeypatch, passing, kind):
    monkeypatch.setattr(dist, "is_first", lambda: False)
    monkeypatch.setattr(dist, "from_first_rank", lambda _: json.dumps({"error": "the store is away", "passing": passing}))
    with pytest.raises(kind, match="the store is away"):
        resume_point.newest_for_all(tmp_path, "s3://b/run")


def fail_reading(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Reading files of this name fails, as a network file system or a disk does."""
    opened = Path.open

    def faulty(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", faulty)


@pytest.mark.parametrize("name", ["manifest.json", "student.safetensors"])
def test_a_passing_fault_on_another_host_is_not_a_checkpoint_that_it_does_not_see(tmp_path, monkeypatch, name):
    path = write(tmp_path, 5)
    OtherHost(monkeypatch, path)
    fail_reading(monkeypatch, name, errno.ESTALE)
    with pytest.raises(RankUnavailable, match=f"{path} cannot be used on this host: {name} cannot be read: .*run this again"):
        resume_point.newest_for_all(tmp_path)


@pytest.mark.parametrize(("number", "word"), [(errno.EACCES, (True, False, True)), (errno.EMFILE, (True, False, True))])
def test_a_host_that_may_not_read_it_says_so_to_the_ranks_that_wait(tmp_path, monkeypatch, number, word):
    path, words = write(tmp_path, 5), []
    OtherHost(monkeypatch, path)
    monkeypatch.setattr(dist, "any_ranks", lambda *flags: (words.append(flags), flags)[1])
    fail_reading(monkeypatch, "manifest.json", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        resume_point.newest_for_all(tmp_path)
    assert words == [word]


def test_the_other_ranks_hear_of_any_error_of_the_first(tmp_path, monkeypatch):
    output: list[str] = []
    monkeypatch.setattr(dist, "from_first_rank", lambda text: (output.append(text), text)[1])
    monkeypatch.setattr(portable, "folders", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume_point.newest_for_all(tmp_path)
    assert json.loads(output[0]) == {"error": "division by zero", "passing": True}


def test_one_that_is_spoiled_while_it_is_looked_at_is_passed_over(tmp_path, store, monkeypatch):
    write_both(tmp_path / "first", store, 3)

    def spoiled(*args: Any, moments: bool = True, **options: Any) -> Path:
        if moments:
            raise remote.Damaged(portable.Fault("exp_avg.safetensors is missing", absent=True, only_moments=True))
        raise remote.Damaged("student.safetensors does not have the size and hash of its manifest")

    monkeypatch.setattr(remote, "fetch", spoiled)
    for rebuild in (False, True):
        with pytest.raises(UserError, match="cannot be used, and none that can"):
            resume_point.newest(tmp_path / "second", store, rebuild_moments=rebuild)

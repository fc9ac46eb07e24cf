"""The shards of an object store on this host: fetched once, checked, shared by ranks, nothing else left."""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from subprocess import PIPE

import boto3.session
import numpy as np
import pytest
import torch
import warm
from botocore.exceptions import ClientError
from caches import NUM_SHARDS, OPTIONS, assert_same, cache_of, num_bytes, present, read_epochs, remote_set

from personmae.data import attempts, cache, mds
from personmae.data.shard_set import ShardSet
from personmae.data.stream import CanvasBatch
from personmae.errors import UserError
from personmae.system import mosaic, storage

# --- fetched once, checked, kept ---


def test_a_remote_set_is_fetched_once_and_kept(shard_dir, put, tmp_path):
    location = put(shard_dir, "kept")
    names = sorted(path.name for path in shard_dir.glob("*.mds"))
    with ShardSet(location, tmp_path) as data, ShardSet(str(shard_dir), tmp_path) as local:
        assert present(data) == []  # shards come when they are needed
        assert all(data.jpeg(number) == local.jpeg(number) for number in range(len(data)))
        assert present(data) == names
        totals = data.counters.totals()
        assert totals["personmae_cache_misses_total"] == len(names)
        assert totals["personmae_stream_requests_total{op=get,outcome=ok}"] == len(names)
        assert totals["personmae_stream_bytes_total{source=remote}"] == num_bytes(shard_dir)
    with ShardSet(f"{location}/", tmp_path) as data:
        assert [data.open(index) is not None for index in range(len(names))]
        totals = data.counters.totals()
        assert totals["personmae_cache_hits_total"] == len(names)
        assert not [name for name in totals if "requests" in name or "misses" in name]


def test_another_data_set_at_the_same_place_does_not_meet_the_files_of_the_first(shard_dir, many, put, s3_server, tmp_path):
    location = put(shard_dir, "rewritten")
    with ShardSet(location, tmp_path) as data:
        data.open(0)
        first = data.cache.directory
    for path in many.iterdir():
        s3_server.client.upload_file(str(path), "rewritten", f"set/{path.name}")
    with ShardSet(location, tmp_path) as data, ShardSet(str(many), tmp_path) as local:
        assert data.cache.directory != first
        assert data.jpeg(0) == local.jpeg(0)


def test_a_download_whose_hash_does_not_agree_is_refused_and_not_kept(shard_dir, put, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "FIRST_DELAY_SECONDS", 0.01)
    location = put(shard_dir, "flipped")
    content = bytearray((shard_dir / "shard.00001.mds").read_bytes())
    content[-1] ^= 1
    s3_server.client.put_object(Bucket="flipped", Key="set/shard.00001.mds", Body=bytes(content))
    with ShardSet(location, tmp_path) as data:
        data.open(0)
        with pytest.raises(UserError, match=r"s3://flipped/set/shard\.00001\.mds does not have the size and hash"):
            data.open(1)
        assert present(data) == ["shard.00000.mds"]
        assert data.counters.totals()["personmae_corrupt_shards_total"] == attempts.MAX_BAD_FETCHES


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_file_that_was_damaged_on_disk_is_fetched_again(many, copying, tmp_path, damage):
    first = cache_of(many, tmp_path)
    first.open(0).release()
    path = first.directory / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    second = cache_of(many, tmp_path)
    second.open(0).release()
    assert path.read_bytes() == (many / "shard.00000.mds").read_bytes()
    assert copying == ["shard.00000.mds"] * 2


def test_a_file_that_another_rank_removes_while_it_is_checked_is_fetched_again(many, copying, tmp_path, monkeypatch):
    data = cache_of(many, tmp_path)
    data.open(0).release()
    agrees = mds.agrees

    def removed_meanwhile(path, shard):
        monkeypatch.setattr(mds, "agrees", agrees)
        path.unlink()
        return agrees(path, shard)

    monkeypatch.setattr(mds, "agrees", removed_meanwhile)
    data.open(0).release()
    assert copying == ["shard.00000.mds"] * 2


def test_a_connection_that_breaks_behind_the_last_byte_costs_nothing(many, copying, tmp_path, monkeypatch):
    copy = storage.fetch_into

    def broken(file, root, name, check):
        if file.tell() == (many / name).stat().st_size:  # what a store says to a range behind the end
            raise ClientError({"Error": {"Code": "InvalidRange"}}, "GetObject")
        copy(file, root, name, check)
        raise ConnectionResetError

    monkeypatch.setattr(storage, "fetch_into", broken)
    cache_of(many, tmp_path).open(0).release()
    assert copying == ["shard.00000.mds"]


def test_threads_that_fetch_at_once_share_one_client(put, many, tmp_path, monkeypatch, fresh_s3_client):
    location, made = put(many, "shared"), []
    session = boto3.session.Session
    with ShardSet(location, tmp_path) as data:
        monkeypatch.setattr(boto3.session, "Session", lambda: made.append(1) or session())
        read_epochs(data, num_connections=8)
    assert len(made) == 1


# --- several readers ---

HOLDER = """
import sys
from pathlib import Path
from personmae.system import storage
from personmae.data.cache import ShardCache
from personmae.data.counters import StreamCounters
directory, folder = map(Path, sys.argv[1:])
index = (directory / "index.json").read_bytes()
storage.fetch_into = lambda file, root, name, check: file.write((directory / name).read_bytes())
cache = ShardCache("s3://no-such/set", index, folder, limit_bytes=None, retry_seconds=5, counters=StreamCounters())
held = cache.open(0)
print("held", flush=True)
sys.stdin.readline()
held.release()
print("released", flush=True)
sys.stdin.readline()
"""


def test_a_shard_that_another_process_holds_is_not_removed(many, copying, tmp_path):
    with warm.start(["-c", HOLDER, many, tmp_path], stdin=PIPE, stdout=PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        data = cache_of(many, tmp_path, limit_bytes=20_000)
        data = data.for_reader(lambda name: float(name == "shard.00000.mds"), lambda: False)
        held = data.directory / "shard.00000.mds"
        for index in range(1, 6):
            data.open(index).release()
            assert held.exists()
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "released\n"
        data.open(6).release()
        assert not held.exists()
        holder.kill()


RANK = """
import hashlib, json, sys
from itertools import islice
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
location, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
limit = options.pop("limit")
with ShardSet(location, folder, cache_limit_bytes=limit) as data:
    reader = BatchReader(data, **options)
    for batch in islice(reader, reader.steps_per_epoch):
        print(json.dumps(batch.keys.tolist()), flush=True)
        sys.stdin.readline()
    reader.close()
    print(json.dumps(data.counters.totals()))
"""


@pytest.mark.integration
@pytest.mark.parametrize("share_of_set", [1, 2])
def test_ranks_of_a_host_fetch_each_shard_once_together(many, put, tmp_path, share_of_set):
    location, steps = put(many, "shared"), 4 * NUM_SHARDS // 12
    limit = num_bytes(many) // share_of_set
    ranks = []
    for rank in range(3):
        options = OPTIONS | {"rank": rank, "world_size": 3, "global_batch_size": 12, "micro_batch_size": 4, "limit": limit}
        options |= {"prefetch_shards": 8, "prefetch_batches": 1}
        command = ["-c", RANK, location, tmp_path, json.dumps(options)]
        ranks.append(warm.start(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True))
    keys: list[int] = []
    for _ in range(steps):  # in step, as gradients keep them
        for rank in ranks:
            keys += json.loads(rank.stdout.readline())
        for rank in ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    fetched = sum(json.loads(out).get("personmae_stream_requests_total{op=get,outcome=ok}", 0) for out, _ in said)
    assert NUM_SHARDS <= fetched <= NUM_SHARDS + (0 if share_of_set == 1 else NUM_SHARDS // 4)
    with ShardSet(str(many), tmp_path) as local:
        expected = read_epochs(local, global_batch_size=12, micro_batch_size=12)
    assert keys == torch.cat([batch.keys for batch in expected]).tolist()
    (directory,) = tmp_path.iterdir()
    assert all(re.fullmatch(r"shard\.\d+\.mds", path.name) for path in directory.iterdir())
    assert num_bytes(directory) <= limit


def test_two_readers_of_one_process_share_a_cache(many, copying, tmp_path):
    with ShardSet(str(many), tmp_path) as local:
        expected = read_epochs(local)
    data = remote_set(many, tmp_path, num_bytes(many) // 4)
    results: list[list[CanvasBatch]] = []
    threads = [threading.Thread(target=lambda: results.append(read_epochs(data))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        assert_same(got, expected)
    data.close()
    assert len(results) == 2


# --- ends ---


def test_closing_removes_what_is_being_fetched_and_a_late_end_of_it_changes_nothing(many, tmp_path, monkeypatch):
    entered, may_go = threading.Event(), threading.Event()

    def slow(file, root, name, check):  # a client that cannot be interrupted
        entered.set()
        may_go.wait(10)
        file.write((many / name).read_bytes())

    monkeypatch.setattr(storage, "fetch_into", slow)
    data = cache_of(many, tmp_path)
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            data.open(0)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert entered.wait(10)
    assert [path.name for path in data.directory.iterdir()] == ["shard.00000.mds.part"]
    data.close()
    assert not list(data.directory.iterdir())
    other = cache_of(many, tmp_path)
    unfinished = other._claim(other.shards[0], needed=True)  # another rank begins the same shard
    assert not isinstance(unfinished, cache.NotNow)
    may_go.set()
    thread.join()
    assert isinstance(errors[0], cache.Cancelled)
    assert [path.name for path in data.directory.iterdir()] == ["shard.00000.mds.part"]
    other.close()
    unfinished.close()
    assert not list(data.directory.iterdir())


def test_a_cache_that_is_closed_after_the_last_check_keeps_nothing(many, copying, tmp_path, monkeypatch):
    data, agrees = cache_of(many, tmp_path), mds.agrees

    def closed_afterwards(path, shard):
        whole = agrees(path, shard)
        data.close()
        return whole

    monkeypatch.setattr(mds, "agrees", closed_afterwards)
    with pytest.raises(cache.Cancelled):
        data.open(0)
    assert not list(data.directory.iterdir())


def test_a_start_removes_what_a_killed_process_left_and_nothing_that_is_being_fetched(many, copying, tmp_path):
    data = cache_of(many, tmp_path)
    (data.directory / "shard.00001.mds.part").write_bytes(bytes(100))
    (data.directory / "shard.00002.mds.part.abc").mkdir()
    (data.directory / "shard.00002.mds.part.abc" / "shard.00002.mds").touch()
    live = data._claim(data.shards[0], needed=True)
    (data.directory / "shard.00000.mds.part.abc").mkdir()
    assert not isinstance(live, cache.NotNow)
    cache_of(many, tmp_path)
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00000.mds.part", "shard.00000.mds.part.abc"]
    data.close()
    live.close()
    assert not list(data.directory.iterdir())


def test_an_unexpected_error_leaves_nothing_half_written(many, tmp_path, monkeypatch):
    def failing(file, root, name, check):
        file.write(b"something")
        raise RuntimeError("unexpected")

    monkeypatch.setattr(storage, "fetch_into", failing)
    data = cache_of(many, tmp_path)
    with pytest.raises(RuntimeError):
        data.open(0)
    assert not list(data.directory.iterdir())


# --- data sets and stores of other kinds ---


def test_an_index_without_shards_and_empty_shards_are_read_as_what_they_are(shard_dir, many, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / mds.INDEX).write_text('{"version": 2, "shards": []}')
    with (
        ShardSet(str(empty), tmp_path) as data,
        pytest.raises(UserError, match=r"one global batch needs 8 samples. .* holds 0"),
    ):
        read_epochs(data)
    mixed = Path(shutil.copytree(many, tmp_path / "mixed"))
    index = json.loads((mixed / mds.INDEX).read_text())
    for place in (0, 10, 66):
        content = np.array([0, 8], np.uint32).tobytes()
        (mixed / f"empty.{place}.mds").write_bytes(content)
        raw = {"basename": f"empty.{place}.mds", "bytes": len(content), "hashes": {}}
        index["shards"].insert(place, index["shards"][0] | {"samples": 0, "raw_data": raw})
    (mixed / mds.INDEX).write_text(json.dumps(index))
    with ShardSet(str(mixed), tmp_path) as data:
        keys = torch.cat([batch.keys for batch in read_epochs(data)])
    assert len(keys.unique()) == 4 * NUM_SHARDS


class FromDirectory(mosaic.load("streaming.base.storage").CloudDownloader):
    """A store of a scheme of its own, ``test://`` and a path; counts and spoils what it is asked for."""

    asked: list[str] = []  # noqa: RUF012 - one store
    failures: list[Exception] = []  # noqa: RUF012

    @staticmethod
    def _client_identifier() -> str:
        return "test"

    def clean_up(self) -> None:
        pass

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        self.asked.append(remote)
        Path(f"{local}.tmp").write_bytes(b"")
        if remote.endswith(".mds") and self.failures:
            raise self.failures.pop()
        shutil.copy(remote.removeprefix("test://store"), f"{local}.tmp")
        os.rename(f"{local}.tmp", local)


@pytest.fixture
def other_store(monkeypatch: pytest.MonkeyPatch) -> type[FromDirectory]:
    monkeypatch.setitem(mosaic.load("streaming.base.storage.download").DOWNLOADER_MAPPINGS, "test", FromDirectory)
    monkeypatch.setattr(attempts, "FIRST_DELAY_SECONDS", 0.01)
    FromDirectory.asked.clear()
    FromDirectory.failures.clear()
    return FromDirectory


def test_other_schemes_are_read_through_the_clients_of_mosaicml_streaming(many, other_store, tmp_path):
    with ShardSet(str(many), tmp_path) as local:
        expected = read_epochs(local)
    other_store.failures += [TimeoutError("late"), RuntimeError("a client's own error"), ConnectionResetError("gone")]
    limit = num_bytes(many) // 5
    with ShardSet(f"test://store{many}", tmp_path / "cache", cache_limit_bytes=limit) as data:
        assert_same(read_epochs(data, num_connections=4), expected)
        assert all(re.fullmatch(r"shard\.\d+\.mds", name) for name in present(data))
        totals = data.counters.totals()
    assert totals["personmae_cache_evictions_total"] > NUM_SHARDS // 3
    assert totals["personmae_stream_retries_total{reason=connection}"] == 2
    assert totals["personmae_stream_retries_total{reason=timeout}"] == 1
    assert all(asked.startswith(f"test://store{many}/") for asked in other_store.asked)


def test_a_missing_shard_of_another_scheme_is_named(many, other_store, tmp_path):
    damaged = Path(shutil.copytree(many, tmp_path / "damaged"))
    (damaged / "shard.00003.mds").unlink()
    with ShardSet(f"test://store{damaged}", tmp_path / "cache") as data:
        with pytest.raises(UserError, match=r"shard\.00003\.mds failed: it does not exist"):
            read_epochs(data)
        assert all(re.fullmatch(r"shard\.\d+\.mds", name) for name in present(data))

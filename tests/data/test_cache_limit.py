"""A cache that may only take so much: it is never exceeded, and what gives way to what."""

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from caches import NUM_SHARDS, OPTIONS, assert_same, cache_of, num_bytes, present, read_epochs, remote_set

from personmae.data import cache
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
from personmae.errors import UserError


@contextmanager
def watching(directory: Path) -> Iterator[list[int]]:
    """The largest that a directory has been, looked at again and again, never between a removal and what it is for."""
    largest, stop = [0], threading.Event()

    def watch() -> None:
        handle = os.open(directory, os.O_RDONLY)
        while not stop.is_set():
            fcntl.flock(handle, fcntl.LOCK_EX)
            largest[0] = max(largest[0], sum(entry.stat().st_size for entry in os.scandir(directory)))
            fcntl.flock(handle, fcntl.LOCK_UN)
            time.sleep(0.001)
        os.close(handle)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        stop.set()
        thread.join()


def test_a_cache_of_a_tenth_of_the_data_set_is_never_exceeded_and_reads_the_same(many, copying, tmp_path):
    with ShardSet(str(many), tmp_path) as local:
        expected = read_epochs(local, 2)
    limit = num_bytes(many) // 10
    data = remote_set(many, tmp_path, limit)
    with watching(data.cache.directory) as largest:
        assert_same(read_epochs(data, 2), expected)
    assert num_bytes(many) // 20 < largest[0] <= limit
    assert len(copying) <= 2.25 * NUM_SHARDS  # on a busy machine some that came ahead give way and come again
    totals = data.counters.totals()
    assert totals["personmae_cache_evictions_total"] >= 2 * NUM_SHARDS - 16
    assert totals["personmae_cache_bytes"] <= limit
    data.close()
    assert all(re.fullmatch(r"shard\.\d+\.mds", name) for name in present(data))


@pytest.mark.parametrize(("num_connections", "prefetch_shards"), [(4, 64), (8, 64), (8, 2)])
def test_reading_ahead_over_many_connections_stays_within_the_limit(many, copying, tmp_path, num_connections, prefetch_shards):
    needed = smallest_limit(remote_set(many, tmp_path / "unused", None), num_connections)
    with ShardSet(str(many), tmp_path) as local:
        expected = read_epochs(local, 2)
    data = remote_set(many, tmp_path, needed)
    with watching(data.cache.directory) as largest:
        assert_same(read_epochs(data, 2, num_connections=num_connections, prefetch_shards=prefetch_shards), expected)
    assert largest[0] <= needed
    data.close()


def smallest_limit(data: ShardSet, num_connections: int) -> int:
    """The smallest limit that is not refused."""
    refused, accepted = 1, num_bytes(Path(data.root))
    while accepted - refused > 1:
        data.cache_limit_bytes = (refused + accepted) // 2
        try:
            BatchReader(data, **{**OPTIONS, "num_connections": num_connections}).close()
            accepted = data.cache_limit_bytes
        except UserError:
            refused = data.cache_limit_bytes
    return accepted


def test_a_limit_too_small_for_the_shuffle_block_is_refused_at_once_with_one_that_works(many, copying, tmp_path):
    before = threading.active_count()
    data = remote_set(many, tmp_path, 20_000)
    with pytest.raises(UserError, match=r"data\.cache_limit_gb must be at least ([\d.]+) .* It is 2e-05") as caught:
        BatchReader(data, **OPTIONS)
    assert threading.active_count() == before
    assert copying == []
    found = re.search(r"at least ([\d.]+) ", str(caught.value))
    assert found
    data = remote_set(many, tmp_path, round(float(found[1]) * 1e9))
    BatchReader(data, **OPTIONS).close()
    data.close()


def test_what_is_used_last_is_removed_first(many, copying, tmp_path):
    size = max(path.stat().st_size for path in many.glob("*.mds"))
    uses = {"shard.00000.mds": 5.0, "shard.00001.mds": 9.0, "shard.00002.mds": 7.0, "shard.00003.mds": 1.0}
    data = cache_of(many, tmp_path, limit_bytes=3 * size).for_reader(uses.__getitem__, lambda: False)
    for index in range(4):
        data.open(index).release()
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00000.mds", "shard.00002.mds", "shard.00003.mds"]
    data.open(1).release()
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00000.mds", "shard.00001.mds", "shard.00003.mds"]


def test_a_shard_that_cannot_be_removed_is_named_once_and_the_next_is_removed(many, copying, tmp_path, monkeypatch, capsys):
    size = max(path.stat().st_size for path in many.glob("*.mds"))
    uses = {f"shard.{number:05}.mds": 9.0 - number for number in range(5)}
    data = cache_of(many, tmp_path, limit_bytes=3 * size).for_reader(uses.__getitem__, lambda: False)
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "shard.00000.mds":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))  # as where another user owns it
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    for index in range(5):
        data.open(index).release()
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00000.mds", "shard.00003.mds", "shard.00004.mds"]
    assert capsys.readouterr().out.count("shard.00000.mds is no longer needed and is left: Operation not permitted") == 1


def test_what_cannot_be_removed_of_a_killed_process_keeps_nothing_else(many, copying, tmp_path, monkeypatch, capsys):
    directory = cache_of(many, tmp_path, limit_bytes=None).directory
    stuck, other = (directory / f"shard.0000{number}.mds.part" for number in (0, 1))
    stuck.touch()
    other.touch()
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    cache_of(many, tmp_path, limit_bytes=None)
    assert stuck.exists()
    assert not other.exists()
    assert f"{stuck} is no longer needed and is left" in capsys.readouterr().out


def test_a_shard_larger_than_the_limit_is_had_when_it_is_needed_but_not_ahead(many, copying, tmp_path):
    data = cache_of(many, tmp_path, limit_bytes=1000)
    assert data.open_if_possible(0) is cache.NotNow.NO_ROOM
    assert not list(data.directory.iterdir())
    held = data.open(0)
    assert len(held.mapped.jpeg(0)) > 100
    data.open(1).release()
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00000.mds", "shard.00001.mds"]
    held.release()


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserving space fails above 20 kB in a directory, which is room for two shards."""
    reserve = os.posix_fallocate

    def fallocate(file: int, offset: int, length: int) -> None:
        directory = Path(os.readlink(f"/proc/self/fd/{file}")).parent
        if length + sum(path.stat().st_size for path in directory.iterdir()) > 20_000:
            raise OSError(errno.ENOSPC, "no space")
        reserve(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)


@pytest.mark.usefixtures("small_disk")
def test_a_disk_full_of_what_other_ranks_hold_is_waited_for(many, copying, tmp_path):
    other = cache_of(many, tmp_path)
    held = [other.open(0), other.open(1)]
    threading.Timer(0.3, held[0].release).start()
    data = cache_of(many, tmp_path)
    assert data.open_if_possible(2) is cache.NotNow.NO_ROOM
    start = time.monotonic()
    data.open(2).release()
    assert time.monotonic() - start > 0.2
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00001.mds", "shard.00002.mds"]
    held[1].release()


@pytest.mark.usefixtures("small_disk")
def test_a_disk_that_stays_full_is_named_and_nothing_half_written_is_left(many, copying, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_FULL_SECONDS", 0.3)
    data = cache_of(many, tmp_path)
    held = [data.open(0), data.open(1)]
    with pytest.raises(
        UserError, match=r"shard s3://no-such/set/shard\.00002\.mds needs [\d,]+ bytes and the disk of .* is full"
    ):
        data.open(2)
    assert sorted(path.name for path in data.directory.iterdir()) == ["shard.00000.mds", "shard.00001.mds"]
    for shard in held:
        shard.release()
    data.open(2).release()


@pytest.mark.usefixtures("small_disk")
def test_what_was_opened_ahead_gives_way_to_what_is_needed(many, copying, tmp_path):
    ahead: list[cache.HeldShard] = []
    data = cache_of(many, tmp_path).for_reader(lambda name: 0.0, lambda: bool(ahead) and not ahead.pop().release())
    ahead += [data.open(0), data.open(1)]
    assert data.open_if_possible(2) is cache.NotNow.NO_ROOM
    assert len(ahead) == 2
    data.open(2).release()
    assert len(ahead) == 1
    ahead.pop().release()


def test_slices_stay_readable_when_their_file_was_removed(many, copying, tmp_path):
    data = cache_of(many, tmp_path, limit_bytes=10_000)
    held = data.open(0)
    jpeg = held.mapped.jpeg(0)
    content = bytes(jpeg)
    held.release()
    data.open(1).release()
    assert not (data.directory / "shard.00000.mds").exists()
    assert bytes(jpeg) == content

"""Whatever a small disk or a kill does to a reader, only whole shards are left, and it reads on or ends with one line."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm
from fault_proxy import Fault, FaultProxy, wait_for
from fault_sets import BUCKET, OPTIONS, SECRET, Remote, assert_same, assert_whole, read_both, read_epoch
from programs import ROOT, environment

from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
from personmae.errors import UserError
from personmae.system import storage

pytestmark = pytest.mark.integration


# --- a small disk ---


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of a given number of bytes."""
    mounted: list[Path] = []

    def make(num_bytes: int) -> Path:
        disk = tmp_path / f"disk-{num_bytes}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", disk]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system can only be mounted by root")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("num_connections", [2, 8])
def test_a_disk_smaller_than_the_data_set_holds_what_is_in_use(
    remote: Remote, proxy: FaultProxy, tmp_path: Path, mount: Callable[[int], Path], num_connections: int
) -> None:
    disk = mount(1 << 20)
    assert sum(path.stat().st_size for path in remote.many.glob("*.mds")) > 5 << 20
    with ShardSet(str(remote.many), tmp_path) as local:
        expected = read_epoch(local)
    with ShardSet(f"s3://{BUCKET}/many", disk) as data:
        assert_same(read_epoch(data, num_connections=num_connections), expected)
        assert_whole(data, None)
        totals = data.counters.totals()
    assert totals["personmae_cache_evictions_total"] > 40
    assert totals["personmae_cache_misses_total"] < 90


def test_a_disk_smaller_than_a_shard_ends_the_run_and_is_named(
    proxy: FaultProxy, tmp_path: Path, mount: Callable[[int], Path]
) -> None:
    disk = mount(1 << 20)
    with ShardSet(f"s3://{BUCKET}/large", disk) as data:
        with pytest.raises(UserError) as caught:
            read_epoch(data)
        assert not list(data.cache.directory.iterdir())
    assert "shard s3://crops/large/shard.0000" in str(caught.value)
    assert f"the disk of {data.cache.directory} is full" in str(caught.value)
    assert not proxy.of(r"\.mds$")


def test_a_disk_that_others_fill_meanwhile_ends_the_run_without_a_half_written_file(
    remote: Remote, proxy: FaultProxy, tmp_path: Path, mount: Callable[[int], Path]
) -> None:
    disk = mount(8 << 20)
    (disk / "others").write_bytes(bytes(6 << 20))
    with ShardSet(f"s3://{BUCKET}/large", disk) as data:
        with pytest.raises(UserError, match="is full"):
            read_epoch(data)
        assert_whole(data, None)
        (disk / "others").unlink()
        with ShardSet(str(remote.large), tmp_path) as local:
            assert_same(read_epoch(data, num_connections=1, prefetch_shards=1, block_size=1), read_epoch(local, block_size=1))


# --- kills ---

READER = """
import hashlib, json, sys
from itertools import islice
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
from personmae.errors import run_program
root, cache, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def program():
    digest = hashlib.sha256()
    with ShardSet(root, cache) as data:
        reader = BatchReader(data, **options)
        for batch in islice(reader, reader.steps_per_epoch):
            digest.update(batch.keys.numpy().tobytes())
            for canvas, (height, width) in zip(batch.canvas, batch.size.tolist()):
                digest.update(canvas[:height, :width].contiguous().numpy().tobytes())
        reader.close()
        print(json.dumps([digest.hexdigest(), data.counters.totals()]))
sys.exit(run_program(program))
"""


def start_reader(root: str, folder: Path) -> warm.Process:
    """Another process that reads an epoch by way of ``folder``/cache."""
    (folder / "temporary").mkdir(exist_ok=True)
    return warm.start(
        ["-c", READER, root, str(folder / "cache"), json.dumps(OPTIONS)],
        cwd=ROOT,
        env=environment({"TMPDIR": str(folder / "temporary")}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(reader: warm.Process) -> tuple[str, dict[str, float]]:
    """What a reader has printed: a digest of all batches, and its counters."""
    out, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err
    assert SECRET not in out + err
    return tuple(json.loads(out.splitlines()[-1]))


def shared_memory_names() -> set[str]:
    """All but those of multiprocessing, which a reader does not use."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_a_killed_rank_leaves_its_download_to_another(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    shared_memory = shared_memory_names()
    expected, _ = result(start_reader(str(remote.large), tmp_path))
    proxy.faults = [Fault(r"shard\.00001", times=1, what="stall", after_bytes=1_500_000)]
    killed = start_reader(f"s3://{BUCKET}/large", tmp_path)
    wait_for(lambda: any(request.num_sent > 1_000_000 for request in proxy.of(r"shard\.00001")), seconds=30)
    survivor = start_reader(f"s3://{BUCKET}/large", tmp_path)
    wait_for(lambda: len(proxy.of("index.json")) == 2, seconds=30)
    time.sleep(0.5)
    assert survivor.poll() is None
    assert len(proxy.of(r"shard\.00001")) == 1  # one of them fetches it, the other waits
    killed.kill()
    killed.communicate()
    got, totals = result(survivor)
    assert got == expected
    assert totals["personmae_cache_misses_total"] >= 1
    with ShardSet(f"s3://{BUCKET}/large", tmp_path / "cache") as data:
        assert_whole(data, remote.large)
    assert not list((tmp_path / "temporary").iterdir())
    assert shared_memory_names() <= shared_memory


def test_the_next_start_removes_what_killed_ranks_left(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(what="stall", after_bytes=1_500_000)]
    readers = [start_reader(f"s3://{BUCKET}/large", tmp_path) for _ in range(2)]
    wait_for(lambda: len([r for r in proxy.of(r"\.mds$") if r.num_sent > 1_000_000]) == 3, seconds=30)
    for reader in readers:
        reader.kill()
        reader.communicate()
    (directory,) = (tmp_path / "cache").iterdir()
    assert len(list(directory.glob("*.part"))) == 3
    proxy.faults.clear()
    with ShardSet(f"s3://{BUCKET}/large", tmp_path / "cache"):
        assert not list(directory.iterdir())
    read_both(remote.large, tmp_path)
    assert not list((tmp_path / "temporary").iterdir())


def test_closing_during_a_download_leaves_nothing_half_written(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 100.0)
    proxy.faults = [Fault(what="stall", after_bytes=1_500_000)]
    with ShardSet(f"s3://{BUCKET}/large", tmp_path / "cache") as data:
        reader = BatchReader(data, **OPTIONS)
        wait_for(lambda: len([r for r in proxy.of(r"\.mds$") if r.num_sent > 1_000_000]) == 3, seconds=30)
        start = time.monotonic()
        reader.close()
        assert time.monotonic() - start < 50  # it waits for neither the end of the stall nor the time-out
        assert not list(data.cache.directory.iterdir())

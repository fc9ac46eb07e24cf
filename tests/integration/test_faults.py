"""Whatever an object store, a disk or a kill does to a reader, it hands out the right batches or ends with one line.

moto in a process of its own serves the shards; a proxy spoils its answers. What is read is compared with what the local
directory gives.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import cv2
import numpy as np
import pytest
import torch
from fault_proxy import Fault, FaultProxy, moto_process, wait_for
from programs import ROOT, environment, losses, pretrain, start_pretrain

from personmae.data import cache, storage
from personmae.data.stream import BatchReader, CanvasBatch, ShardSet
from personmae.errors import UserError

pytestmark = pytest.mark.integration
BUCKET, KEY, SECRET = "crops", "first-key", "nobody-may-see-this"
OPTIONS: dict[str, Any] = {
    "canvas_size": (40, 20),
    "seed": 3,
    "global_batch_size": 8,
    "rank": 0,
    "world_size": 1,
    "micro_batch_size": 8,
    "first_step": 0,
    "num_threads": 2,
    "prefetch_batches": 2,
    "block_size": 16,
    "max_bad_ratio": 0.1,
}


@dataclass(frozen=True)
class Remote:
    """The data sets of this file in a bucket, and the directories they come from."""

    port: int
    client: Any
    small: Path  # the 50 pictures of all tests, shards of 20 kB
    large: Path  # 3 shards of 3.5 MB
    many: Path  # 64 shards of 5 pictures, 0.1 MB each

    def copy(self, name: str, prefix: str) -> str:
        """A copy that a test may damage; returns its location."""
        upload(self.client, getattr(self, name), prefix)
        return f"s3://{BUCKET}/{prefix}"


def write_noise(directory: Path, *, count: int, size: tuple[int, int], shard_bytes: int) -> Path:
    """Pictures that compress badly, as shards."""
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    with MDSWriter(out=str(directory), columns={"jpeg": "bytes"}, hashes=["xxh64"], size_limit=shard_bytes) as writer:
        for _ in range(count):
            _, jpeg = cv2.imencode(".jpg", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            writer.write({"jpeg": jpeg.tobytes()})
    return directory


def upload(client: Any, directory: Path, prefix: str) -> None:
    for path in directory.iterdir():
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")


@pytest.fixture(scope="module")
def remote(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("sets")
    with moto_process() as port:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        sets = Remote(
            port,
            client,
            shard_dir,
            write_noise(folder / "large", count=69, size=(512, 256), shard_bytes=3_600_000),
            write_noise(folder / "many", count=320, size=(128, 128), shard_bytes=110_000),
        )
        for name in ("small", "large", "many"):
            sets.copy(name, name)
        yield sets
        client.close()


@pytest.fixture
def proxy(
    remote: Remote,
    fresh_s3_client: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[FaultProxy]:
    """A proxy that does nothing yet, in the environment; whatever a test does, requests are signed and nothing is told."""
    made = FaultProxy(remote.port)
    made.start()
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("S3_ENDPOINT_URL", made.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(cache, "FIRST_DELAY_SECONDS", 0.02)
    yield made
    made.stop()
    assert made.requests
    assert all(request.authorization.startswith("AWS4-HMAC-SHA256 Credential=") for request in made.requests)
    assert SECRET not in "".join(capfd.readouterr())


def read_epoch(data: ShardSet, **options) -> list[CanvasBatch]:
    """Every batch of the first epoch, black where there is no picture."""
    batches = []
    with closing(BatchReader(data, **(OPTIONS | options))) as reader:
        for batch in islice(reader, reader.steps_per_epoch):
            batches.append(CanvasBatch(*(tensor.clone() for tensor in batch)))
            for canvas, (height, width) in zip(batches[-1].canvas, batch.size.tolist(), strict=True):
                canvas[height:], canvas[:, width:] = 0, 0
    return batches


def assert_same(got: list[CanvasBatch], expected: list[CanvasBatch]) -> None:
    assert len(got) == len(expected) > 0
    assert all(torch.equal(a, b) for one, other in zip(got, expected, strict=True) for a, b in zip(one, other, strict=True))


def read_both(directory: Path, folder: Path, *, retry_seconds: float = 60.0, **options) -> dict[str, float]:
    """Read the first epoch from the bucket; it must be that of the directory, with whole shards left. Returns the counters."""
    with ShardSet(str(directory), folder) as local:
        expected = read_epoch(local, **options)
    with ShardSet(f"s3://{BUCKET}/{directory_name(directory)}", folder / "cache", retry_seconds=retry_seconds) as data:
        assert_same(read_epoch(data, **options), expected)
        assert_whole(data, directory)
        return data.counters.totals()


def directory_name(directory: Path) -> str:
    """The prefix under which a directory was uploaded."""
    return directory.name if directory.name in ("large", "many") else "small"


def failing(prefix: str, folder: Path, *, retry_seconds: float = 60.0, **options) -> tuple[str, dict[str, float]]:
    """Read an epoch that must end with a user error; returns its one line and the counters."""
    with ShardSet(f"s3://{BUCKET}/{prefix}", folder / "cache", retry_seconds=retry_seconds) as data:
        with pytest.raises(UserError) as caught:
            read_epoch(data, **options)
        assert_whole(data, None)
        return str(caught.value), data.counters.totals()


def assert_whole(data: ShardSet, directory: Path | None) -> None:
    """Only shards with the right content are in the cache; all of them, where the directory is given."""
    names = sorted(path.name for path in data.cache.directory.iterdir())
    known = {shard.name: shard for shard in data.shards}
    assert set(names) <= set(known), "something else than shards was left"
    assert all(cache.mds.agrees(data.cache.directory / name, known[name]) for name in names)
    if directory:
        assert names == sorted(path.name for path in directory.glob("*.mds"))


# --- broken connections ---


def test_after_resets_a_shard_goes_on_where_it_was(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.00001", times=3, what="reset", after_bytes=1_200_000)]
    totals = read_both(remote.large, tmp_path)
    of_shard = proxy.of(r"large/shard\.00001")
    mib = 1 << 20
    assert [request.first_byte for request in of_shard] == [0, mib, 2 * mib, 3 * mib]
    size = (remote.large / "shard.00001.mds").stat().st_size
    assert sum(request.num_sent for request in of_shard) < size + 3 * (1_200_000 - mib) + 1
    assert totals["personmae_stream_retries_total{reason=connection}"] == 3
    assert totals["personmae_stream_bytes_total{source=remote}"] == sum(p.stat().st_size for p in remote.large.glob("*.mds"))
    assert totals["personmae_cache_misses_total"] == 3


def test_bodies_that_end_early_are_completed(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(times=4, what="close", after_bytes=9_000)]
    totals = read_both(remote.small, tmp_path)
    assert sum(value for name, value in totals.items() if "retries" in name) == 4
    assert "personmae_corrupt_shards_total" not in totals


@pytest.mark.parametrize(("status", "code", "reason"), [(503, "SlowDown", "throttled"), (500, "InternalError", "server_error")])
def test_bursts_of_server_errors_are_waited_out(
    remote: Remote, proxy: FaultProxy, tmp_path: Path, status: int, code: str, reason: str
) -> None:
    proxy.faults = [Fault(times=9, error=(status, code))]
    totals = read_both(remote.small, tmp_path)
    assert totals[f"personmae_stream_retries_total{{reason={reason}}}"] == 9
    assert totals[f"personmae_stream_requests_total{{op=get,outcome={reason}}}"] == 9


def test_a_stalled_connection_is_given_up_for_another(
    remote: Remote, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 0.5)
    proxy.faults = [Fault(times=2, what="stall", after_bytes=5_000)]
    totals = read_both(remote.small, tmp_path)
    assert totals["personmae_stream_retries_total{reason=timeout}"] == 2


@pytest.mark.slow
def test_a_stall_of_a_minute_costs_the_read_time_out_only(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.00001", times=1, what="stall", after_bytes=1_500_000)]
    start = time.monotonic()
    totals = read_both(remote.large, tmp_path)
    assert 14 < time.monotonic() - start < 25
    assert totals["personmae_stream_retries_total{reason=timeout}"] == 1
    assert proxy.of(r"large/shard\.00001")[-1].first_byte == 1 << 20


def test_an_outage_of_seconds_is_waited_out(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    with ShardSet(str(remote.small), tmp_path) as local:
        expected = read_epoch(local)
    with ShardSet(f"s3://{BUCKET}/small", tmp_path / "cache") as data, closing(BatchReader(data, **OPTIONS)) as reader:
        proxy.stop()
        time.sleep(2)
        proxy.start()
        list(islice(reader, reader.steps_per_epoch))
        assert_same(read_epoch(data), expected)
        totals = data.counters.totals()
    assert totals["personmae_stream_retries_total{reason=connection}"] >= 1


def test_a_store_that_does_not_come_back_ends_the_run_after_the_time_that_is_set(proxy: FaultProxy, tmp_path: Path) -> None:
    with ShardSet(f"s3://{BUCKET}/small", tmp_path / "cache", retry_seconds=1.5) as data:
        proxy.stop()
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            read_epoch(data)
        assert 1.5 < time.monotonic() - start < 6
        assert_whole(data, None)
    proxy.start()
    assert "shard s3://crops/small/shard.0000" in str(caught.value)
    assert "tried again for 2 s (data.retry_seconds) without a byte" in str(caught.value)
    assert "Could not connect" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- wrong content ---


def test_a_wrong_hash_is_fetched_again(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(times=2, what="flip", after_bytes=8_000)]
    totals = read_both(remote.small, tmp_path)
    assert totals["personmae_corrupt_shards_total"] == 2
    assert totals["personmae_stream_retries_total{reason=hash}"] == 2


def test_a_hash_that_is_always_wrong_ends_the_run_and_names_the_shard(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.00001", what="flip", after_bytes=8_000)]
    line, totals = failing("small", tmp_path)
    assert "shard s3://crops/small/shard.00001.mds does not have the size and hash its index gives, fetched 3 times" in line
    assert totals["personmae_corrupt_shards_total"] >= 3


def test_a_shard_deleted_after_the_start_ends_the_run_at_once(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    location = remote.copy("small", "deleted")
    with ShardSet(location, tmp_path / "cache") as data:
        remote.client.delete_object(Bucket=BUCKET, Key="deleted/shard.00001.mds")
        start = time.monotonic()
        with pytest.raises(
            UserError, match=rf"shard {location}/shard\.00001\.mds was refused \(NoSuchKey\): it does not exist"
        ):
            read_epoch(data)
        assert time.monotonic() - start < 5
        assert_whole(data, None)
    assert len(proxy.of(r"deleted/shard\.00001")) <= 2  # by who read ahead, and by the consumer


# --- credentials ---


def test_credentials_that_have_expired_for_good_end_the_run(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(error=(400, "ExpiredToken"))]
    line, totals = failing("small", tmp_path)
    assert "shard s3://crops/small/shard.0000" in line
    assert "the credentials have expired" in line
    assert totals["personmae_stream_requests_total{op=get,outcome=expired}"] >= 3


def test_expired_credentials_are_read_anew(
    remote: Remote, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_s3_client: Callable[[], None]
) -> None:
    shared = tmp_path / "credentials"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    text = f"[default]\naws_access_key_id = {{}}\naws_secret_access_key = {SECRET}\n"
    shared.write_text(text.format(KEY))
    with ShardSet(str(remote.small), tmp_path) as local:
        expected = read_epoch(local)
    with ShardSet(f"s3://{BUCKET}/small", tmp_path / "cache") as data:
        data.open(0)
        shared.write_text(text.format("second-key"))
        proxy.faults = [Fault(error=(400, "ExpiredToken"), spares="second-key")]
        assert_same(read_epoch(data), expected)
        totals = data.counters.totals()
    assert totals["personmae_stream_retries_total{reason=expired}"] >= 1
    assert "Credential=second-key/" in proxy.of(r"\.mds")[-1].authorization


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
            assert_same(read_epoch(data, num_connections=1, num_ahead=1, block_size=1), read_epoch(local, block_size=1))


# --- kills ---

READER = """
import hashlib, json, sys
from itertools import islice
from personmae.data.stream import BatchReader, ShardSet
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


def start_reader(root: str, folder: Path) -> subprocess.Popen[str]:
    """Another process that reads an epoch by way of ``folder``/cache."""
    (folder / "temporary").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", READER, root, str(folder / "cache"), json.dumps(OPTIONS)],
        cwd=ROOT,
        env=environment({"TMPDIR": str(folder / "temporary")}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(reader: subprocess.Popen[str]) -> tuple[str, dict[str, float]]:
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
    start = time.monotonic()
    killed.kill()
    killed.communicate()
    got, totals = result(survivor)
    assert time.monotonic() - start < 10
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


def test_closing_during_a_download_leaves_nothing_half_written(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(what="stall", after_bytes=1_500_000)]
    with ShardSet(f"s3://{BUCKET}/large", tmp_path / "cache") as data:
        reader = BatchReader(data, **OPTIONS)
        wait_for(lambda: len([r for r in proxy.of(r"\.mds$") if r.num_sent > 1_000_000]) == 3, seconds=30)
        start = time.monotonic()
        reader.close()
        assert time.monotonic() - start < 5
        assert not list(data.cache.directory.iterdir())


# --- whole programs ---


@pytest.mark.slow
def test_a_run_through_all_kinds_of_faults_has_the_losses_of_a_run_on_the_directory(
    proxy: FaultProxy, native_run: Path, tmp_path: Path
) -> None:
    proxy.faults = [
        Fault(times=2, what="reset", after_bytes=7_000),
        Fault(times=2, error=(503, "SlowDown")),
        Fault(times=1, what="flip", after_bytes=3_000),
        Fault(times=1, what="close", after_bytes=11_000),
        Fault(times=1, error=(500, "InternalError")),
    ]
    pretrain(f"s3://{BUCKET}/small", tmp_path / "run", "engine.name=native")
    assert all(fault.times == 0 for fault in proxy.faults)
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(native_run))
    assert SECRET not in Path(f"{tmp_path / 'run'}.log").read_text()


@pytest.mark.slow
def test_a_run_on_a_damaged_shard_ends_with_78_and_one_line(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.00001", what="flip", after_bytes=3_000)]
    run = start_pretrain(f"s3://{BUCKET}/small", tmp_path / "run", "engine.name=native")
    assert run.wait(timeout=120) == 78
    said = Path(f"{tmp_path / 'run'}.log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "shard s3://crops/small/shard.00001.mds does not have the size and hash its index gives" in line
    assert "Traceback" not in said
    assert SECRET not in said
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.slow
def test_a_run_that_is_stopped_while_a_shard_is_fetched_leaves_nothing_half_written(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.00001", what="stall", after_bytes=3_000)]
    run = start_pretrain(f"s3://{BUCKET}/small", tmp_path / "run", "engine.name=native")
    wait_for(lambda: bool(proxy.of(r"shard\.00001")), seconds=60)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 75
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.slow
def test_a_run_that_waits_for_a_store_that_has_gone_can_still_be_stopped(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.", what="stall", after_bytes=100)]
    run = start_pretrain(f"s3://{BUCKET}/small", tmp_path / "run", "engine.name=native")
    wait_for(lambda: bool(proxy.of(r"shard\.")), seconds=60)
    time.sleep(1)  # it waits for its first batch
    start = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 75
    assert time.monotonic() - start < 10
    assert "stopped: at step 0 of 20, nothing to save yet" in Path(f"{tmp_path / 'run'}.log").read_text()
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_data_set_is_opened_through_a_broken_connection_and_a_busy_store(proxy: FaultProxy, tmp_path: Path) -> None:
    for fault in (
        Fault(r"index\.json", what="reset", after_bytes=500, times=3),
        Fault(r"index\.json", what="close", after_bytes=500, times=3),
        Fault(r"", error=(503, "SlowDown"), times=9),
    ):
        proxy.faults = [fault]
        with ShardSet(f"s3://{BUCKET}/many", tmp_path, retry_seconds=60) as data:
            assert len(data.shards) > 10

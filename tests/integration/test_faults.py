"""Whatever an object store does to a reader, it hands out the right batches or ends with one line.

moto in a process of its own serves the shards; a proxy spoils its answers. What is read is compared with what the local
directory gives.
"""

import signal
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import Fault, FaultProxy, wait_for
from fault_sets import BUCKET, KEY, OPTIONS, SECRET, Remote, assert_same, assert_whole, failing, read_both, read_epoch
from programs import losses, pretrain, start_pretrain

from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
from personmae.errors import UserError
from personmae.system import storage

pytestmark = pytest.mark.integration


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
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 2.0)  # less is what a busy machine may take for any read
    proxy.faults = [Fault(times=2, what="stall", after_bytes=5_000)]
    totals = read_both(remote.small, tmp_path)
    assert totals["personmae_stream_retries_total{reason=timeout}"] == 2


@pytest.mark.slow
def test_a_stall_of_a_minute_costs_the_read_time_out_only(remote: Remote, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(r"shard\.00001", times=1, what="stall", after_bytes=1_500_000)]
    start = time.monotonic()
    totals = read_both(remote.large, tmp_path)
    assert time.monotonic() - start > 14
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
        assert time.monotonic() - start > 1.5
        assert_whole(data, None)
    proxy.start()
    assert "shard s3://crops/small/shard.0000" in str(caught.value)
    assert "Tried again for 2 s (data.retry_seconds) without a byte" in str(caught.value)
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
        with pytest.raises(
            UserError, match=rf"shard {location}/shard\.00001\.mds was refused \(NoSuchKey\): it does not exist"
        ):
            read_epoch(data)
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
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 75
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

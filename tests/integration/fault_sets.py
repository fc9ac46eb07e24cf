"""Data sets in a bucket behind a proxy that spoils answers, and how what is read is compared with the local directory.

``conftest.py`` makes the fixtures known to all tests of this folder.
"""

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
from fault_proxy import FaultProxy, moto_process

from personmae.data import attempts, cache
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, CanvasBatch
from personmae.errors import UserError
from personmae.system import mosaic

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
    small: Path  # the 50 images of all tests, shards of 20 kB
    large: Path  # 3 shards of 3.5 MB
    many: Path  # 64 shards of 5 images, 0.1 MB each

    def copy(self, name: str, prefix: str) -> str:
        """A copy that a test may damage; returns its location."""
        upload(self.client, getattr(self, name), prefix)
        return f"s3://{BUCKET}/{prefix}"


def write_noise(directory: Path, *, count: int, size: tuple[int, int], shard_bytes: int) -> Path:
    """Images that compress badly, as shards."""
    rng = np.random.default_rng(0)
    new_writer = mosaic.load("streaming.base.format.mds.writer").MDSWriter
    with new_writer(out=str(directory), columns={"jpeg": "bytes"}, hashes=["xxh64"], size_limit=shard_bytes) as writer:
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
    monkeypatch.setattr(attempts, "FIRST_DELAY_SECONDS", 0.02)
    yield made
    made.stop()
    assert made.requests
    assert all(request.authorization.startswith("AWS4-HMAC-SHA256 Credential=") for request in made.requests)
    assert SECRET not in "".join(capfd.readouterr())


def read_epoch(data: ShardSet, **options) -> list[CanvasBatch]:
    """Every batch of the first epoch, black where there is no image."""
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

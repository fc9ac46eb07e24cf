"""A set of 64 shards, a bucket to put it into, and a store that copies from a directory instead."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from caches import NUM_SHARDS

from personmae.data import attempts
from personmae.system import mosaic, storage


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 shards of 4 images, 7 kB each; read only."""
    directory, rng = tmp_path_factory.mktemp("many") / "set", np.random.default_rng(0)
    new_writer = mosaic.load("streaming.base.format.mds.writer").MDSWriter
    with new_writer(out=str(directory), columns={"jpeg": "bytes"}, hashes=["xxh64"], size_limit=8_000) as writer:
        for _ in range(4 * NUM_SHARDS):
            _, jpeg = cv2.imencode(".jpg", rng.integers(0, 256, (40, 24, 3), dtype=np.uint8))
            writer.write({"jpeg": jpeg.tobytes()})
    assert len(list(directory.glob("*.mds"))) == NUM_SHARDS
    return directory


@pytest.fixture
def put(s3_server) -> Callable[[Path, str], str]:
    """Uploads a directory into a bucket of that name; returns its location."""

    def upload(directory: Path, bucket: str) -> str:
        s3_server.bucket(bucket)
        for path in directory.iterdir():
            s3_server.client.upload_file(str(path), bucket, f"set/{path.name}")
        return f"s3://{bucket}/set"

    return upload


@pytest.fixture
def copying(many: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of a store, the directory ``many``; yields the names that were fetched."""
    fetched = []

    def fetch_into(file, root, name, check):
        check()
        fetched.append(name)
        file.write((many / name).read_bytes()[file.tell() :])

    monkeypatch.setattr(storage, "fetch_into", fetch_into)
    monkeypatch.setattr(attempts, "FIRST_DELAY_SECONDS", 0.01)
    return fetched

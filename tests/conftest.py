"""What all tests share: runtime shape checks, a few threads, images and shards of them, an S3 server."""

import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin while they wait cost four times the time on a busy machine
# scikit-learn sets these when it is imported. Programs under test have them from the start, whatever ran before.
os.environ |= {"KMP_DUPLICATE_LIB_OK": "True", "KMP_INIT_AT_FORK": "FALSE"}

import cv2
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    # On a GPU tests compile, and the compiler does not see through these checks.
    install_import_hook(["personmae.model", "personmae.reid"], "beartype.beartype")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&` ignores Ctrl-C, and so would each program under test
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(2)
cv2.setNumThreads(1)

NUM_IMAGES = 50
SHARD_BYTES = 20_000


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 50 JPEGs of different sizes, some of them in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        coarse = rng.integers(0, 256, (6, 3, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (int(rng.integers(30, 60)), int(rng.integers(70, 130))))
        name = f"more/p{i:02}.jpeg" if i % 5 == 0 else f"p{i:02}.jpg"
        assert cv2.imwrite(str(folder / name), image)
    return folder


@pytest.fixture(scope="session")
def shard_dir(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as shards; read only."""
    from personmae.data import importer

    target = tmp_path_factory.mktemp("shards") / "set"
    assert importer.write(images, str(target), shard_bytes=SHARD_BYTES) == NUM_IMAGES
    return target


@pytest.fixture
def restore_signals() -> Iterator[None]:
    """Gives signals back what handled them before a program ran in this process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class S3Server:
    """A running server, and a client of the test's own that does not go through the package."""

    endpoint: str
    client: Any

    def bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture(scope="session")
def _moto_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def fresh_s3_client() -> Iterator[Callable[[], None]]:
    """Forgets the process's S3 client before and after a test, and whenever it is called."""
    from personmae.system import storage

    storage.s3_client.cache_clear()
    yield storage.s3_client.cache_clear
    storage.s3_client.cache_clear()


@pytest.fixture
def s3_server(_moto_endpoint: str, fresh_s3_client: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """moto behind real HTTP, empty, with the environment that points at it."""
    import boto3

    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials that it found
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("S3_ENDPOINT_URL", _moto_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=_moto_endpoint)
    yield S3Server(_moto_endpoint, client)
    client.close()
    urllib.request.urlopen(urllib.request.Request(f"{_moto_endpoint}/moto-api/reset", method="POST")).close()

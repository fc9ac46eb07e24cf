"""What a benchmark's pod fetches before it starts and leaves when it is done, over a real HTTP conversation."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from launcher.cluster import bucket as buckets
from personmae.checkpoint import portable, remote
from personmae.checkpoint.commit import commit
from personmae.checkpoint.host_copy import HostCopy
from personmae.errors import UserError
from personmae.keys.renamed import print_new_name
from personmae.system import storage


@pytest.fixture
def bucket(s3_server: Any) -> Any:
    """A bucket with a run of two checkpoints, a benchmark as single files, and as a tar."""
    s3_server.bucket("bucket")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("Market/query/a.jpg", "Market/bounding_box_train/b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"jpg"))
    files = {
        "run/LATEST": b"step-00000020",
        "run/step-00000010/state.json": b"old",
        "run/step-00000020/state.json": b"new",
        "run/step-00000020/student.safetensors": b"weights",
        "market/query/a.jpg": b"jpg",
        "market/query/empty.txt": b"",
        "market.tar": packed.getvalue(),
        "broken.tar": b"not a tar" * 100,
    }
    for key, body in files.items():
        s3_server.client.put_object(Bucket="bucket", Key=key, Body=body)
    return s3_server


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetch(benchmark: str, encoder: str, into: Path) -> int:
    return buckets.main(["fetch", f"--benchmark={benchmark}", f"--encoder={encoder}", f"--into={into}"])


def test_a_benchmark_and_the_newest_checkpoint_are_fetched(bucket: Any, tmp_path: Path) -> None:
    assert fetch("s3://bucket/market.tar", "s3://bucket/run", tmp_path) == 0
    assert below(tmp_path / "benchmark") == {"Market/query/a.jpg": b"jpg", "Market/bounding_box_train/b.jpg": b"jpg"}
    assert below(tmp_path / "encoder") == {
        "checkpoints/LATEST": b"step-00000020",
        "checkpoints/step-00000020/state.json": b"new",
        "checkpoints/step-00000020/student.safetensors": b"weights",
    }
    assert fetch("s3://bucket/market", "random", tmp_path) == 0  # single files; it takes the place of the other
    assert below(tmp_path / "benchmark") == {"query/a.jpg": b"jpg", "query/empty.txt": b""}


def test_the_slash_at_the_end_of_a_place_is_nothing(bucket: Any, tmp_path: Path) -> None:
    assert fetch("s3://bucket/market/", "s3://bucket/run/", tmp_path) == 0
    assert "query/a.jpg" in below(tmp_path / "benchmark")
    assert "checkpoints/step-00000020/state.json" in below(tmp_path / "encoder")


def test_what_a_run_has_uploaded_is_fetched_to_where_a_benchmark_finds_it(bucket: Any, tmp_path: Path) -> None:
    copy = HostCopy()
    copy.take({"student": {"patch.weight": torch.arange(6.0)}})
    remote.send("s3://bucket/run", commit(tmp_path / "run", 30, copy, {"total_steps": 30}), 30, set())
    assert fetch("s3://bucket/market.tar", "s3://bucket/run", tmp_path / "pod") == 0
    found = portable.locate(tmp_path / "pod" / "encoder")
    assert found.name == "step-00000030"
    assert portable.find_fault(found) is None
    assert portable.read_state(found)["total_steps"] == 30


def test_a_store_that_does_not_answer_is_not_a_user_error(s3_server: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """With 78 one moment without the network would end a benchmark; with any other code the pod is replaced."""
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(EndpointConnectionError):
        fetch("s3://bucket/market.tar", "random", tmp_path)


def test_a_manifest_of_before_still_fetches_where_its_configuration_looks(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_new_name.cache_clear()
    assert buckets.main(["fetch", "--pictures=s3://bucket/market", "--encoder=random", f"--into={tmp_path}"]) == 0
    assert below(tmp_path) == {"pictures/query/a.jpg": b"jpg", "pictures/query/empty.txt": b""}
    assert capsys.readouterr().err == "note: --pictures is called --benchmark now\n"


@pytest.mark.parametrize(
    ("code", "final"),
    [
        ("AccessDenied", True),
        ("InvalidAccessKeyId", True),
        ("404", True),
        ("SlowDown", False),
        ("InternalError", False),
        ("ExpiredToken", False),  # a new pod gets new credentials
        ("NeverHeardOf", False),
    ],
)
def test_only_what_another_try_cannot_change_is_a_user_error(code: str, final: bool) -> None:
    def refuse() -> None:
        with buckets.explained("s3://bucket/x", "reading"):
            raise ClientError({"Error": {"Code": code}}, "GetObject")

    with pytest.raises(UserError if final else ClientError, match=code) as caught:
        refuse()
    assert isinstance(caught.value, UserError) == final


def test_missing_credentials_are_a_user_error() -> None:
    with pytest.raises(UserError, match="none were found"), buckets.explained("s3://bucket/x", "reading"):
        raise NoCredentialsError


def test_requests_have_no_checksums_that_compatible_servers_refuse(bucket: Any) -> None:
    seen: list[dict[str, str]] = []
    storage.s3_client().meta.events.register("before-send.s3", lambda request, **_: seen.append(dict(request.headers)))
    buckets.write("s3://bucket/x", b"x")
    assert buckets.read("s3://bucket/x") == b"x"
    assert len(seen) == 2
    assert not [name for headers in seen for name in headers if "checksum" in name.lower() or "trailer" in name.lower()]


@pytest.mark.parametrize(
    ("benchmark", "encoder", "told"),
    [
        ("s3://bucket/nothing", "random", "nothing lies at s3://bucket/nothing/"),
        ("s3://bucket/nothing.tar", "random", "fetching s3://bucket/nothing.tar was refused (NoSuchKey)"),
        ("s3://absent/x", "random", "fetching s3://absent/x was refused (NoSuchBucket)"),
        ("s3://bucket/broken.tar", "random", "must be an uncompressed tar"),
        ("s3://bucket/market.tar.gz", "random", "must be an uncompressed .tar or a prefix"),
        ("market", "random", "a location like s3://bucket/prefix is required. Got market"),
        ("s3://bucket/market", "s3://bucket/other", "s3://bucket/other has no checkpoint; train it first"),
    ],
)
def test_a_wrong_place_ends_the_pod_for_good(
    benchmark: str, encoder: str, told: str, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(benchmark, encoder, tmp_path) == 78
    assert told in capsys.readouterr().err


def test_a_tar_that_leaves_its_folder_is_refused(bucket: Any, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../outside.jpg"), io.BytesIO())
    bucket.client.put_object(Bucket="bucket", Key="bad.tar", Body=packed.getvalue())
    with pytest.raises(UserError, match="must be an uncompressed tar"):
        buckets.fetch_benchmark("s3://bucket/bad.tar", tmp_path / "in" / "benchmark")
    assert not list(tmp_path.rglob("outside.jpg"))


@pytest.mark.integration
def test_a_benchmark_leaves_its_result_in_the_bucket(s3_server: Any, tmp_path: Path) -> None:
    from people import draw_few_people

    s3_server.bucket("results")
    draw_few_people(tmp_path)
    given = [
        f"root={tmp_path / 'data/market1501'}",
        f"run_dir={tmp_path / 'run'}",
        "batch.num_ids=4",
        "train.epochs=1",
        "train.precision=fp32",
    ]
    command = ["launcher/downstream.py", "--config=configs/quickstart_random.yaml", "--program=finetune"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = warm.run([*command, "--result=s3://results/market.json", *given], env=environ, timeout=240)
    assert done.returncode == 0, done.stderr
    written = json.loads(buckets.read("s3://results/market.json") or b"")
    assert written == json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < written["mAP"] <= 1

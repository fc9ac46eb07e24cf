"""Directories and S3 over real HTTP (moto); every failure is one line that says what to do, within seconds."""

import socket
import time
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from moto.backends import get_backend

from personmae.data import importer, shards
from personmae.data.shard_set import ShardSet
from personmae.errors import UserError
from personmae.system import storage

NUM_IMAGES = 50
SHARD_BYTES = 20_000


def refused(call, *args, within_seconds: float = 60.0) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        call(*args)
    assert time.monotonic() - start < within_seconds
    return str(caught.value)


# --- names and directories ---


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket/a/b", ("bucket", "a/b/")),
        ("s3://bucket/a/b/", ("bucket", "a/b/")),
    ],
)
def test_bucket_and_prefix_are_split(url, expected):
    assert storage.split_s3(url) == expected


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "gs://bucket/prefix", "/a/directory"])
def test_what_is_not_an_s3_location_is_refused(url):
    assert f"s3://bucket/prefix is required. Got {url}" in refused(storage.split_s3, url)


def test_remote_locations_have_a_scheme():
    assert storage.is_remote("s3://bucket")
    assert storage.is_remote("gs://bucket")
    assert not storage.is_remote("/data/shards")
    assert not storage.is_remote(Path("data"))


def test_a_directory_lists_its_files_with_sizes_and_nothing_below(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").touch()
    assert storage.list_sizes(str(tmp_path)) == {"a": 3}
    assert "does not exist" in refused(storage.list_sizes, str(tmp_path / "nowhere"))
    storage.delete(str(tmp_path), ["a", "not there"])
    assert storage.list_sizes(str(tmp_path)) == {}


# --- S3 ---


@pytest.mark.integration
@pytest.mark.parametrize("prefix", ["", "/deep/prefix", "/slash/"])
def test_shards_written_to_s3_are_read_back_as_they_were(images, shard_dir, s3_server, tmp_path, prefix):
    bucket = s3_server.bucket("shards")
    root = f"s3://{bucket}{prefix}"
    assert importer.write(images, root, shard_bytes=SHARD_BYTES) == NUM_IMAGES
    below = prefix.strip("/") + "/" if prefix else ""
    assert sorted(s3_server.keys(bucket)) == sorted(f"{below}{path.name}" for path in shard_dir.iterdir())
    with ShardSet(root, tmp_path / "cache") as remote, ShardSet(str(shard_dir), tmp_path) as local:
        assert remote.sizes == local.sizes
        for number in range(NUM_IMAGES):
            assert bytes(remote.jpeg(number)) == bytes(local.jpeg(number))
    assert shards.verify(root, cache_dir=tmp_path / "other") == NUM_IMAGES


def test_listing_and_deleting_stay_directly_below_the_prefix(s3_server):
    bucket = s3_server.bucket("listing")
    for key in ("set/a", "set/b", "set/sub/c", "settings", "other/d"):
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=b"12")
    assert storage.list_sizes(f"s3://{bucket}/set") == {"a": 2, "b": 2}
    storage.delete(f"s3://{bucket}/set", ["a", "b"])
    assert s3_server.keys(bucket) == ["other/d", "set/sub/c", "settings"]


@pytest.mark.parametrize("refusal", [None, "NotImplemented", "AccessDenied"])
def test_many_objects_are_deleted_by_few_requests_or_by_one_each_where_a_server_wants_it(s3_server, monkeypatch, refusal):
    bucket = s3_server.bucket("many")
    names = [f"n{number} &<é" for number in range(7)]
    for name in names:
        s3_server.client.put_object(Bucket=bucket, Key=f"set/{name}", Body=b"")
    monkeypatch.setattr(storage, "_MOST_DELETED", 3)
    asked: list[str] = []

    def count(model, **_: object) -> None:
        asked.append(model.name)
        if refusal and model.name == "DeleteObjects":
            raise ClientError({"Error": {"Code": refusal, "Message": "no"}}, model.name)

    storage.s3_client().meta.events.register("before-call.s3", count)
    if refusal == "AccessDenied":
        with pytest.raises(UserError, match=r"deleting below s3://many/set was refused \(AccessDenied\)"):
            storage.delete(f"s3://{bucket}/set", names)
        assert len(s3_server.keys(bucket)) == 7
        return
    storage.delete(f"s3://{bucket}/set", names)
    assert s3_server.keys(bucket) == []
    assert asked.count("DeleteObject") == (7 if refusal else 1)
    assert asked.count("DeleteObjects") == 2


def test_what_a_server_keeps_of_many_objects_is_told(s3_server, monkeypatch):
    bucket = s3_server.bucket("kept")
    kept = {"Errors": [{"Key": "set/a", "Code": "AccessDenied", "Message": "locked"}]}
    monkeypatch.setattr(storage.s3_client(), "delete_objects", lambda **_: kept)
    with pytest.raises(UserError, match=r"deleting below s3://kept/set was refused \(AccessDenied\)") as caught:
        storage.delete(f"s3://{bucket}/set", ["a", "b"])
    assert "set/a: locked" in str(caught.value.__cause__)


def test_a_listing_longer_than_a_page_is_complete(s3_server):
    bucket = s3_server.bucket("long")
    backend = get_backend("s3")["123456789012"]["aws"]  # 1,001 requests would take seconds
    for i in range(1001):
        backend.put_object(bucket, f"set/{i}", b"")
    assert storage.list_sizes(f"s3://{bucket}/set") == {str(i): 0 for i in range(1001)}


def test_a_missing_bucket_is_named_and_nothing_is_tried_further(images, s3_server, tmp_path):
    for call, args in (
        (importer.write, (images, "s3://no-such-bucket/set")),
        (ShardSet, ("s3://no-such-bucket/set", tmp_path)),
    ):
        message = refused(call, *args)
        assert "s3://no-such-bucket/set" in message
        assert "the bucket does not exist. Create it or correct the name" in message


def test_a_prefix_without_an_index_says_how_to_write_one(s3_server, tmp_path):
    bucket = s3_server.bucket("empty")
    message = refused(ShardSet, f"s3://{bucket}/nothing", tmp_path)
    assert f"s3://{bucket}/nothing has none: write it with 'personmae shards write SRC s3://{bucket}/nothing'" in message


def test_a_taken_prefix_is_left_alone(images, s3_server):
    bucket = s3_server.bucket("taken")
    s3_server.client.put_object(Bucket=bucket, Key="set/precious", Body=b"data")
    assert f"s3://{bucket}/set already holds precious" in refused(importer.write, images, f"s3://{bucket}/set")
    assert s3_server.keys(bucket) == ["set/precious"]


def test_a_remote_shard_that_is_missing_or_of_another_size_is_named(shard_dir, s3_server, tmp_path):
    bucket = s3_server.bucket("damaged")
    for path in shard_dir.iterdir():
        s3_server.client.upload_file(str(path), bucket, path.name)
    s3_server.client.put_object(Bucket=bucket, Key="shard.00001.mds", Body=b"short")
    assert f"s3://{bucket}/shard.00001.mds must have" in refused(ShardSet, f"s3://{bucket}", tmp_path)
    s3_server.client.delete_object(Bucket=bucket, Key="shard.00001.mds")
    assert f"s3://{bucket}/shard.00001.mds must have" in refused(ShardSet, f"s3://{bucket}", tmp_path)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.integration
def test_an_address_where_nothing_listens_is_an_error_within_seconds(images, s3_server, fresh_s3_client, monkeypatch, tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("S3_ENDPOINT_URL", address)
    fresh_s3_client()
    for call, args in ((ShardSet, ("s3://bucket/set", tmp_path)), (importer.write, (images, "s3://bucket/set"))):
        message = refused(call, *args)
        assert "s3://bucket/set" in message
        assert address in message
        assert "S3_ENDPOINT_URL" in message


def test_an_address_that_is_not_one_is_an_error(s3_server, fresh_s3_client, monkeypatch, tmp_path):
    monkeypatch.setenv("S3_ENDPOINT_URL", "localhost-without-scheme")
    fresh_s3_client()
    assert "S3_ENDPOINT_URL" in refused(ShardSet, "s3://bucket/set", tmp_path)


def test_missing_credentials_are_an_error_that_names_the_variables(s3_server, fresh_s3_client, monkeypatch, tmp_path):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials that it found
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fresh_s3_client()
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refused(ShardSet, "s3://bucket/set", tmp_path)


def test_the_identity_in_use_is_told_without_its_secret(s3_server, fresh_s3_client, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    fresh_s3_client()
    output = storage.s3_identity()
    assert output == f"access key AKIA... from env, endpoint {s3_server.endpoint}"


def test_requests_have_no_checksums_that_compatible_servers_refuse(s3_server, fresh_s3_client):
    fresh_s3_client()
    s3_server.bucket("plain")
    client, seen = storage.s3_client(), []
    client.meta.events.register("before-send.s3", lambda request, **_: seen.append(dict(request.headers)))
    storage.write("s3://plain/x", "a", b"content")
    assert storage.read("s3://plain/x", "a") == b"content"
    assert len(seen) == 2
    assert not [name for headers in seen for name in headers if "checksum" in name.lower() or "trailer" in name.lower()]
    fresh_s3_client()


def test_one_client_serves_the_process(s3_server):
    assert storage.s3_client() is storage.s3_client()
    assert storage.s3_client().meta.endpoint_url == s3_server.endpoint

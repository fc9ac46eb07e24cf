"""A location is no URL: keys of an object store are taken as they are, over real HTTP (moto)."""

import json

import pytest

from launcher.cluster import bucket as buckets
from personmae import config
from personmae.checkpoint import portable, remote
from personmae.data import importer, shards
from personmae.data.shard_set import ShardSet
from personmae.errors import UserError
from personmae.system import storage

NUM_IMAGES = 50
ODD = ("a #1", "a?b=c", "a%20b", "a+b", "é/日本", "a/../b", "a//b", "/a", "a;b&c=d", "a@b:c", "~a'(b)!*")


@pytest.mark.parametrize("key", ODD)
def test_bucket_and_prefix_of_any_key_are_split_as_they_stand(key):
    assert storage.split_s3(f"s3://bkt/{key}") == ("bkt", f"{key}/")
    assert storage.split_s3(f"s3://bkt/{key}/") == ("bkt", f"{key}/")
    assert buckets.split(f"s3://bkt/{key}/") == ("bkt", key)


@pytest.mark.parametrize("key", ODD)
def test_a_store_keeps_and_finds_files_under_the_very_key(s3_server, key):
    bucket = s3_server.bucket("odd")
    root = f"s3://{bucket}/{key}"
    storage.write(root, "f", b"content")
    assert s3_server.keys(bucket) == [f"{key}/f"]
    assert storage.read(root, "f") == b"content"
    assert storage.list_sizes(root) == {"f": 7}
    assert buckets.read(f"{root}/f") == b"content"
    assert buckets.age_seconds(f"{root}/f") is not None
    storage.delete(root, ["f"])
    assert s3_server.keys(bucket) == []


@pytest.mark.integration
def test_sets_whose_names_differ_behind_a_hash_are_two(images, s3_server, tmp_path):
    bucket = s3_server.bucket("sets")
    few = importer.write(images / "more", f"s3://{bucket}/set #1")
    assert importer.write(images, f"s3://{bucket}/set #2") == NUM_IMAGES != few
    for name, count in (("set #1", few), ("set #2", NUM_IMAGES)):
        assert shards.verify(f"s3://{bucket}/{name}", cache_dir=tmp_path / name) == count
        buckets.require_shards(f"s3://{bucket}/{name}")
    with pytest.raises(UserError, match="set has none"):
        ShardSet(f"s3://{bucket}/set", tmp_path)


def test_checkpoints_of_runs_whose_names_differ_behind_a_hash_do_not_meet(s3_server, tmp_path):
    bucket = s3_server.bucket("runs")
    for number in (1, 2):
        folder = tmp_path / str(number) / portable.name_of(number)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"files": {}}))
        remote.send(f"s3://{bucket}/run #{number}", folder, number, set())
    assert [remote.steps(f"s3://{bucket}/run #{number}") for number in (1, 2)] == [[1], [2]]


def test_a_slash_at_the_end_of_a_runs_store_does_not_count():
    """A checkpoint went to STORE/step-..., and resuming looked at STORE//step-..."""
    assert config.Checkpoint(upload_to="s3://bucket/run/").upload_to == "s3://bucket/run"
    assert config.Checkpoint(upload_to=None).upload_to is None


@pytest.mark.parametrize("root", ["gs://bkt/a #1", "azure://bkt/a?b", "oci://bkt/a;b", "gs://bkt/a b"])
def test_what_other_clients_would_cut_off_is_refused(root, tmp_path):
    (tmp_path / "f").touch()
    for call in (
        lambda: storage.list_sizes(root),
        lambda: storage.list_folders(root),
        lambda: storage.read(root, "f"),
        lambda: storage.upload(root, "f", tmp_path / "f"),
        lambda: storage.delete(root, ["f"]),
        lambda: importer.write(tmp_path, root),
    ):
        with pytest.raises(UserError, match=r"reads it as a URL\. .* has '[#?; ]': rename the prefix"):
            call()


def test_a_local_path_with_a_colon_and_two_slashes_is_no_store():
    assert not storage.is_remote("/data/a://b")
    assert storage.is_remote("s3://a")


def test_a_whole_bucket_may_hold_the_data_of_a_pod(s3_server, tmp_path):
    bucket = s3_server.bucket("whole")
    for key in ("index.json", "query/a.jpg"):
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=b"x")
    buckets.require_shards(f"s3://{bucket}")
    buckets.fetch_benchmark(f"s3://{bucket}", tmp_path / "benchmark")
    assert (tmp_path / "benchmark" / "query" / "a.jpg").read_bytes() == b"x"


def test_what_begins_alike_is_not_what_was_asked_for(s3_server):
    bucket = s3_server.bucket("alike")
    s3_server.client.put_object(Bucket=bucket, Key="market1501/a.jpg", Body=b"x")
    with pytest.raises(UserError, match="nothing lies at"):
        buckets.require_something(f"s3://{bucket}/market")
    buckets.require_something(f"s3://{bucket}/market1501")
    buckets.require_something(f"s3://{bucket}/market1501/a.jpg")

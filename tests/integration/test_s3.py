"""Object storage against a real server: a Ceph gateway, which checks signatures and bucket names."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from programs import losses, one_line_error, personmae, pretrain

pytestmark = [pytest.mark.integration, pytest.mark.slow]
_NEEDED = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
_SCRIPT = Path(__file__).parent / "ceph_gateway.sh"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A gateway with an empty bucket "crops"; yields the environment that reaches it."""
    if missing := [name for name in _NEEDED if not shutil.which(name)]:
        pytest.skip(f"{missing[0]} is not installed; tests/integration/install_ceph.sh installs it on Debian as root")
    directory = tmp_path_factory.mktemp("ceph")
    started = subprocess.run([_SCRIPT, "start", directory], capture_output=True, text=True, check=False, timeout=200)
    assert started.returncode == 0, started.stdout + started.stderr
    environment = {
        "S3_ENDPOINT_URL": started.stdout.strip().splitlines()[-1],
        "AWS_ACCESS_KEY_ID": "test-access-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=environment["S3_ENDPOINT_URL"],
            aws_access_key_id="test-access-key",
            aws_secret_access_key="test-secret-key",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="crops")
        yield environment
        client.close()
    finally:
        subprocess.run([_SCRIPT, "stop", directory], check=False, capture_output=True)


def test_images_travel_through_the_bucket_into_the_same_losses(
    gateway: dict[str, str], images: Path, shard_dir: Path, native_run: Path, tmp_path: Path
) -> None:
    shard_bytes = json.loads((shard_dir / "index.json").read_text())["shards"][0]["size_limit"]
    location = "s3://crops/people/shards"
    written = personmae("shards", "write", images, location, "--shard-mb", str(shard_bytes / 2**20), env=gateway)
    assert written.returncode == 0, written.stderr
    verified = personmae("shards", "verify", location, env=gateway)
    assert verified.stdout.strip() == f"50 samples of {location} are whole", verified.stderr
    pretrain(location, tmp_path / "run", "engine.name=native", env=gateway)
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(native_run))


def test_a_missing_bucket_and_a_wrong_key_are_named(gateway: dict[str, str], images: Path, tmp_path: Path) -> None:
    missing = personmae("shards", "write", images, "s3://no-such-bucket/x", env=gateway)
    assert "s3://no-such-bucket/x" in one_line_error(missing)
    assert "the bucket does not exist" in missing.stderr
    wrong = personmae("shards", "stats", "s3://crops/people/shards", env=(gateway | {"AWS_SECRET_ACCESS_KEY": "wrong"}))
    assert "the secret key does not fit the access key" in one_line_error(wrong)
    unknown = personmae("shards", "stats", "s3://crops/people/shards", env=(gateway | {"AWS_ACCESS_KEY_ID": "nobody"}))
    assert "the server does not know this access key" in one_line_error(unknown)
    run_dir = tmp_path / "run"
    train = personmae(
        "pretrain", "configs/quickstart.yaml", f"run_dir={run_dir}", "data.shards=s3://crops/nothing-here", env=gateway
    )
    assert "s3://crops/nothing-here has none" in one_line_error(train)
    assert not run_dir.exists()

"""A rendered benchmark in the stand-in for a cluster: init container, sidecar store, trainer; the bucket is real HTTP."""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import LocalCluster
from sample_requests import ROOT, request_for

from launcher.cluster import bucket as buckets
from launcher.cluster import deployed, render

pytestmark = [pytest.mark.integration, pytest.mark.slow]
TRAINING = ["batch.num_ids=4", "train.epochs=2", "train.precision=fp32", "train.log_every=1", "checkpoint.every_steps=2"]


@pytest.fixture
def bucket(s3_server: Any, tmp_path: Path) -> str:
    """A bucket with a small benchmark as a tar."""
    from people import draw_few_people

    draw_few_people(tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(tmp_path / "data" / "market1501", arcname=".")
    s3_server.bucket("bucket")
    s3_server.client.put_object(Bucket="bucket", Key="market1501.tar", Body=packed.getvalue())
    return "bucket"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalCluster]:
    kubectl = LocalCluster(tmp_path / "nodes", factor=0.1)
    yield kubectl
    kubectl.close()


def test_a_rendered_benchmark_fetches_trains_stops_resumes_elsewhere_and_leaves_its_result(
    local: LocalCluster, bucket: str, tmp_path: Path, s3_server: Any
) -> None:
    names = ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    keys = {name: os.environ[name] for name in names}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "personmae-s3"}, "stringData": keys}
    places = [f"root=s3://{bucket}/market1501.tar", f"checkpoint.upload_to=s3://{bucket}/runs/market"]
    config = ROOT / "configs" / "quickstart_random.yaml"
    rendered = render.render(
        request_for("finetune-market1501", config=config, overrides=[*places, *TRAINING], components=["s3-secret"])
    )
    deployed.create(local, [rendered.run], [secret, *rendered.objects], rendered.workload)
    wait_for(lambda: any(key.endswith("manifest.json") for key in s3_server.keys(bucket)), local)
    pod = local.pods[0].name
    local.run("create", "--raw", f"/api/v1/namespaces/{local.namespace}/pods/{pod}/eviction", "-f", "-", text="{}")
    wait_for(lambda: deployed.finished(deployed.find(local, rendered.run)[1]), local)
    assert deployed.finished(deployed.find(local, rendered.run)[1]) == "Complete", local.logs()
    codes = [pod.codes()["trainer"] for pod in local.pods]
    assert codes in ([75, 0], [0]), local.logs()  # or it was done before the signal came
    assert deployed.find(local, rendered.run)[1]["status"]["failed"] == 0
    said = [(tmp_path / "nodes" / pod.name / "trainer.log").read_text() for pod in local.pods]
    fetched = [(tmp_path / "nodes" / pod.name / "fetch.log").read_text() for pod in local.pods]
    assert all(text.startswith("fetched s3://bucket/market1501.tar") for text in fetched)
    assert "result: s3://bucket/runs/market/result.json" in said[-1]
    assert len(codes) == 1 or "resuming at step" in said[-1] or "complete" in said[-1]
    assert 0 < json.loads(buckets.read("s3://bucket/runs/market/result.json") or b"")["mAP"] <= 1


def wait_for(arrived: Callable[[], Any], local: LocalCluster) -> None:
    """Wait two minutes at most."""
    for _ in range(1200):
        if arrived():
            return
        time.sleep(0.1)
    raise TimeoutError(local.logs())

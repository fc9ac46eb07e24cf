"""What an operator does, from the namespace to the last deletion, on a real API server, as the role personmae-submitter.

    make test-cluster KUBECONFIG=FILE

``real.py`` says what else a cluster with nodes needs. PERSONMAE_E2E_RESTART may be a command that restarts the API server.
"""

import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from people import draw_few_people
from real import Cluster
from sample_requests import ROOT

from launcher.cluster import bucket as buckets
from launcher.cluster.deployed import INSTANCE

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = [
    "train.global_batch_size=24",
    "train.precision=fp32",
    "engine.name=native",
    "data.shuffle_block_size=32",
    "data.num_threads=1",
    "train.log_every=5",
]


@pytest.fixture
def shards(cluster: Cluster, shard_dir: Path) -> str:
    """A few images in the bucket."""
    for path in shard_dir.iterdir():
        buckets.write(f"{cluster.store}/shards/{path.name}", path.read_bytes())
    return f"{cluster.store}/shards"


def saved_step(place: str) -> int:
    """The step of a store's newest checkpoint; -1 where there is none."""
    return int((buckets.read(f"{place}/LATEST") or b"step--1").decode().removeprefix("step-"))


def test_a_run_is_submitted_scaled_evicted_suspended_resumed_deleted_and_submitted_again(cluster: Cluster, shards: str) -> None:
    run, place = "story", f"{cluster.store}/story"
    given = [f"data.shards={shards}", f"checkpoint.upload_to={place}", "train.total_steps=1000000", *SMALL]
    options = ["--overlay", "dev-cpu", "--nodes", "1:3", "--name", run, "--image", cluster.image]
    submit = ["configs/quickstart.yaml", *given, "checkpoint.every_steps=20", *options]

    def trains(ranks: int, beyond: int) -> bool:
        state = cluster.state(run)
        return state.get("world_size") == ranks and ((state["progress"] or {}).get("step") or 0) > beyond

    cluster.personmae("submit", *submit)
    assert "exists already" in cluster.personmae("submit", *submit, code=78)
    cluster.wait_for(lambda: trains(3, 5))
    cluster.personmae("scale", run, "--nodes", "2")
    cluster.wait_for(lambda: trains(2, 5))
    cluster.wait_for(lambda: saved_step(place) > 0)
    evicted = cluster.pods(run)["0"]
    metadata = {"name": evicted, "namespace": cluster.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{evicted}/eviction"
    before = saved_step(place)
    cluster.wait_for(lambda: cluster.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(eviction)))
    cluster.wait_for(lambda: cluster.pods(run).get("0", evicted) != evicted)
    cluster.wait_for(lambda: trains(2, before))
    cluster.personmae("suspend", run)
    cluster.wait_for(lambda: cluster.state(run)["state"] == "Suspended" and not cluster.pods(run))
    before = saved_step(place)
    cluster.personmae("resume", run)
    cluster.wait_for(lambda: trains(2, before))
    assert "resum" in cluster.personmae("logs", run)
    cluster.personmae("delete", run)
    cluster.personmae("submit", *submit)  # at once, while the old pods save and the old store goes
    saved = saved_step(place)
    assert saved >= before
    cluster.wait_for(lambda: trains(3, saved))
    time.sleep(15)  # what was going then is gone now
    assert {name.split("/")[0] for name in cluster.left(run)} >= {"job.batch", "deployment.apps", "service", "configmap"}
    assert trains(3, saved)
    cluster.personmae("delete", run)
    cluster.wait_for(lambda: not cluster.left(run))
    assert saved_step(place) >= saved


def test_a_name_that_somebody_elses_objects_bear_deletes_none_of_them(cluster: Cluster) -> None:
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mlflow", "labels": {INSTANCE: "mlflow"}}}
    cluster.kubectl("apply", "-f", "-", text=json.dumps(foreign))
    assert "there is no run mlflow" in cluster.personmae("delete", "mlflow", code=78)
    assert cluster.left("mlflow") == ["configmap/mlflow"]


@pytest.fixture
def suite_file(cluster: Cluster, shards: str, tmp_path: Path) -> Path:
    """A pre-training of a few steps and a benchmark of a few people."""
    draw_few_people(tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(tmp_path / "data" / "market1501", arcname=".")
    buckets.write(f"{cluster.store}/market1501.tar", packed.getvalue())
    small = ["batch.num_ids=4", "train.epochs=2", "train.precision=fp32", "train.drop_path_rate=0.0"]
    pre = {"name": "pre", "config": str(ROOT / "configs/quickstart.yaml"), "overlay": "dev-cpu", "nodes": [1, 1], "gpus": 0}
    pre |= {"set": ["data.shards={shards}", "train.total_steps=10", *SMALL]}
    market = {"name": "market", "after": "pre", "config": str(ROOT / "configs/quickstart_personmae.yaml"), "gpus": 0}
    market |= {"set": ["root={market}", *small]}
    places = {"shards": shards, "market": f"{cluster.store}/market1501.tar"}
    content = {"name": "tale", "results": f"{cluster.store}/tale", "places": places, "stages": [pre, market]}
    (tmp_path / "tale.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "tale.yaml"


def test_a_suite_outlives_a_server_that_restarts_and_rights_that_are_away(cluster: Cluster, suite_file: Path) -> None:
    options = ["--with", "s3-secret", "--memory", "4Gi", "--cpu", "1", "--image", cluster.image]
    cluster.personmae("submit", suite_file, *options)
    held = json.loads(cluster.kubectl("get", "rolebinding", "tale-dispatcher", "-o", "json"))
    cluster.wait_for(lambda: "pre runs" in cluster.personmae("logs", "tale"))
    cluster.kubectl("delete", "rolebinding", "tale-dispatcher")  # what an API server that starts says, is said now: 403
    cluster.wait_for(lambda: "403" in cluster.personmae("logs", "tale"))
    if command := os.environ.get("PERSONMAE_E2E_RESTART"):
        subprocess.run(command, shell=True, check=True, timeout=300)
    kept = {key: held["metadata"][key] for key in ("name", "labels", "ownerReferences") if key in held["metadata"]}
    cluster.kubectl("apply", "-f", "-", text=json.dumps(held | {"metadata": kept}))
    cluster.wait_for(lambda: cluster.state("tale")["state"].startswith(("Complete", "Failed")), 900)
    state = cluster.state("tale")
    assert state["state"] == "Complete", cluster.personmae("logs", "tale")
    table = (buckets.read(f"{cluster.store}/tale/results.md") or b"").decode()
    assert "| market | market1501 |" in table, table
    cluster.personmae("delete", "tale")
    for run in ("tale", "tale-pre", "tale-market"):
        cluster.wait_for(lambda run=run: not cluster.left(run))

"""A run from its submission to its end: pods are evicted, fail and are scaled, and no sample is lost or trained on twice.

Without a cluster the manifests are obeyed by ``kubelet.py``, ``controller.py`` and ``apiserver.py``, with real processes and
a real S3 server. The same is asked of a cluster where these are set: PERSONMAE_E2E_KUBECONFIG, PERSONMAE_E2E_NAMESPACE (it
has the secret personmae-s3), PERSONMAE_E2E_IMAGE, and PERSONMAE_E2E_STORE (s3://BUCKET/PREFIX, which this machine reaches
too, with S3_ENDPOINT_URL and AWS's variables; what is written there stays).
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from apiserver import LocalCluster
from kubelet import Object, free_port
from sample_requests import by_name, request_for

from launcher.cluster import bucket as buckets
from launcher.cluster import deployed, render
from launcher.cluster.kubectl import Kubectl
from personmae.checkpoint import remote
from personmae.data import order
from personmae.system import storage

pytestmark = [pytest.mark.integration, pytest.mark.slow]
HERE = Path(__file__).parent
TOTAL_STEPS, BATCH, BLOCK = 60, 24, 32
SETTINGS = [
    f"train.total_steps={TOTAL_STEPS}",
    f"train.global_batch_size={BATCH}",
    "train.precision=fp32",
    "engine.name=native",
    f"data.shuffle_block_size={BLOCK}",
    "data.num_threads=1",
    "checkpoint.every_steps=5",
]
FAST = ["--settle-seconds=2", "--keep-alive-seconds=5"]
GIVEN = [f"PERSONMAE_E2E_{name}" for name in ("KUBECONFIG", "NAMESPACE", "IMAGE", "STORE")]
BREAK = "rm -rf /tmp/personmae-beats-*"  # what cleans /tmp by age may do this: the agent fails when the next round begins


@dataclass
class Stage:
    """Where a run is rehearsed: a cluster, a place in a bucket, and how patient one has to be."""

    kubectl: Kubectl
    store: str
    image: str
    pace_seconds: float
    patience_seconds: float

    def __post_init__(self) -> None:
        self.client = storage.s3_client()

    def write(self, url: str, content: bytes) -> None:
        bucket, key = buckets.split(url)
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def read(self, url: str) -> bytes:
        bucket, key = buckets.split(url)
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, url: str) -> list[str]:
        """All files below a place."""
        bucket, prefix = buckets.split(url)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])]

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """What ``what`` returns once that is true."""
        deadline = time.monotonic() + self.patience_seconds
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.2)
        raise TimeoutError(self.kubectl.logs() if isinstance(self.kubectl, LocalCluster) else "see 'personmae logs'")

    @property
    def local(self) -> LocalCluster | None:
        """The stand-in, which remembers pods that a cluster has forgotten."""
        return self.kubectl if isinstance(self.kubectl, LocalCluster) else None


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_s3_client: Callable[[], None]) -> Iterator[dict[str, str]]:
    """moto as a process of its own, and what a client must know of it."""
    port = free_port()
    given = {"S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in ({"NO_PROXY": "127.0.0.1"} | given).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(tmp_path / "s3.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        for _ in range(300):
            with contextlib.suppress(Exception):
                storage.s3_client().create_bucket(Bucket="bucket")
                break
            time.sleep(0.1)
        yield given
        server.kill()


@pytest.fixture(params=["stand-in", "cluster"])
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_s3_client: Callable[[], None]
) -> Iterator[Stage]:
    if request.param == "cluster":
        if missing := [name for name in GIVEN if not os.environ.get(name)]:
            pytest.skip(f"needs a cluster: set {', '.join(missing)}")
        config, namespace, image, store = (os.environ[name] for name in GIVEN)
        monkeypatch.setenv("KUBECONFIG", config)
        yield Stage(Kubectl(namespace), f"{store}/{uuid.uuid4().hex[:8]}", image, 3.0, 900.0)
        return
    keys = request.getfixturevalue("s3")
    kubectl = LocalCluster(tmp_path / "nodes", factor=0.1)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "personmae-s3"}, "stringData": keys}
    deployed.apply(kubectl, [secret])
    yield Stage(kubectl, "s3://bucket", f"registry.test/personmae@sha256:{'0' * 64}", 0.5, 240.0)
    kubectl.close()


class Run:
    """A run that records what it trains on, created as ``personmae submit`` does it, with ``pods`` pods of 1 to ``most``."""

    def __init__(self, stage: Stage, shard_dir: Path, *, most: int, pods: int) -> None:
        self.stage, self._shards = stage, shard_dir
        self.name = f"rehearsal-{uuid.uuid4().hex[:6]}"
        self.store, self._record = f"{stage.store}/{self.name}", f"{stage.store}/{self.name}-record"
        for path in shard_dir.iterdir():
            stage.write(f"{stage.store}/shards/{path.name}", path.read_bytes())
        rendered = render.render(
            request_for(
                "dev-cpu",
                nodes=(1, most),
                name=self.name,
                namespace=stage.kubectl.namespace,
                image=stage.image,
                overrides=[f"data.shards={stage.store}/shards", f"checkpoint.upload_to={self.store}", *SETTINGS],
                env=[f"RECORD={self._record}", f"PACE_SECONDS={stage.pace_seconds}"],
            )
        )
        names = by_name(rendered.objects)
        names["ConfigMap", f"{self.name}-config"]["data"]["recorded.py"] = (HERE / "recorded.py").read_text()
        spec = names["Job", f"{self.name}-trainer"]["spec"]
        spec["parallelism"] = spec["completions"] = pods
        args = spec["template"]["spec"]["containers"][0]["args"]
        args[args.index("launcher/$(PROGRAM).py")] = "/etc/personmae/recorded.py"
        args[args.index("--") : args.index("--")] = FAST
        deployed.create(stage.kubectl, [self.name], rendered.objects, rendered.workload)

    def job(self) -> Object:
        return deployed.find(self.stage.kubectl, self.name)[1]

    def end(self) -> Object:
        """Wait for the end of the Job; its last condition."""
        self.stage.wait_for(lambda: deployed.finished(self.job()))
        return self.job()["status"]["conditions"][-1]

    def pods(self) -> dict[int, Object]:
        """The newest pod of each index."""
        selector = f"{deployed.INSTANCE}={self.name},app.kubernetes.io/component=trainer"
        found = sorted(self.stage.kubectl.items("pods", "-l", selector), key=lambda pod: pod["status"]["phase"] == "Running")
        return {int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]): pod for pod in found}

    def evict(self, pod: Object) -> None:
        """What ``kubectl drain`` asks for."""
        metadata = {"name": pod["metadata"]["name"], "namespace": self.stage.kubectl.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
        self.stage.kubectl.run("create", "--raw", path, "-f", "-", text=json.dumps(eviction))

    def delete(self, pod: Object) -> None:
        """Somebody deletes it: nothing but its code 75 says then that this is no failure."""
        self.stage.kubectl.run("delete", "pod", pod["metadata"]["name"], "--wait=false")

    def run_in(self, pod: Object, command: str) -> None:
        self.stage.kubectl.run("exec", pod["metadata"]["name"], "-c", "trainer", "--", "sh", "-c", command)

    def scale(self, nodes: int) -> None:
        deployed.scale(self.stage.kubectl, self.name, nodes)

    def edit_variables(self, **values: str) -> None:
        patch = json.dumps({"data": values})
        self.stage.kubectl.run("patch", "configmap", f"{self.name}-run", "--type", "merge", "-p", patch)

    def replaced(self, old: Object) -> Object:
        """Wait for another pod of the same index that runs."""
        index = int(old["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])

        def there() -> Object | None:
            pod = self.pods().get(index, old)
            return pod if pod["metadata"]["name"] != old["metadata"]["name"] and _running(pod) else None

        return self.stage.wait_for(there)

    def finish(self) -> None:
        self.stage.write(f"{self._record}/finish", b"")

    def recorded(self) -> dict[int, dict[int, dict[int, str]]]:
        """By round, step and rank: where the samples stand; a step that not all ranks have begun is left out."""
        found: dict[int, dict[int, dict[int, str]]] = {}
        sizes = {}
        for key in self.stage.keys(self._record):
            if "/" in key:
                (number, rank, size), step = map(int, key.split("/")[0].split("-")), int(key.split("/")[1])
                found.setdefault(number, {}).setdefault(step, {})[rank] = f"{self._record}/{key}"
                sizes[number] = size
        return {n: {s: r for s, r in sorted(steps.items()) if len(r) == sizes[n]} for n, steps in sorted(found.items())}

    def trains(self, world_size: int, after: int = 0) -> int:
        """Wait for a round beyond ``after`` in which so many ranks have trained for some steps; its number."""

        def there() -> int:
            rounds = self.recorded().items()
            return max((n for n, s in rounds if n > after and len(s) > 2 and len(s[min(s)]) == world_size), default=0)

        return self.stage.wait_for(there)

    def history(self) -> tuple[dict[int, list[int]], int]:
        """Keys of the samples of every step as the last checkpoint has them, and how many steps were done twice."""
        history: dict[int, list[int]] = {}
        again = 0
        for steps in filter(None, self.recorded().values()):
            first = min(steps)
            assert first <= len(history), f"steps {len(history)} to {first} are left out"
            again += len(history) - first
            history = {step: ids for step, ids in history.items() if step < first}
            for step, ranks in steps.items():
                history[step] = [int(k) for _, url in sorted(ranks.items()) for k in self.stage.read(url).split()]
        return history, again

    def planned(self) -> dict[int, list[int]]:
        """Keys of the samples of every step, as an undisturbed run takes them."""
        sizes = [shard["samples"] for shard in json.loads((self._shards / "index.json").read_text())["shards"]]
        per_epoch = sum(sizes) // BATCH
        plan = {}
        for step in range(TOTAL_STEPS):
            epoch, number = divmod(step, per_epoch)
            ids = order.epoch_order(sizes, seed=0, epoch=epoch, block_size=BLOCK).ids[number * BATCH : (number + 1) * BATCH]
            plan[step] = order.sample_keys(ids, seed=0, epoch=epoch).tolist()
        return plan


def _running(pod: Object) -> bool:
    return pod["status"]["phase"] == "Running" and not pod["metadata"].get("deletionTimestamp")


def saved_steps(stage: Stage, store: str) -> list[int]:
    """Steps of the checkpoints of a store, in which nothing may be half-written."""
    folders: dict[str, set[str]] = {}
    for key in stage.keys(store):
        if "/" in key:
            folders.setdefault(key.split("/")[0], set()).add(key.split("/")[1])
    for folder, names in folders.items():
        manifest = json.loads(stage.read(f"{store}/{folder}/manifest.json"))
        assert names - set(remote.RECORDS) == {*manifest, "manifest.json"}
        for name, expected in manifest.items():
            content = stage.read(f"{store}/{folder}/{name}")
            assert len(content) == expected["bytes"]
            assert hashlib.sha256(content).hexdigest() == expected["sha256"]
    bucket, prefix = buckets.split(store)
    assert not stage.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads")
    assert stage.read(f"{store}/LATEST").decode() == max(folders)
    return sorted(int(folder.removeprefix("step-")) for folder in folders)


@pytest.fixture
def start(stage: Stage, shard_dir: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(**sizes: int) -> Run:
        runs.append(Run(stage, shard_dir, **sizes))
        return runs[-1]

    yield start
    for run in runs:
        deployed.delete(stage.kubectl, run.name)


@pytest.mark.timeout(3600)
def test_a_run_whose_pods_are_deleted_evicted_fail_and_are_scaled_completes_without_a_sample_lost_or_doubled(
    stage: Stage, start: Callable[..., Run]
) -> None:
    run = start(most=3, pods=3)
    number = run.trains(3)
    stage.wait_for(lambda: run.job()["status"].get("ready") == 3)  # or the disruption budget might refuse the eviction
    before = run.pods()
    run.run_in(before[2], BREAK)
    run.evict(before[1])
    run.delete(before[0])
    replaced = [run.replaced(pod) for _, pod in sorted(before.items())]  # none of them has a disk with a checkpoint
    number = run.trains(3, after=number)
    run.scale(2)
    run.trains(2, after=number)
    run.finish()
    ended = run.end()
    assert (ended["type"], ended["reason"]) == ("Complete", "SuccessPolicy")
    if stage.local:
        codes = sorted((pod.index, pod.codes()["trainer"]) for pod in stage.local.controllers.popitem()[1].pods)
        assert codes == [(0, 0), (0, 75), (1, 0), (1, 75), (2, 1), (2, 75)], stage.local.logs()
    assert run.job()["status"]["failed"] == 1
    count = "batch.kubernetes.io/job-index-failure-count"
    assert [pod["metadata"]["annotations"].get(count, "0") for pod in replaced] == ["0", "0", "1"]
    history, again = run.history()
    assert history == run.planned()
    assert again == 0  # all stops were in good order: the pod that failed had trained nothing since
    assert saved_steps(stage, run.store)[-1] == TOTAL_STEPS


@pytest.mark.timeout(3600)
def test_one_pod_with_a_user_error_ends_the_job_and_the_others_save_within_their_grace(
    stage: Stage, start: Callable[..., Run]
) -> None:
    run = start(most=3, pods=2)
    number = run.trains(2)
    run.edit_variables(NODES="1: 3")  # a blank too much: what runs does not notice, what starts from now on does
    run.scale(3)
    ended = run.end()
    assert (ended["type"], ended["reason"]) == ("Failed", "PodFailurePolicy")
    assert "failed with exit code 78 matching FailJob rule at index 0" in ended["message"]
    assert f"{run.name}-trainer-2-" in ended["message"]
    if stage.local:
        pods = stage.local.controllers.popitem()[1].pods
        assert [(pod.index, pod.codes()["trainer"]) for pod in pods] == [(0, 75), (1, 75), (2, 78)], stage.local.logs()
        assert not any(container.killed for pod in pods for container in pod.containers)
    history, again = run.history()
    assert max(run.recorded()) == number
    assert saved_steps(stage, run.store)[-1] == len(history) < TOTAL_STEPS
    assert history == {step: ids for step, ids in run.planned().items() if step < len(history)}
    assert again == 0

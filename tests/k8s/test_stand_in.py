"""The stand-in for a cluster does what a real server does, asked of both: ownership, deletion, back-off, suspension.

The second half needs PERSONMAE_E2E_KUBECONFIG (``real.py``).
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from apiserver import LocalCluster
from kubelet import Object
from real import Cluster

from launcher.cluster import deployed
from launcher.cluster.kubectl import Kubectl

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
COUNT = "batch.kubernetes.io/job-index-ignored-failure-count"
STAYS = "trap 'sleep 2; exit 75' TERM; while :; do sleep 0.1; done"  # it takes a while to save


@dataclass
class Place:
    """Where the same is asked: a cluster, by how much its back-off is shortened, an image, and the mark of a test's objects."""

    kubectl: Kubectl
    factor: float
    image: str
    run: str

    def job(self, script: str) -> Object:
        """An Indexed Job of one pod, in which code 75 counts for nothing, as our manifests have it."""
        strict = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        main = {"name": "main", "image": self.image, "command": ["/usr/bin/tini", "--", "sh", "-c", script]}
        memory = {"requests": {"memory": "64Mi"}, "limits": {"memory": "64Mi"}}
        user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
        pod = {"restartPolicy": "Never", "automountServiceAccountToken": False, "securityContext": user}
        pod |= {"containers": [main | {"securityContext": strict, "resources": memory}]}
        on_exit = {"containerName": "main", "operator": "In", "values": [75]}
        spec = {
            "completionMode": "Indexed",
            "parallelism": 1,
            "completions": 1,
            "backoffLimitPerIndex": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onExitCodes": on_exit}]},
            "template": {"metadata": {"labels": self.labels}, "spec": pod},
        }
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": self.metadata("job"), "spec": spec}

    @property
    def labels(self) -> dict[str, str]:
        return {deployed.INSTANCE: self.run}

    def metadata(self, name: str) -> Object:
        return {"name": f"{self.run}-{name}", "labels": self.labels}

    def config(self, name: str, **more: Any) -> Object:
        """A config map, the smallest of objects."""
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self.metadata(name) | more, "data": {"key": "value"}}

    def apply(self, *objects: Object) -> None:
        deployed.apply(self.kubectl, list(objects))

    def get(self, kind: str, name: str) -> Object | None:
        return self.kubectl.get(kind, f"{self.run}-{name}")

    def delete(self, kinds: str) -> None:
        """As ``personmae delete`` does it."""
        how = ("--cascade=foreground", "--wait=false", "--ignore-not-found", "-o", "name")
        self.kubectl.run("delete", kinds, "-l", f"{deployed.INSTANCE}={self.run}", *how)

    def suspend(self, suspended: bool) -> None:
        patch = json.dumps({"spec": {"suspend": suspended}})
        self.kubectl.run("patch", "jobs.batch", f"{self.run}-job", "--type", "merge", "-p", patch)

    def pods(self, phase: str = "") -> list[Object]:
        """Those that there are, or those in a phase that are not to go."""
        found = self.kubectl.items("pods", "-l", f"{deployed.INSTANCE}={self.run}")
        alive = [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]
        return [pod for pod in alive if pod["status"].get("phase") == phase] if phase else found

    def running(self) -> Object:
        """The pod, once it runs and has set its trap."""
        (pod,) = wait_for(lambda: self.pods("Running"))
        time.sleep(1)
        return pod

    def owner(self) -> Object:
        job = self.get("jobs.batch", "job")
        assert job
        reference = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
        return reference | {"blockOwnerDeletion": False}


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture(params=["stand-in", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    run = f"same-{uuid.uuid4().hex[:6]}"
    if request.param == "stand-in":
        local = LocalCluster(tmp_path / "nodes", factor=0.05)
        yield Place(local, 0.05, "registry.test/none", run)
        local.close()
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    monkeypatch.setenv("KUBECONFIG", cluster.admin)
    there = Place(Kubectl(cluster.namespace), 1.0, cluster.image, run)
    yield there
    there.delete("jobs.batch,configmaps")


def test_a_job_that_is_deleted_stays_until_its_pod_has_ended_and_takes_along_what_it_owns(place: Place) -> None:
    place.apply(place.job(STAYS))
    place.apply(place.config("owned", ownerReferences=[place.owner()]), place.config("free"))
    place.running()
    place.delete("jobs.batch")
    job = place.get("jobs.batch", "job")
    assert job
    assert job["metadata"]["deletionTimestamp"]
    wait_for(lambda: place.get("jobs.batch", "job") is None)
    assert place.pods("Running") == []
    wait_for(lambda: place.get("configmaps", "owned") is None)
    assert place.get("configmaps", "free")


def test_what_names_an_owner_that_is_gone_is_collected(place: Place) -> None:
    place.apply(place.job("exit 0"))
    gone = place.owner() | {"uid": str(uuid.uuid4())}
    place.apply(place.config("orphan", ownerReferences=[gone]), place.config("heir", ownerReferences=[gone, place.owner()]))
    wait_for(lambda: place.get("configmaps", "orphan") is None)
    assert place.get("configmaps", "heir")


def test_what_is_applied_to_an_object_that_is_going_goes_with_it_and_kubectl_warns(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.apply(place.job(STAYS))
    place.running()
    place.delete("jobs.batch")
    place.apply(place.job(STAYS))
    assert "which is currently being deleted" in capsys.readouterr().err
    wait_for(lambda: place.get("jobs.batch", "job") is None)


def test_each_stop_of_an_index_doubles_the_wait_for_its_replacement_though_code_75_counts_for_nothing(place: Place) -> None:
    place.apply(place.job("sleep 1; exit 75"))
    found: dict[str, tuple[int, float]] = {}  # by name: how many came before, and when it was first seen

    def third() -> bool:
        for pod in place.pods():
            before = int(pod["metadata"]["annotations"].get(COUNT, "0"))
            found.setdefault(pod["metadata"]["name"], (before, time.monotonic()))
        return len(found) == 3

    wait_for(third)
    (first, begun), (second, again), (last, ended) = found.values()
    assert (first, second, last) == (0, 1, 2)
    assert again - begun >= 10 * place.factor
    assert ended - again >= 20 * place.factor
    job = place.get("jobs.batch", "job")
    assert job
    assert not job["status"].get("failed")


def test_a_suspension_counts_for_nothing_and_a_resumed_job_has_its_pod_at_once(place: Place) -> None:
    place.apply(place.job(STAYS))
    first = place.running()["metadata"]["name"]
    place.suspend(True)
    wait_for(lambda: not place.pods("Running"))
    time.sleep(3)
    assert place.pods("Running") == place.pods("Pending") == []
    place.suspend(False)
    (second,) = wait_for(lambda: place.pods("Running"))
    assert second["metadata"]["name"] != first
    assert COUNT not in second["metadata"]["annotations"]

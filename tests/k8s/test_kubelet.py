"""The stand-in for a cluster does with pods what Kubernetes documents, for the fields that our manifests have."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import LocalCluster
from controller import JobController
from kubelet import Object, Pod

from launcher.cluster import deployed
from personmae.errors import UserError

pytestmark = pytest.mark.integration
RULES = [
    {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [78]}},
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "Ignore", "onExitCodes": {"containerName": "main", "operator": "In", "values": [75]}},
]
FOREVER = "while :; do sleep 0.05; done"


def container(script: str, name: str = "main", **more: Any) -> Object:
    return {"name": name, "command": ["/usr/bin/tini", "--", "sh", "-c", script], **more}


def job(script: str, pods: int = 1, *, pod: Object | None = None, main: Object | None = None, **spec: Any) -> Object:
    """An Indexed Job whose pods run a few words of shell."""
    inside = {"restartPolicy": "Never", "containers": [container(script, **(main or {}))]}
    template = {"metadata": {"labels": {"run": "r"}}, "spec": inside | (pod or {})}
    size = {"completionMode": "Indexed", "parallelism": pods, "completions": pods, "template": template}
    rules = {"backoffLimitPerIndex": 1, "maxFailedIndexes": 0, "podFailurePolicy": {"rules": RULES}}
    return {"kind": "Job", "apiVersion": "batch/v1", "metadata": {"name": "j"}, "spec": size | rules | spec}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalCluster]:
    kubectl = LocalCluster(tmp_path / "nodes", factor=0.02)
    yield kubectl
    kubectl.close()


@pytest.fixture
def start(local: LocalCluster) -> Callable[..., JobController]:
    def start(*objects: Object) -> JobController:
        deployed.apply(local, list(objects))
        wait_for(lambda: local.controllers and next(iter(local.controllers.values())).pods)
        return next(iter(local.controllers.values()))

    return start


Start = Callable[..., JobController]


def wait_for(what: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def end(controller: JobController) -> tuple[str, str]:
    """Type and reason of the Job's end."""
    wait_for(lambda: controller.finished)
    last = controller.job["status"]["conditions"][-1]
    return last["type"], last["reason"]


def codes(controller: JobController) -> list[int]:
    return [pod.codes()["main"] for pod in controller.pods]


def evict(local: LocalCluster, pod: Pod) -> None:
    local.run("create", "--raw", f"/api/v1/namespaces/personmae/pods/{pod.name}/eviction", "-f", "-", text="{}")


def running(pod: Pod) -> bool:
    return pod.phase == "Running"


def test_code_78_fails_the_job_at_once_in_the_words_of_kubernetes(start: Start) -> None:
    controller = start(job(f"[ $JOB_COMPLETION_INDEX = 1 ] && sleep 0.5 && exit 78; trap 'exit 75' TERM; {FOREVER}", 2))
    assert end(controller) == ("Failed", "PodFailurePolicy")
    told = controller.job["status"]["conditions"][-1]["message"]
    assert told.startswith("Container main for pod personmae/j-1-")
    assert told.endswith("failed with exit code 78 matching FailJob rule at index 0")
    assert codes(controller) == [75, 78]
    assert controller.job["status"]["failed"] == 1


def test_code_75_is_not_counted_and_any_other_is_until_its_index_has_used_up_its_limit(start: Start, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    controller = start(job(f"n=$(cat {mark} || echo 0); echo $((n+1)) > {mark}; [ $n -lt 3 ] && exit 75; exit 1"))
    assert end(controller) == ("Failed", "MaxFailedIndexesExceeded")
    assert codes(controller) == [75, 75, 75, 1, 1]
    assert (controller.job["status"]["failed"], controller.job["status"]["failedIndexes"]) == (2, "0")


def test_an_evicted_pod_has_its_grace_is_not_counted_and_is_replaced_once_it_is_gone(start: Start, local: LocalCluster) -> None:
    controller = start(job(f"trap '' TERM; {FOREVER}", pod={"terminationGracePeriodSeconds": 1}))
    first = controller.pods[0]
    wait_for(lambda: running(first))
    time.sleep(0.2)  # for its trap
    evict(local, first)
    begun = time.monotonic()
    time.sleep(0.5)
    assert len(controller.pods) == 1
    wait_for(lambda: first.ended)
    assert time.monotonic() - begun > 0.9
    assert first.containers[0].killed
    assert first.codes() == {"main": 137}
    wait_for(lambda: len(controller.pods) == 2)
    assert controller.job["status"]["failed"] == 0


def test_the_first_success_is_enough_where_the_policy_says_so(start: Start) -> None:
    script = f"[ $JOB_COMPLETION_INDEX = 0 ] && exec sleep 0.5; trap 'exit 75' TERM; {FOREVER}"
    controller = start(job(script, 3, successPolicy={"rules": [{"succeededCount": 1}]}))
    assert end(controller) == ("Complete", "SuccessPolicy")
    assert codes(controller) == [0, 75, 75]
    early = controller.job["status"]["conditions"][0]
    assert (early["type"], early["message"]) == ("SuccessCriteriaMet", "Matched rules at index 0")


def test_scaling_takes_the_highest_indexes_which_count_neither_way(start: Start, local: LocalCluster) -> None:
    controller = start(job(f"trap 'exit 1' TERM; {FOREVER}", 3))
    wait_for(lambda: len(controller.pods) == 3 and all(map(running, controller.pods)))
    time.sleep(0.2)
    with pytest.raises(UserError, match="in tandem"):
        local.run("patch", "jobs.batch", "j", "--type", "merge", "-p", json.dumps({"spec": {"completions": 1}}))
    local.run("patch", "jobs.batch", "j", "--type", "merge", "-p", json.dumps({"spec": {"parallelism": 1, "completions": 1}}))
    wait_for(lambda: [pod.ended for pod in controller.pods] == [False, True, True])
    time.sleep(0.5)
    assert len(controller.pods) == 3
    assert controller.job["status"]["failed"] == 0


def test_a_container_that_fails_its_liveness_probe_is_asked_to_end_and_not_before_it_has_started(
    start: Start, tmp_path: Path
) -> None:
    probe = {"exec": {"command": ["sh", "-c", f"[ -e {tmp_path}/well ]"]}, "periodSeconds": 0.2, "failureThreshold": 2}
    probes = {"startupProbe": probe | {"failureThreshold": 1000}, "livenessProbe": probe, "readinessProbe": probe}
    controller = start(job(f"trap 'exit 75' TERM; {FOREVER}", main=probes))
    pod = controller.pods[0]
    time.sleep(1)
    assert running(pod)
    assert not pod.ready
    (tmp_path / "well").touch()
    wait_for(lambda: pod.ready)
    (tmp_path / "well").unlink()
    wait_for(lambda: pod.ended)
    assert pod.codes() == {"main": 75}
    assert "liveness" in pod.containers[0].sick


def test_init_containers_come_first_and_a_sidecar_ends_last(start: Start, tmp_path: Path) -> None:
    said = tmp_path / "said"
    ready = {"startupProbe": {"exec": {"command": ["sh", "-c", f"grep -q side {said}"]}, "periodSeconds": 0.1}}
    side = container(f"echo side >> {said}; trap 'echo end >> {said}; exit' TERM; {FOREVER}", "side", restartPolicy="Always")
    inits = [container(f"sleep 0.2; echo init >> {said}", "init"), side | ready]
    assert end(start(job(f"echo main >> {said}", pod={"initContainers": inits}))) == ("Complete", "CompletionsReached")
    assert said.read_text().split() == ["init", "side", "main", "end"]


def test_an_init_container_that_fails_ends_its_pod(start: Start) -> None:
    rules = {"rules": [{"action": "FailJob", "onExitCodes": {"containerName": "init", "operator": "In", "values": [78]}}]}
    controller = start(job("true", pod={"initContainers": [container("exit 78", "init")]}, podFailurePolicy=rules))
    assert end(controller) == ("Failed", "PodFailurePolicy")
    assert controller.pods[0].codes() == {"init": 78}


def test_a_deployment_starts_its_container_again(local: LocalCluster, tmp_path: Path) -> None:
    template = {"metadata": {"labels": {"run": "s"}}, "spec": {"containers": [container(f"echo . >> {tmp_path}/said")]}}
    deployed.apply(local, [{"kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": 1, "template": template}}])
    wait_for(lambda: (tmp_path / "said").exists() and len((tmp_path / "said").read_text()) >= 6)
    assert len(local.pods) == 1


def test_an_eviction_below_the_disruption_budget_is_refused(start: Start, local: LocalCluster) -> None:
    budget = {"minAvailable": 1, "selector": {"matchLabels": {"run": "r"}}}
    controller = start({"kind": "PodDisruptionBudget", "metadata": {"name": "b"}, "spec": budget}, job(FOREVER))
    wait_for(lambda: controller.pods[0].ready)
    with pytest.raises(UserError, match="disruption budget"):
        evict(local, controller.pods[0])


def test_a_field_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="activeDeadlineSeconds"):
        JobController(job("true", activeDeadlineSeconds=5), lambda *_: None, 1.0)  # pyright: ignore[reportArgumentType]

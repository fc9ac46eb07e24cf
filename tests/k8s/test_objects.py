"""Only what is ours is changed and deleted, names and places are free before a run is created, and warnings are passed on.

The cluster is the stand-in of ``apiserver.py``, in which deletion takes its time.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import LocalCluster
from kubelet import Object
from recorder import Captured, Recorder, error, items, job, marked, personmae, submitted
from sample_requests import request_for

from launcher.cluster import commands, deployed, names, objects, render

pytestmark = pytest.mark.integration
SLOW = "trap 'sleep 1; exit 75' TERM; while :; do sleep 0.05; done"  # a pod that takes its time to save


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """The cluster that the commands talk to."""
    cluster = LocalCluster(tmp_path / "nodes", factor=0.02, script=SLOW)
    deployed.apply(cluster, [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "personmae-s3"}}])
    monkeypatch.setattr(commands, "Kubectl", lambda *_: cluster)
    monkeypatch.setattr(commands, "WATCH_SECONDS", 0)
    monkeypatch.setattr(names, "PAUSE_SECONDS", 0.05)
    yield cluster
    cluster.close()


def helm(kind: str, group: str, name: str = "mlflow", **more: Any) -> Object:
    """An object of somebody else's release."""
    labels = {"app.kubernetes.io/instance": "mlflow", "app.kubernetes.io/managed-by": "Helm"}
    labels |= {"app.kubernetes.io/name": "mlflow"}
    return {"apiVersion": group, "kind": kind, "metadata": {"name": name, "labels": labels}, **more}


HELM = [
    helm("Deployment", "apps/v1", spec={"replicas": 0}),
    helm("Service", "v1", spec={"clusterIP": "None", "selector": {"app": "mlflow"}, "ports": []}),
    helm("ConfigMap", "v1", data={}),
    helm("ServiceAccount", "v1"),
]


def left(cluster: LocalCluster, run: str) -> set[str]:
    """Paths of all objects of this instance, whoever has made them."""
    found, _ = cluster.items_of(sorted(cluster.kinds()), "-l", f"{objects.INSTANCE}={run}")
    return {objects.path_of(item) for item in found}


def wait_for(what: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def run_of_before(run: str) -> list[Object]:
    """A run's objects as they were submitted when they had no label of ours."""
    made = render.render(request_for("dev-cpu", name=run)).objects
    for item in made:
        del item["metadata"]["labels"][objects.RUN]
    return made


# --- only what is ours ---


def test_delete_leaves_a_release_of_the_same_name_alone(local: LocalCluster, capsys: Captured) -> None:
    local.run("apply", "--field-manager", "helm", "-f", "-", text=json.dumps({"items": HELM}))
    theirs = {objects.path_of(item) for item in HELM}
    assert personmae("delete", "mlflow") == 78
    told = error(capsys)
    assert "there is no run mlflow" in told
    assert "not of personmae, so it stays: " in told
    assert left(local, "mlflow") == theirs
    deployed.apply(local, render.render(request_for("dev-cpu", name="mlflow")).objects)
    assert personmae("delete", "mlflow") == 0
    wait_for(lambda: left(local, "mlflow") == theirs)


def test_a_run_that_was_submitted_before_the_label_is_deleted_whole(local: LocalCluster) -> None:
    deployed.apply(local, run_of_before("old"))
    assert len(left(local, "old")) == 8
    assert personmae("delete", "old") == 0
    wait_for(lambda: not left(local, "old"))


def test_a_workload_of_somebody_else_is_not_taken_for_a_run(recorder: Recorder, capsys: Captured) -> None:
    theirs = marked(job(), labels={"app.kubernetes.io/instance": "run"})
    for words in ("get jobs.batch run-trainer", "named jobs.batch/run-trainer"):
        recorder.answer(words, json.dumps(theirs))
    for verb in (["suspend"], ["scale", "--nodes", "2"], ["status"]):
        assert personmae(verb[0], "run", *verb[1:]) == 78
        assert "there is no run run in namespace personmae" in error(capsys)
    assert submitted() == 78
    assert "job.batch/run-trainer is there already and is no object of personmae; give another --name" in error(capsys)
    assert not {"patch", "delete", "apply"} & {call[0] for call in recorder.calls()}


def test_with_a_role_that_may_not_list_roles_a_run_is_deleted_with_code_0(local: LocalCluster, capsys: Captured) -> None:
    local.forbidden = {"roles.rbac.authorization.k8s.io", "rolebindings.rbac.authorization.k8s.io"}  # as with edit
    deployed.apply(local, render.render(request_for("dev-cpu", name="race")).objects)
    assert personmae("delete", "race") == 0
    assert capsys.readouterr().err == ""
    wait_for(lambda: not left(local, "race"))
    local.forbidden = {"services"}
    assert personmae("delete", "race") == 78
    assert "services is forbidden" in error(capsys)


def test_a_run_that_kubectl_has_applied_is_told_adopted_and_leaves_nothing_when_its_job_is_gone(
    local: LocalCluster, capsys: Captured
) -> None:
    made = json.dumps({"items": render.render(request_for("dev-cpu", name="race")).objects})
    local.run("apply", "--field-manager", "kubectl-client-side-apply", "-f", "-", text=made)
    assert personmae("status", "race") == 0
    assert "  warning: its store outlives it: personmae adopt race" in capsys.readouterr().out.splitlines()
    assert personmae("adopt", "race") == 0
    assert "deployment.apps/race-store" in capsys.readouterr().out
    local.run("delete", "jobs.batch/race-trainer")  # what its time to live does
    wait_for(lambda: not left(local, "race"))


def test_a_store_that_is_left_without_its_run_is_told_at_each_submission(local: LocalCluster, capsys: Captured) -> None:
    made = json.dumps({"items": render.render(request_for("dev-cpu", name="old")).objects})
    local.run("apply", "--field-manager", "kubectl-client-side-apply", "-f", "-", text=made)
    local.run("delete", "jobs.batch/old-trainer")
    assert submitted("--dry-run", "server") == 0
    told = "deployment.apps/old-store is left of the run old, whose workload is gone: personmae delete old -n personmae"
    assert f"warning: {told}" in capsys.readouterr().err.splitlines()
    assert personmae("delete", "old") == 0
    wait_for(lambda: not left(local, "old"))


# --- names and places are free ---


def test_a_run_that_is_deleted_and_submitted_again_waits_for_all_of_the_old_one(local: LocalCluster, capsys: Captured) -> None:
    given = ("--overlay", "dev-cpu", "--name", "race")
    assert submitted(*given) == 0
    wait_for(lambda: len(local.pods) == 3 and all(pod.phase == "Running" for pod in local.pods))
    assert personmae("delete", "race") == 0
    capsys.readouterr()
    assert submitted(*given) == 0
    assert "waiting until what is being deleted is gone: " in capsys.readouterr().err
    there = left(local, "race")
    assert "deployment.apps/race-store" in there
    time.sleep(1.5)  # longer than the old pods take
    assert left(local, "race") == there


def test_what_is_left_of_an_earlier_run_is_named_with_the_command_that_deletes_it(
    local: LocalCluster, capsys: Captured
) -> None:
    made = render.render(request_for("dev-cpu", name="run")).objects
    deployed.apply(local, [item for item in made if item["kind"] == "ConfigMap"])
    assert submitted() == 78
    assert "is left of an earlier run run; delete it first: personmae delete run -n personmae" in error(capsys)


def test_what_the_garbage_collector_will_find_is_waited_for(local: LocalCluster) -> None:
    """The Job of the old run is gone, by its time to live, and its store is not marked yet."""
    made = render.render(request_for("dev-cpu", name="run"))
    deployed.create(local, ["run"], made.objects, made.workload)
    local.collects = False
    local.run("delete", "jobs.batch/run-trainer")
    going = names._going(local, ["run"], made.objects)
    assert {"deployment.apps/run-store", "configmap/run-run"} <= set(going)


@pytest.mark.parametrize("kind", ["Job", "JobSet", "TrainJob"])
def test_one_place_takes_one_run_of_whatever_kind(kind: str, recorder: Recorder, capsys: Captured) -> None:
    other = marked(job("other", kind=kind), annotations={"personmae/store": "s3://bucket/run"})
    recorder.answer(f"get -l {objects.WORKLOADS[kind][0]} name=personmae", items(other))
    for overlay in ("pretrain", "jobset"):
        assert submitted("--overlay", overlay) == 78
        assert "s3://bucket/run belongs to the run other, which is at work" in error(capsys)
    assert recorder.applied() == []


# --- warnings ---


def test_what_the_server_warns_of_is_printed_once_also_where_nothing_is_created(local: LocalCluster, capsys: Captured) -> None:
    local.warnings = ['would violate PodSecurity "restricted:latest": unrestricted capabilities']
    assert submitted("--with", "rdma", "--dry-run", "server") == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown.count(f"warning: {local.warnings[0]}") == 1

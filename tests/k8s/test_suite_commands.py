"""What ``personmae`` does with a suite in a cluster: tries all of it, creates it, has it go on, finds all of it again."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from object_cluster import ObjectCluster, Server, account, serve
from recorder import IMAGE, Captured, error, personmae, submitted
from sample_suite import SCORES, request_in

from launcher.cluster import bucket, commands, dispatcher
from launcher.cluster.api import Api

POLICY = "ValidatingAdmissionPolicy 'team' with binding 'team' denied request: label team is required"
SUBMITTER = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "Role",
    "metadata": {"name": "personmae-submitter"},
    "rules": [],
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ObjectCluster:
    """A namespace as its administrator leaves it."""
    found = ObjectCluster()
    found.objects.create(SUBMITTER)
    monkeypatch.setattr(commands, "Kubectl", lambda *_: found)
    monkeypatch.setattr(commands, "WATCH_SECONDS", 0)
    return found


def submit(folder: Path, *more: str) -> int:
    return personmae("submit", str(request_in(folder).config), IMAGE, "--no-bucket-check", *more)


def held(cluster: ObjectCluster) -> set[tuple[str, str]]:
    """What there is but for the administrator's role."""
    for _ in range(4):
        cluster.objects.collect()
    return set(cluster.objects.held) - {("Role", "personmae-submitter")}


def stages_of(cluster: ObjectCluster, server: Server, folder: Path, patience_seconds: float = 900.0) -> dispatcher.Stages:
    """What the dispatcher's pod works on."""
    plan = json.loads(cluster.objects.get("ConfigMap", "s-config")["data"]["plan.json"])
    return dispatcher.Stages(plan, Api(server.url, account(folder / "account", "s-trainer")), patience_seconds)


def end(cluster: ObjectCluster, run: str, kind: str = "Complete") -> None:
    condition = {"type": kind, "status": "True", "reason": "PodFailurePolicy", "message": "exit code 78"}
    cluster.objects.patch("Job", f"{run}-trainer", {"status": {"conditions": [condition]}})


@pytest.mark.parametrize("refused", ["s-pre", "s-duke-trainer", "s-market-config", "s-dispatcher"])
def test_an_object_of_any_stage_that_would_be_refused_is_refused_before_anything_is_created(
    refused: str, cluster: ObjectCluster, tmp_path: Path, capsys: Captured
) -> None:
    cluster.objects.policies.append(lambda item: POLICY if item["metadata"]["name"].startswith(refused) else None)
    assert submit(tmp_path) == 78
    told = error(capsys)
    assert "denied request: label team is required; a policy of the cluster refuses it" in told
    assert held(cluster) == set()


def test_a_binding_of_rights_is_tried_although_its_role_does_not_exist_yet(
    cluster: ObjectCluster, tmp_path: Path, capsys: Captured
) -> None:
    cluster.objects.policies.append(lambda item: POLICY if item["kind"] == "RoleBinding" else None)
    assert submit(tmp_path) == 78
    assert 'rolebindings.rbac.authorization.k8s.io "s-dispatcher" is forbidden: ' in error(capsys)
    assert held(cluster) == set()


def test_what_cannot_be_tried_is_told(cluster: ObjectCluster, tmp_path: Path, capsys: Captured) -> None:
    assert submit(tmp_path, "--dry-run", "server") == 0
    assert capsys.readouterr().err == ""
    cluster.objects.delete("Role", "personmae-submitter")
    assert submit(tmp_path, "--dry-run", "server") == 0
    shown = capsys.readouterr()
    assert "warning: RoleBinding s-dispatcher was not tried: a server wants the role that it names first" in shown.err
    assert "the cluster would take all" in shown.out
    assert submitted("--overlay", "trainjob", "--nodes", "4", "--gpus", "8", "--dry-run", "server") == 0
    assert "warning: TrainJob run-run was not tried" in capsys.readouterr().err


def test_a_submitted_suite_has_its_first_stages_and_each_owns_what_is_its(cluster: ObjectCluster, tmp_path: Path) -> None:
    assert submit(tmp_path) == 0
    assert {name for kind, name in held(cluster) if kind == "Job"} == {"s-pre-trainer", "s-trainer"}
    for item in cluster.objects.held.values():
        owners = [owner["name"] for owner in item["metadata"].get("ownerReferences", [])]
        if item["kind"] != "Job" and item["metadata"]["name"] != "personmae-submitter":
            run = item["metadata"]["labels"]["app.kubernetes.io/instance"]
            assert owners == [f"{run}-trainer"], item["metadata"]["name"]


@pytest.mark.parametrize("left", ["everything", "no dispatcher", "no plan", "one Job", "one config map", "a late stage"])
def test_delete_finds_all_of_a_suite_whatever_is_left(left: str, cluster: ObjectCluster, tmp_path: Path) -> None:
    assert submit(tmp_path) == 0
    end(cluster, "s-pre")
    with serve(cluster.objects) as server:
        stages_of(cluster, server, tmp_path).turn()
    there = held(cluster)
    match left:
        case "no dispatcher":
            cluster.objects.delete("Job", "s-trainer", "Foreground")
        case "no plan":
            cluster.objects.delete("ConfigMap", "s-config")
        case "one Job" | "one config map":
            cluster.collects = False
            kept = ("Job", "s-duke-trainer") if left == "one Job" else ("ConfigMap", "s-duke-config")
            cluster.objects.held = {key: item for key, item in cluster.objects.held.items() if key == kept}
        case "a late stage":
            late = dict(cluster.objects.held["Job", "s-duke-trainer"])
            cluster.objects.delete("Job", "s-duke-trainer")
            held(cluster)
            remove = cluster.objects.delete

            def delete(kind: str, name: str, policy: str = "Background") -> None:
                remove(kind, name, policy)
                if name == "s-dispatcher" and ("Job", "s-duke-trainer") not in cluster.objects.held:
                    cluster.objects.held["Job", "s-duke-trainer"] = late

            cluster.objects.delete = delete  # pyright: ignore[reportAttributeAccessIssue]
    assert ("Job", "s-duke-trainer") in there
    assert personmae("delete", "s") == 0
    cluster.collects = True
    assert held(cluster) == set()


def test_a_suite_that_ended_goes_on_with_what_is_complete(
    cluster: ObjectCluster, tmp_path: Path, s3_server: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.bucket("results")
    assert submit(tmp_path) == 0
    end(cluster, "s-pre")
    cluster.objects.policies.append(lambda item: POLICY if item["metadata"]["name"].startswith("s-duke") else None)
    with serve(cluster.objects) as server:
        stages = stages_of(cluster, server, tmp_path, patience_seconds=0.0)
        stages.turn()
        end(cluster, "s-market", "Failed")
        stages.turn()
        assert stages.over
        end(cluster, "s", "Failed")
        cluster.objects.policies.clear()
        capsys.readouterr()
        before = {name: item["metadata"]["uid"] for (kind, name), item in cluster.objects.held.items() if kind == "Job"}
        assert personmae("resume", "s") == 0
        shown = capsys.readouterr().out
        assert "s-market is tried again. It was Failed: PodFailurePolicy" in shown
        assert "s-duke is tried again. It was Failed: POST" in shown
        after = {name: item["metadata"]["uid"] for (kind, name), item in cluster.objects.held.items() if kind == "Job"}
        assert after.keys() == {"s-pre-trainer", "s-trainer"}
        assert after["s-pre-trainer"] == before["s-pre-trainer"]
        assert after["s-trainer"] != before["s-trainer"]
        assert ("ConfigMap", "s-config") in held(cluster)
        stages = stages_of(cluster, server, tmp_path)
        stages.turn()
        assert stages.states == {"pre": "Complete", "market": "runs", "duke": "runs"}
        for name in ("market", "duke"):
            end(cluster, f"s-{name}")
            bucket.write(f"s3://results/s/runs/{name}/result.json", json.dumps(SCORES).encode())
        monkeypatch.setattr(dispatcher, "PAUSE_SECONDS", 0)
        dispatcher.run(stages._plan, Api(server.url, tmp_path / "account"))
    assert (bucket.read("s3://results/s/results.md") or b"").count(b"| 50.0 |") == 2


def test_a_stage_that_was_deleted_stays_so_when_the_suite_goes_on_and_status_says_so(
    cluster: ObjectCluster, tmp_path: Path, capsys: Captured
) -> None:
    assert submit(tmp_path) == 0
    end(cluster, "s-pre")
    with serve(cluster.objects) as server:
        stages = stages_of(cluster, server, tmp_path)
        stages.turn()
        assert personmae("delete", "s-market") == 0
        end(cluster, "s-duke")
        stages.turn()
        end(cluster, "s", "Failed")
        capsys.readouterr()
        assert personmae("status", "s") == 0
        assert "stage s-market: Failed: its Job s-market-trainer was deleted" in capsys.readouterr().out
        assert personmae("resume", "s") == 0
        assert "s-market was deleted, and stays so" in capsys.readouterr().out
        stages = stages_of(cluster, server, tmp_path)
        stages.turn()
        assert stages.states["market"] == "Failed: its Job s-market-trainer was deleted"
    assert ("Job", "s-market-trainer") not in held(cluster)


@pytest.mark.parametrize("command", ["patch", "delete", "apply"])
def test_a_resume_that_is_interrupted_goes_on_when_it_is_given_again(
    command: str, cluster: ObjectCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit(tmp_path) == 0
    mine = held(cluster)
    end(cluster, "s", "Failed")
    run = cluster.run

    def breaks(*args: str, **more: Any) -> str:
        if args[0] == command:
            raise KeyboardInterrupt
        return run(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "run", breaks)
        with contextlib.suppress(KeyboardInterrupt):
            personmae("resume", "s")
    assert personmae("resume", "s") == 0
    assert held(cluster) == mine
    assert not cluster.objects.get("Job", "s-trainer")["status"]


def test_a_suite_of_another_version_is_not_resumed(cluster: ObjectCluster, tmp_path: Path, capsys: Captured) -> None:
    assert submit(tmp_path) == 0
    data = cluster.objects.get("ConfigMap", "s-config")["data"]
    plan = json.loads(data["plan.json"]) | {"version": 1}
    cluster.objects.patch("ConfigMap", "s-config", {"data": {"plan.json": json.dumps(plan)}})
    end(cluster, "s", "Failed")
    assert personmae("resume", "s") == 78
    assert "s was submitted by another version: delete it and submit it again" in error(capsys)

"""The commands that talk to a cluster: what is asked of kubectl, what is made of its answers, and that nothing is left behind.

The kubectl here is a recorder, so this shows arguments, order and errors. Where PERSONMAE_E2E_KUBECONFIG names a cluster,
``test_a_real_cluster_takes_every_object`` asks that one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recorder import CONFIG, IMAGE, Captured, Recorder, ended, error, event, items, job, job_of, personmae, submitted
from sample_requests import DIGEST, PRETRAIN, ROOT

from launcher.cluster import commands, deployed, kubectl
from personmae.errors import UserError


def test_a_run_is_tried_before_it_is_created_and_goes_with_its_job(recorder: Recorder, capsys: Captured) -> None:
    assert submitted("--gpus", "8", "--nodes", "2:8") == 0
    assert recorder.applied() == ["dry-run 8", "apply 8"]
    asked = [call[:2] for call in recorder.calls()]
    assert asked.index(["auth", "can-i"]) < asked.index(["apply", "--server-side"])
    patches = [call for call in recorder.calls() if call[0] == "patch"]
    assert {call[1] for call in patches} == {
        "serviceaccount",
        "configmap",
        "service",
        "deployment.apps",
        "poddisruptionbudget.policy",
    }
    assert all(json.loads(call[-1])["metadata"]["ownerReferences"][0]["uid"] == "the-uid" for call in patches)
    out = capsys.readouterr().out
    for verb in ("status", "logs -f", "suspend", "delete"):
        assert f"personmae {verb} run -n personmae" in out
    assert ["delete"] not in [call[:1] for call in recorder.calls()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--overlay", "nothing"], "--overlay must be one of"),
        (["--nodes", "1:3", "--gpus", "8"], "must divide train.global_batch_size=2048"),
        (["--name", "x" * 39], "must be at most 38 characters"),
        (["--image", "personmae@sha256:1"], "--image must be NAME"),
        (["--set", "train.global_batch_siz=1"], "unknown key 'train.global_batch_siz'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_of_the_command_line_asks_nothing_of_the_cluster(
    arguments: list[str], told: str, recorder: Recorder, capsys: Captured
) -> None:
    assert submitted(*arguments) == 78
    assert told in error(capsys)
    assert recorder.calls() == []


def test_an_image_is_required_and_one_without_a_digest_is_warned_of(recorder: Recorder, capsys: Captured) -> None:
    assert personmae("submit", CONFIG, *PRETRAIN, "--no-bucket-check") == 78
    assert "an image is required" in error(capsys)
    example = f"registry.example.com/personmae@{DIGEST}"
    assert submitted("--image", example, "--dry-run", "client") == 0  # nodes may be told of such a registry
    assert f"warning: {example} is at registry.example.com/, a name for examples" in capsys.readouterr().err
    assert submitted("--image", "registry.test/personmae:1", "--dry-run", "client") == 0
    assert "warning: the image has no digest" in capsys.readouterr().err
    assert recorder.calls() == []


@pytest.mark.parametrize(
    ("words", "answer", "told"),
    [
        ("auth can-i", {"out": "no\n", "code": 1}, "you may not create jobs in namespace personmae; ask for the role"),
        (
            "auth can-i",
            {"err": "error: dial tcp: connection refused\n", "code": 1},
            "connection refused; the cluster must be up",
        ),
        (
            "apply --dry-run=server",
            {"err": 'Error from server (NotFound): namespaces "personmae" not found\n', "code": 1},
            'namespaces "personmae" not found; create it',
        ),
        (
            "apply --dry-run=server",
            {"err": 'Error from server (Forbidden): services is forbidden: User "me" cannot patch\n', "code": 1},
            "services is forbidden.*ask for the role personmae-submitter in namespace personmae",
        ),
        (
            "apply --dry-run=server",
            {"err": 'error: resource mapping not found: no matches for kind "PodMonitor"\n', "code": 1},
            "no matches for kind .PodMonitor.; its controller is not installed",
        ),
    ],
    ids=["may not", "no cluster", "no namespace", "forbidden", "no controller"],
)
def test_what_the_cluster_would_refuse_is_found_before_anything_is_created(
    words: str, answer: dict[str, Any], told: str, recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer(words, **answer)
    assert submitted() == 78
    assert re.search(told, error(capsys))
    assert "apply 8" not in recorder.applied()


def test_a_missing_secret_is_told_with_the_command_that_makes_it(recorder: Recorder, capsys: Captured) -> None:
    assert submitted("--with", "s3-secret") == 78
    assert "kubectl -n personmae create secret generic personmae-s3" in error(capsys)
    assert recorder.applied() == []
    recorder.answer("get secret personmae-s3", '{"kind": "Secret"}')
    assert submitted("--with", "s3-secret") == 0


def test_two_runs_do_not_write_to_one_store(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch -l", job_of("other"))
    assert submitted() == 78
    assert "s3://bucket/run belongs to the run other, which is at work" in error(capsys)
    recorder.answer("get jobs.batch -l", job_of("other", status=ended("Complete")))
    assert submitted() == 0


def test_a_run_that_exists_is_neither_changed_nor_deleted(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("named jobs.batch/run-trainer", json.dumps(job()))
    assert submitted() == 78
    assert "the run run exists already (at work); delete it first" in error(capsys)
    assert recorder.applied() == []
    assert ["delete"] not in [call[:1] for call in recorder.calls()]


def test_when_creation_fails_half_way_nothing_is_left_behind(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("apply --server-side", code=1, err="Error from server (Forbidden): exceeded quota: personmae\n")
    recorder.answer("apply --dry-run=server")
    assert submitted() == 78
    assert "exceeded quota" in error(capsys)
    last = recorder.calls()[-1]
    assert last[0] == "delete"
    assert {"job.batch/run-trainer", "service/run-store", "configmap/run-run", "deployment.apps/run-store"} <= set(last)


FORBIDDEN = 'pods "run-trainer-0" is forbidden: violates PodSecurity "restricted:latest"'
PULLING = {"image": "x", "state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}
UNPULLED = items({"metadata": {"name": "run-trainer-0-abcde"}, "spec": {}, "status": {"containerStatuses": [PULLING]}})


@pytest.mark.parametrize(
    ("words", "answer", "told"),
    [
        ("get events", event("FailedCreate", FORBIDDEN), "violates PodSecurity"),
        ("get pods", UNPULLED, "ErrImagePull: not found"),
    ],
    ids=["pod security", "missing image"],
)
def test_pods_that_are_refused_end_the_submission_and_leave_nothing(
    words: str, answer: str, told: str, recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer(words, answer, created=True)
    assert submitted() == 78
    assert told in error(capsys)
    assert recorder.calls()[-1][0] == "delete"


@pytest.mark.parametrize(
    "told",
    [
        "pods is forbidden: exceeded quota: personmae",
        "Internal error occurred: failed calling webhook: context deadline exceeded",
        'pods "run-trainer-0" is forbidden: error looking up service account personmae/run-trainer',
    ],
    ids=["quota", "webhook", "service account"],
)
def test_a_refusal_that_may_pass_is_only_warned_of(told: str, recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get events", event("FailedCreate", told))
    assert submitted() == 0
    assert f"warning: run-trainer: FailedCreate: {told}" in capsys.readouterr().err
    assert ["delete"] not in [call[:1] for call in recorder.calls()]


@pytest.mark.parametrize(
    "other",
    [
        {"at": "2026-01-02T03:04:04Z"},
        *({"of": name} for name in ("run-2-trainer", "run-trainer-trainer", "run-run-trainer-0-abcde")),
    ],
    ids=["of an hour ago", "of run-2", "of run-trainer", "of run-run"],
)
def test_what_is_told_of_another_run_or_an_earlier_one_is_not_of_this_run(
    other: dict[str, str], recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer("get events", event("FailedCreate", FORBIDDEN, **other))
    assert submitted() == 0
    assert "PodSecurity" not in capsys.readouterr().err


@pytest.mark.parametrize("of", ["run-trainer", "run-store-6f9c4-xk2pq", "run-run-trainer-0", "run-run-node-0-1-abcde"])
def test_what_is_told_of_any_object_of_a_run_is_of_this_run(of: str, recorder: Recorder) -> None:
    recorder.answer("get events", event("FailedCreate", FORBIDDEN, of=of))
    assert submitted() == 78


def test_a_run_whose_pods_cannot_be_watched_is_kept_and_warned_of(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get events", code=1, err="Error from server (Forbidden): events is forbidden\n")
    assert submitted() == 0
    shown = capsys.readouterr()
    assert "warning: run is created, and whether its pods are accepted could not be seen: " in shown.err
    assert "personmae delete run" in shown.out


def test_a_run_that_fails_while_it_is_watched_is_told_and_stays_for_its_logs(recorder: Recorder, capsys: Captured) -> None:
    failed = job(status=ended("Failed", reason="PodFailurePolicy", message="exit code 78"))
    recorder.answer("get jobs.batch -l", items(failed), created=True)
    with pytest.raises(SystemExit) as over:
        submitted()
    assert over.value.code == 1
    shown = capsys.readouterr()
    assert "error: run is submitted and has ended already: Failed: PodFailurePolicy: exit code 78" in shown.err
    assert "personmae logs run -n personmae" in shown.err
    assert shown.out == ""
    assert ["delete"] not in [call[:1] for call in recorder.calls()]


def test_what_cannot_be_deleted_again_is_told_with_both_reasons(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("apply --server-side", code=1, err="Error from server (Forbidden): exceeded quota: personmae\n")
    recorder.answer("apply --dry-run=server")
    recorder.answer("delete", code=1, err="Unable to connect to the server: i/o timeout\n")
    assert submitted() == 78
    told = error(capsys)
    for part in ("exceeded quota", "run could not be deleted: kubectl delete failed", "personmae delete run"):
        assert part in told


def test_a_suite_tries_all_its_stages_and_creates_the_first_ones_and_the_dispatcher(recorder: Recorder, tmp_path: Path) -> None:
    for name in ("paper-trainer", "paper-base-trainer"):
        recorder.answer(f"get jobs.batch {name}", json.dumps(job()), created=True)
    configs = ROOT / "configs"
    (tmp_path / "suite.yaml").write_text(
        "name: paper\nresults: s3://bucket/paper\nstages:\n"
        f"- {{name: base, config: {CONFIG}, set: ['data.shards=s3://b/l'], nodes: [1, 2], gpus: 8}}\n"
        f"- {{name: market, after: base, config: {configs}/finetune_market1501.yaml, set: ['root=s3://b/m.tar']}}\n"
    )
    assert personmae("submit", str(tmp_path / "suite.yaml"), IMAGE, "--no-bucket-check") == 0
    tried, *created = (json.loads(c["text"])["items"] for c in recorder._calls() if "apply" in c["args"])
    jobs = [{i["metadata"]["name"] for i in items if i["kind"] == "Job"} for items in (tried, *created)]
    assert jobs == [{"paper-trainer", "paper-base-trainer", "paper-market-trainer"}, {"paper-base-trainer"}, {"paper-trainer"}]
    # The server looks for the Role that a RoleBinding names, which a dry run has not created.
    assert {"Role", "RoleBinding"} & {i["kind"] for i in tried} == {"Role"}
    kinds = [i["kind"] for i in created[1]]
    assert kinds.index("Role") < kinds.index("RoleBinding")


def test_places_are_looked_at_before_a_cluster_is_asked(recorder: Recorder, capsys: Captured, s3_server: Any) -> None:
    arguments = ["submit", CONFIG, *PRETRAIN, IMAGE, "--name", "run", "--dry-run", "client"]
    assert personmae(*arguments) == 78
    assert "looking for the bucket of s3://bucket/run was refused (404)" in error(capsys)
    s3_server.bucket("bucket")
    assert personmae(*arguments) == 78
    assert "shards are required at s3://bucket/shards and it has no index.json" in error(capsys)
    s3_server.client.put_object(Bucket="bucket", Key="shards/index.json", Body=b"{}")
    assert personmae(*arguments) == 0
    assert recorder.calls() == []


def test_a_train_job_is_neither_tried_nor_created_before_its_runtime(recorder: Recorder) -> None:
    recorder.answer("get trainjobs.trainer.kubeflow.org run-run", json.dumps(job(kind="TrainJob")), created=True)
    assert submitted("--overlay", "trainjob", "--nodes", "4", "--gpus", "8") == 0
    tried, created = ([i["kind"] for i in json.loads(c["text"])["items"]] for c in recorder._calls() if "apply" in c["args"])
    assert "TrainingRuntime" in tried
    assert "TrainJob" not in tried
    assert created[-2:] == ["TrainingRuntime", "TrainJob"]


def test_a_bucket_that_is_not_checked_is_a_warning(recorder: Recorder, capsys: Captured) -> None:
    places = ["data.shards=gs://bucket/shards", "checkpoint.upload_to=azure://bucket/run"]
    assert personmae("submit", CONFIG, *places, IMAGE, "--name", "run", "--dry-run", "client") == 0
    told = capsys.readouterr().err
    assert "warning: whether gs://bucket/shards is there is not checked" in told
    assert "warning: whether azure://bucket/run is there is not checked" in told


def test_places_are_looked_at_where_the_pods_will_look(
    recorder: Recorder, capsys: Captured, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.bucket("bucket")
    s3_server.client.put_object(Bucket="bucket", Key="shards/index.json", Body=b"{}")
    arguments = ["submit", CONFIG, *PRETRAIN, IMAGE, "--name", "run", "--dry-run", "client"]
    here = "http://127.0.0.1:1"
    monkeypatch.setenv("S3_ENDPOINT_URL", here)
    assert personmae(*arguments) == 78
    assert here in error(capsys)
    for name in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"):
        assert personmae(*arguments, "--env", f"{name}={s3_server.endpoint}") == 0
    assert os.environ["S3_ENDPOINT_URL"] == here
    assert "AWS_ENDPOINT_URL" not in os.environ


@pytest.mark.parametrize("cloud", ["irsa", "gke-workload-identity"])
def test_a_role_is_required_to_submit_but_not_to_render(cloud: str, recorder: Recorder, capsys: Captured) -> None:
    assert submitted("--with", cloud) == 78
    assert f"--role is required with --with {cloud}; give --role " in error(capsys)
    assert recorder.calls() == []
    assert personmae("render", CONFIG, *PRETRAIN, IMAGE, "--with", cloud) == 0


def test_a_suite_is_refused_where_the_job_of_a_later_stage_is_left_from_before(
    recorder: Recorder, tmp_path: Path, capsys: Captured
) -> None:
    recorder.answer("named jobs.batch/run-market-trainer", job_of("run-market", status=ended("Complete")))
    (tmp_path / "suite.yaml").write_text(
        f"name: run\nresults: s3://bucket/paper\nstages:\n- {{name: pre, config: {CONFIG}, set: ['data.shards=s3://b/l']}}\n"
        f"- {{name: market, after: pre, config: {ROOT}/configs/finetune_market1501.yaml, set: ['root=s3://b/m.tar']}}\n"
    )
    assert personmae("submit", str(tmp_path / "suite.yaml"), IMAGE, "--no-bucket-check") == 78
    assert "the run run-market exists already (Complete); delete it first" in error(capsys)


def test_wait_ends_with_the_end_of_the_run(recorder: Recorder) -> None:
    failed = ended("Failed", reason="PodFailurePolicy", message="exit code 78")
    for status_, seconds, code in ((ended("Complete"), (), 0), (failed, (), 1), ({}, ("0",), commands.EXIT_TIMEOUT)):
        recorder.forget()
        recorder.answer("get jobs.batch run-trainer", json.dumps(job(status=status_)), created=True)
        with pytest.raises(SystemExit) as over:
            submitted("--wait", *seconds)
        assert over.value.code == code


def test_wait_outlives_a_cluster_that_does_not_answer_for_a_moment(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    answers = iter([UserError("away"), UserError("away"), job(), UserError("away"), job(status=ended("Complete"))])

    def find(*_: Any) -> Any:
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return "jobs.batch", answer

    monkeypatch.setattr(deployed, "find", find)
    monkeypatch.setattr(commands, "_PAUSE_SECONDS", 0)
    with pytest.raises(SystemExit) as over:
        submitted("--wait", "60")
    assert over.value.code == 0
    recorder.forget()
    answers = iter([UserError("away")] * commands._MISSES)
    assert submitted("--wait", "60") == 78
    assert error(capsys) == "error: away"


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("http://127.0.0.1:1", "Could not connect to the endpoint URL.*give --no-bucket-check"),
        ("nonsense", "S3_ENDPOINT_URL|Invalid endpoint"),
    ],
    ids=["closed port", "no address"],
)
def test_a_bucket_that_cannot_be_asked_is_one_line(
    endpoint: str, told: str, recorder: Recorder, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "x")
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    assert personmae("submit", CONFIG, *PRETRAIN, IMAGE, "--name", "run") == 78
    assert re.search(told, error(capsys))
    assert recorder.calls() == []


def test_without_kubectl_rendering_works_and_submitting_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert personmae("render", CONFIG, *PRETRAIN, IMAGE) == 0
    assert "kind: Job" in capsys.readouterr().out
    assert submitted() == 78
    assert "kubectl is required" in error(capsys)


@pytest.mark.skipif(not os.environ.get("PERSONMAE_E2E_KUBECONFIG"), reason="needs a cluster: set PERSONMAE_E2E_KUBECONFIG")
def test_a_real_cluster_takes_every_object(tmp_path: Path) -> None:
    environ = os.environ | {"KUBECONFIG": os.environ["PERSONMAE_E2E_KUBECONFIG"]}
    command = [
        sys.executable,
        "-m",
        "launcher.cluster.cli",
        "submit",
        CONFIG,
        *PRETRAIN,
        IMAGE,
        "--no-bucket-check",
        "--dry-run",
        "server",
    ]
    done = subprocess.run(
        [*command, "--dry-run", "server", "-n", "default"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_errors_of_kubectl_become_one_line() -> None:
    told = kubectl._error_of("Warning: something\nError from server (Forbidden): jobs is forbidden\nmore\n", ("apply",), "team")
    assert "\n" not in told
    assert told.startswith("kubectl apply failed: jobs is forbidden; ask for the role")
    assert isinstance(UserError(told), ValueError)

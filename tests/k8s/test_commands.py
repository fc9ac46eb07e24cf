"""The commands for a run that is there: scale, suspend, resume, logs, delete, with the recording kubectl."""

import json

import pytest
from recorder import (
    ALL,
    RUNNING,
    Captured,
    Recorder,
    container,
    ended,
    error,
    items,
    job,
    labels,
    marked,
    personmae,
    pod,
    submitted,
    thing,
)

from launcher.cluster import names


def deleted(recorder: Recorder) -> list[list[str]]:
    """What each deletion names."""
    return [[word for word in call if "/" in word] for call in recorder.calls() if call[0] == "delete"]


def test_a_suite_is_deleted_with_its_runs(recorder: Recorder) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    plan = json.dumps({"stages": [{"job": "run-base-trainer"}, {"job": "run-market-trainer"}]})
    recorder.answer("get configmap run-config", json.dumps({"data": {"plan.json": plan}}))
    for name in ("run", "run-base", "run-market"):
        recorder.answer(f"get -l app.kubernetes.io/instance={name}", items(job(name)))
    assert personmae("delete", "run") == 0
    assert deleted(recorder) == [[f"job.batch/{name}-trainer"] for name in ("run-base", "run-market", "run")]
    # Its dispatcher would find its stages gone and write so into the table.
    changes = [call for call in recorder.calls() if call[0] in ("patch", "delete")]
    assert changes[0][:3] == ["patch", "jobs.batch", "run-trainer"]
    assert json.loads(changes[0][-1]) == {"spec": {"suspend": True}}


def test_delete_removes_what_a_creation_has_left_without_its_job(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get -l instance=run", items(thing("ConfigMap", "run-config"), thing("Service", "run-store")))
    assert personmae("delete", "run") == 0
    assert deleted(recorder) == [["configmap/run-config", "service/run-store"]]
    assert "what there was of run is deleted" in capsys.readouterr().out


def test_a_part_of_the_api_that_is_down_does_not_keep_a_run_from_being_found_or_deleted(recorder: Recorder) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer("api-resources", ALL, code=1, err="error: unable to retrieve the complete list of server APIs\n")
    assert personmae("delete", "run") == 0
    listed = next(call for call in recorder.calls() if "--show-managed-fields" in call)
    assert {"jobs.batch", "configmaps"} <= set(listed[1].split(","))
    assert "job.batch/run-trainer" in deleted(recorder)[0]


def test_a_deleted_run_stays_until_its_pods_have_saved_and_is_not_created_again_before(
    recorder: Recorder, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "PATIENCE_SECONDS", 0)
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    assert personmae("delete", "run") == 0
    assert "--cascade=foreground" in recorder.calls()[-1]
    capsys.readouterr()
    for words in ("get jobs.batch run-trainer", "named jobs.batch/run-trainer"):
        recorder.answer(words, json.dumps(marked(job(), deletionTimestamp="2026-01-02T03:04:06Z")))
    assert submitted() == 78
    assert "the run run is being deleted, and its pods may still save; job.batch/run-trainer is still there" in error(capsys)
    assert recorder.applied() == []
    assert personmae("scale", "run", "--nodes", "4") == personmae("suspend", "run") == 78


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ("9", "--nodes must be from 1 to 8"),
        ("3", "2048; give --nodes 1 or 2 or 4 or 8"),
        ("0", "from 1 to 8"),
    ],
)
def test_scale_refuses_what_the_run_was_not_submitted_for(nodes: str, told: str, recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    assert personmae("scale", "run", "--nodes", nodes) == 78
    assert told in error(capsys)
    assert ["patch"] not in [call[:1] for call in recorder.calls()]


def test_scale_needs_a_run_with_nodes(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    for answer in (json.dumps({"data": {"PROGRAM": "dispatcher"}}), ""):
        recorder.answer("get configmap run-run", answer)
        assert personmae("scale", "run", "--nodes", "2") == 78
        assert "run is a suite or has lost its config map" in error(capsys)


def test_a_run_that_is_over_is_neither_scaled_nor_suspended(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job(status=ended("Complete"))))
    for arguments in (("scale", "run", "--nodes", "2"), ("suspend", "run"), ("resume", "run")):
        assert personmae(*arguments) == 78
        assert "run is over (Complete); submit it again" in error(capsys)
    assert ["patch"] not in [call[:1] for call in recorder.calls()]


def test_a_suite_is_suspended_with_those_of_its_runs_that_are_at_work(recorder: Recorder) -> None:
    recorder.answer_for_a_suite()
    for name in ("run", "run-market"):
        recorder.answer(f"get jobs.batch {name}-trainer", json.dumps(job(name)))
    assert personmae("suspend", "run") == 0
    assert [call[2] for call in recorder.calls() if call[0] == "patch"] == ["run-market-trainer", "run-trainer"]


def test_what_kueue_decides_is_left_to_kueue(recorder: Recorder, capsys: Captured) -> None:
    queued = labels("run") | {"kueue.x-k8s.io/queue-name": "personmae"}
    recorder.answer("get jobs.batch run-trainer", json.dumps(marked(job(), labels=queued)))
    assert personmae("suspend", "run") == 78
    told = error(capsys)
    assert "Kueue decides when run runs" in told
    assert """patch workload NAME --type merge -p '{"spec": {"active": false}}'""" in told


def test_scale_changes_parallelism_and_completions_in_one_patch(recorder: Recorder) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    assert personmae("scale", "run", "--nodes", "4") == 0
    assert recorder.calls()[-1][:3] == ["patch", "jobs.batch", "run-trainer"]
    assert json.loads(recorder.calls()[-1][-1]) == {"spec": {"parallelism": 4, "completions": 4}}


def test_suspend_resume_logs_and_delete_name_the_run(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    assert personmae("suspend", "run") == personmae("resume", "run") == 0
    patches = [json.loads(call[-1]) for call in recorder.calls() if call[0] == "patch"]
    assert patches == [{"spec": {"suspend": True}}, {"spec": {"suspend": False}}]
    recorder.answer("get pods", items(pod(3, **RUNNING)))
    assert personmae("logs", "run", "--index", "3", "--since", "10m") == 0
    call = recorder.calls()[-1]
    assert call[0] == "logs"
    assert {"--since=10m", "--prefix"} <= set(call)
    assert "batch.kubernetes.io/job-completion-index=3" in call[2]
    assert personmae("delete", "run") == 0
    assert recorder.calls()[-1][0] == "delete"
    assert "its checkpoints stay at s3://bucket/run" in capsys.readouterr().out


def test_logs_are_of_the_container_that_trains_and_pods_without_a_node_do_not_end_them(recorder: Recorder) -> None:
    recorder.answer("get jobs.batch run-trainer", "")
    recorder.answer("get trainjobs.trainer.kubeflow.org run-run", json.dumps(job(kind="TrainJob")))
    recorder.answer("get pods", items(pod(0, phase="Running", containerStatuses=[container("node", running={})])))
    assert personmae("logs", "run") == 0
    call = recorder.calls()[-1]
    assert call[call.index("-c") + 1] == "node"
    assert "--ignore-errors" in call


def test_logs_of_a_benchmark_are_also_of_what_fetches_for_it(recorder: Recorder) -> None:
    fetching = labels("run") | {"personmae/fetches": "yes"}
    recorder.answer("get jobs.batch run-trainer", json.dumps(marked(job(), labels=fetching)))
    recorder.answer("get pods", items(pod(0, phase="Pending", initContainerStatuses=[container("fetch", running={})])))
    assert personmae("logs", "run") == 0
    call = recorder.calls()[-1]
    assert "--all-containers" in call
    assert "-c" not in call


def test_an_unknown_run_is_told_with_those_that_there_are(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch -l", items(job()))
    assert personmae("status", "other") == 78
    assert "there is no run other in namespace personmae; there is run" in error(capsys)

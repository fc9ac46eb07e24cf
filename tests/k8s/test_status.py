"""What ``personmae status`` makes of what a cluster, the agents, the log and the bucket say."""

import json
from pathlib import Path
from typing import Any

import pytest
from recorder import Captured, Recorder, event, job, personmae

from launcher.cluster import status


def pod(name: str, index: str, **status_: Any) -> dict[str, Any]:
    annotations = {"batch.kubernetes.io/job-completion-index": index}
    metadata = {"name": name, "annotations": annotations, "creationTimestamp": "t"}
    return {"metadata": metadata, "spec": {"nodeName": "node-a"}, "status": status_}


POD = pod("run-trainer-1-abcde", "1", phase="Running", conditions=[{"type": "Ready", "status": "True"}])
PREEMPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
LOST = pod("run-trainer-0-fghij", "0", phase="Failed", conditions=[PREEMPTED])
METRICS = """\
# TYPE personmae_world_size gauge
personmae_world_size 16.0
# TYPE personmae_last_step gauge
personmae_last_step 1200.0
# TYPE personmae_restarts counter
personmae_restarts_total{reason="peer_lost"} 2.0
"""
LINES = "[rank 0] pretrain 1150/204100  loss 0.61  lr 0.001  5,100 images/s  22:10:05 to go\n"
LATER = "[rank 0] pretrain 1200/204100  loss 0.59  lr 0.001  5,211 images/s  22:07:11 to go\n"


def test_status_tells_pods_ranks_step_and_what_went_wrong(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer("get pods", json.dumps({"items": [POD, LOST]}))
    recorder.answer("get --raw run-trainer-1-abcde:9400/proxy/metrics", METRICS)
    recorder.answer("logs -l", LATER + LINES)  # pods answer in any order
    recorder.answer("get events", event("FailedScheduling", "0/3 nodes are available"))
    assert personmae("status", "run") == 0
    shown = capsys.readouterr().out
    for part in ("run: Running", "ranks 16, rounds ended 2", "step 1,200 of 204,100  loss 0.59", "to go 22:07:11"):
        assert part in shown
    assert "PreemptionByScheduler" in shown
    assert "warning: FailedScheduling: 0/3 nodes are available" in shown
    assert personmae("status", "run", "-o", "json") == 0
    state = json.loads(capsys.readouterr().out)
    assert [(pod["index"], pod["phase"]) for pod in state["pods"]] == [(0, "Failed"), (1, "Running")]
    assert state["checkpoint_age_seconds"] is None


def test_what_rank_0_tells_is_found_on_any_pod_and_the_newest_counts(recorder: Recorder, capsys: Captured) -> None:
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    pods = [pod(f"run-trainer-{index}-abcde", index, **ready) for index in "012"]
    recorder.answer("get pods", json.dumps({"items": pods}))
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    for index, step in (("0", ""), ("1", "personmae_last_step 100\n"), ("2", "personmae_last_step 200\n")):
        answer = f"personmae_world_size 24\n{step}"
        recorder.answer(f"get --raw run-trainer-{index}-abcde:9400/proxy/metrics", answer)
    assert personmae("status", "run") == 0
    assert "step 200" in capsys.readouterr().out


def test_status_of_a_suite_tells_its_stages(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer_for_a_suite()
    assert personmae("status", "run") == 0
    shown = capsys.readouterr().out
    assert "  stage run-pre: Complete\n  stage run-market: at work\n  stage run-duke: waits" in shown


JOBSET = {"spec": {"replicatedJobs": [{"name": "trainer", "template": {"spec": {"parallelism": 4}}}]}}
OTHERS = [
    ("jobsets.jobset.x-k8s.io", job(kind="JobSet", status={}, **JOBSET), "trainer"),
    ("trainjobs.trainer.kubeflow.org", job(kind="TrainJob", status={}, spec={"trainer": {"numNodes": 4}}), "node"),
]


@pytest.mark.parametrize(("resource", "workload", "container"), OTHERS, ids=["JobSet", "TrainJob"])
def test_status_of_other_kinds_tells_nodes_and_whether_they_run(
    resource: str, workload: dict[str, Any], container: str, recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer("get jobs.batch run-trainer", "")
    recorder.answer(f"get {resource} run-run", json.dumps(workload))
    recorder.answer(f"logs -c {container} --ignore-errors", LATER)
    for pods, state in (([POD], "Running"), ([], "Pending")):
        recorder.answer("get pods", json.dumps({"items": pods}))
        recorder.answer("get --raw", "personmae_world_size 16.0\npersonmae_las{")  # it broke off
        assert personmae("status", "run") == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"run: {state}\n  nodes 4, ")
        assert "step 1,200 of 204,100" in shown


def test_a_job_without_a_running_pod_is_pending_and_one_that_is_being_deleted_says_so(
    recorder: Recorder, capsys: Captured
) -> None:
    waiting = pod("run-trainer-0-abcde", "0", phase="Pending")
    recorder.answer("get pods", json.dumps({"items": [waiting]}))
    for more, state in (({}, "Pending"), ({"deletionTimestamp": "2026-01-02T03:04:06Z"}, "Deleting")):
        recorder.answer("get jobs.batch run-trainer", json.dumps(job(metadata=job()["metadata"] | more)))
        assert personmae("status", "run") == 0
        assert capsys.readouterr().out.startswith(f"run: {state}\n")


def test_status_before_the_first_step_has_ranks_and_no_step(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer("get pods", json.dumps({"items": [POD]}))
    recorder.answer("get --raw", METRICS.replace("personmae_last_step 1200.0\n", ""))
    recorder.answer("logs -l", "")
    assert personmae("status", "run") == 0
    shown = capsys.readouterr().out
    assert "ranks 16, rounds ended 2" in shown
    assert "step -" in shown


def test_status_without_metrics_and_logs_still_tells_the_pods(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer("get pods", json.dumps({"items": [POD]}))
    recorder.answer("get --raw", code=1, err="Error from server (Forbidden): pods/proxy is forbidden\n")
    recorder.answer("logs", code=1, err="error: container is waiting to start\n")
    assert personmae("status", "run") == 0
    assert "step -" in capsys.readouterr().out


def test_the_progress_line_is_the_one_that_a_run_prints(tmp_path: Path, capsys: Captured) -> None:
    from personmae.monitor.run_log import RunLog

    log = RunLog(tmp_path, is_first=True, title="pretrain", total_steps=100, first_step=0)
    log.record(10, {"loss": 0.5, "lr": 1e-3}, images_per_step=64)
    log.close()
    match = status._LINE.search(capsys.readouterr().out)
    assert match
    assert (match["program"], match["step"], match["total"], match["values"]) == ("pretrain", "10", "100", "loss 0.5  lr 0.001")
    match = status._LINE.search("03:14:07 pretrain 10/100  loss 0.5  12 images/s  3 d 04:10:00 to go")
    assert match
    assert match["left"] == "3 d 04:10:00"


def test_the_age_of_the_last_checkpoint_comes_from_the_bucket(s3_server: Any) -> None:
    s3_server.bucket("bucket")
    assert status._checkpoint_age({}, "s3://bucket/run") is None
    s3_server.client.put_object(Bucket="bucket", Key="run/LATEST", Body=b"step-00000010")
    age = status._checkpoint_age({}, "s3://bucket/run")
    assert age is not None
    assert -2 < age < 60

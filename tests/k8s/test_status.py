"""What ``personmae status`` makes of what a cluster, the agents, the log and the bucket say."""

import json
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from recorder import RUNNING, Captured, Recorder, container, event, items, job, marked, personmae, pod, stopped, thing

from launcher.cluster import pods, status
from launcher.cluster.kubectl import Kubectl
from personmae.errors import UserError

READY: dict[str, Any] = RUNNING | {"conditions": [{"type": "Ready", "status": "True"}]}
POD = pod(1, **READY)
PREEMPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
LOST = pod(0, "fghij", phase="Failed", conditions=[PREEMPTED])
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
    assert "warning: run-trainer: FailedScheduling: 0/3 nodes are available" in shown
    assert personmae("status", "run", "-o", "json") == 0
    state = json.loads(capsys.readouterr().out)
    assert [(pod["index"], pod["phase"]) for pod in state["pods"]] == [(0, "Failed"), (1, "Running")]
    assert state["checkpoint_age_seconds"] is None


def test_what_rank_0_tells_is_found_on_any_pod_and_the_newest_counts(recorder: Recorder, capsys: Captured) -> None:
    recorder.answer("get pods", items(*(pod(index, **READY) for index in range(3))))
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


JOBSET: dict[str, Any] = {"spec": {"replicatedJobs": [{"name": "trainer", "template": {"spec": {"parallelism": 4}}}]}}
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
    for there, state in (([POD], "Running"), ([], "Pending")):
        recorder.answer("get pods", json.dumps({"items": there}))
        recorder.answer("get --raw", "personmae_world_size 16.0\npersonmae_las{")  # it broke off
        assert personmae("status", "run") == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"run: {state}\n  nodes 4, ")
        assert "step 1,200 of 204,100" in shown


def test_a_job_without_a_running_pod_is_pending_and_one_that_is_being_deleted_says_so(
    recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer("get pods", items(pod(0, phase="Pending")))
    for more, state in (({}, "Pending"), ({"deletionTimestamp": "2026-01-02T03:04:06Z"}, "Deleting")):
        recorder.answer("get jobs.batch run-trainer", json.dumps(marked(job(), **more)))
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


def test_all_pods_are_asked_at_once_and_one_with_a_blocked_port_costs_two_seconds(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    together, run = threading.Barrier(16), Kubectl.run
    waited = set()

    def blocked(self: Kubectl, *args: str, text: str | None = None, seconds: int | None = None) -> str:
        if args[:2] != ("get", "--raw"):
            return run(self, *args, text=text, seconds=seconds)
        waited.add(seconds)
        together.wait(30)  # of pods that are asked one by one the first would wait for ever
        if args[2].endswith("/run-trainer-7-abcde:9400/proxy/metrics"):
            return METRICS
        raise UserError("timeout")

    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer("get pods", items(*(pod(index, **READY) for index in range(16))))
    monkeypatch.setattr(Kubectl, "run", blocked)
    assert personmae("status", "run") == 0
    assert "ranks 16" in capsys.readouterr().out
    assert waited == {2}


def told(recorder: Recorder, capsys: Captured, *there: dict[str, Any], **more: Any) -> list[str]:
    """The lines of a run's pods."""
    recorder.answer("get jobs.batch run-trainer", json.dumps(job(**more)))
    recorder.answer("get pods", items(*there))
    assert personmae("status", "run") == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if re.match(r" +(\d+|store) ", line)]


TWO: dict[str, Any] = {"spec": {"parallelism": 2}}


def test_a_failed_fetch_is_told_and_not_that_its_pod_is_being_initialized(recorder: Recorder, capsys: Captured) -> None:
    trainer = container("trainer", waiting={"reason": "PodInitializing"})
    fetched = container("fetch", terminated={"exitCode": 78, "reason": "Error"})
    failed = pod(0, phase="Failed", initContainerStatuses=[fetched], containerStatuses=[trainer])
    (line,) = told(recorder, capsys, failed, spec={"parallelism": 1})
    assert line.startswith("0 Failed node-a fetch: exit code 78; is replaced")
    assert "PodInitializing" not in line
    at_work = [container("fetch", running={}), container("store", waiting={"reason": "PodInitializing"})]
    fetching = pod(0, phase="Pending", initContainerStatuses=at_work, containerStatuses=[trainer])
    assert told(recorder, capsys, fetching, spec={"parallelism": 1}) == ["0 Pending - fetch is at work"]


@pytest.mark.parametrize(
    ("counted", "ignored", "seconds"), [("0", "0", 10), ("1", "1", 40), ("0", "4", 160), ("5", "9", 600)], ids=str
)
def test_each_index_says_what_it_waits_for_and_how_long_its_replacement_takes(
    counted: str, ignored: str, seconds: int, recorder: Recorder, capsys: Captured
) -> None:
    now = datetime.now(UTC).strftime("%FT%TZ")
    gone = pod(0, **stopped(75, at=now))
    gone["metadata"]["annotations"] |= {
        "batch.kubernetes.io/job-index-failure-count": counted,
        "batch.kubernetes.io/job-index-ignored-failure-count": ignored,
    }
    first, second = told(recorder, capsys, gone, **TWO)
    stop = int(counted) + int(ignored) + 1
    assert second == "1 - - has no pod yet"
    assert first.startswith("0 Failed node-a exit code 75; is replaced in ")
    assert first.endswith(f" s, after stop {stop}")
    left = pods._replacement(gone, pods._seconds(now))
    assert left == f"is replaced in {seconds} s, after stop {stop}"


def test_a_pod_that_is_asked_to_end_and_the_one_before_it_are_told(recorder: Recorder, capsys: Captured) -> None:
    before = pod(0, "older", **stopped(1))
    ending = marked(pod(0, **READY), creationTimestamp="2026-01-02T03:05:00Z", deletionTimestamp="2026-01-02T03:06:00Z")
    unscheduled = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]
    lines = told(recorder, capsys, before, ending, pod(1, phase="Pending", conditions=unscheduled), **TWO)
    assert lines == ["0 Ending node-a (the one before: exit code 1)", "1 Pending - 0/3 nodes are available"]


AGENT = {"args": ["--store=$(RUN)-store:29400"]}
ELASTIC = {"parallelism": 1, "template": {"spec": {"containers": [AGENT]}}}


def test_the_rendezvous_store_is_told_and_that_it_is_missing(recorder: Recorder, capsys: Captured) -> None:
    there = container("store", running={}) | {"restartCount": 2}
    store = pod(0, component="store", phase="Running", containerStatuses=[there])
    assert told(recorder, capsys, POD, store, spec=ELASTIC)[-1] == "store Running node-a 2 restarts"
    recorder.answer("get deployments.apps run-store", json.dumps(thing("Deployment", "run-store", group="apps/v1")))
    assert told(recorder, capsys, POD, spec=ELASTIC)[-1] == "store Pending - has no pod yet"
    recorder.answer("get deployments.apps run-store", "")
    missing = told(recorder, capsys, POD, spec=ELASTIC)[-1]
    assert missing.startswith("store Missing - agents wait for it; delete the run and submit it again")
    assert not [line for line in told(recorder, capsys, POD) if line.startswith("store")]  # it needs none of its own


def test_warnings_name_what_they_are_of_and_those_of_pods_that_are_gone_or_placed_are_left_out(
    recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))
    recorder.answer("get pods", items(POD, pod(2, phase="Pending"), pod(3, phase="Pending")))
    warned = [
        event(reason, "words", of=f"run-trainer-{name}", kind="Pod")
        for reason, name in (
            ("FailedScheduling", "2-abcde"),
            ("FailedScheduling", "1-abcde"),  # it has a node since
            ("Unhealthy", "1-abcde"),
            ("BackOff", "0-zzzzz"),  # a pod of long ago
            ("FailedScheduling", "3-abcde"),
        )
    ]
    recorder.answer("get events", items(*(json.loads(each)["items"][0] for each in warned)))
    assert personmae("status", "run") == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert shown == [
        "warning: run-trainer-2-abcde and 1 more: FailedScheduling: words",
        "warning: run-trainer-1-abcde: Unhealthy: words",
    ]

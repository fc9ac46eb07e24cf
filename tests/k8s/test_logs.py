"""``personmae logs -f`` follows a run across the pods that replace each other until it ends, with a word while none runs."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from recorder import RUNNING, Captured, Recorder, container, ended, items, job, marked, personmae, pod, stopped

from launcher.cluster import logs

UNSCHEDULED = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]
WAITING = pod(0, "first", phase="Pending", conditions=UNSCHEDULED)
FIRST, SECOND = pod(0, "first", **RUNNING), pod(0, "second", **RUNNING)
GONE = pod(0, "first", **stopped(1))
COMPLETE = json.dumps(job(status=ended("Complete")))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """A run that is there, and looks at it without a pause."""
    monkeypatch.setattr(logs, "PAUSE_SECONDS", 0.02)
    recorder.answer("get jobs.batch run-trainer", json.dumps(job()))


def asked(recorder: Recorder, *words: str) -> int:
    return sum(set(words) <= set(call) for call in recorder.calls())


@pytest.fixture
def meanwhile(recorder: Recorder) -> Iterator[Callable[..., None]]:
    """Changes answers, each after a number of further calls with certain words."""
    threads: list[threading.Thread] = []

    def change(*steps: tuple[tuple[str, ...], int, str, str]) -> None:
        def work() -> None:
            for words, times, of, answer in steps:
                before = asked(recorder, *words) if times > 1 else 0
                deadline = time.monotonic() + 60
                while asked(recorder, *words) < before + times:
                    assert time.monotonic() < deadline, words
                    time.sleep(0.02)
                recorder.answer(of, answer)

        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()

    yield change
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_run_is_followed_from_its_pending_pods_over_a_replaced_one_to_its_end(
    recorder: Recorder, meanwhile: Callable[..., None], capsys: Captured
) -> None:
    recorder.answer("get pods", items(WAITING))
    recorder.answer("logs run-trainer-0-first", "one\n")
    recorder.answer("logs run-trainer-0-second", "two\n")
    meanwhile(
        (("get", "pods"), 3, "get pods", items(FIRST)),
        (("logs", "run-trainer-0-first"), 1, "get pods", items(GONE)),
        (("get", "pods"), 3, "get pods", items(GONE, SECOND)),
        (("logs", "run-trainer-0-second"), 1, "get jobs.batch run-trainer", COMPLETE),
    )
    assert personmae("logs", "run", "-f") == 0
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n"
    assert [line.removeprefix("run: ") for line in shown.err.splitlines()] == [
        "waiting: index 0: Pending, 0/3 nodes are available",
        "waiting: index 0: Failed, exit code 1; is replaced now",
        "Complete",
    ]


def test_pods_that_run_are_followed_together_and_each_one_that_comes_by_its_name(
    recorder: Recorder, meanwhile: Callable[..., None], capsys: Captured
) -> None:
    recorder.answer("get pods", items(FIRST, pod(1, **RUNNING)))
    recorder.answer("logs -l", "both\n")
    recorder.answer("logs run-trainer-2-abcde", "third\n")
    meanwhile(
        (("get", "pods"), 2, "get pods", items(FIRST, pod(1, **RUNNING), pod(2, **RUNNING))),
        (("logs", "run-trainer-2-abcde"), 1, "get jobs.batch run-trainer", COMPLETE),
    )
    assert personmae("logs", "run", "-f", "--since", "10m") == 0
    first, second = (call for call in recorder.calls() if call[0] == "logs")
    assert {"-l", "--follow", "--since=10m", "--max-log-requests=200"} <= set(first)
    assert second == ["logs", "run-trainer-2-abcde", "-c", "trainer", "--prefix", "--follow"]
    assert sorted(capsys.readouterr().out.split()) == ["both", "third"]


def test_a_connection_that_is_lost_while_its_container_runs_is_taken_up_again(
    recorder: Recorder, meanwhile: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_LOST_SECONDS", 0.0)
    recorder.answer("get pods", items(FIRST))
    meanwhile((("logs", "run-trainer-0-first"), 2, "get jobs.batch run-trainer", COMPLETE))
    assert personmae("logs", "run", "-f") == 0
    again = [call for call in recorder.calls() if call[0] == "logs"][1]
    assert again[-1] == "--since=1s"


def test_logs_that_are_refused_again_and_again_end_with_an_error(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "_LOST_SECONDS", 0.0)
    monkeypatch.setattr(logs, "_REFUSALS", 3)
    recorder.answer("get pods", items(FIRST))
    recorder.answer("logs run-trainer-0-first", code=1, err='pods "run-trainer-0-first" is forbidden\n')
    assert personmae("logs", "run", "-f") == 78
    assert asked(recorder, "logs", "run-trainer-0-first") == 3
    assert "error: kubectl logs has failed 3 times in a row; its own words are above" in capfd.readouterr().err


def test_a_cluster_that_does_not_answer_for_a_moment_does_not_end_the_logs(
    recorder: Recorder, meanwhile: Callable[..., None], capsys: Captured
) -> None:
    recorder.answer("get pods", code=1, err="Unable to connect to the server: EOF\n")
    meanwhile(
        (("get", "pods"), 2, "get pods", items(FIRST)),
        (("logs", "run-trainer-0-first"), 1, "get jobs.batch run-trainer", COMPLETE),
    )
    assert personmae("logs", "run", "-f") == 0
    assert "run: the cluster did not answer, and is asked again: " in capsys.readouterr().err


def test_a_benchmark_is_followed_from_what_fetches_to_what_trains(
    recorder: Recorder, meanwhile: Callable[..., None], capsys: Captured
) -> None:
    benchmark = marked(job(), labels=job()["metadata"]["labels"] | {"personmae/fetches": "yes"})
    recorder.answer("get jobs.batch run-trainer", json.dumps(benchmark))
    fetching: dict[str, Any] = {"phase": "Pending", "initContainerStatuses": [container("fetch", running={})]}
    training: dict[str, Any] = RUNNING | {"initContainerStatuses": [container("fetch", terminated={"exitCode": 0})]}
    recorder.answer("get pods", items(pod(0, **fetching)))
    recorder.answer("logs -c trainer", "trained\n")
    recorder.answer("logs -c fetch", "fetched\n")
    meanwhile(
        (("logs", "fetch"), 1, "get pods", items(pod(0, **training))),
        (("logs", "trainer"), 1, "get jobs.batch run-trainer", COMPLETE),
    )
    assert personmae("logs", "run", "-f") == 0
    assert capsys.readouterr().out == "fetched\ntrained\n"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([WAITING], "run: no container has begun: index 0: Pending, 0/3 nodes are available"),
        ([WAITING, pod(1, phase="Pending", conditions=UNSCHEDULED)], "index 0 and 1 more: Pending, 0/3 nodes are available"),
        ([], "run: no container has begun: there is no pod yet"),
    ],
    ids=["pending", "two", "none"],
)
def test_logs_of_pods_that_have_not_begun_say_why_there_are_none(
    found: list[dict[str, Any]], told: str, recorder: Recorder, capsys: Captured
) -> None:
    recorder.answer("get pods", items(*found))
    assert personmae("logs", "run") == 0
    assert told in capsys.readouterr().err
    assert asked(recorder, "logs") == 0


def test_a_run_that_is_deleted_ends_its_logs(recorder: Recorder, meanwhile: Callable[..., None], capsys: Captured) -> None:
    recorder.answer("get pods", items(FIRST))
    meanwhile((("logs", "run-trainer-0-first"), 1, "get jobs.batch run-trainer", ""))
    assert personmae("logs", "run", "-f") == 0
    assert capsys.readouterr().err.splitlines()[-1] == "run: it is deleted"

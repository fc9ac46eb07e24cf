"""A suite's dispatcher: what it creates when, who owns it, what it survives and remembers, and what it leaves in the bucket.

It talks over HTTP to ``object_cluster.py``, with the rights of its own Role.
"""

import contextlib
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apiobjects import Object
from sample_suite import SCORES, Submitted, submitted

from launcher.cluster import bucket, dispatcher
from launcher.cluster.api import Api, Away, Refused
from personmae.errors import UserError

POLICY = "ValidatingAdmissionPolicy 'gpus' with binding 'gpus' denied request: label team is required"
COLD = (
    'jobs.batch "x" is forbidden: User "system:serviceaccount:personmae:s-trainer" cannot get resource "jobs": RBAC: '
    'role.rbac.authorization.k8s.io "s-dispatcher" not found'
)


@pytest.fixture
def made(tmp_path: Path, s3_server: Any) -> Iterator[Submitted]:
    s3_server.bucket("results")
    with submitted(tmp_path) as suite:
        yield suite


class Clock:
    """Stands in for ``time``: a pause takes no time, and ``then`` is what happens meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
        self.now, self.pauses, self._then = 0.0, list[float](), then
        monkeypatch.setattr(dispatcher, "time", types.SimpleNamespace(sleep=self.sleep, monotonic=lambda: self.now))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)
        assert self.now < 100_000, "it waits for ever"
        self._then()


def work(made: Submitted, failing: tuple[str, ...] = (), waiting: tuple[str, ...] = ()) -> None:
    """What controllers and pods do: stages that may run, run to their end and leave their result."""
    for stage in made.plan["stages"]:
        job = made.objects.held.get(("Job", stage["job"]))
        if job and not job["spec"].get("suspend") and not job["status"] and stage["name"] not in waiting:
            made.end(stage["name"], "Failed" if stage["name"] in failing else "Complete")
            if "result" in stage and stage["name"] not in failing:
                bucket.write(stage["result"], json.dumps(SCORES).encode())


def stages_of(made: Submitted, patience_seconds: float = 900) -> dispatcher.Stages:
    return dispatcher.Stages(made.plan, made.api, patience_seconds)


def table() -> str:
    return (bucket.read("s3://results/s/results.md") or b"").decode()


def test_benchmarks_are_created_when_their_encoder_is_complete_and_not_before(made: Submitted) -> None:
    stages = stages_of(made)
    stages.turn()
    assert stages.states == {"pre": "runs", "market": "waits for pre", "duke": "waits for pre"}
    assert made.jobs() == ["s-pre-trainer", "s-trainer"]
    made.end("pre")
    for _ in range(2):  # nothing twice
        stages.turn()
        assert stages.states == {"pre": "Complete", "market": "runs", "duke": "runs"}
    assert made.jobs() == ["s-pre-trainer", "s-trainer", "s-market-trainer", "s-duke-trainer"]
    assert made.memory() == {"pre": "Complete", "market": "runs", "duke": "runs"}
    assert not stages.over


def test_a_stage_is_what_was_rendered_and_its_job_is_let_go_last(made: Submitted) -> None:
    made.end("pre")
    stages_of(made).turn()
    for stage in made.plan["stages"][1:]:
        for item in stage["objects"]:
            live = made.objects.get(item["kind"], item["metadata"]["name"])
            assert live.get("data") == item.get("data")
            assert item["metadata"]["labels"].items() <= live["metadata"]["labels"].items()
        live = made.objects.get("Job", stage["job"])
        assert live["spec"]["suspend"] is False
        assert dispatcher._INCOMPLETE not in live["metadata"]["annotations"]
        asked = [path for method, path in made.server.requests if f"/{stage['job']}" in path and method == "PATCH"]
        created = [path for method, path in made.server.requests if method == "POST" and "jobs" not in path]
        assert made.server.requests.index(("PATCH", asked[0])) > made.server.requests.index(("POST", created[0]))


def test_a_stage_owns_its_objects_and_keeps_them_when_the_dispatcher_is_gone(made: Submitted) -> None:
    made.end("pre")
    stages_of(made).turn()
    mine = [(item["kind"], item["metadata"]["name"]) for stage in made.plan["stages"] for item in stage["objects"]]
    made.objects.delete("Job", "s-trainer", "Foreground")  # as when its time after its end is over
    for _ in range(3):
        made.objects.collect()
    assert set(made.objects.held) == set(mine)
    made.objects.delete("Job", "s-market-trainer", "Foreground")
    for _ in range(3):
        made.objects.collect()
    assert {name for _, name in made.objects.held if name.startswith("s-market")} == set()
    assert {name for _, name in made.objects.held if name.startswith("s-duke")} != set()


def test_a_dispatcher_that_is_started_again_goes_on_where_the_last_one_was(made: Submitted) -> None:
    made.end("pre")
    create = made.objects.create
    for broken in ("ConfigMap", "ServiceAccount", "nothing"):  # the first pods have died between two creations

        def breaks(item: Object, *, kind: str = broken, **more: Any) -> Object:
            assert item["kind"] != kind, "the pod dies"
            return create(item, **more)

        made.objects.create = breaks  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(Away):
            stages_of(made).turn()
    stages = stages_of(made)
    stages.turn()
    assert stages.states == {"pre": "Complete", "market": "runs", "duke": "runs"}
    for stage in made.plan["stages"]:
        assert all((item["kind"], item["metadata"]["name"]) in made.objects.held for item in stage["objects"])
        assert not made.objects.get("Job", stage["job"])["spec"].get("suspend")


def test_a_job_that_kueue_lets_go_stays_suspended(tmp_path: Path, s3_server: Any) -> None:
    s3_server.bucket("results")
    with submitted(tmp_path, components=("kueue",)) as made:
        made.end("pre")
        stages_of(made).turn()
        assert made.objects.get("Job", "s-market-trainer")["spec"]["suspend"] is True
        assert made.memory()["market"] == "runs"


def test_one_table_is_written_to_the_bucket(made: Submitted, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, lambda: work(made))
    dispatcher.run(made.plan, made.api)
    assert "| market | market1501 | 50.0 | 62.5 | 75.0 | 87.5 | 25.0 |" in table().splitlines()
    assert json.loads(bucket.read("s3://results/s/results.json") or b"")["results"]["duke"]["mAP"] == 0.5
    assert table() in capsys.readouterr().out


def test_an_api_server_that_restarts_does_not_end_a_suite(
    made: Submitted, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart: list[tuple[int, str] | None] = [
        None,
        (503, "apiserver not ready"),
        (404, "404 page not found"),
        *[(403, COLD)] * 5,
        (401, "Unauthorized"),
        (429, "too many requests"),
        (500, "etcdserver: leader changed"),
    ]
    first = iter([restart])

    def meanwhile() -> None:
        if made.memory().get("pre") == "Complete":  # in the middle of the suite
            made.server.answers += next(first, [])
        work(made)

    clock = Clock(monkeypatch, meanwhile)
    dispatcher.run(made.plan, made.api)
    assert not made.server.answers
    assert table().count("| 50.0 |") == 2
    shown = capsys.readouterr().out
    for words in ("no answer", "apiserver not ready", "404 page not found", '"s-dispatcher" not found', "leader changed"):
        assert words in shown
    waits = clock.pauses[clock.pauses.index(2.0) :][:5]
    assert waits == sorted(waits)  # further and further apart
    assert len(set(waits)) > 3


def test_what_stays_refused_ends_the_suite_with_a_table_and_what_to_give_next(
    made: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile() -> None:
        work(made, waiting=("duke",))
        if made.memory().get("market") == "Complete":
            made.objects.held.pop(("RoleBinding", "s-dispatcher"), None)

    clock = Clock(monkeypatch, meanwhile)
    with pytest.raises(UserError, match=r"1 of 3 stages failed: duke\. See .*/results\.md, .* give: personmae resume s"):
        dispatcher.run(made.plan, made.api)
    assert clock.now >= dispatcher.PATIENCE_SECONDS
    assert "| market | market1501 | 50.0 |" in table()
    asked = "/apis/batch/v1/namespaces/personmae/jobs/s-duke-trainer"
    assert f"| duke | Failed: not known, GET {asked} was refused (403)" in table()


def test_a_refused_stage_fails_alone_and_the_table_is_written(
    made: Submitted, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made.objects.policies.append(lambda item: POLICY if item["metadata"]["name"].startswith("s-duke") else None)
    clock = Clock(monkeypatch, lambda: work(made))
    with pytest.raises(UserError, match="1 of 3 stages failed: duke"):
        dispatcher.run(made.plan, made.api)
    assert "| market | market1501 | 50.0 |" in table()
    assert "denied request: label team is required |" in next(line for line in table().splitlines() if "| duke |" in line)
    assert clock.now >= dispatcher.PATIENCE_SECONDS
    assert "waits, for it may pass" in capsys.readouterr().out
    assert "s-duke-trainer" not in made.jobs()


def test_a_policy_that_is_corrected_in_time_costs_nothing(made: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    made.objects.policies.append(lambda item: POLICY if item["kind"] == "ServiceAccount" else None)

    def meanwhile() -> None:
        if clock.now > 300:
            made.objects.policies.clear()
        work(made)

    clock = Clock(monkeypatch, meanwhile)
    dispatcher.run(made.plan, made.api)
    assert table().count("| 50.0 |") == 2


@pytest.mark.parametrize("told", ["exceeded quota: personmae, requested: count/jobs.batch=1", "status unknown for quota: q"])
def test_a_full_quota_is_waited_for_however_long(told: str, made: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    made.objects.policies.append(lambda item: told if item["kind"] == "Job" else None)

    def meanwhile() -> None:
        if clock.now > 2 * dispatcher.PATIENCE_SECONDS:
            made.objects.policies.clear()
        work(made)

    clock = Clock(monkeypatch, meanwhile)
    dispatcher.run(made.plan, made.api)
    assert table().count("| 50.0 |") == 2


@pytest.mark.parametrize("again", [False, True], ids=["the same pod", "another pod"])
def test_a_stage_that_is_deleted_by_hand_stays_deleted_and_is_told(again: bool, made: Submitted) -> None:
    made.end("pre")
    stages = stages_of(made)
    stages.turn()
    made.objects.delete("Job", "s-market-trainer", "Foreground")
    made.objects.collect()
    stages = stages_of(made) if again else stages
    stages.turn()
    made.end("duke")
    stages.turn()
    assert stages.over
    assert stages.states["market"] == "Failed: its Job s-market-trainer was deleted"
    assert made.memory()["market"] == stages.states["market"]
    assert "s-market-trainer" not in made.jobs()


def test_a_stage_that_is_being_deleted_is_told_while_its_pods_save(made: Submitted) -> None:
    made.objects.hold("Job", "s-pre-trainer")
    made.objects.delete("Job", "s-pre-trainer", "Foreground")
    stages = stages_of(made)
    stages.turn()
    assert stages.states["pre"] == "Failed: its Job s-pre-trainer was deleted"
    assert stages.states["market"] == "Failed: pre has failed"
    assert "market" not in made.memory()  # it can begin when pre is mended


def test_a_stage_that_is_complete_may_be_deleted(made: Submitted) -> None:
    made.end("pre")
    stages_of(made).turn()
    made.objects.delete("Job", "s-pre-trainer")
    stages = stages_of(made)
    stages.turn()
    assert stages.states == {"pre": "Complete", "market": "runs", "duke": "runs"}


def test_what_is_left_of_an_earlier_run_is_waited_for_and_not_taken(made: Submitted) -> None:
    item = next(o for o in made.plan["stages"][1]["objects"] if o["kind"] == "ServiceAccount")
    old = {"apiVersion": "batch/v1", "kind": "Job", "name": "s-market-trainer", "uid": "of-an-earlier-run"}
    made.objects.create(item | {"metadata": item["metadata"] | {"ownerReferences": [old]}})
    made.objects.hold("ServiceAccount", item["metadata"]["name"])
    made.objects.collect()
    made.end("pre")
    stages = stages_of(made)
    stages.turn()
    assert stages.states["market"].startswith("waits: creating ServiceAccount s-market-trainer was refused (409): one of an")
    assert stages.states["duke"] == "runs"
    made.objects.release("ServiceAccount", item["metadata"]["name"])
    stages.turn()
    assert stages.states["market"] == "runs"
    assert made.objects.get("ServiceAccount", "s-market-trainer")["metadata"]["ownerReferences"][0]["uid"] != old["uid"]


def test_a_failed_stage_fails_those_after_it_and_the_table_has_the_others(
    made: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, lambda: work(made, failing=("duke",)))
    with pytest.raises(UserError, match="1 of 3 stages failed: duke"):
        dispatcher.run(made.plan, made.api)
    assert "| duke | Failed: PodFailurePolicy: exit code 78 |" in table()
    assert "| market | market1501 | 50.0 |" in table()


def test_a_plan_of_another_version_is_one_line(made: Submitted) -> None:
    with pytest.raises(UserError, match="a plan of version 2 is required and this one has 1: the image and the personmae"):
        dispatcher.run({key: value for key, value in made.plan.items() if key != "version"}, made.api)


def test_requests_carry_the_newest_token_and_known_answers_are_told_apart(made: Submitted, tmp_path: Path) -> None:
    job = made.plan["stages"][1]["objects"][-1]
    assert job["kind"] == "Job"
    assert made.api.get(job) is None
    (tmp_path / "account" / "token").write_text("somebody")
    with pytest.raises(Refused, match=r"GET .*/jobs/s-market-trainer was refused \(403\).*system:serviceaccount:personmae:som"):
        made.api.get(job)
    (tmp_path / "account" / "token").write_text("s-trainer")
    assert made.api.create(job)
    assert made.api.create(job) is None  # the last pod was faster
    live = made.api.get(job)
    assert live
    assert live["metadata"]["name"] == "s-market-trainer"
    passing = [(409, "Operation cannot be fulfilled on resourcequotas"), (503, ""), (429, ""), (403, "exceeded quota: q")]
    for answer, final in [*((answer, False) for answer in passing), ((403, "no"), True), ((404, "page not found"), True)]:
        made.server.answers.append(answer)
        with pytest.raises(Refused) as caught:
            made.api.get(job)
        assert caught.value.final is final
    made.server.answers.append(None)
    with pytest.raises(Away, match="had no answer"):
        made.api.get(job)


def test_the_api_server_is_asked_without_the_proxy_of_the_bucket(made: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    job = made.plan["stages"][0]["objects"][-1]
    assert Api(made.server.url, made.api._account).get(job)

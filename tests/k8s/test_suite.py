"""A suite, locally from end to end, and its dispatcher: what it creates when, survives, and leaves in the bucket."""

import http.server
import json
import os
import subprocess
import threading
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml
from sample_requests import DIGEST, ROOT, by_name

from launcher.cluster import bucket, dispatcher, render, suite
from launcher.cluster.request import Request
from personmae import config
from personmae.errors import UserError

TINY = [
    "train.global_batch_size=16",
    "train.total_steps=4",
    "train.precision=fp32",
    "data.num_threads=1",
    "data.shuffle_block_size=32",
]
SCORES = {"mAP": 0.5, "rank1": 0.625, "rank5": 0.75, "rank10": 0.875, "mINP": 0.25, "benchmark": "market1501"}
STAGES = [
    {
        "name": "pre",
        "config": str(ROOT / "configs/pretrain_vit_base.yaml"),
        "set": ["data.shards=s3://b/l"],
        "nodes": [1, 2],
        "gpus": 8,
    },
    {"name": "market", "after": "pre", "config": str(ROOT / "configs/finetune_market1501.yaml"), "set": ["root={market}"]},
    {"name": "duke", "after": "pre", "config": str(ROOT / "configs/finetune_occluded_duke.yaml"), "set": ["root=s3://b/d.tar"]},
]
FILE = {"name": "s", "results": "s3://results/s", "places": {"market": "s3://b/m.tar"}, "stages": STAGES}


@pytest.fixture
def suite_request(tmp_path: Path) -> Request:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(FILE))
    return Request(tmp_path / "suite.yaml", image=f"registry.test/personmae@{DIGEST}")


def test_paths_of_a_suites_stages_are_the_pods(suite_request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OF_PODS", raising=False)
    monkeypatch.setenv("BUCKET", "results")
    stages = [{**STAGES[0], "set": ["data.shards=s3://b/l", "data.cache_dir={cache}", "run_dir=~/x"]}, *STAGES[1:]]
    places = FILE["places"] | {"cache": "$OF_PODS/x"}
    told = FILE | {"results": "s3://$BUCKET/a$$b", "places": places, "stages": stages}
    suite_request.config.write_text(yaml.safe_dump(told))
    dispatching, runs = suite.render_suite(suite_request)
    assert runs[0].settings.data.cache_dir == "$OF_PODS/x"
    assert [run.settings.checkpoint.upload_to for run in runs] == [f"s3://results/a$$b/runs/{s['name']}" for s in stages]
    assert json.loads(suite.plan_of(dispatching))["results"] == "s3://results/a$$b"


class Cluster:
    """Jobs in memory, as the API server would hold them; they end when the test says so."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        return self.jobs.get(name)

    def create(self, job: dict[str, Any]) -> None:
        assert job["metadata"]["name"] not in self.jobs
        self.jobs[job["metadata"]["name"]] = json.loads(json.dumps(job))

    def end(self, name: str, kind: str = "Complete") -> None:
        condition = {"type": kind, "status": "True", "reason": "PodFailurePolicy", "message": "exit code 78"}
        self.jobs[name]["status"] = {"conditions": [condition]}


@pytest.fixture
def plan(suite_request: Request) -> dict[str, Any]:
    return json.loads(suite.plan_of(suite.render_suite(suite_request)[0]))


@pytest.fixture
def cluster(plan: dict[str, Any]) -> Cluster:
    first = Cluster()
    first.create({"metadata": {"name": plan["stages"][0]["job"]}})
    return first


def test_benchmarks_are_created_when_their_encoder_is_complete_and_not_before(plan: dict[str, Any], cluster: Cluster) -> None:
    assert dispatcher.turn(plan["stages"], cluster) == {"pre": "runs", "market": "waits for pre", "duke": "waits for pre"}
    assert list(cluster.jobs) == ["s-pre-trainer"]
    cluster.end("s-pre-trainer")
    assert dispatcher.turn(plan["stages"], cluster) == {"pre": "Complete", "market": "runs", "duke": "runs"}
    assert list(cluster.jobs) == ["s-pre-trainer", "s-market-trainer", "s-duke-trainer"]
    assert dispatcher.turn(plan["stages"], cluster) == {"pre": "Complete", "market": "runs", "duke": "runs"}  # nothing twice


def test_a_dispatcher_that_is_started_again_goes_on_where_the_last_one_was(plan: dict[str, Any], cluster: Cluster) -> None:
    cluster.end("s-pre-trainer")
    dispatcher.turn(plan["stages"][:2], cluster)  # the first pod has died between two creations
    assert list(cluster.jobs) == ["s-pre-trainer", "s-market-trainer"]
    dispatcher.turn(json.loads(json.dumps(plan["stages"])), cluster)
    assert list(cluster.jobs) == ["s-pre-trainer", "s-market-trainer", "s-duke-trainer"]


def test_one_table_is_written_to_the_bucket(plan: dict[str, Any], cluster: Cluster, s3_server: Any, capsys: Any) -> None:
    s3_server.bucket("results")
    cluster.end("s-pre-trainer")
    dispatcher.turn(plan["stages"], cluster)
    for name in ("market", "duke"):
        cluster.end(f"s-{name}-trainer")
        bucket.write(f"s3://results/s/runs/{name}/result.json", json.dumps(SCORES).encode())
    dispatcher.run(plan, cluster, pause_seconds=0)
    written = bucket.read("s3://results/s/results.md")
    assert written
    assert "| market | market1501 | 50.0 | 62.5 | 75.0 | 87.5 | 25.0 |" in written.decode().splitlines()
    assert json.loads(bucket.read("s3://results/s/results.json") or b"")["results"]["duke"]["mAP"] == 0.5
    assert written.decode() in capsys.readouterr().out


def test_the_dispatcher_outlives_an_api_server_that_does_not_answer(
    plan: dict[str, Any], cluster: Cluster, s3_server: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.bucket("results")
    cluster.end("s-pre-trainer")
    away = iter([TimeoutError("read"), urllib.error.HTTPError("url", 503, "", Message(), None), ConnectionResetError()])
    ask = cluster.get

    def get(name: str) -> dict[str, Any] | None:
        if error := next(away, None):
            raise error
        if name in cluster.jobs and name != "s-pre-trainer":
            cluster.end(name)
            bucket.write(f"s3://results/s/runs/{name.split('-')[1]}/result.json", json.dumps(SCORES).encode())
        return ask(name)

    monkeypatch.setattr(cluster, "get", get)
    dispatcher.run(plan, cluster, pause_seconds=0)
    assert capsys.readouterr().out.count("the cluster did not answer") == 3
    assert (bucket.read("s3://results/s/results.md") or b"").count(b"| 50.0 |") == 2


def test_a_failed_stage_fails_those_after_it_and_the_table_has_the_others(
    plan: dict[str, Any], cluster: Cluster, s3_server: Any
) -> None:
    s3_server.bucket("results")
    cluster.end("s-pre-trainer")
    dispatcher.turn(plan["stages"], cluster)
    cluster.end("s-market-trainer")
    cluster.end("s-duke-trainer", "Failed")
    bucket.write("s3://results/s/runs/market/result.json", json.dumps(SCORES).encode())
    with pytest.raises(UserError, match="1 of 3 stages failed: duke"):
        dispatcher.run(plan, cluster, pause_seconds=0)
    assert "| duke | Failed: PodFailurePolicy: exit code 78 |" in (bucket.read("s3://results/s/results.md") or b"").decode()
    cluster.end("s-pre-trainer", "Failed")
    cluster.jobs = {"s-pre-trainer": cluster.jobs["s-pre-trainer"]}
    states = dispatcher.turn(plan["stages"], cluster)
    assert states["market"] == "Failed: pre has failed"
    assert list(cluster.jobs) == ["s-pre-trainer"]


def test_the_dispatcher_is_what_kustomize_makes_of_it(suite_request: Request, tmp_path: Path, kustomize: Any) -> None:
    picked = replace(suite_request, components=("irsa", "monitoring", "network-policy"), role="arn:aws:iam::1:role/r")
    first, _ = suite.render_suite(picked)
    render.write(first, tmp_path / "written")
    assert by_name(first.objects) == kustomize(tmp_path / "written")


def test_the_first_objects_of_a_suite_are_all_but_the_later_jobs(suite_request: Request) -> None:
    first, runs = suite.render_suite(suite_request)
    created = by_name(suite.first_objects(first, runs))
    assert {name for kind, name in created if kind == "Job"} == {"s-trainer", "s-pre-trainer"}
    plan = json.loads(suite.plan_of(first))
    for stage in plan["stages"][1:]:
        pod = stage["object"]["spec"]["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in created
        assert ("ConfigMap", next(v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v)) in created
        assert ("ConfigMap", pod["containers"][0]["envFrom"][0]["configMapRef"]["name"]) in created
        assert created["ConfigMap", f"s-{stage['name']}-run"]["data"]["ENCODER"] == "s3://results/s/runs/pre"
        assert created["ConfigMap", f"s-{stage['name']}-run"]["data"]["RESULT"] == stage["result"]
    waiting = created["Job", "s-trainer"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in waiting["limits"]
    rules = created["Role", "s-dispatcher"]["rules"]
    assert rules == [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "create"]}]
    binding = created["RoleBinding", "s-dispatcher"]
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == ("s-dispatcher", "s-trainer")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stages": [{**STAGES[1]}]}, "stage market is after pre, which must stand before it; there is nothing"),
        ({"stages": [STAGES[0], STAGES[0]]}, "two stages are called pre"),
        ({"places": {}}, "stage market sets root={market}, and places has no 'market'"),
        ({"name": "x" * 36}, "a run's name must be at most 38"),
        ({"results": "runs/s"}, "results must be s3://BUCKET/PREFIX in a cluster; got runs/s"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_suite_is_one_line(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(FILE | change))
    with pytest.raises(UserError, match=told) as caught:
        suite.render_suite(Request(tmp_path / "suite.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"gpus": 4}, "--gpus is for one run; each stage of a suite says its own"),
        ({"nodes": (1, 2)}, "--nodes is for one run"),
        ({"overlay": "pretrain"}, "--overlay is for one run"),
        ({"name": ""}, "a run's name must be at most 38"),
    ],
    ids=str,
)
def test_what_a_suite_would_not_heed_is_refused(suite_request: Request, more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        suite.render_suite(replace(suite_request, **more))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"overlay": "jobset"}, "the stages of a suite must be Jobs; pre has the overlay jobset"),
        ({"nodes": [2, 1]}, "--nodes must be MIN:MAX with 1 <= MIN <= MAX; got 2:1"),
        ({"set": ["data.shards={market.x}"]}, "stage pre sets"),
    ],
    ids=str,
)
def test_a_wrong_stage_is_one_line(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(FILE | {"stages": [STAGES[0] | change]}))
    with pytest.raises(UserError, match=told):
        suite.render_suite(Request(tmp_path / "suite.yaml"))


def test_the_suite_of_the_paper_has_every_table(tmp_path: Path) -> None:
    steps = suite.load(ROOT / "configs" / "suite_paper.yaml", ["results=s3://mine/paper"])
    assert suite.is_suite(ROOT / "configs" / "suite_paper.yaml")
    assert not suite.is_suite(ROOT / "configs" / "pretrain_vit_base.yaml")
    for step in steps:
        settings = config.load(getattr(config, step.program.capitalize()), step.config, step.overrides)
        assert settings.checkpoint.upload_to == step.run_dir
    by_stage = {step.stage.name: step for step in steps}
    for step in steps:
        if step.stage.after:  # weights are only good for an encoder of their own size
            sizes = [
                config.load(getattr(config, s.program.capitalize()), s.config, s.overrides).model.size
                for s in (step, by_stage[step.stage.after])
            ]
            assert sizes[0] == sizes[1], step.stage.name


class _Api(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, str, str | None]] = []  # noqa: RUF012 - of the one test below
    code, body = 200, b'{"kind": "Job"}'

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path, self.headers["Authorization"]))
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path) -> Iterator[dispatcher.ApiJobs]:
    """A server that answers as told: it shows the requests, not what an API server makes of them."""
    _Api.seen.clear()
    (tmp_path / "namespace").write_text("team\n")
    (tmp_path / "token").write_text("first")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield dispatcher.ApiJobs(f"http://127.0.0.1:{server.server_address[1]}", tmp_path)
    server.shutdown()
    server.server_close()


def test_requests_carry_the_newest_token_and_known_answers_are_told_apart(api: dispatcher.ApiJobs, tmp_path: Path) -> None:
    _Api.code = 200
    assert api.get("x-trainer") == {"kind": "Job"}
    (tmp_path / "token").write_text("second")
    _Api.code = 404
    assert api.get("x-trainer") is None
    _Api.code = 409
    api.create({"metadata": {"name": "x-trainer"}})  # the last pod was faster
    _Api.code = 503
    with pytest.raises(urllib.error.HTTPError) as caught:  # it may pass
        api.get("x-trainer")
    caught.value.close()
    _Api.code = 403
    with pytest.raises(UserError, match=r"POST .*/apis/batch/v1/namespaces/team/jobs was refused \(403\)"):
        api.create({"metadata": {"name": "x-trainer"}})
    jobs = "/apis/batch/v1/namespaces/team/jobs"
    assert _Api.seen[:3] == [
        ("GET", f"{jobs}/x-trainer", "Bearer first"),
        ("GET", f"{jobs}/x-trainer", "Bearer second"),
        ("POST", jobs, "Bearer second"),
    ]


def test_a_full_quota_is_waited_for(api: dispatcher.ApiJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Api, "code", 403)
    monkeypatch.setattr(_Api, "body", b'{"message": "jobs.batch \\"x\\" is forbidden: exceeded quota: personmae"}')
    with pytest.raises(OSError, match=r"POST .*exceeded quota: personmae"):  # what the dispatcher tries again after
        api.create({"metadata": {"name": "x-trainer"}})


def test_the_api_server_is_asked_without_the_proxy_of_the_bucket(
    api: dispatcher.ApiJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Api, "code", 200)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert dispatcher.ApiJobs(api._url.partition("/apis")[0], api._account).get("x-trainer") == {"kind": "Job"}


@pytest.mark.integration
@pytest.mark.slow
def test_a_suite_runs_locally_from_shards_to_the_table_and_again_without_work(shard_dir: Path, tmp_path: Path) -> None:
    from people import draw_few_people

    ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | ours

    def local(*args: object) -> subprocess.CompletedProcess[str]:
        return warm.run(["-m", "launcher.cluster.cli", "submit", "--local", *map(str, args)], env=environ, timeout=240)

    draw_few_people(tmp_path)
    small = ["batch.num_ids=4", "train.epochs=2", "train.precision=fp32", "train.drop_path_rate=0.0"]
    stages = [
        {
            "name": "pre",
            "config": str(ROOT / "configs/quickstart.yaml"),
            "set": ["data.shards={shards}", *TINY, "engine.name=native"],
        },
        {
            "name": "market",
            "after": "pre",
            "config": str(ROOT / "configs/quickstart_personmae.yaml"),
            "set": ["root={market}", *small],
        },
        {
            "name": "duke",
            "after": "pre",
            "config": str(ROOT / "configs/quickstart_personmae.yaml"),
            "set": ["root={duke}", "benchmark=occluded_duke", *small],
        },
    ]
    places = {
        "shards": str(shard_dir),
        "market": str(tmp_path / "data/market1501"),
        "duke": str(tmp_path / "data/occluded_duke"),
    }
    content = {"name": "tiny", "results": str(tmp_path / "runs"), "places": places, "stages": stages}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    done = local(tmp_path / "suite.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    done = local(tmp_path / "suite.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is complete" in done.stdout
    record = json.loads((tmp_path / "runs/runs/market/result.json").read_text())
    assert f"| market | market1501 | {100 * record['mAP']:.1f} |" in (tmp_path / "runs/results.md").read_text()
    assert (tmp_path / "runs/results.md").read_text() in done.stdout
    assert json.loads((tmp_path / "runs/results.json").read_text())["results"].keys() == {"market", "duke"}
    broken = local(tmp_path / "suite.yaml", "places.duke=nowhere", f"results={tmp_path / 'other'}")
    assert broken.returncode == 78
    assert "duke has ended with code 78" in broken.stderr

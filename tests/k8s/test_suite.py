"""A suite: what a file becomes, what is wrong with one, and a run of all its stages on this machine."""

import itertools
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml
from apiobjects import resource
from sample_requests import DIGEST, ROOT, by_name
from sample_suite import FILE, STAGES, request_in

from launcher.cluster import kustomization, render, suite
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


@pytest.fixture
def suite_request(tmp_path: Path) -> Request:
    return request_in(tmp_path)


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


def test_the_dispatcher_is_what_kustomize_makes_of_it(suite_request: Request, tmp_path: Path, kustomize: Any) -> None:
    picked = replace(suite_request, components=("irsa", "monitoring", "network-policy"), role="arn:aws:iam::1:role/r")
    first, _ = suite.render_suite(picked)
    render.write(first, tmp_path / "written")
    assert by_name(first.objects) == kustomize(tmp_path / "written")


def test_submit_creates_the_first_stages_and_the_dispatcher_whose_plan_has_all_objects_of_all(suite_request: Request) -> None:
    first, runs = suite.render_suite(suite_request)
    assert [rendered.run for rendered in suite.first_runs(first, runs)] == ["s-pre", "s"]
    plan = json.loads(suite.plan_of(first))
    assert [stage["objects"] for stage in plan["stages"]] == [rendered.objects for rendered in runs]
    created = by_name([item for stage in plan["stages"] for item in stage["objects"]] + first.objects)
    for stage in plan["stages"]:
        pod = created["Job", stage["job"]]["spec"]["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in created
        assert ("ConfigMap", next(v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v)) in created
        assert ("ConfigMap", pod["containers"][0]["envFrom"][0]["configMapRef"]["name"]) in created
    for stage in plan["stages"][1:]:
        assert created["ConfigMap", f"s-{stage['name']}-run"]["data"]["ENCODER"] == "s3://results/s/runs/pre"
        assert created["ConfigMap", f"s-{stage['name']}-run"]["data"]["RESULT"] == stage["result"]
    waiting = created["Job", "s-trainer"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert "nvidia.com/gpu" not in waiting["limits"]
    binding = created["RoleBinding", "s-dispatcher"]
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == ("s-dispatcher", "s-trainer")


def test_every_object_of_a_suite_names_it_and_its_jobs_are_kept_equally_long(suite_request: Request) -> None:
    first, runs = suite.render_suite(replace(suite_request, components=("monitoring", "network-policy")))
    for item in [item for rendered in (first, *runs) for item in rendered.objects]:
        assert item["metadata"]["labels"]["personmae/suite"] == "s", item["kind"]
    kept = {rendered.workload["spec"]["ttlSecondsAfterFinished"] for rendered in (first, *runs)}
    assert kept == {90 * 86400}  # or the plan would go while stages run, or their ends before they are read


def test_the_dispatcher_may_do_what_its_stages_need_and_no_more_than_who_submits(suite_request: Request) -> None:
    first, runs = suite.render_suite(replace(suite_request, components=("monitoring", "network-policy")))
    (role,) = (item for item in first.objects if item["kind"] == "Role")
    submitter = kustomization.build(ROOT / "k8s" / "overlays" / "namespace")
    (theirs,) = (item for item in submitter if item["kind"] == "Role")
    for rule in role["rules"]:
        for verb in rule["verbs"]:
            for word in rule["resources"]:
                assert _allowed(theirs, rule["apiGroups"][0], word, verb), (word, verb)
    for item in [item for rendered in runs for item in rendered.objects]:
        group = item["apiVersion"].rpartition("/")[0]
        for verb in ("get", "create"):
            assert _allowed(role, group, resource(item["kind"]), verb), item["kind"]
    assert [rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule] == [["s-state"]]


def _allowed(role: dict[str, Any], group: str, word: str, verb: str) -> bool:
    rules = (rule for rule in role["rules"] if group in rule["apiGroups"] and word in rule["resources"])
    return any(verb in rule["verbs"] for rule in rules)


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


def test_the_default_quotas_hold_whatever_stages_of_the_papers_suite_may_work_at_a_time() -> None:
    request = Request(ROOT / "configs" / "suite_paper.yaml", image=f"registry.test/personmae@{DIGEST}")
    first, runs = suite.render_suite(request)
    plan = json.loads(suite.plan_of(first))["stages"]
    after = {stage["name"]: stage["after"] for stage in plan}
    sizes = {stage["name"]: _requests(rendered.objects) for stage, rendered in zip(plan, runs, strict=True)}
    (quota,) = (o["spec"]["hard"] for o in kustomization.build(ROOT / "k8s/overlays/namespace") if o["kind"] == "ResourceQuota")
    (queue,) = (o["spec"] for o in kustomization.build(ROOT / "k8s/overlays/queues") if o["kind"] == "ClusterQueue")
    queued = {each["name"]: each["nominalQuota"] for each in queue["resourceGroups"][0]["flavors"][0]["resources"]}
    for name in ("nvidia.com/gpu", "memory", "cpu", "ephemeral-storage"):
        most = max(sum(sizes[stage][name] for stage in together) for together in _independent(after))
        most += _requests(first.objects)[name]
        assert most <= _number(queued[name]), name
        assert most <= _number(quota.get(f"requests.{name}", "1Ei")), name
    assert int(quota["count/jobs.batch"]) > len(runs)


def _independent(after: dict[str, str | None]) -> Iterator[tuple[str, ...]]:
    """The sets of stages none of which waits for another."""
    above: dict[str, set[str]] = {}
    for name, before in after.items():
        above[name] = {before, *above[before]} if before else set()
    for number in range(1, len(after) + 1):
        for names in itertools.combinations(after, number):
            if not any(above[name] & {*names} for name in names):
                yield names


def _requests(objects: list[dict[str, Any]]) -> Counter[str]:
    """What the pods of a run request in all, as a quota counts it."""
    total = Counter[str]()
    for item in objects:
        if item["kind"] in ("Job", "Deployment"):
            pod = item["spec"]["template"]["spec"]
            inits = pod.get("initContainers", [])
            together = [*pod["containers"], *(c for c in inits if c.get("restartPolicy") == "Always")]
            for name in ("nvidia.com/gpu", "memory", "cpu", "ephemeral-storage"):
                most = max(sum(_request(c, name) for c in together), *(_request(c, name) for c in inits), 0.0)
                total[name] += round(1000 * most * item["spec"].get("parallelism", 1))
    return total


def _request(container: dict[str, Any], name: str) -> float:
    resources = container["resources"]
    return _number(resources["requests"].get(name, resources["limits"].get(name, "0"))) / 1000


def _number(quantity: str) -> int:
    """A quantity of Kubernetes, in thousandths."""
    units = {"m": 1, "": 1000, "Mi": 1000 << 20, "Gi": 1000 << 30, "Ti": 1000 << 40, "Ei": 1000 << 60}
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", quantity).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return round(float(number) * units[unit])


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

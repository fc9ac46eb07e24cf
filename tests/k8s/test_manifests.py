"""Whether k8s/ keeps what it promises: strict schemas, the restricted profile, and agreement with the launcher's contract."""

import functools
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemas
import yaml
from sample_requests import OVERLAYS, ROOT, request_for

from launcher.cluster import kustomization, render, request
from launcher.elastic.__main__ import build_parser, read_options, read_policy
from launcher.elastic.agent import _KILL_SECONDS
from launcher.elastic.http import Metrics, Probes, serve
from personmae import config
from personmae.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError

K8S = ROOT / "k8s"
RUNS = [name for name in OVERLAYS if name not in ("namespace", "queues")]
SPOT_NOTICE_SECONDS = {"spot": 120, "spot-gke": 25}


@functools.cache
def overlay(name: str) -> list[dict[str, Any]]:
    return kustomization.build(K8S / "overlays" / name)


def walk(node: Any, key: str) -> Iterator[Any]:
    """Every value that stands under a key, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from walk(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value, key)


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Specs of all pod templates, in whatever object they are."""
    return [t["spec"] for item in objects for t in walk(item, "template") if "containers" in t.get("spec", {})]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def trainer(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod that trains, and its container."""
    pod = next(pod for pod in pods(objects) if any("--nnodes=$(NODES)" in c.get("args", []) for c in pod["containers"]))
    return pod, pod["containers"][0]


def variables(objects: list[dict[str, Any]]) -> dict[str, str]:
    return next(o["data"] for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"].endswith("run"))


@functools.cache
def checked(text: str, version: str) -> None:
    schemas.check_core(json.loads(text), version)


def check(objects: list[dict[str, Any]]) -> None:
    """Core kinds for every version, custom kinds where their definitions are; what was checked before is not checked again."""
    for item in objects:
        if not schemas.is_custom(item):
            for version in schemas.VERSIONS:
                checked(json.dumps(item, sort_keys=True), version)
        elif schemas.have_custom():
            schemas.check_custom(item)


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_overlay_is_valid_for_all_versions(name: str) -> None:
    check(overlay(name))


@pytest.mark.parametrize("name", ["jobset", "trainjob", "pretrain-spot", "queues"])
def test_custom_kinds_are_valid(name: str) -> None:
    if not schemas.have_custom():
        pytest.skip("needs the custom resource definitions: set PERSONMAE_CRDS to a folder of them")
    custom = [item for item in overlay(name) if schemas.is_custom(item)]
    assert custom
    for item in custom:
        schemas.check_custom(item)


@pytest.mark.parametrize("ask", [schemas.check_core, schemas.check_core_quickly])
def test_the_schemas_notice_a_field_that_does_not_exist(ask: Callable[[dict[str, Any], str], None]) -> None:
    job = json.loads(json.dumps(next(o for o in overlay("pretrain") if o["kind"] == "Job")))
    job["spec"]["parallelsm"] = 4
    for version in schemas.VERSIONS:
        with pytest.raises(Exception, match="parallelsm"):
            ask(job, version)
    if schemas.have_custom():
        monitor = json.loads(json.dumps(next(o for o in overlay("pretrain-spot") if o["kind"] == "PodMonitor")))
        monitor["spec"]["podMetricEndpoints"] = monitor["spec"].pop("podMetricsEndpoints")
        with pytest.raises(Exception, match="podMetric"):
            schemas.check_custom(monitor)


@pytest.mark.parametrize("name", RUNS)
def test_every_pod_keeps_to_the_restricted_profile(name: str) -> None:
    assert pods(overlay(name))
    for pod in pods(overlay(name)):
        assert pod["automountServiceAccountToken"] is (name == "suite")  # its dispatcher creates Jobs
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert {key for volume in pod["volumes"] for key in volume} <= {"name", "emptyDir", "configMap", "ephemeral"}
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            assert "cpu" not in resources["limits"]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_goes_to_a_volume(name: str) -> None:
    if name == "suite":
        pytest.skip("its dispatcher writes nothing")
    pod, container = trainer(overlay(name))
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    for entry in container["env"]:
        if str(entry.get("value", "")).startswith("/"):
            assert any(entry["value"].startswith(path) for path in ("/scratch", "/tmp")), entry
    assert {"/tmp", "/scratch", "/etc/personmae"} <= mounts.keys()


@pytest.mark.parametrize("components", [[], ["spot"], ["spot-gke"]], ids=str)
def test_the_grace_of_the_pod_covers_the_launcher_and_that_of_the_launcher_the_checkpoint(components: list[str]) -> None:
    rendered = render.render(request_for(components=components, name="run"))
    pod, _ = trainer(rendered.objects)
    grace, end = float(variables(rendered.objects)["GRACE_SECONDS"]), pod["terminationGracePeriodSeconds"]
    text = next(o["data"]["config.yaml"] for o in rendered.objects if o["metadata"]["name"] == "run-config")
    assert yaml.safe_load(text)["checkpoint"]["close_seconds"] <= grace / 2  # the other half is for the step and the writing
    if "spot-gke" in components:  # 25 s do not leave the agent all the time that it takes for ranks that do not die
        assert grace + 5 < end
    else:
        assert grace + _KILL_SECONDS + 3 <= end
    notice = next((SPOT_NOTICE_SECONDS[name] for name in components), None)
    assert notice is None or end <= notice


@pytest.mark.parametrize("name", [n for n in RUNS if n != "suite"])
def test_the_command_line_of_the_pod_is_one_that_the_launcher_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pod, container = trainer(overlay(name))
    values = variables(overlay(name)) | {"RUN": "run", "POD_IP": "10.0.0.1"}
    args = [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], arg) for arg in container["args"]]
    monkeypatch.chdir(ROOT)  # as the pod's workingDir
    assert container["command"] == ["/usr/bin/tini", "--", "python", "-m", "launcher.elastic", "run"]
    parsed = build_parser().parse_args(["run", *args])
    options, policy = read_options(parsed), read_policy(parsed)
    assert options.host == "all"  # probes and Prometheus come from elsewhere
    assert options.port == next(p["containerPort"] for p in container["ports"] if p["name"] == "metrics")
    assert options.store[1] == 29400
    assert options.grace_seconds < pod["terminationGracePeriodSeconds"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert options.num_ranks == int(gpus or 1)
    assert policy.batch is not None
    assert policy.batch % (policy.max_nodes * options.num_ranks) == 0
    job = next((o["spec"] for o in overlay(name) if o["kind"] == "Job"), None)
    assert job is None or job["parallelism"] == job["completions"] == policy.max_nodes
    budget = next((o["spec"] for o in overlay(name) if o["kind"] == "PodDisruptionBudget"), None)
    assert (budget is None) == ("DOWNSTREAM" in values)
    assert budget is None or budget["minAvailable"] == policy.min_nodes  # an integer; a Job has no scale


def test_an_agent_that_can_rejoin_outlasts_what_it_waits_for() -> None:
    """Each end of a pod doubles the wait for its replacement, so a pod stays where waiting helps."""
    images_pulled_seconds, noticed_seconds = 300, 50  # of 7.8 GB on a new node; by the node controller
    for name in ("pretrain", "jobset", "trainjob"):
        container = trainer(overlay(name))[1]
        ours = [arg for arg in container["args"] if arg.startswith(("--join-seconds", "--store-seconds"))]
        parsed = build_parser().parse_args(["run", *ours])
        assert parsed.join_seconds > build_parser().parse_args(["run"]).join_seconds
        stores = [pod for pod in pods(overlay(name)) if pod["containers"][0]["name"] == "store"]
        (waits,) = [{t["key"]: t["tolerationSeconds"] for t in pod["tolerations"]} for pod in stores]
        assert waits.keys() == {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
        assert noticed_seconds + max(waits.values()) + images_pulled_seconds < parsed.store_seconds


def test_the_store_of_the_pod_is_one_that_the_launcher_takes() -> None:
    store = next(o for o in overlay("pretrain") if o["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]
    parsed = build_parser().parse_args(store["command"][store["command"].index("launcher.elastic") + 1 :])
    assert parsed.port == store["ports"][0]["containerPort"] == 29400


def test_probes_ask_what_the_agent_answers() -> None:
    _, container = trainer(overlay("pretrain"))
    server = serve(0, Metrics(1, 1), lambda: Probes(sick="a rank hangs", ready=False))
    try:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            url = f"http://127.0.0.1:{server.server_address[1]}{container[probe]['httpGet']['path']}"
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(url, timeout=5)
            with caught.value as answer:
                assert answer.code == 503, probe  # known, and judged: not merely answered
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", [n for n in RUNS if n != "suite"])
def test_exit_codes_mean_in_the_cluster_what_they_mean_to_the_launcher(name: str) -> None:
    policy = next(walk(overlay(name), "podFailurePolicy"))["rules"]
    rules = [
        (r["action"], *next((e["containerName"], *e["values"]) for e in [r["onExitCodes"]]))
        for r in policy
        if "onExitCodes" in r
    ]
    where = trainer(overlay(name))[1]["name"]
    if any(c["name"] == "fetch" for c in containers(trainer(overlay(name))[0])):
        assert rules.pop(0) == ("FailJob", "fetch", EXIT_USER_ERROR)
    assert rules == [("FailJob", where, EXIT_USER_ERROR), ("Ignore", where, EXIT_STOPPED)]
    order = [r["action"] if "onExitCodes" in r else "disruption" for r in policy]
    assert order[-3:] == ["FailJob", "disruption", "Ignore"]
    assert next(walk(overlay(name), "successPolicy")) in (
        {"rules": [{"succeededCount": 1}]},
        {"operator": "All"} | {"targetReplicatedJobs": ["trainer"]},
        {"operator": "All", "targetReplicatedJobs": ["node"]},
    )
    assert {"rules": [{"succeededCount": 1}]} in walk(overlay(name), "successPolicy")
    assert "Failed" in walk(overlay(name), "podReplacementPolicy")


GPU_NODES = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


@pytest.mark.parametrize("components", [[], ["spot"], ["spot-gke"]])
def test_pods_that_train_may_go_to_nodes_that_are_kept_for_gpus(components: list[str]) -> None:
    assert GPU_NODES in trainer(render.render(request_for(components=components)).objects)[0]["tolerations"]


def test_the_queue_covers_what_a_run_with_kueue_may_ask_for() -> None:
    queue = next(o for o in overlay("queues") if o["kind"] == "ClusterQueue")
    covered = {name for names in walk(queue, "coveredResources") for name in names}
    for fast in ("efa", "rdma"):
        for wanted in walk(pods(render.render(request_for(components=["kueue", fast])).objects), "limits"):
            assert wanted.keys() <= covered


@pytest.mark.parametrize(("name", "container"), [("jobset", "trainer"), ("trainjob", "node")])
def test_the_pods_of_other_kinds_are_those_of_the_job(name: str, container: str) -> None:
    ours, theirs = trainer(overlay("pretrain"))[0], trainer(overlay(name))[0]
    text = json.dumps(theirs).replace(f'"name": "{container}"', '"name": "trainer"').replace(f"{name}-", "pretrain-")
    assert json.loads(text) == ours
    if name == "jobset":
        store = next(o for o in overlay("pretrain") if o["kind"] == "Deployment")["spec"]["template"]["spec"]
        assert {**store, "restartPolicy": "OnFailure"} in json.loads(
            json.dumps(pods(overlay(name))).replace("jobset-", "pretrain-")
        )


@pytest.mark.parametrize("name", [n for n in RUNS if n != "suite"])
def test_the_configuration_of_an_overlay_is_one_that_its_program_takes(name: str, tmp_path: Path) -> None:
    values = variables(overlay(name))
    program = values.get("DOWNSTREAM", values["PROGRAM"])
    text = (K8S / "overlays" / name / "config.yaml").read_text().replace("/opt/personmae", str(ROOT))
    base = Path(yaml.safe_load(text)["_base_"])
    kind = getattr(config, program.capitalize(), None)
    if kind is None or not base.is_file():
        pytest.skip(f"{base.name} or the program {program} is not here yet")
    (tmp_path / "config.yaml").write_text(text)
    settings = config.load(kind, tmp_path / "config.yaml")
    assert int(values["BATCH"]) == request.batch_of(settings)
    assert settings.checkpoint.close_seconds <= float(values["GRACE_SECONDS"]) * 0.6


def test_selectors_find_the_pods_of_their_run_alone() -> None:
    objects = render.render(request_for(components=["monitoring", "network-policy"], name="mine")).objects
    templates = {
        o["metadata"]["name"]: next(walk(o, "template"))["metadata"]["labels"]
        for o in objects
        if o["kind"] in ("Job", "Deployment")
    }
    found = {}
    for item in objects:
        spec = item.get("spec", {})
        selector = spec.get("selector", {}).get("matchLabels", spec.get("selector")) or spec.get("podSelector", {}).get(
            "matchLabels"
        )
        if selector:
            assert selector["app.kubernetes.io/instance"] == "mine", item["kind"]
            found[item["kind"], item["metadata"]["name"]] = {
                n for n, labels in templates.items() if selector.items() <= labels.items()
            }
    assert found == {
        ("Service", "mine-store"): {"mine-store"},
        ("Service", "mine-pods"): {"mine-trainer"},
        ("Deployment", "mine-store"): {"mine-store"},
        ("PodDisruptionBudget", "mine-trainer"): {"mine-trainer"},
        ("PodMonitor", "mine-trainer"): {"mine-trainer"},
        ("NetworkPolicy", "mine-run"): {"mine-trainer", "mine-store"},
    }


def test_every_exception_of_checkov_says_why() -> None:
    here = [line for line in (K8S / "checkov.yaml").read_text().splitlines() if line.startswith("- CKV")]
    for line in here:
        assert len(line.partition("# ")[2]) > 20, line
    largest = render.render(request_for(components=["rdma", "s3-secret"], name="run")).objects
    found = [
        value
        for item in [*largest, *(item for name in OVERLAYS for item in overlay(name))]
        for key, value in item["metadata"].get("annotations", {}).items()
        if key.startswith("checkov.io/skip")
    ]
    assert len(here) == 2
    assert {value.partition("=")[0] for value in found} >= {"CKV_K8S_11", "CKV_K8S_25", "CKV_K8S_35", "CKV_K8S_38"}
    for value in found:
        assert re.fullmatch(r"CKV2?_K8S_\d+=.{15,}", value), value


@pytest.mark.slow
def test_checkov_finds_nothing_but_the_exceptions_that_say_why(tmp_path: Path) -> None:
    checkov = (
        os.environ.get("PERSONMAE_CHECKOV") or shutil.which("checkov") or str(ROOT / ".venv" / "checkov" / "bin" / "checkov")
    )
    if not Path(checkov).is_file():
        pytest.skip("needs checkov: 'make checkov' gives it an environment of its own, for its pins do not go with ours")
    for name in OVERLAYS:
        (tmp_path / f"{name}.yaml").write_text(render.to_yaml(overlay(name)))
    for fast in ("rdma", "efa"):  # with all components; of those that exclude each other, each once
        left_out = {"rdma", "spot", "irsa"} if fast == "efa" else {"efa", "spot-gke", "gke-workload-identity"}
        for name in ("pretrain", "finetune-market1501"):
            chosen = request_for(name, components=sorted({*request.components()} - left_out), name="run")
            (tmp_path / f"{name}-{fast}.yaml").write_text(render.to_yaml(render.render(chosen).objects))
    command = [
        checkov,
        "--config-file",
        str(K8S / "checkov.yaml"),
        "-d",
        str(tmp_path),
        "--compact",
        "--quiet",
        "--skip-download",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "pretrain.yaml").write_text(
        (tmp_path / "pretrain.yaml").read_text().replace("readOnlyRootFilesystem: true", "")
    )
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "CKV_K8S_22" in again.stdout, again.stderr  # it does look


def test_a_checkout_without_k8s_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(request, "K8S", tmp_path / "k8s")
    with pytest.raises(UserError, match="the folder k8s of the checkout is required"):
        render.render(request_for())

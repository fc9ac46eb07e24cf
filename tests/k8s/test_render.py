"""What ``personmae render`` prints is what kustomize makes of the same request, and bad requests are refused in one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_requests import DIGEST, EXCLUSIVE, OVERLAYS, PRETRAIN, ROOT, by_name, request_for

from launcher.cluster import kustomization, render, request
from personmae import config
from personmae.errors import UserError
from personmae.system import locations

Kustomize = Callable[[Path], dict[tuple[str, str], dict[str, Any]]]
SINGLE = [("pretrain", [name]) for name in request.components()]
DOWNSTREAM = [("finetune-market1501", [name]) for name in ("s3-secret", "priority", "kueue")]
OTHER = [(overlay, ["monitoring", "grafana", "network-policy", "s3-secret"]) for overlay in ("jobset", "trainjob")]
LARGEST = [("pretrain", sorted({*request.components()} - {pair[i] for pair in EXCLUSIVE})) for i in (0, 1)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_part_of_kustomize_builds_each_overlay_as_kustomize_does(overlay: str, kustomize: Kustomize) -> None:
    directory = ROOT / "k8s" / "overlays" / overlay
    assert by_name(kustomization.build(directory)) == kustomize(directory)


@pytest.mark.parametrize(
    ("overlay", "components"), SINGLE + DOWNSTREAM + OTHER + LARGEST, ids=lambda v: v if isinstance(v, str) else "+".join(v)
)
def test_a_rendered_request_is_what_kustomize_makes_of_it(
    overlay: str, components: list[str], kustomize: Kustomize, tmp_path: Path
) -> None:
    rendered = render.render(
        request_for(overlay, components=components, gpus=4, memory="96Gi", cpu="12", env=["S3_ENDPOINT_URL=https://s3"])
    )
    render.write(rendered, tmp_path / "run")
    assert by_name(rendered.objects) == kustomize(tmp_path / "run")
    assert by_name(list(yaml.safe_load_all(render.to_yaml(rendered.objects)))) == by_name(rendered.objects)


def test_paths_of_a_run_are_the_pods_and_stores_are_known_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The submitter's home was part of a run's name, and a variable of the pods had to be set on the submitter's machine."""
    monkeypatch.delenv("OF_PODS", raising=False)
    monkeypatch.setenv("BUCKET", "bucket")
    overrides = [
        "run_dir=~/run",
        "data.cache_dir=$OF_PODS/x",
        "data.shards=s3://$BUCKET/a$$b",
        "checkpoint.upload_to=s3://$BUCKET/r",
    ]
    names = set()
    for home in ("/home/me", "/home/you"):
        monkeypatch.setenv("HOME", home)
        rendered = render.render(request_for(overrides=overrides))
        assert (rendered.settings.run_dir, rendered.settings.data.cache_dir) == ("~/run", "$OF_PODS/x")
        assert home not in render.to_yaml(rendered.objects)
        names.add(rendered.run)
    assert len(names) == 1
    assert rendered.workload["metadata"]["annotations"]["personmae/store"] == "s3://bucket/r"
    (written,) = (o["data"]["config.yaml"] for o in rendered.objects if "config.yaml" in o.get("data", {}))
    (tmp_path / "pod.yaml").write_text(written)
    in_pod = config.load(config.Pretrain, tmp_path / "pod.yaml")
    assert (in_pod.data.shards, in_pod.run_dir) == ("s3://bucket/a$$b", "/scratch/run")
    kept = config.load(config.Pretrain, tmp_path / "pod.yaml", ["run_dir=~/$OF_PODS"], locations.expand_location)
    (tmp_path / "pod.yaml").write_text(config.dump_yaml(kept, expanded=False))
    monkeypatch.setenv("OF_PODS", "p")
    assert config.load(config.Pretrain, tmp_path / "pod.yaml").run_dir == "/home/you/p"


def test_the_request_arrives_in_the_objects() -> None:
    rendered = render.render(
        request_for(nodes=(2, 4), gpus=8, memory="96Gi", components=["irsa"], role="arn:aws:iam::1:role/r", name="mine")
    )
    objects = by_name(rendered.objects)
    job = objects["Job", "mine-trainer"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    container = job["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "96Gi", "ephemeral-storage": "110Gi"}
    assert container["resources"]["requests"]["memory"] == "96Gi"
    assert container["image"] == f"registry.test/personmae:1@{DIGEST}"
    assert objects["PodDisruptionBudget", "mine-trainer"]["spec"]["minAvailable"] == 2
    variables = objects["ConfigMap", "mine-run"]["data"]
    assert (variables["NODES"], variables["RANKS"], variables["BATCH"]) == ("2:4", "8", "2048")
    annotations = objects["ServiceAccount", "mine-trainer"]["metadata"]["annotations"]
    assert annotations["eks.amazonaws.com/role-arn"] == "arn:aws:iam::1:role/r"
    assert rendered.warnings == ["with 3 of 4 nodes some GPUs idle: 2048 is not divided by all of them"]


def test_the_rendered_configuration_is_read_back_with_the_places_that_a_pod_has(tmp_path: Path) -> None:
    rendered = render.render(request_for(components=["spot"], name="mine"))
    (tmp_path / "config.yaml").write_text(by_name(rendered.objects)["ConfigMap", "mine-config"]["data"]["config.yaml"])
    settings = config.load(config.Pretrain, tmp_path / "config.yaml")
    assert settings.run_dir == "/scratch/run"
    assert settings.data.shards == "s3://bucket/shards"
    assert settings.data.cache_dir == "/scratch/shards"
    assert settings.data.cache_limit_gb == 80  # of 100 GiB of scratch
    assert settings.checkpoint.close_seconds == 37.5  # half of the grace on spot nodes
    same = rendered.settings.model_dump(exclude={"run_dir", "data", "checkpoint"})
    assert settings.model_dump(exclude={"run_dir", "data", "checkpoint"}) == same


def test_the_cache_is_as_large_as_the_volume_allows() -> None:
    for components, limit in (([], 80), (["nvme-cache"], 400)):
        objects = by_name(render.render(request_for(components=components, name="mine")).objects)
        text = objects["ConfigMap", "mine-config"]["data"]["config.yaml"]
        assert yaml.safe_load(text)["data"]["cache_limit_gb"] == limit


def test_the_name_tells_configuration_and_request_apart_and_nothing_else() -> None:
    requests: list[dict[str, Any]] = [{}, {}, {"gpus": 4}, {"overrides": [*PRETRAIN, "seed=1"]}]
    names = [render.render(request_for(**more)).run for more in requests]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert names[0].startswith("pretrain-vit-base-")


def test_a_name_made_of_the_files_begins_with_a_letter(tmp_path: Path) -> None:
    for stem, start in (("2024_run", "run-2024-run-"), ("__", "run-"), ("Größe", "gr-e-")):
        path = tmp_path / f"{stem}.yaml"
        path.write_text(f"_base_: {ROOT}/configs/pretrain_vit_base.yaml\n")
        name = render.render(request_for(config=path)).run
        request.check_name(name)
        assert name.startswith(start)


def test_a_place_is_the_same_with_and_without_a_slash_at_its_end() -> None:
    overrides = ["root=s3://b/m.tar", "init=random", "checkpoint.upload_to=s3://b/run/"]
    objects = by_name(render.render(request_for("finetune-market1501", overrides=overrides, name="mine")).objects)
    assert objects["ConfigMap", "mine-run"]["data"]["RESULT"] == "s3://b/run/result.json"
    assert objects["Job", "mine-trainer"]["metadata"]["annotations"]["personmae/store"] == "s3://b/run"


@pytest.mark.parametrize("overlay", request.overlays())
def test_the_longest_name_leaves_room_for_what_kubernetes_adds(overlay: str) -> None:
    rendered = render.render(request_for(overlay, name="x" * request.MOST_NAME))
    for item in rendered.objects:
        ending = {
            "Job": "-999-abcde",
            "JobSet": "-trainer-0-999-abcde",
            "TrainJob": "-node-0-999-abcde",
            "Deployment": "-0123456789-abcde",
        }
        assert len(item["metadata"]["name"] + ending.get(item["kind"], "")) <= 63, item["kind"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"overlay": "pretrian"}, "--overlay must be one of dev-cpu, finetune-market1501"),
        ({"components": ["spott"]}, "--with takes efa, gke-workload-identity"),
        ({"components": ["spot", "spot-gke"]}, "--with takes one of spot and spot-gke, not both"),
        ({"overlay": "jobset", "components": ["spot"]}, "the component spot is for Jobs"),
        ({"overlay": "trainjob", "nodes": (2, 4)}, "Kubeflow Trainer has no elasticity"),
        ({"overlay": "finetune-market1501", "nodes": (1, 2)}, "a benchmark runs on one node; got --nodes 1:2"),
        ({"nodes": (1, 3), "gpus": 8}, r"--nodes 3 times --gpus 8 is 24\. With --gpus 8 use --nodes 1, 2, 4, 8, 16 or 32\."),
        ({"nodes": (1, 3), "gpus": 8}, r"No --gpus works with --nodes 3\."),
        ({"name": "x" * 39}, r"at most 38 characters .*\(39 characters\)"),
        ({"name": "Run_1"}, "at most 38 characters of a-z, 0-9 and '-'"),
        ({"image": "personmae@sha256:12"}, "--image must be NAME"),
        ({"env": ["AWS_SECRET_ACCESS_KEY=x"]}, "would be readable by all in a config map"),
        ({"env": ["x"]}, "--env takes NAME=VALUE"),
        ({"role": "arn"}, "--role needs --with irsa"),
        ({"components": ["irsa"], "role": "a@b.iam.gserviceaccount.com"}, "--role for irsa must look like arn:aws:iam"),
        ({"components": ["gke-workload-identity"], "role": "arn:aws:iam::1:role/r"}, "must look like NAME@PROJECT.iam"),
        ({"gpus": -1}, "--gpus must be 0, for one rank on the CPU, or the GPUs of each node; got -1"),
        ({"nodes": (0, 2)}, "--nodes must be MIN:MAX with 1 <= MIN <= MAX; got 0:2"),
        ({"cpu": "0"}, "--cpu must be a quantity of Kubernetes above 0"),
        ({"memory": "512G b"}, "--memory must be a quantity of Kubernetes above 0"),
        ({"namespace": "-team"}, "--namespace must be at most 63"),
        ({"env": ["GRACE_SECONDS=1"]}, "--env GRACE_SECONDS is set by the run itself"),
        ({"env": ["TRITON_CACHE_DIR=/x"]}, "--env TRITON_CACHE_DIR is set by the run itself"),
        ({"env": ["aws_secret=1"]}, "would be readable by all"),
        ({"overlay": "dev-cpu", "components": ["nvme-cache"]}, "nvme-cache does not go with the overlay dev-cpu"),
        ({"overrides": ["data.shards=s3:///x", "checkpoint.upload_to=s3://b/r"]}, "data.shards must be on s3://"),
        (
            {"overrides": ["data.shards=s3://b/l", "checkpoint.upload_to=s3a://b/r"]},
            "must begin with one of s3://.*; got s3a://b/r",
        ),
        (
            {"overrides": ["data.shards=data/luperson", "checkpoint.upload_to=s3://b/r"]},
            "data.shards must be on s3:// or another",
        ),
        ({"overrides": ["data.shards=s3://b/l"]}, "checkpoint.upload_to must be on s3://"),
        ({"overrides": ["data.shard=s3://b/l"]}, "unknown key 'data.shard'"),
        (
            {"overlay": "finetune-market1501", "overrides": ["root=gs://b/x", "checkpoint.upload_to=s3://b/r"]},
            "root must be on s3://; got gs",
        ),
        (
            {
                "overlay": "finetune-market1501",
                "overrides": ["root=s3://b/x.tgz", "init=random", "checkpoint.upload_to=s3://b/r"],
            },
            "must be an uncompressed .tar or a prefix of single files; got s3://b/x.tgz",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_bad_request_is_refused_in_one_line(more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        render.render(request_for(**more))
    assert "\n" not in str(caught.value)


def test_an_image_without_a_digest_is_warned_of() -> None:
    assert (
        "has no digest" in render.render(request_for(image="registry.test:5000/personmae:1", gpus=8, nodes=(8, 8))).warnings[0]
    )


def test_a_configuration_finds_its_overlay(tmp_path: Path) -> None:
    configs = ROOT / "configs"
    assert request.guess_overlay(configs / "pretrain_vit_small.yaml") == "pretrain"  # its keys are in its base
    assert request.guess_overlay(configs / "finetune_occluded_duke.yaml") == "finetune-occluded-duke"
    assert request.guess_overlay(configs / "finetune_msmt17_vit_small.yaml") == "finetune-msmt17"
    assert request.guess_overlay(configs / "usl_msmt17.yaml") == "usl-msmt17"
    assert request.guess_overlay(configs / "uda_msmt17_to_market1501.yaml") == "uda-msmt17-market1501"
    (tmp_path / "own.yaml").write_text("benchmark: our_own\n")
    assert request.guess_overlay(tmp_path / "own.yaml") == "finetune-market1501"
    (tmp_path / "odd.yaml").write_text("run_dir: x\n")
    with pytest.raises(UserError, match="names no program by a key"):
        request.guess_overlay(tmp_path / "odd.yaml")
    with pytest.raises(UserError, match="does not exist"):
        request.guess_overlay(tmp_path / "missing.yaml")


def test_quotes_around_a_literal_are_taken_as_kustomize_takes_them(kustomize: Kustomize, tmp_path: Path) -> None:
    given = ["A='x'", 'B="x"', 'C="half', "D=", "E=a=b", "F='x\"", 'G=" x "', "H='", 'I="a\nb"']
    spec = {"generatorOptions": {"disableNameSuffixHash": True}, "configMapGenerator": [{"name": "run", "literals": given}]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(spec))
    assert by_name(kustomization.build(tmp_path)) == kustomize(tmp_path)


def test_a_kustomization_beyond_our_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("replicas: [{name: trainer, count: 2}]\n")
    with pytest.raises(UserError, match="'replicas' is not understood here"):
        kustomization.build(tmp_path)


def test_a_patch_that_does_not_fit_is_an_error() -> None:
    item = {"kind": "Job", "metadata": {"name": "x"}, "spec": {"list": [1]}}
    for patch in (
        {"op": "replace", "path": "/spec/no", "value": 1},
        {"op": "remove", "path": "/spec/list/4"},
        {"op": "move", "path": "/spec"},
    ):
        with pytest.raises(UserError, match="must fit Job x"):
            kustomization.apply_patch(item, [patch])


def test_rendering_loads_neither_torch_nor_boto3_and_needs_no_kubectl(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "launcher.cluster.cli",
        "render",
        "configs/pretrain_vit_base.yaml",
        *PRETRAIN,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {
        line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert {"pydantic", "yaml"} <= loaded
    assert not loaded & {"torch", "boto3", "numpy", "deepspeed", "streaming"}
    assert {item["kind"] for item in yaml.safe_load_all(done.stdout)} >= {"Job", "Deployment", "Service", "ConfigMap"}


def test_an_existing_kustomization_is_not_written_over(tmp_path: Path) -> None:
    rendered = render.render(request_for())
    render.write(rendered, tmp_path)
    with pytest.raises(UserError, match="needs a folder without"):
        render.write(rendered, tmp_path)

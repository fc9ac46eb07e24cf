"""From a request (a configuration, nodes, GPUs and components) to Kubernetes objects, without asking a cluster.

The request becomes a kustomization (an overlay of ``k8s/`` with some fields set), so ``kubectl kustomize`` of what
``--write`` leaves behind gives the same objects.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster import kustomization
from launcher.cluster.kustomization import Object
from launcher.cluster.request import (
    Request,
    batch_of,
    check_namespace,
    components_of,
    downstream_variables,
    environment_of,
    image_of,
    in_pod,
    name_of,
    overlay_of,
    settings_of,
    sizes_of,
)
from personmae import config
from personmae.errors import UserError
from personmae.keys.yaml_text import Dumper, read_file, represent_text
from personmae.system import files

_ORDER = (  # what a kind names comes before it
    *("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor"),
    *("Deployment", "TrainingRuntime", "Job", "JobSet", "TrainJob"),
)
_WORKLOADS = {  # kind -> where the trainer's Job spec is in it
    "Job": "/spec",
    "JobSet": "/spec/replicatedJobs/1/template/spec",
    "TrainingRuntime": "/spec/template/spec/replicatedJobs/0/template/spec",
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """The objects of a run, ready to be applied, and the kustomization that gives the same."""

    run: str
    namespace: str
    settings: Any
    objects: list[Object]
    kustomization: Object
    warnings: list[str] = field(default_factory=list)

    @property
    def workload(self) -> Object:
        """The Job, JobSet or TrainJob."""
        return next(o for o in self.objects if o["kind"] in ("Job", "JobSet", "TrainJob"))


def render(request: Request) -> Rendered:
    """Check the request and build its objects.

    Raises:
        UserError: the configuration, a name, a size or a combination cannot work; nothing has been created.
    """
    overlay = overlay_of(request)
    spec = kustomization.read(overlay)
    spec["components"] = [*spec.get("components", []), *components_of(request, spec)]
    before = kustomization.build(overlay, spec)
    variables = _variables(before)
    settings = settings_of(request, variables)
    kind, job = _job(before)
    nodes, gpus, warnings = sizes_of(request, settings, variables, kind, job)
    check_namespace(request.namespace)
    run = name_of(request, settings, spec["components"], nodes, gpus)
    literals = {"NODES": f"{nodes[0]}:{nodes[1]}", "RANKS": str(max(1, gpus)), "BATCH": str(batch_of(settings))}
    literals["GPU_METRICS"] = "on" if settings.metrics.gpu else "off"
    literals |= downstream_variables(settings) | environment_of(request)
    spec |= {"namespace": request.namespace, "namePrefix": f"{run}-"}
    for labels in spec["labels"]:
        labels["pairs"] = dict.fromkeys(labels["pairs"], run)
    spec["configMapGenerator"] = [
        {
            "name": "config",
            "literals": [
                f"config.yaml={config.dump_yaml(in_pod(settings, variables, job['template']['spec']), expanded=False)}"
            ],
        },
        {"name": "run", "behavior": "merge", "literals": [f"{k}={v}" for k, v in literals.items()]},
    ]
    spec["images"] = [image_of(request, spec["images"][0])]
    if "digest" not in spec["images"][0]:
        warnings.append("the image has no digest, so it may change between pods: give --image NAME@sha256:...")
    spec["patches"] = [
        *_inlined(overlay, spec),
        *_size_patches(request, before, nodes, gpus, run, settings.checkpoint.upload_to),
    ]
    objects = kustomization.build(overlay, spec)
    objects.sort(key=lambda o: _ORDER.index(o["kind"]) if o["kind"] in _ORDER else len(_ORDER))
    return Rendered(run, request.namespace, settings, objects, {"overlay": overlay, **spec}, warnings)


def to_yaml(objects: list[Object]) -> str:
    """The objects as a stream of YAML documents; texts of several lines stay readable."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120)


def write(rendered: Rendered, directory: Path) -> None:
    """Leave the kustomization of a rendered request in a directory.

    Raises:
        UserError: there is another one already.
    """
    spec = dict(rendered.kustomization)
    overlay = spec.pop("overlay")
    for key in ("resources", "components"):
        spec[key] = [os.path.relpath((overlay / path).resolve(), directory.resolve()) for path in spec.get(key, [])]
    directory.mkdir(parents=True, exist_ok=True)
    for name in (kustomization.FILE, "kustomization.yml", "Kustomization"):  # kustomize takes any, but only one of them
        if (directory / name).exists():
            raise UserError(f"--write needs a folder without a {name}; {directory} has one: name another")
    files.replace(directory / kustomization.FILE, yaml.dump(spec, Dumper=_Dumper, sort_keys=False, width=120))


class _Dumper(Dumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Texts of several lines stay readable; others are in quotes where another reader would take them for a number."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|") if "\n" in text else represent_text(dumper, text)


_Dumper.add_representer(str, _represent_text)


def _variables(objects: list[Object]) -> dict[str, str]:
    return next(o["data"] for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"].endswith("-run"))


def _job(objects: list[Object]) -> tuple[str, Object]:
    """Kind of the workload and the trainer's Job spec in it."""
    item = next(o for o in objects if o["kind"] in _WORKLOADS)
    node: Any = item
    for part in _WORKLOADS[item["kind"]].strip("/").split("/"):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return item["kind"], node


def _inlined(overlay: Path, spec: Object) -> list[Object]:
    """The overlay's own patches without files beside them."""
    patches = spec.get("patches", [])
    return [{"target": p["target"], "patch": p.get("patch") or read_file(overlay / p["path"])} for p in patches]


def _size_patches(
    request: Request, objects: list[Object], nodes: tuple[int, int], gpus: int, run: str, upload_to: str
) -> list[Object]:
    kind, job = _job(objects)
    at, pod = _WORKLOADS[kind], job["template"]["spec"]
    resources = f"{at}/template/spec/containers/0/resources"
    operations = []
    if kind == "TrainingRuntime":
        operations.append(_add("/spec/mlPolicy/numNodes", nodes[1]))
    else:
        operations += [_add(f"{at}/parallelism", nodes[1]), _add(f"{at}/completions", nodes[1])]
    if kind == "Job" and any(o["kind"] == "Service" for o in objects):
        operations.append(_add(f"{at}/template/spec/subdomain", f"{run}-pods"))
    if gpus:
        operations.append(_add(f"{resources}/limits/nvidia.com~1gpu", str(gpus)))
    elif "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]:
        operations.append({"op": "remove", "path": f"{resources}/limits/nvidia.com~1gpu"})
    if request.memory:
        operations += [_add(f"{resources}/{which}/memory", request.memory) for which in ("requests", "limits")]
    if request.cpu:
        operations.append(_add(f"{resources}/requests/cpu", request.cpu))
    patches = [({"kind": kind}, operations)]
    owner = "TrainJob" if kind == "TrainingRuntime" else kind
    at, place = "/metadata/annotations", upload_to.rstrip("/")
    marked = [_add(at, {"personmae/store": place})] if owner == "TrainJob" else [_add(f"{at}/personmae~1store", place)]
    patches.append(({"kind": owner}, marked))
    if kind == "TrainingRuntime":
        patches.append(({"kind": "TrainJob"}, [_add("/spec/trainer/numNodes", nodes[1])]))
    patches.append(({"kind": "PodDisruptionBudget"}, [_add("/spec/minAvailable", nodes[0])]))
    built = [{"target": target, "patch": yaml.dump(todo, Dumper=_Dumper, sort_keys=False)} for target, todo in patches]
    if request.role:
        built.append({"target": {"kind": "ServiceAccount", "name": "trainer"}, "patch": role_patch(request)})
    return built


def role_patch(request: Request) -> str:
    """The patch that gives a service account its role in the cloud."""
    cloud = {"irsa": "eks.amazonaws.com~1role-arn", "gke-workload-identity": "iam.gke.io~1gcp-service-account"}
    key = next(key for name, key in cloud.items() if name in request.components)
    return yaml.dump([_add(f"/metadata/annotations/{key}", request.role)], Dumper=_Dumper, sort_keys=False)


def _add(path: str, value: Any) -> Object:
    return {"op": "add", "path": path, "value": value}

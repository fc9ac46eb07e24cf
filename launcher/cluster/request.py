"""What the command line asks for, checked against the configuration, ``k8s/`` and Kubernetes' own limits."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster import bucket, kustomization
from launcher.cluster.kustomization import Object
from personmae import config
from personmae.errors import UserError
from personmae.system import locations

K8S = Path(__file__).resolve().parents[2] / "k8s"
MOST_NAME = 38  # what is left of 63 characters when kinds, indexes and Kubernetes' own endings are added
_ONLY_JOBS = {"spot", "spot-gke", "kueue", "nvme-cache", "rdma", "efa", "priority"}  # they patch the Job
_NOT_HERE = {"dev-cpu": {"nvme-cache", "rdma", "efa"}}  # it sets what they would
_EXCLUDE = ({"spot", "spot-gke"}, {"irsa", "gke-workload-identity"}, {"rdma", "efa"})
_NOT_OF_A_RUN = {"namespace", "queues", "suite"}
_OWN = (
    "PROGRAM",
    "NODES",
    "RANKS",
    "BATCH",
    "GRACE_SECONDS",
    "GPU_METRICS",
    "DOWNSTREAM",
    "BENCHMARK",
    "ENCODER",
    "RESULT",
    "RUN",
    "POD_IP",
    "HOME",
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
)
_STORES = ("s3", "gs", "oci", "azure", "azure-dl", "hf", "dbfs", "alipan")  # that mosaicml-streaming reads and writes
_CPU = r"(?=.*[1-9])\d+(\.\d+|m)?"
_MEMORY = r"(?=.*[1-9])\d+(\.\d+)?([kMGTP]|[KMGTP]i)?"
_ROLES = {
    "irsa": (r"arn:[\w-]+:iam::\d+:role/\S+", "arn:aws:iam::ACCOUNT:role/NAME"),
    "gke-workload-identity": (r"[\w.-]+@[\w.-]+\.iam\.gserviceaccount\.com", "NAME@PROJECT.iam.gserviceaccount.com"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line says; None leaves a size to the overlay."""

    config: Path
    overrides: Sequence[str] = ()
    overlay: str | None = None
    components: Sequence[str] = ()
    nodes: tuple[int, int] | None = None
    gpus: int | None = None
    cpu: str | None = None
    memory: str | None = None
    image: str | None = None
    name: str | None = None
    namespace: str = "personmae"
    role: str | None = None
    env: Sequence[str] = ()


def overlays() -> list[str]:
    """Overlays that are runs."""
    return sorted(
        path.parent.name for path in K8S.glob(f"overlays/*/{kustomization.FILE}") if path.parent.name not in _NOT_OF_A_RUN
    )


def components() -> list[str]:
    """Components that a run may be given."""
    return sorted(path.parent.name for path in K8S.glob(f"components/*/{kustomization.FILE}") if path.parent.name != "quota")


def batch_of(settings: Any) -> int:
    """What the number of ranks must divide: the global batch, or the people in one."""
    return settings.train.global_batch_size if isinstance(settings, config.Pretrain) else settings.batch.num_ids


def check_name(name: str) -> None:
    """Raise a ``UserError`` for a name that Kubernetes would not take for all that is derived from it."""
    if len(name) > MOST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise UserError(
            f"a run's name must be at most {MOST_NAME} characters of a-z, 0-9 and '-', beginning with a letter and not ending "
            f"with '-'; got {name} ({len(name)} characters)"
        )


def check_namespace(name: str) -> None:
    """Raise a ``UserError`` for what cannot be the name of a namespace."""
    if len(name) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        raise UserError(
            f"--namespace must be at most 63 characters of a-z, 0-9 and '-', neither first nor last '-'; got '{name}'"
        )


def guess_overlay(path: Path) -> str:
    """The overlay that a configuration file is for: by its keys, and by its name where that begins with usl or uda."""
    keys = config.read(path).values
    if "data" in keys:
        return "pretrain"
    if "benchmark" in keys:
        stem = path.stem.replace("_to_", "-").replace("_", "-")
        kind = stem[:3] if stem.startswith(("usl-", "uda-")) else "finetune"
        benchmark = re.sub(r"_v\d$", "", str(keys["benchmark"])).replace("_", "-")
        name = stem if kind != "finetune" else f"finetune-{benchmark}"
        same_kind = [known for known in overlays() if known.startswith(f"{kind}-")]
        return name if name in same_kind else same_kind[0]  # a data set of one's own: they differ in places alone
    if "stages" in keys:
        raise config.OtherProgram(str(path), "suite")
    raise UserError(f"{path} names no program by a key 'data' or 'benchmark'; give --overlay, one of {', '.join(overlays())}")


def overlay_of(request: Request) -> Path:
    if not K8S.is_dir():
        raise UserError(f"the folder k8s of the checkout is required and {K8S} does not exist; install with 'pip install -e .'")
    name = request.overlay or guess_overlay(request.config)
    if name not in overlays():
        raise UserError(f"--overlay must be one of {', '.join(overlays())}; got {name}")
    return K8S / "overlays" / name


def components_of(request: Request, spec: Object) -> list[str]:
    known, present = components(), {Path(path).name for path in spec.get("components", [])}
    overlay = spec["namePrefix"].removesuffix("-")
    for name in request.components:
        if name not in known:
            raise UserError(f"--with takes {', '.join(known)}; got {name}")
    chosen = present | set(request.components)
    for pair in _EXCLUDE:
        if pair <= chosen:
            raise UserError(f"--with takes one of {' and '.join(sorted(pair))}, not both")
    if not any(Path(path).name in ("elastic", "downstream") for path in spec["resources"]) and (bad := chosen & _ONLY_JOBS):
        raise UserError(f"the component {sorted(bad)[0]} is for Jobs; leave it out or use the overlay pretrain")
    if bad := chosen & _NOT_HERE.get(overlay, set()):
        raise UserError(f"the component {sorted(bad)[0]} does not go with the overlay {overlay}; leave it out or use pretrain")
    _check_role(request.role, chosen)
    return [f"../../components/{name}" for name in dict.fromkeys(request.components) if name not in present]


def _check_role(role: str | None, chosen: set[str]) -> None:
    if role is None:
        return
    clouds = sorted(chosen & _ROLES.keys())
    if not clouds:
        raise UserError("--role needs --with irsa or --with gke-workload-identity")
    pattern, example = _ROLES[clouds[0]]
    if not re.fullmatch(pattern, role):
        raise UserError(f"--role for {clouds[0]} must look like {example}; got '{role}'")


def require_role(request: Request) -> None:
    """Raise a ``UserError`` where the role is left to a component, which has an example's; for what is to run."""
    clouds = sorted(set(request.components) & _ROLES.keys())
    if clouds and request.role is None:
        raise UserError(f"--role is required with --with {clouds[0]}; give --role {_ROLES[clouds[0]][1]}")


def settings_of(request: Request, variables: dict[str, str]) -> Any:
    program = variables.get("DOWNSTREAM", variables["PROGRAM"])
    kind = getattr(config, program.capitalize(), None)
    if kind is None:
        raise UserError(f"this version has no program '{program}' yet; choose another overlay")
    # A path is the pod's, with its home and its variables. A bucket is known here too, and its files are looked for.
    settings = config.load(kind, request.config, request.overrides, locations.expand_location)
    places = {"checkpoint.upload_to": settings.checkpoint.upload_to}
    if isinstance(settings, config.Pretrain):
        places["data.shards"] = settings.data.shards
        if settings.init != config.RANDOM:  # the base fetches encoders for downstream programs alone
            raise UserError(
                f"init of a pre-training must be 'random' in pods, which fetch no weights for it. Got {settings.init}"
            )
    else:
        places["root"] = settings.root
        if settings.init != "random":
            places["init"] = settings.init
    for key, place in places.items():
        schemes = "s3://" if key in ("root", "init") else "s3:// or another object store"
        scheme, _, rest = str(place).partition("://")
        if rest.startswith("/") or not rest or (scheme != "s3" and key in ("root", "init")):
            raise UserError(f"pods lose their disks, so {key} must be on {schemes}; got {place}: give {key}=s3://BUCKET/PREFIX")
        if scheme not in _STORES:
            raise UserError(f"{key} must begin with one of {', '.join(f'{name}://' for name in _STORES)}; got {place}")
    bucket.check_benchmark(str(places.get("root", "")))
    return settings


def in_pod(settings: Any, variables: dict[str, str], pod: Object) -> Any:
    """The settings with the places that a pod has, and an end that leaves the grace half of its time to save in."""
    close = min(settings.checkpoint.close_seconds, float(variables["GRACE_SECONDS"]) / 2)
    changed: dict[str, Any] = {
        "run_dir": "/scratch/run",
        "checkpoint": settings.checkpoint.model_copy(update={"close_seconds": close}),
    }
    if isinstance(settings, config.Pretrain):
        changed["data"] = settings.data.model_copy(
            update={"cache_dir": "/scratch/shards", "cache_limit_gb": settings.data.cache_limit_gb or 0.8 * _scratch_gib(pod)}
        )
    else:
        changed |= {"root": "/scratch/benchmark", "init": settings.init if settings.init == "random" else "/scratch/encoder"}
    return settings.model_copy(update=changed)


def _scratch_gib(pod: Object) -> int:
    """Size of the volume that the shards' cache shares with the run directory."""
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "scratch")
    if "emptyDir" in volume:
        return int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
    return int(claim["resources"]["requests"]["storage"].removesuffix("Gi"))


def sizes_of(
    request: Request, settings: Any, variables: dict[str, str], kind: str, job: Object
) -> tuple[tuple[int, int], int, list[str]]:
    fewest, _, most = variables["NODES"].partition(":")
    nodes = request.nodes or (int(fewest), int(most))
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = request.gpus if request.gpus is not None else int(limits.get("nvidia.com/gpu", 0))
    if gpus < 0:
        raise UserError(f"--gpus must be 0, for one rank on the CPU, or the GPUs of each node; got {gpus}")
    if not 1 <= nodes[0] <= nodes[1]:
        raise UserError(f"--nodes must be MIN:MAX with 1 <= MIN <= MAX; got {nodes[0]}:{nodes[1]}")
    for name, text, pattern, example in (("cpu", request.cpu, _CPU, "8 or 500m"), ("memory", request.memory, _MEMORY, "64Gi")):
        if text is not None and not re.fullmatch(pattern, text):
            raise UserError(f"--{name} must be a quantity of Kubernetes above 0, e.g. {example}; got '{text}'")
    if "DOWNSTREAM" in variables and nodes != (1, 1):
        raise UserError(f"a benchmark runs on one node; got --nodes {nodes[0]}:{nodes[1]}: leave it out")
    if kind == "TrainingRuntime" and nodes[0] != nodes[1]:
        raise UserError(f"Kubeflow Trainer has no elasticity; give one number of nodes, not --nodes {nodes[0]}:{nodes[1]}")
    batch, ranks = batch_of(settings), max(1, gpus)
    good = [n for n in range(1, max(64, 2 * nodes[1])) if batch % (n * ranks) == 0]
    if nodes[1] not in good:
        key = "train.global_batch_size" if isinstance(settings, config.Pretrain) else "batch.num_ids"
        counts = [g for g in range(1, 17) if batch % (nodes[1] * g) == 0]
        raise UserError(
            f"the number of ranks must divide {key}={batch}; --nodes {nodes[1]} times --gpus {gpus} is {nodes[1] * ranks}. "
            f"{_advice(f'--gpus {gpus}', '--nodes', good)} {_advice(f'--nodes {nodes[1]}', '--gpus', counts)}"
        )
    idle = [n for n in range(nodes[0], nodes[1]) if n not in good]
    if not idle:
        return nodes, gpus, []
    return nodes, gpus, [f"with {_listed(idle)} of {nodes[1]} nodes some GPUs idle: {batch} is not divided by all of them"]


def name_of(request: Request, settings: Any, parts: list[str], nodes: tuple[int, int], gpus: int) -> str:
    if request.name is None:
        text = json.dumps([config.config_hash(settings), request.overlay, parts, nodes, gpus, request.image, *request.env])
        stem = re.sub(r"[^a-z0-9]+", "-", request.config.stem.lower()).strip("-")
        stem = stem if stem[:1].isalpha() else f"run-{stem}"  # a Service begins with a letter
        return f"{stem[: MOST_NAME - 7].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    check_name(request.name)
    return request.name


def downstream_variables(settings: Any) -> dict[str, str]:
    if isinstance(settings, config.Pretrain):
        return {}
    return {
        "BENCHMARK": settings.root,
        "ENCODER": settings.init,
        "RESULT": f"{settings.checkpoint.upload_to.rstrip('/')}/result.json",
    }


def environment_of(request: Request) -> dict[str, str]:
    pairs = {}
    for text in request.env:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UserError(f"--env takes NAME=VALUE, got {text}")
        if key in _OWN:
            raise UserError(f"--env {key} is set by the run itself; leave it out and give its option, e.g. --nodes or --gpus")
        if re.search("SECRET|PASSWORD|TOKEN", key.upper()):
            raise UserError(f"--env {key} would be readable by all in a config map; put it in a Secret (--with s3-secret)")
        pairs[key] = value
    return pairs


def image_of(request: Request, given: dict[str, str]) -> dict[str, str]:
    if not request.image:
        return given
    match = re.fullmatch(r"(?P<name>[^@\s]+?)(?::(?P<tag>[\w][\w.-]*))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?", request.image)
    if not match:
        raise UserError(f"--image must be NAME[:TAG]@sha256:64 hexadecimal digits, got {request.image}")
    parts = {"newName": match["name"], "newTag": match["tag"], "digest": match["digest"]}
    return {"name": "personmae"} | {key: value for key, value in parts.items() if value}


def _advice(given: str, option: str, numbers: list[int]) -> str:
    """A sentence with the numbers that go with what is given."""
    return f"With {given} use {option} {_listed(numbers)}." if numbers else f"No {option} works with {given}."


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last

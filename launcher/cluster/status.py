"""What a run in a cluster is doing: conditions, pods by index, ranks, step, loss, time to go, checkpoints, warnings."""

import json
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from launcher.cluster import bucket, pods
from launcher.cluster.deployed import find, refusals, trainer
from launcher.cluster.deployed_suite import states
from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from launcher.cluster.objects import INSTANCE, OURS, finished, upload_to
from personmae.errors import UserError

_PORT = 9400
_METRICS_SECONDS = 2  # for all pods, which are asked at once; a port may be blocked
_LOG_SECONDS = 5
_MOST_AT_ONCE = 64  # a kubectl each
_LINE = re.compile(  # what RunLog prints; rank 0 may be on any index
    r"(?P<program>\w+) (?P<step>\d+)/(?P<total>\d+)  (?P<values>.*?)  (?P<rate>[\d,]+) images/s  (?P<left>(?:\d+ d )?\S+) to go"
)


def read(kubectl: Kubectl, run: str) -> dict[str, Any]:
    """The state of a run as plain values; what cannot be had is None."""
    _, workload = find(kubectl, run)
    everything = kubectl.items("pods", "-l", f"{INSTANCE}={run},{OURS}")
    trainers = [pod for pod in everything if pods.component_of(pod) == "trainer"]
    trainers.sort(key=lambda pod: (pods.index_of(pod), pod["metadata"]["creationTimestamp"]))
    ready = [pod["metadata"]["name"] for pod in trainers if pods.is_ready(pod)]
    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        asked = [pool.submit(_metrics, kubectl, name) for name in ready]
        progress = pool.submit(_progress, kubectl, run, trainer(workload))
        warnings = pool.submit(refusals, kubectl, [run], workload["metadata"].get("creationTimestamp", ""))
        deployment = pool.submit(kubectl.get, "deployments.apps", f"{run}-store")
        of_stages = pool.submit(lambda: states(kubectl, run))
        metrics = _newest(asked)
        age = pool.submit(_checkpoint_age, metrics, upload_to(workload))
    step = metrics.get("personmae_last_step")  # it comes with a run's first step
    over, nodes = finished(workload), _nodes(workload["kind"], workload["spec"])
    alive = not (over or workload["spec"].get("suspend") or workload["metadata"].get("deletionTimestamp"))
    final, passing = warnings.result()
    unowned = deployment.result() is not None and not deployment.result()["metadata"].get("ownerReferences")
    return {
        "run": run,
        "state": over or _state(workload, trainers),
        "nodes": nodes,
        "pods": [pods.describe(pod) for pod in trainers],
        "indexes": pods.by_index(trainers, nodes or 0, time.time(), alive=alive),
        "store": pods.store(everything, needed=alive and _needs_store(workload), deployed=deployment.result() is not None),
        "conditions": [f"{c['type']}={c['status']}" for c in workload.get("status", {}).get("conditions", [])],
        "world_size": metrics.get("personmae_world_size"),
        "restarts": sum(value for name, value in metrics.items() if name.startswith("personmae_restarts_total"))
        if metrics
        else None,
        "progress": progress.result() or ({"step": int(step)} if step is not None else None),
        "checkpoint_age_seconds": age.result(),
        "stages": of_stages.result(),
        "warnings": [*final, *passing, *([f"its store outlives it: personmae adopt {run}"] if unowned else [])],
    }


def _newest(asked: list[Future[dict[str, float]]]) -> dict[str, float]:
    """The largest of each number: rank 0 may be on any pod, and have been on another one before."""
    found: dict[str, float] = {}
    for name, value in (item for each in asked for item in each.result().items()):
        found[name] = max(value, found.get(name, value))
    return found


def _needs_store(workload: Object) -> bool:
    """Whether its agents meet at a Deployment: a JobSet has the store in itself, a benchmark in its pod, a suite none."""
    return workload["kind"] == "TrainJob" or (workload["kind"] == "Job" and "$(RUN)-store:" in json.dumps(workload["spec"]))


def _state(workload: Object, trainers: list[Object]) -> str:
    """Of a workload that is not over."""
    if workload["metadata"].get("deletionTimestamp"):
        return "Deleting"
    if workload["spec"].get("suspend"):
        return "Suspended"
    return "Running" if any(pod.get("status", {}).get("phase") == "Running" for pod in trainers) else "Pending"


def _nodes(kind: str, spec: Object) -> int | None:
    match kind:
        case "JobSet":
            return next(job["template"]["spec"]["parallelism"] for job in spec["replicatedJobs"] if job["name"] == "trainer")
        case "TrainJob":
            return spec.get("trainer", {}).get("numNodes")
    return spec.get("parallelism")


def to_text(state: dict[str, Any]) -> str:
    """A few lines for people."""
    shown = state["progress"] or {}
    age = state["checkpoint_age_seconds"]
    step = f"{shown['step']:,}" + (f" of {shown['total']:,}" if "total" in shown else "") if shown else "-"
    lines = [
        f"{state['run']}: {state['state']}",
        f"  nodes {state['nodes']}, ranks {_shown(state['world_size'])}, rounds ended {_shown(state['restarts'])}",
        f"  step {step}  {shown.get('values', '')}".rstrip(),
        f"  to go {shown.get('left', '-')}, last checkpoint {'-' if age is None else f'{age:,.0f} s ago'}",
    ]
    lines += [_row(str(row["index"]), row) for row in state["indexes"]]
    if store := state["store"]:
        again = f" {store['restarts']} restarts" if store["restarts"] else ""
        lines.append(_row("store", store) + again)
    lines += [f"  stage {run}: {found}" for run, found in state["stages"].items()]
    return "\n".join(lines + [f"  warning: {line}" for line in state["warnings"][-5:]])


def _row(name: str, row: dict[str, Any]) -> str:
    return f"  {name:>5}  {row['phase']:<10} {row['node'] or '-':<24} {row['reason']}".rstrip()


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _metrics(kubectl: Kubectl, pod: str) -> dict[str, float]:
    """An agent's numbers, through the API server; none where that may not be asked or does not answer."""
    from prometheus_client.parser import text_string_to_metric_families as parse

    try:
        path = f"/api/v1/namespaces/{kubectl.namespace}/pods/{pod}:{_PORT}/proxy/metrics"
        text = kubectl.run("get", "--raw", path, seconds=_METRICS_SECONDS)
        samples = [sample for family in parse(text) for sample in family.samples]
    except ValueError:  # UserError, or an answer that broke off
        return {}
    return {s.name + (json.dumps(s.labels) if s.labels else ""): s.value for s in samples}


def _progress(kubectl: Kubectl, run: str, container: str) -> dict[str, Any] | None:
    """The newest line of the training program among the pods' last lines."""
    selector = f"{INSTANCE}={run},{OURS},app.kubernetes.io/component=trainer"
    last = ("--tail=200", "--max-log-requests=200", "--ignore-errors")
    try:
        text = kubectl.run("logs", "-l", selector, "-c", container, *last, seconds=_LOG_SECONDS)
    except UserError:  # no container has started
        return None
    found = [match.groupdict() for match in _LINE.finditer(text)]
    if not found:
        return None
    last = max(found, key=lambda line: int(line["step"]))
    return last | {"step": int(last["step"]), "total": int(last["total"])}


def _checkpoint_age(metrics: dict[str, float], place: str | None) -> float | None:
    if stamp := metrics.get("personmae_last_checkpoint_timestamp_seconds"):
        return time.time() - stamp
    if not place or not place.startswith("s3://"):
        return None
    try:
        return bucket.age_seconds(f"{place}/LATEST")
    except Exception:  # this machine need not reach the bucket; then the age is left out
        return None

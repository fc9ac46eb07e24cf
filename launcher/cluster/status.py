"""What a run in a cluster is doing: conditions, pods by index, ranks, step, loss, time to go, checkpoints, warnings."""

import json
import re
import time
from typing import Any

from launcher.cluster import bucket
from launcher.cluster.deployed import INSTANCE, find, finished, refusals, stages, states, trainer, upload_to
from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from personmae.errors import UserError

_INDEX = "batch.kubernetes.io/job-completion-index"
_PORT = 9400
_LINE = re.compile(  # what RunLog prints; rank 0 may be on any index
    r"(?P<program>\w+) (?P<step>\d+)/(?P<total>\d+)  (?P<values>.*?)  (?P<rate>[\d,]+) images/s  (?P<left>(?:\d+ d )?\S+) to go"
)


def read(kubectl: Kubectl, run: str) -> dict[str, Any]:
    """The state of a run as plain values; what cannot be had is None."""
    _, workload = find(kubectl, run)
    pods = kubectl.items("pods", "-l", f"{INSTANCE}={run},app.kubernetes.io/component=trainer")
    pods.sort(key=lambda pod: (int(_index(pod)), pod["metadata"]["creationTimestamp"]))
    spec, status = workload["spec"], workload.get("status", {})
    final, passing = refusals(kubectl, [run], workload["metadata"].get("creationTimestamp", ""))
    progress = _progress(kubectl, run, trainer(workload))
    metrics: dict[str, float] = {}  # rank 0 may be on any pod, and have been on another one before
    for name, value in (item for pod in pods if _is_ready(pod) for item in _metrics(kubectl, pod["metadata"]["name"]).items()):
        metrics[name] = max(value, metrics.get(name, value))
    step = metrics.get("personmae_last_step")  # it comes with a run's first step
    return {
        "run": run,
        "state": finished(workload) or _state(workload, pods),
        "nodes": _nodes(workload["kind"], spec),
        "pods": [_pod(pod) for pod in pods],
        "conditions": [f"{c['type']}={c['status']}" for c in status.get("conditions", [])],
        "world_size": metrics.get("personmae_world_size"),
        "restarts": sum(value for name, value in metrics.items() if name.startswith("personmae_restarts_total"))
        if metrics
        else None,
        "progress": progress or ({"step": int(step)} if step is not None else None),
        "checkpoint_age_seconds": _checkpoint_age(metrics, upload_to(workload)),
        "stages": states(kubectl, stages(kubectl, run)),
        "warnings": [*final, *passing],
    }


def _state(workload: Object, pods: list[Object]) -> str:
    """Of a workload that is not over."""
    if workload["metadata"].get("deletionTimestamp"):
        return "Deleting"
    if workload["spec"].get("suspend"):
        return "Suspended"
    return "Running" if any(pod.get("status", {}).get("phase") == "Running" for pod in pods) else "Pending"


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
    lines += [f"  {p['index']:>3}  {p['phase']:<10} {p['node'] or '-':<24} {p['reason']}".rstrip() for p in state["pods"]]
    lines += [f"  stage {run}: {found}" for run, found in state["stages"].items()]
    return "\n".join(lines + [f"  warning: {line}" for line in state["warnings"][-5:]])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _index(pod: Object) -> str:
    return pod["metadata"].get("annotations", {}).get(_INDEX, "0")


def _is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", []))


def _pod(pod: Object) -> dict[str, Any]:
    status = pod.get("status", {})
    reasons = [c.get("reason", "") for c in status.get("conditions", []) if c["type"] == "DisruptionTarget"]
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        reasons += [state[k]["reason"] for k in ("waiting", "terminated") if state.get(k, {}).get("reason")]
        reasons += [f"exit code {state['terminated']['exitCode']}"] if "terminated" in state else []
    if status.get("phase") == "Pending" and not reasons:
        reasons = [
            c.get("message", "") for c in status.get("conditions", []) if c["type"] == "PodScheduled" and c["status"] == "False"
        ]
    return {
        "index": int(_index(pod)),
        "name": pod["metadata"]["name"],
        "phase": status.get("phase", "Unknown"),
        "node": pod["spec"].get("nodeName"),
        "reason": ", ".join(filter(None, reasons)),
    }


def _metrics(kubectl: Kubectl, pod: str) -> dict[str, float]:
    """An agent's numbers, through the API server; none where that may not be asked or does not answer."""
    from prometheus_client.parser import text_string_to_metric_families as parse

    try:
        text = kubectl.run("get", "--raw", f"/api/v1/namespaces/{kubectl.namespace}/pods/{pod}:{_PORT}/proxy/metrics")
        samples = [sample for family in parse(text) for sample in family.samples]
    except ValueError:  # UserError, or an answer that broke off
        return {}
    return {s.name + (json.dumps(s.labels) if s.labels else ""): s.value for s in samples}


def _progress(kubectl: Kubectl, run: str, container: str) -> dict[str, Any] | None:
    """The newest line of the training program among the pods' last lines."""
    selector = f"{INSTANCE}={run},app.kubernetes.io/component=trainer"
    try:
        text = kubectl.run("logs", "-l", selector, "-c", container, "--tail=200", "--max-log-requests=200", "--ignore-errors")
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

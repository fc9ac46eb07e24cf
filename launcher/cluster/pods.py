"""What the pods of a run do, or wait for, in a few words."""

import re
from datetime import UTC, datetime
from typing import Any

from launcher.cluster.kustomization import Object

INDEX = "batch.kubernetes.io/job-completion-index"
_FAILURES = ("batch.kubernetes.io/job-index-failure-count", "batch.kubernetes.io/job-index-ignored-failure-count")
# Of the Job controller, for the replacement of a pod: https://kubernetes.io/docs/concepts/workloads/controllers/job/
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 10, 600
_PLAIN = {"Error", "Completed"}  # reasons that say no more than the exit code


def index_of(pod: Object) -> int:
    """Its index in the Job; 0 where the Job has none."""
    return int(pod["metadata"].get("annotations", {}).get(INDEX, 0))


def component_of(pod: Object) -> str:
    """'trainer' or 'store'."""
    return pod["metadata"].get("labels", {}).get("app.kubernetes.io/component", "trainer")


def phase_of(pod: Object) -> str:
    """As Kubernetes says it, or 'Ending' for a pod that is asked to end and has not."""
    phase = pod.get("status", {}).get("phase", "Unknown")
    return "Ending" if pod["metadata"].get("deletionTimestamp") and not is_over(pod) else phase


def is_over(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", []))


def begun(pod: Object) -> list[str]:
    """Names of the containers that have something to say: they run, or have ended."""
    status = pod.get("status", {})
    statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return [each["name"] for each in statuses if {"running", "terminated"} & each.get("state", {}).keys()]


def describe(pod: Object) -> dict[str, Any]:
    """Index, name, phase, node and the reason, as plain values."""
    return {
        "index": index_of(pod),
        "name": pod["metadata"]["name"],
        "phase": phase_of(pod),
        "node": pod["spec"].get("nodeName"),
        "reason": ", ".join(dict.fromkeys(filter(None, _reasons(pod)))),
    }


def _reasons(pod: Object) -> list[str]:
    status = pod.get("status", {})
    reasons = [c.get("reason", "") for c in status.get("conditions", []) if c["type"] == "DisruptionTarget"]
    reasons += [status.get("reason", "")]  # Evicted, NodeLost
    sidecars = {each["name"] for each in pod["spec"].get("initContainers", []) if each.get("restartPolicy") == "Always"}
    for container in status.get("initContainerStatuses", []):
        if container["name"] not in sidecars:
            reasons += _of_init(container)
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting and not is_over(pod) and not (waiting.get("reason") == "PodInitializing" and any(reasons)):
            reasons.append(": ".join(filter(None, (waiting.get("reason"), waiting.get("message")))))
        reasons += _of_end(container)
    if status.get("phase") == "Pending" and not any(reasons):
        reasons += [
            c.get("message", "") for c in status.get("conditions", []) if c["type"] == "PodScheduled" and c["status"] == "False"
        ]
    return reasons


def _of_init(container: Object) -> list[str]:
    """What an init container says of its pod: that it works, waits for something, or has failed."""
    state = container.get("state", {})
    if "running" in state:
        return [f"{container['name']} is at work"]
    waiting = state.get("waiting", {})
    if waiting and waiting.get("reason") != "PodInitializing":
        return [f"{container['name']}: " + ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))]
    failed = state.get("terminated", {}).get("exitCode", 0) != 0
    return [f"{container['name']}: {', '.join(_of_end(container))}"] if failed else []


def _of_end(container: Object) -> list[str]:
    ended = container.get("state", {}).get("terminated")
    if not ended:
        return []
    reason = ended.get("reason", "")
    return [*([reason] if reason and reason not in _PLAIN else []), f"exit code {ended['exitCode']}"]


def by_index(pods: list[Object], size: int, now: float, *, alive: bool) -> list[dict[str, Any]]:
    """The newest pod of each index below ``size``, with those before it counted, and what a missing one waits for.

    ``now`` is in seconds since 1970. Where the run is not ``alive``, over or suspended, nothing is waited for.
    """
    rows = []
    for index in sorted({*(range(size) if alive else ()), *map(index_of, pods)}):
        own = sorted((pod for pod in pods if index_of(pod) == index), key=lambda pod: pod["metadata"]["creationTimestamp"])
        if not own:
            rows.append({"index": index, "name": None, "phase": "-", "node": None, "reason": "has no pod yet", "before": 0})
            continue
        row = describe(own[-1]) | {"before": len(own) - 1}
        if alive and index < size and row["phase"] == "Failed":
            row["reason"] = f"{row['reason'] or 'has failed'}; {_replacement(own[-1], now)}"
        elif len(own) > 1 and (last := describe(own[-2])["reason"]):
            row["reason"] = f"{row['reason']} (the one before: {last})".strip()
        rows.append(row)
    return rows


def _replacement(pod: Object, now: float) -> str:
    """When the Job controller replaces a pod that has ended: each stop of an index, counted or not, doubles the wait."""
    notes, ended = pod["metadata"].get("annotations", {}), _ended(pod)
    if INDEX not in notes or ended is None:
        return "is replaced soon"
    stops = sum(int(notes.get(name, 0)) for name in _FAILURES) + 1
    left = ended + min(_FIRST_BACKOFF_SECONDS * 2 ** (stops - 1), _LONGEST_BACKOFF_SECONDS) - now
    return f"is replaced in {left:.0f} s, after stop {stops}" if left > 0 else "is replaced now"


def _ended(pod: Object) -> float | None:
    """When the last of its containers ended, in seconds since 1970."""
    status = pod.get("status", {})
    statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    stamps = [each["state"]["terminated"].get("finishedAt") for each in statuses if "terminated" in each.get("state", {})]
    stamps += [pod["metadata"].get("deletionTimestamp")]
    return max((_seconds(stamp) for stamp in stamps if stamp), default=None)


def _seconds(stamp: str) -> float:
    """Seconds since 1970 of a time in RFC 3339."""
    return datetime.strptime(re.sub(r"\.\d+", "", stamp), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def store(pods: list[Object], *, needed: bool, deployed: bool) -> dict[str, Any] | None:
    """The rendezvous store's newest pod and its restarts; None for a run that has none of its own.

    ``needed`` says that agents wait for a Deployment, and ``deployed`` that it is there.
    """
    own = sorted((p for p in pods if component_of(p) == "store"), key=lambda pod: pod["metadata"]["creationTimestamp"])
    if not own and not needed:
        return None
    if not own:
        missing = "agents wait for it; delete the run and submit it again, it goes on from its checkpoint"
        phase, reason = ("Pending", "has no pod yet") if deployed else ("Missing", missing)
        return {"name": None, "phase": phase, "node": None, "reason": reason, "restarts": 0}
    newest = [*filter(is_over, own), *(pod for pod in own if not is_over(pod))][-1]
    row = describe(newest)
    restarts = sum(each.get("restartCount", 0) for each in newest.get("status", {}).get("containerStatuses", []))
    return {key: row[key] for key in ("name", "phase", "node", "reason")} | {"restarts": restarts}

"""Whether the names and the checkpoints' places of runs are free, before anything of them is created.

Every object counts and not the workload alone: what is applied to an object that is being deleted vanishes with it.
"""

import sys
import time
from collections.abc import Sequence

from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from launcher.cluster.objects import (
    INSTANCE,
    OURS,
    SUITE,
    WORKLOADS,
    finished,
    is_of,
    path_of,
    resource_of,
    run_of,
    upload_to,
    workloads,
)
from personmae.errors import UserError

PATIENCE_SECONDS = 300.0  # a trainer that is being deleted has 200 s to save
PAUSE_SECONDS = 2.0
_ENDED = ("Succeeded", "Failed")


def require_free(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> None:
    """Wait for what is being deleted under the names of these runs' objects, with a word on standard error.

    Raises:
        UserError: a name is taken, by a run, by what is left of one or by somebody else, or is not free in time.
    """
    deadline, printed = time.monotonic() + PATIENCE_SECONDS, ""
    while going := _going(kubectl, runs, objects):
        line = f"waiting until what is being deleted is gone: {', '.join(going[:3])}{' ...' if len(going) > 3 else ''}"
        if time.monotonic() >= deadline:
            raise UserError(
                f"the run {runs[0]} is being deleted, and its pods may still save; {going[0]} is still there after "
                f"{PATIENCE_SECONDS:g} s: wait, or give another --name"
            )
        if line != printed:
            print(line, file=sys.stderr, flush=True)
            printed = line
        time.sleep(PAUSE_SECONDS)


def _going(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> list[str]:
    """What bears a name of these runs and is on its way out: objects, and pods that may still save."""
    there = kubectl.named(_names(kubectl, runs, objects))
    there.sort(key=lambda item: item["kind"] not in WORKLOADS)
    own = {item["metadata"]["uid"]: item for item in there}
    going = [path_of(item) for item in there if _is_going(kubectl, runs, item, own)]
    selector = f"{INSTANCE} in ({','.join(runs)}),{OURS}"
    pods = [pod for pod in kubectl.items("pods", "-l", selector) if pod.get("status", {}).get("phase") not in _ENDED]
    return going + [f"pod/{pod['metadata']['name']}" for pod in pods]


def _names(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> list[str]:
    """``resource/name`` of all that these runs have, and of what a dispatcher or another kind of run would be called."""
    known = kubectl.kinds()
    workload = [f"{name}/{run}-{ending}" for name, ending in WORKLOADS.values() if name in known for run in runs]
    return list(dict.fromkeys([*workload, *(path_of(item) for item in objects if item["kind"] not in WORKLOADS)]))


def _is_going(kubectl: Kubectl, runs: Sequence[str], item: Object, own: dict[str, Object]) -> bool:
    """Whether an object with one of our names goes away by itself.

    Raises:
        UserError: it stays.
    """
    if item["metadata"].get("deletionTimestamp"):
        return True
    if not any(is_of(run, item) for run in runs):
        raise UserError(f"{path_of(item)} is there already and is no object of personmae; give another --name")
    if item["kind"] in WORKLOADS:
        end, run = finished(item), run_of(item)
        again = "resume or delete it" if end and item["metadata"].get("labels", {}).get(SUITE) == run else "delete it"
        raise UserError(f"the run {run} exists already ({end or 'at work'}); {again} first, or give another --name")
    owners = item["metadata"].get("ownerReferences", [])
    if owners and not any(_stays(kubectl, owner, own) for owner in owners):
        return True  # the garbage collector will find it
    raise UserError(
        f"{path_of(item)} is left of an earlier run {run_of(item)}; delete it first: personmae delete {run_of(item)} "
        f"-n {kubectl.namespace}"
    )


def _stays(kubectl: Kubectl, owner: Object, own: dict[str, Object]) -> bool:
    """Whether the object that a reference names is there, and is not being deleted."""
    there = own.get(owner["uid"]) or kubectl.get(resource_of(owner), owner["name"]) or {}
    metadata = there.get("metadata", {})
    return metadata.get("uid") == owner["uid"] and not metadata.get("deletionTimestamp")


def require_own_places(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> None:
    """Raise a ``UserError`` where a run that is not over, of whatever kind, uploads to the place of one of these."""
    places = {place for item in objects if (place := upload_to(item))}
    there, refused = workloads(kubectl)
    for item in there:
        if (place := upload_to(item)) in places and not finished(item) and run_of(item) not in runs:
            raise UserError(
                f"{place} belongs to the run {run_of(item)}, which is at work; delete that first or give another "
                "checkpoint.upload_to"
            )
    for resource in refused:
        print(
            f"warning: whether one of {resource} uploads to the same place is not known: you may not list them", file=sys.stderr
        )


def warn_of_left_stores(kubectl: Kubectl) -> None:
    """A line on standard error for each rendezvous store that stays though its run is gone, as one that kubectl has applied."""
    alive = {run_of(item) for item in workloads(kubectl)[0]}
    for item in kubectl.items("deployments.apps", "-l", f"{OURS},app.kubernetes.io/component=store"):
        metadata = item["metadata"]
        if run_of(item) not in alive and not metadata.get("ownerReferences") and not metadata.get("deletionTimestamp"):
            found = f"{path_of(item)} is left of the run {run_of(item)}, whose workload is gone"
            print(f"warning: {found}: personmae delete {run_of(item)} -n {kubectl.namespace}", file=sys.stderr)

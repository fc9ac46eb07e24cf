"""A run in a cluster: what is looked at before it is created, its creation, what becomes of its pods, its end."""

import json
import re
import time
from collections.abc import Sequence

from launcher.cluster import names
from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from launcher.cluster.objects import (
    INSTANCE,
    MANAGER,
    WORKLOADS,
    delete,
    finished,
    is_of,
    of_run,
    path_of,
    resource_of,
    run_of,
    workloads,
)
from personmae.errors import UserError

_REFERRING = {"RoleBinding": "role", "TrainJob": "runtime"}  # they are refused until what they name exists
_SUBMITTER = "personmae-submitter"  # the role of k8s/overlays/namespace, which whoever may submit has
_APPLY_SECONDS = 60  # admission by webhooks takes its time
_PASSING = "exceeded quota|serviceaccount|service account|being terminated"  # words of a refusal that may pass
_WAITING = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
}  # for good


def preflight(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> list[str]:
    """Find what the cluster would refuse, while nothing has been created. Returns a line for what it could not be asked.

    Raises:
        UserError: permission, the namespace, a secret or a kind is missing, or the name or the checkpoints' place is taken.
    """
    if not kubectl.may("create", "jobs.batch"):
        raise UserError(
            f"you may not create jobs in namespace {kubectl.namespace}; ask for the role personmae-submitter there, or give "
            "another --namespace"
        )
    for name in sorted(_secrets(objects)):
        if not kubectl.get("secret", name):
            raise UserError(
                f"the secret {name} is required in namespace {kubectl.namespace}; create it: kubectl -n {kubectl.namespace} "
                f"create secret generic {name} --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=..."
            )
    names.require_free(kubectl, runs, objects)
    names.require_own_places(kubectl, runs, objects)
    names.warn_of_left_stores(kubectl)
    apply(kubectl, [item for item in objects if item["kind"] not in _REFERRING], dry_run=True)
    return [
        f"{item['kind']} {item['metadata']['name']} was not tried: a server wants the {named} that it names first"
        for item in objects
        if (named := _REFERRING.get(item["kind"])) and not _is_tried(kubectl, item)
    ]


def _is_tried(kubectl: Kubectl, item: Object) -> bool:
    """Whether the server could be asked about an object that names one which is still to be created.

    A binding is tried with the role of who submits, which is there and may be handed on by whoever has it. The rights of its
    own role are looked at when that role is tried.
    """
    if item["kind"] != "RoleBinding":
        return False
    try:
        if not kubectl.get("role.rbac.authorization.k8s.io", _SUBMITTER):
            return False
        apply(kubectl, [item | {"roleRef": item["roleRef"] | {"name": _SUBMITTER}}], dry_run=True)
    except UserError as error:
        if re.search('attempting to grant|cannot get resource "roles"', str(error)):
            return False
        raise
    return True


def _secrets(objects: list[Object]) -> set[str]:
    return set(re.findall(r'"secretRef": \{"name": "([^"]+)"', json.dumps(objects)))


def apply(kubectl: Kubectl, objects: list[Object], *, dry_run: bool = False) -> None:
    """Server-side apply, or the server's opinion of it."""
    asked = ["--dry-run=server"] if dry_run else []
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    kubectl.run("apply", "--server-side", "--field-manager", MANAGER, *asked, "-f", "-", text=text, seconds=_APPLY_SECONDS)


def create(kubectl: Kubectl, runs: Sequence[str], objects: list[Object], owned: Object) -> str:
    """Apply the objects of runs and let them go with one of them, ``owned``; when that fails, nothing is left behind.

    Returns the cluster's time of its creation.
    """
    try:
        apply(kubectl, objects)
        workload = kubectl.get(WORKLOADS[owned["kind"]][0], owned["metadata"]["name"])
        own(kubectl, workload, objects)
        return workload["metadata"]["creationTimestamp"]
    except BaseException as error:
        _delete_all(kubectl, runs, f"{error or 'interrupted'}")
        raise


def own(kubectl: Kubectl, workload: Object, objects: list[Object]) -> None:
    """Let objects go with a workload, once the cluster has it."""
    owner = {key: workload[key] for key in ("apiVersion", "kind")} | {"blockOwnerDeletion": False}
    owner |= {key: workload["metadata"][key] for key in ("name", "uid")}
    patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
    for item in objects:
        if item["kind"] not in WORKLOADS:
            kubectl.run("patch", resource_of(item), item["metadata"]["name"], "--type", "merge", "-p", patch)


def adopt(kubectl: Kubectl, run: str) -> list[str]:
    """Let all objects of a run go with its workload, as those do that ``create`` has made; returns those that did not."""
    _, workload = find(kubectl, run)
    alone = [item for item in of_run(kubectl, run)[0] if not item["metadata"].get("ownerReferences")]
    alone = [item for item in alone if item["kind"] not in WORKLOADS]
    own(kubectl, workload, alone)
    return [path_of(item) for item in alone]


def _delete_all(kubectl: Kubectl, runs: Sequence[str], why: str) -> None:
    for run in runs:
        try:
            delete(kubectl, run)
        except UserError as error:
            raise UserError(f"{why}; and {run} could not be deleted: {error}; then give: personmae delete {run}") from error


def refusals(kubectl: Kubectl, runs: Sequence[str], since: str) -> tuple[list[str], list[str]]:
    """What keeps the pods of runs from existing for good, and what may pass: lines that quote the cluster.

    Events are kept for an hour, so those before ``since`` are of an earlier run of the same name.
    """
    final: list[str] = []
    passing: dict[str, list[str]] = {}  # words -> what they are of
    pods = {pod["metadata"]["name"]: pod for pod in kubectl.items("pods", "-l", f"{INSTANCE} in ({','.join(runs)})")}
    for event in sorted(kubectl.items("events"), key=_time):
        name = event["involvedObject"].get("name", "")
        if event["type"] != "Warning" or _time(event) < since or not any(_is_of(run, name) for run in runs):
            continue
        if event["involvedObject"].get("kind") == "Pod" and not _matters(event, pods.get(name)):
            continue
        message = " ".join(event.get("message", "").split())
        refused = re.search("forbidden|invalid", message) and not re.search(_PASSING, message)
        if event["reason"] == "FailedCreate" and refused:
            final.append(message)
        else:
            of = passing.setdefault(f"{event['reason']}: {message}", [])
            of += [] if name in of else [name]
    for pod in pods.values():
        status = pod.get("status", {})
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _WAITING:
                final.append(f"{waiting['reason']}: {waiting.get('message', container['image'])}")
    return list(dict.fromkeys(final)), [f"{several(of)}: {words}" for words, of in passing.items()]


def several(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _matters(event: Object, pod: Object | None) -> bool:
    """Whether what is told of a pod still holds: it is there, and has no node yet where that is what was lacking."""
    return pod is not None and not (event["reason"] == "FailedScheduling" and pod["spec"].get("nodeName"))


def _time(event: Object) -> str:
    """When something happened last, to the second, in RFC 3339."""
    stamps = (event.get("lastTimestamp"), event.get("eventTime"), event["metadata"]["creationTimestamp"])
    return f"{max(filter(None, stamps))[:19]}Z"


def _is_of(run: str, name: str) -> bool:
    """Whether an object is a run's workload, or a Job, replica set or pod below it; not those of RUN-2."""
    job = r"(-\d+-\w{5})?"
    return bool(re.fullmatch(rf"{run}-(trainer{job}|store(-\w+){{0,2}}|run(-(trainer|store|node)-\d+{job})?)", name))


def failures(kubectl: Kubectl, runs: Sequence[str]) -> dict[str, str]:
    """The runs that have failed, and why."""
    ends = {run_of(item): finished(item) or "" for item in workloads(kubectl)[0]}
    return {run: end for run, end in ends.items() if run in runs and end.startswith("Failed")}


def watch(kubectl: Kubectl, runs: Sequence[str], since: str, seconds: float, pause: float = 1.0) -> list[str]:
    """Look for refusals for a while; a Job whose pods are refused is accepted all the same. Returns what may pass.

    Raises:
        UserError: something that does not go away by itself; the runs have been deleted.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            final, passing = refusals(kubectl, runs, since)
        except UserError as error:
            return [f"{runs[0]} is created, and whether its pods are accepted could not be seen: {error}"]
        if final:
            _delete_all(kubectl, runs, f"the pods of {runs[0]} were refused: {final[0]}")
            raise UserError(f"the pods of {runs[0]} were refused, and it has been deleted: {final[0]}")
        if time.monotonic() >= deadline:
            return passing
        time.sleep(pause)


def find(kubectl: Kubectl, run: str) -> tuple[str, Object]:
    """Resource and object of a run's workload.

    Raises:
        UserError: there is no such run; those that there are, are named.
    """
    known = kubectl.kinds()
    for resource, ending in WORKLOADS.values():
        if resource in known and (found := kubectl.get(resource, f"{run}-{ending}")) and is_of(run, found):
            return resource, found
    runs = sorted({run_of(item) for item in workloads(kubectl)[0]})
    raise UserError(f"there is no run {run} in namespace {kubectl.namespace}; there is {', '.join(runs) or 'none'}")


def trainer(workload: Object) -> str:
    """Name of the container that trains: Kubeflow Trainer wants one of its own."""
    return "node" if workload["kind"] == "TrainJob" else "trainer"


def set_suspended(kubectl: Kubectl, run: str, suspended: bool) -> None:
    """Let the pods go, with their state saved, or have them back.

    Raises:
        UserError: it is over, or Kueue decides about it.
    """
    resource, found = find(kubectl, run)
    _require_alive(run, found)
    if "kueue.x-k8s.io/queue-name" in found["metadata"].get("labels", {}):
        active = f'{{"spec": {{"active": {json.dumps(not suspended)}}}}}'
        raise UserError(
            f"Kueue decides when {run} runs and would undo this; find its workload with 'kubectl -n {kubectl.namespace} get "
            f"workloads' and give: kubectl -n {kubectl.namespace} patch workload NAME --type merge -p '{active}'"
        )
    patch = json.dumps({"spec": {"suspend": suspended}})
    kubectl.run("patch", resource, found["metadata"]["name"], "--type", "merge", "-p", patch)


def is_over(workload: Object) -> str | None:
    """Why nothing can be done with a workload any more."""
    return finished(workload) or ("being deleted" if workload["metadata"].get("deletionTimestamp") else None)


def _require_alive(run: str, workload: Object) -> None:
    if over := is_over(workload):
        raise UserError(f"{run} is over ({over}); submit it again: it goes on from its checkpoint.upload_to")


def scale(kubectl: Kubectl, run: str, nodes: int) -> None:
    """Change the number of a Job's pods, highest indexes first.

    Raises:
        UserError: another kind, or a number that the agents' --nnodes or the batch does not admit.
    """
    resource, found = find(kubectl, run)
    if resource != "jobs.batch":
        raise UserError(
            f"only a Job changes its size while it runs; {run} is a {found['kind']}: submit it again, it goes on where it was"
        )
    _require_alive(run, found)
    variables = (kubectl.get("configmap", f"{run}-run") or {}).get("data", {})
    if not {"NODES", "RANKS", "BATCH"} <= variables.keys():
        raise UserError(f"a run with nodes is required; {run} is a suite or has lost its config map: name one of its stages")
    fewest, most = map(int, variables["NODES"].split(":"))
    ranks, batch = int(variables["RANKS"]), int(variables["BATCH"])
    good = [n for n in range(fewest, most + 1) if batch % (n * ranks) == 0]
    if not fewest <= nodes <= most:
        raise UserError(
            f"--nodes must be from {fewest} to {most}, as {run} was submitted; got {nodes}: for more, submit it again"
        )
    if nodes not in good:
        raise UserError(
            f"{nodes} nodes of {ranks} ranks do not divide the batch of {batch}; give --nodes {' or '.join(map(str, good))}"
        )
    patch = json.dumps({"spec": {"parallelism": nodes, "completions": nodes}})
    kubectl.run("patch", resource, found["metadata"]["name"], "--type", "merge", "-p", patch)

"""A run in a cluster: what is looked at before it is created, its creation, what becomes of its pods, its end."""

import json
import re
import time
from collections.abc import Sequence

from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from personmae.errors import UserError

MANAGER = "personmae"
INSTANCE = "app.kubernetes.io/instance"
_KINDS = ("jobs.batch", "jobsets.jobset.x-k8s.io", "trainjobs.trainer.kubeflow.org")
_WORKLOADS = {"Job": _KINDS[0], "JobSet": _KINDS[1], "TrainJob": _KINDS[2]}
_REFERRING = {"RoleBinding", "TrainJob"}  # refused until what they name exists, and in a dry run nothing comes to exist
_LEFT_BEHIND = (  # what a run may consist of, in the order of deletion
    *_KINDS,
    "trainingruntimes.trainer.kubeflow.org",
    "deployments.apps",
    "services",
    "configmaps",
    "serviceaccounts",
    "poddisruptionbudgets.policy",
    "networkpolicies.networking.k8s.io",
    "podmonitors.monitoring.coreos.com",
    "rolebindings.rbac.authorization.k8s.io",
    "roles.rbac.authorization.k8s.io",
)
_APPLY_SECONDS = 60  # admission by webhooks takes its time
_PASSING = "exceeded quota|serviceaccount|service account|being terminated"  # words of a refusal that may pass
_WAITING = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
}  # for good


def preflight(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> None:
    """Find what the cluster would refuse, while nothing has been created.

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
    for item in objects:
        if item["kind"] in _WORKLOADS and (there := kubectl.get(_WORKLOADS[item["kind"]], item["metadata"]["name"])):
            raise _exists(item["metadata"]["labels"][INSTANCE], there)
    places = {place for item in objects if (place := upload_to(item))}
    for job in kubectl.items("jobs.batch", "-l", "app.kubernetes.io/name=personmae"):
        other, place = job["metadata"]["labels"].get(INSTANCE), upload_to(job)
        if other in runs:  # of a suite's later stages: the dispatcher would take it for its own
            raise _exists(other, job)
        if place in places and not finished(job):
            raise UserError(
                f"{place} belongs to the run {other}, which is at work; delete that first or give another checkpoint.upload_to"
            )
    apply(kubectl, [item for item in objects if item["kind"] not in _REFERRING], dry_run=True)


def _exists(run: str, workload: Object) -> UserError:
    if workload["metadata"].get("deletionTimestamp"):
        return UserError(f"the run {run} is being deleted, and its pods may still save; wait, or give another --name")
    return UserError(
        f"the run {run} exists already ({finished(workload) or 'at work'}); delete it first, or give another --name"
    )


def upload_to(item: Object) -> str | None:
    """Where a run uploads its checkpoints; the annotation has the key's first name, which runs in clusters bear."""
    return item["metadata"].get("annotations", {}).get("personmae/store")


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
        metadata = kubectl.get(_WORKLOADS[owned["kind"]], owned["metadata"]["name"])["metadata"]
        owner = {
            "apiVersion": owned["apiVersion"],
            "kind": owned["kind"],
            "name": owned["metadata"]["name"],
            "uid": metadata["uid"],
            "blockOwnerDeletion": False,
        }
        for item in objects:
            if item["kind"] not in _WORKLOADS:
                what = f"{item['kind'].lower()}.{_group(item)}" if _group(item) else item["kind"].lower()
                patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
                kubectl.run("patch", what, item["metadata"]["name"], "--type", "merge", "-p", patch)
        return metadata["creationTimestamp"]
    except BaseException as error:
        _delete_all(kubectl, runs, f"{error or 'interrupted'}")
        raise


def _delete_all(kubectl: Kubectl, runs: Sequence[str], why: str) -> None:
    for run in runs:
        try:
            delete(kubectl, run)
        except UserError as error:
            raise UserError(f"{why}; and {run} could not be deleted: {error}; then give: personmae delete {run}") from error


def _group(item: Object) -> str:
    group, _, version = item["apiVersion"].partition("/")
    return group if version else ""


def refusals(kubectl: Kubectl, runs: Sequence[str], since: str) -> tuple[list[str], list[str]]:
    """What keeps the pods of runs from existing for good, and what may pass: lines that quote the cluster.

    Events are kept for an hour, so those before ``since`` are of an earlier run of the same name.
    """
    final, passing = [], []
    for event in kubectl.items("events"):
        name = event["involvedObject"].get("name", "")
        if event["type"] != "Warning" or _time(event) < since or not any(_is_of(run, name) for run in runs):
            continue
        message = " ".join(event.get("message", "").split())
        refused = re.search("forbidden|invalid", message) and not re.search(_PASSING, message)
        if event["reason"] == "FailedCreate" and refused:
            final.append(message)
        else:
            passing.append(f"{event['reason']}: {message}")
    for pod in kubectl.items("pods", "-l", f"{INSTANCE} in ({','.join(runs)})"):
        status = pod.get("status", {})
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _WAITING:
                final.append(f"{waiting['reason']}: {waiting.get('message', container['image'])}")
    return list(dict.fromkeys(final)), list(dict.fromkeys(passing))


def _time(event: Object) -> str:
    """When something happened last, to the second, in RFC 3339."""
    stamps = (event.get("lastTimestamp"), event.get("eventTime"), event["metadata"]["creationTimestamp"])
    return f"{max(filter(None, stamps))[:19]}Z"


def _is_of(run: str, name: str) -> bool:
    """Whether an object is a run's workload, or a Job, replica set or pod below it; not those of RUN-2."""
    job = r"(-\d+-\w{5})?"
    return bool(re.fullmatch(rf"{run}-(trainer{job}|store(-\w+){{0,2}}|run(-(trainer|store|node)-\d+{job})?)", name))


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


def delete(kubectl: Kubectl, run: str) -> bool:
    """Delete all objects of a run, its workload once its pods have saved; what it has in buckets stays.

    Returns whether there was anything.
    """
    known = kubectl.kinds()
    there = ",".join(kind for kind in _LEFT_BEHIND if kind in known)
    how = ("--ignore-not-found", "--cascade=foreground", "--wait=false", "-o", "name")
    return "/" in kubectl.run("delete", there, "-l", f"{INSTANCE}={run}", *how)


def stages(kubectl: Kubectl, run: str) -> list[str]:
    """The runs of a suite, from its dispatcher's plan; none of any other run."""
    data = (kubectl.get("configmap", f"{run}-config") or {}).get("data", {})
    plan = json.loads(data.get("plan.json", '{"stages": []}'))
    return [stage["job"].removesuffix("-trainer") for stage in plan["stages"]]


def find(kubectl: Kubectl, run: str) -> tuple[str, Object]:
    """Resource and object of a run's workload.

    Raises:
        UserError: there is no such run; those that there are, are named.
    """
    known = kubectl.kinds()
    for resource, ending in zip(_KINDS, ("trainer", "run", "run"), strict=True):
        if resource in known and (found := kubectl.get(resource, f"{run}-{ending}")):
            return resource, found
    jobs = kubectl.items("jobs.batch", "-l", "app.kubernetes.io/name=personmae")
    runs = sorted({job["metadata"]["labels"].get(INSTANCE, "?") for job in jobs})
    raise UserError(f"there is no run {run} in namespace {kubectl.namespace}; there is {', '.join(runs) or 'none'}")


def trainer(workload: Object) -> str:
    """Name of the container that trains: Kubeflow Trainer wants one of its own."""
    return "node" if workload["kind"] == "TrainJob" else "trainer"


def states(kubectl: Kubectl, runs: Sequence[str]) -> dict[str, str]:
    """'Complete', 'Failed' with the reason, 'at work', or 'waits' where a run of a suite has no Job yet."""
    jobs = kubectl.items("jobs.batch", "-l", "app.kubernetes.io/name=personmae") if runs else []
    found = {job["metadata"]["labels"].get(INSTANCE): finished(job) or "at work" for job in jobs}
    return {run: found.get(run, "waits") for run in runs}


def finished(workload: Object) -> str | None:
    """'Complete' or 'Failed' with the reason, once it is over."""
    for condition in workload.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Completed", "Failed"):
            why = f": {condition['reason']}: {condition.get('message', '')}" if condition["type"] == "Failed" else ""
            return ("Failed" if condition["type"] == "Failed" else "Complete") + why
    return None


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

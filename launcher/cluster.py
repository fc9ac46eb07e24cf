"""A run in a cluster, through ``kubectl``: it brings every way of logging in, server-side apply, and logs that follow."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from launcher.kustomization import Object
from personmae.errors import UserError

MANAGER = "personmae"
INSTANCE = "app.kubernetes.io/instance"
_KINDS = ("jobs.batch", "jobsets.jobset.x-k8s.io", "trainjobs.trainer.kubeflow.org")
_WORKLOADS = {"Job": _KINDS[0], "JobSet": _KINDS[1], "TrainJob": _KINDS[2]}
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
_WAITING = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError"}  # of which none mends itself


class Kubectl:
    """``kubectl`` in one namespace of one context."""

    def __init__(self, namespace: str, context: str | None = None) -> None:
        if not shutil.which("kubectl"):
            raise UserError("kubectl is required to talk to a cluster and is not on PATH; 'personmae render' works without it")
        self.namespace = namespace
        self.command = ["kubectl", *(["--context", context] if context else []), "--namespace", namespace]

    def run(self, *args: str, text: str | None = None) -> str:
        """Output of ``kubectl ARGS``.

        Raises:
            UserError: it failed; its own first line is in the message.
        """
        done = subprocess.run([*self.command, *args], input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(_told(done.stderr, args, self.namespace))
        return done.stdout

    def get(self, *args: str) -> Any:
        """``kubectl get ARGS`` as JSON; None where a named object does not exist."""
        out = self.run("get", *args, "--ignore-not-found", "-o", "json")
        return json.loads(out) if out.strip() else None

    def items(self, *args: str) -> list[Object]:
        return (self.get(*args) or {}).get("items", [])

    def may(self, verb: str, resource: str) -> bool:
        """Whether the user may do this in the namespace."""
        done = subprocess.run([*self.command, "auth", "can-i", verb, resource], capture_output=True, text=True, check=False)
        if done.stdout.strip() not in ("yes", "no"):
            raise UserError(_told(done.stderr, ("auth",), self.namespace))
        return done.stdout.strip() == "yes"


def _told(stderr: str, args: Sequence[str], namespace: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("Warning:")]
    first = next((line for line in lines if line.startswith(("Error", "error"))), lines[0] if lines else "it said nothing")
    first = re.sub(r"^[Ee]rror( from server)?( \(\w+\))?: ", "", first)
    hint = "see 'kubectl config get-contexts', or give --context and --namespace"
    if "forbidden" in stderr.lower():
        hint = f"ask for the role personmae-submitter in namespace {namespace} (k8s/overlays/namespace)"
    elif "no matches for kind" in stderr or "doesn't have a resource type" in stderr:
        hint = "its controller is not installed: choose another overlay or leave the component out"
    return f"kubectl {args[0]} was refused: {first}; {hint}"


def preflight(kubectl: Kubectl, runs: Sequence[str], objects: list[Object]) -> None:
    """Find what the cluster would refuse, while nothing has been created.

    Raises:
        UserError: permission, the namespace, a secret or a kind is missing, or the name or the store is taken.
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
            run, state = item["metadata"]["labels"][INSTANCE], finished(there) or "at work"
            raise UserError(f"the run {run} exists already ({state}); delete it first, or give another --name")
    stores = {store for item in objects if (store := _store(item))}
    for job in kubectl.items("jobs.batch", "-l", "app.kubernetes.io/name=personmae"):
        other, store = job["metadata"]["labels"].get(INSTANCE), _store(job)
        if other not in runs and store in stores and not finished(job):
            raise UserError(
                f"{store} belongs to the run {other}, which is at work; delete that first or give another checkpoint.store"
            )
    apply(kubectl, objects, dry_run=True)


def _store(item: Object) -> str | None:
    return item["metadata"].get("annotations", {}).get("personmae/store")


def _secrets(objects: list[Object]) -> set[str]:
    return set(re.findall(r'"secretRef": \{"name": "([^"]+)"', json.dumps(objects)))


def apply(kubectl: Kubectl, objects: list[Object], *, dry_run: bool = False) -> None:
    """Server-side apply, or the server's opinion of it."""
    asked = ["--dry-run=server"] if dry_run else []
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    kubectl.run("apply", "--server-side", "--field-manager", MANAGER, *asked, "-f", "-", text=text)


def create(kubectl: Kubectl, runs: Sequence[str], objects: list[Object], owned: Object) -> None:
    """Apply the objects of runs and let them go with one of them, ``owned``; when that fails, nothing is left behind."""
    try:
        apply(kubectl, objects)
        uid = kubectl.get(_WORKLOADS[owned["kind"]], owned["metadata"]["name"])["metadata"]["uid"]
        owner = {
            "apiVersion": owned["apiVersion"],
            "kind": owned["kind"],
            "name": owned["metadata"]["name"],
            "uid": uid,
            "blockOwnerDeletion": False,
        }
        for item in objects:
            if item["kind"] not in _WORKLOADS:
                what = f"{item['kind'].lower()}.{_group(item)}" if _group(item) else item["kind"].lower()
                patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
                kubectl.run("patch", what, item["metadata"]["name"], "--type", "merge", "-p", patch)
    except (UserError, KeyboardInterrupt):
        for run in runs:
            delete(kubectl, run)
        raise


def _group(item: Object) -> str:
    group, _, version = item["apiVersion"].partition("/")
    return group if version else ""


def refusals(kubectl: Kubectl, run: str) -> tuple[list[str], list[str]]:
    """What keeps the pods of a run from existing for good, and what may pass: lines that quote the cluster."""
    final, passing = [], []
    for event in kubectl.items("events"):
        if event["type"] != "Warning" or not event["involvedObject"].get("name", "").startswith(f"{run}-"):
            continue
        told = " ".join(event.get("message", "").split())
        if event["reason"] == "FailedCreate" and "exceeded quota" not in told:
            final.append(told)
        else:
            passing.append(f"{event['reason']}: {told}")
    for pod in kubectl.items("pods", "-l", f"{INSTANCE}={run}"):
        status = pod.get("status", {})
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _WAITING:
                final.append(f"{waiting['reason']}: {waiting.get('message', container['image'])}")
    return list(dict.fromkeys(final)), list(dict.fromkeys(passing))


def watch(kubectl: Kubectl, runs: Sequence[str], seconds: float, pause: float = 1.0) -> list[str]:
    """Look for refusals for a while; a Job whose pods are refused is accepted all the same. Returns what may pass.

    Raises:
        UserError: something that does not mend itself; the runs have been deleted.
    """
    deadline = time.monotonic() + seconds
    while True:
        seen = [refusals(kubectl, run) for run in runs]
        if final := [line for lines, _ in seen for line in lines]:
            for run in runs:
                delete(kubectl, run)
            raise UserError(f"the pods of {runs[0]} were refused, and it has been deleted: {final[0]}")
        if time.monotonic() > deadline:
            return list(dict.fromkeys(line for _, lines in seen for line in lines))
        time.sleep(pause)


def delete(kubectl: Kubectl, run: str) -> None:
    """Delete all objects of a run; what it has in buckets stays."""
    known = set(kubectl.run("api-resources", "--namespaced", "--verbs=delete", "-o", "name").split())
    there = ",".join(kind for kind in _LEFT_BEHIND if kind in known)
    kubectl.run("delete", there, "-l", f"{INSTANCE}={run}", "--ignore-not-found", "--wait=false")


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
    known = set(kubectl.run("api-resources", "--namespaced", "-o", "name").split())
    for resource, ending in zip(_KINDS, ("trainer", "run", "run"), strict=True):
        if resource in known and (found := kubectl.get(resource, f"{run}-{ending}")):
            return resource, found
    jobs = kubectl.items("jobs.batch", "-l", "app.kubernetes.io/name=personmae")
    runs = sorted({job["metadata"]["labels"].get(INSTANCE, "?") for job in jobs})
    raise UserError(f"there is no run {run} in namespace {kubectl.namespace}; there is {', '.join(runs) or 'none'}")


def finished(workload: Object) -> str | None:
    """'Complete' or 'Failed' with the reason, once it is over."""
    for condition in workload.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Completed", "Failed"):
            why = f": {condition['reason']}: {condition.get('message', '')}" if condition["type"] == "Failed" else ""
            return ("Failed" if condition["type"] == "Failed" else "Complete") + why
    return None


def set_suspended(kubectl: Kubectl, run: str, suspended: bool) -> None:
    """Let the pods go, with their state saved, or have them back."""
    resource, found = find(kubectl, run)
    kubectl.run(
        "patch", resource, found["metadata"]["name"], "--type", "merge", "-p", json.dumps({"spec": {"suspend": suspended}})
    )


def scale(kubectl: Kubectl, run: str, nodes: int) -> None:
    """Change the number of a Job's pods, highest indexes first.

    Raises:
        UserError: another kind, or a number that the agents' --nnodes or the batch does not admit.
    """
    resource, found = find(kubectl, run)
    if resource != "jobs.batch":
        raise UserError(
            f"only a Job changes its size while it runs; {run} is a {found['kind']}: submit it anew, it goes on where it was"
        )
    variables = kubectl.get("configmap", f"{run}-run")["data"]
    fewest, most = map(int, variables["NODES"].split(":"))
    ranks, batch = int(variables["RANKS"]), int(variables["BATCH"])
    good = [n for n in range(fewest, most + 1) if batch % (n * ranks) == 0]
    if not fewest <= nodes <= most:
        raise UserError(
            f"--nodes must be from {fewest} to {most}, as {run} was submitted; got {nodes}: for more, submit it anew"
        )
    if nodes not in good:
        raise UserError(
            f"{nodes} nodes of {ranks} ranks do not divide the batch of {batch}; give --nodes {' or '.join(map(str, good))}"
        )
    patch = json.dumps({"spec": {"parallelism": nodes, "completions": nodes}})
    kubectl.run("patch", resource, found["metadata"]["name"], "--type", "merge", "-p", patch)

"""A run's objects: which they are, what they say of it, and their deletion.

Others label their objects with ``app.kubernetes.io/instance`` too, a Helm release of the same name for one. So every object of
a run bears a label of our own, and nothing without it is changed or deleted.
"""

import re
from collections.abc import Iterable

from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object

MANAGER = "personmae"  # of the fields that are applied
RUN = "personmae/run"  # the label of our own: the run's name
SUITE = "personmae/suite"  # the same for a suite: its name, on every object of it and of its stages
INSTANCE = "app.kubernetes.io/instance"
OURS = "app.kubernetes.io/name=personmae"  # workloads and pods have it; a selector
WORKLOADS = {  # kind -> resource, and the end of the workload's name
    "Job": ("jobs.batch", "trainer"),
    "JobSet": ("jobsets.jobset.x-k8s.io", "run"),
    "TrainJob": ("trainjobs.trainer.kubeflow.org", "run"),
}
KINDS = (  # what a run may consist of, in the order of deletion
    *(resource for resource, _ in WORKLOADS.values()),
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
_OF_SOME = re.compile(r"\.(x-k8s\.io|kubeflow\.org|coreos\.com)$|^role")  # kinds that not everybody may list, or has


def is_of(run: str, item: Object) -> bool:
    """Whether an object is this run's: by our label, and for runs of before that label by who has made it."""
    metadata = item["metadata"]
    labels = metadata.get("labels", {})
    if RUN in labels:
        return labels[RUN] == run
    if labels.get(INSTANCE) != run or "app.kubernetes.io/managed-by" in labels:
        return False
    applied = any(field.get("manager") == MANAGER for field in metadata.get("managedFields", []))
    return applied or labels.get("app.kubernetes.io/name") == "personmae"


def run_of(item: Object) -> str:
    """The run of an object of ours."""
    labels = item["metadata"].get("labels", {})
    return labels.get(RUN) or labels.get(INSTANCE, "?")


def resource_of(item: Object) -> str:
    """What kubectl calls the kind of an object, e.g. ``deployment.apps``."""
    group, _, version = item["apiVersion"].partition("/")
    return f"{item['kind'].lower()}.{group}" if version else item["kind"].lower()


def path_of(item: Object) -> str:
    """What kubectl calls an object, e.g. ``deployment.apps/run-store``."""
    return f"{resource_of(item)}/{item['metadata']['name']}"


def of_run(kubectl: Kubectl, run: str) -> tuple[list[Object], list[Object]]:
    """The objects of a run in the order of deletion, and those of others that are labelled as its instance.

    Raises:
        UserError: something every run consists of may not be listed.
    """
    found, _ = _listed(kubectl, KINDS, "-l", f"{INSTANCE}={run}", "--show-managed-fields")  # both labels come together
    return [item for item in found if is_of(run, item)], [item for item in found if not is_of(run, item)]


def _listed(kubectl: Kubectl, kinds: Iterable[str], *args: str) -> tuple[list[Object], list[str]]:
    """Objects of the kinds that the cluster has, and those of ``_OF_SOME`` that this user may not list."""
    known = kubectl.kinds()
    found, refused = kubectl.items_of([kind for kind in kinds if kind in known], *args)
    if bad := [kind for kind in refused if not _OF_SOME.search(kind)]:
        kubectl.items(bad[0], *args)  # it raises in the words of the cluster
    return found, refused


def delete(kubectl: Kubectl, run: str) -> tuple[list[str], list[str]]:
    """Delete the objects of a run, its workload once its pods have saved; what it has in buckets stays.

    Returns what is deleted, and what bears its name and stays because it is not ours.
    """
    ours, others = of_run(kubectl, run)
    if ours:
        kubectl.run("delete", *map(path_of, ours), "--ignore-not-found", "--cascade=foreground", "--wait=false", "-o", "name")
    return [path_of(item) for item in ours], [path_of(item) for item in others]


def runs_of_suite(kubectl: Kubectl, suite: str) -> list[str]:
    """The runs of which something is there that bears the suite's label; without the suite itself."""
    found, _ = _listed(kubectl, KINDS, "-l", f"{SUITE}={suite}")
    return sorted({run_of(item) for item in found if item["metadata"].get("labels", {}).get(SUITE) == suite} - {suite})


def workloads(kubectl: Kubectl) -> tuple[list[Object], list[str]]:
    """All Jobs, JobSets and TrainJobs of runs, and the resources of which this user may list none."""
    items, refused = _listed(kubectl, (name for name, _ in WORKLOADS.values()), "-l", OURS)
    return [item for item in items if is_of(run_of(item), item)], refused


def upload_to(item: Object) -> str | None:
    """Where a run uploads its checkpoints; the annotation has the key's first name, which runs in clusters bear."""
    return item["metadata"].get("annotations", {}).get("personmae/store")


def finished(workload: Object) -> str | None:
    """'Complete' or 'Failed' with the reason, once it is over."""
    for condition in workload.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Completed", "Failed"):
            why = f": {condition['reason']}: {condition.get('message', '')}" if condition["type"] == "Failed" else ""
            return ("Failed" if condition["type"] == "Failed" else "Complete") + why
    return None

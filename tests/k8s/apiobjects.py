"""Stands in for an API server's memory and for its garbage collector: names, owners, deletions that take time, refusals.

It follows the documentation of Kubernetes 1.34 and what was seen of a real control plane. Objects are of one namespace.
"""

import copy
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

Object = dict[str, Any]
KINDS = {  # kind -> API version. The resource is the kind in lower case with an ending
    "ConfigMap": "v1",
    "Secret": "v1",
    "Service": "v1",
    "ServiceAccount": "v1",
    "Deployment": "apps/v1",
    "Job": "batch/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}
_FOREGROUND = "foregroundDeletion"
_HOLD = "test/held"  # a finalizer of somebody else's: what has it is being deleted until it is released


class Denied(Exception):  # noqa: N818 - an answer
    """An answer other than 2xx, with the words and the details of a real one."""

    def __init__(self, code: int, reason: str, message: str, kind: str = "", name: str = ""):
        super().__init__(message)
        self.code, self.reason, self.kind, self.name = code, reason, kind, name

    def status(self) -> Object:
        """The ``Status`` object that stands in the answer."""
        details = {"name": self.name, "kind": resource(self.kind) if self.kind else ""}
        told = {"message": str(self), "reason": self.reason, "details": details, "code": self.code}
        return {"kind": "Status", "apiVersion": "v1", "status": "Failure", **told}


def resource(kind: str) -> str:
    """The name of a kind in paths, e.g. ``networkpolicies``."""
    lower = kind.lower()
    return f"{lower[:-1]}ies" if lower.endswith("y") else f"{lower}s"


def qualified(kind: str) -> str:
    """As messages name it, e.g. ``jobs.batch``."""
    group, _, version = KINDS[kind].partition("/")
    return f"{resource(kind)}.{group}" if version else resource(kind)


def kind_of(word: str) -> str:
    """The kind that a command line or a path names: ``jobs.batch``, ``job``, ``configmaps``."""
    name = word.partition(".")[0].lower()
    return next(kind for kind in KINDS if name in (kind.lower(), resource(kind)))


def merge(item: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386): null removes."""
    if not isinstance(patch, dict):
        return patch
    old = item if isinstance(item, dict) else {}
    merged = old | {key: merge(old.get(key), value) for key, value in patch.items() if value is not None}
    return {key: value for key, value in merged.items() if patch.get(key, ...) is not None}


def matches(metadata: Object, labels: dict[str, str]) -> bool:
    """Whether an object has all of these labels."""
    return labels.items() <= metadata.get("labels", {}).items()


class Objects:
    """The objects of a namespace. ``collect`` is one turn of the garbage collector.

    ``policies`` are asked before anything is created or applied, in a dry run too. What one returns refuses the object.
    ``works`` says whether a workload with this uid still has pods, which hold back its deletion in the foreground.
    ``warnings`` has what kubectl would print as ``Warning:`` with code 0.
    """

    def __init__(self, namespace: str = "personmae") -> None:
        self.namespace = namespace
        self.held: dict[tuple[str, str], Object] = {}
        self.policies: list[Callable[[Object], str | None]] = []
        self.works: Callable[[str], bool] = lambda _: False
        self.warnings: list[str] = []
        self.lock = threading.RLock()
        self._version = 0

    def get(self, kind: str, name: str) -> Object:
        """A live object. Raises ``Denied`` with 404 where there is none."""
        if found := self.held.get((kind, name)):
            return found
        raise Denied(404, "NotFound", f'{qualified(kind)} "{name}" not found', kind, name)

    def list(self, kinds: Iterable[str], labels: dict[str, str]) -> list[Object]:
        """All objects of some kinds that have these labels."""
        wanted = set(kinds)
        return [item for (kind, _), item in self.held.items() if kind in wanted and matches(item["metadata"], labels)]

    def create(self, item: Object, *, dry_run: bool = False) -> Object:
        """What POST does: a name that is taken is refused, also by an object that is being deleted."""
        kind, name = item["kind"], item["metadata"]["name"]
        self._admit(item)
        if there := self.held.get((kind, name)):
            going = "object is being deleted: " if there["metadata"].get("deletionTimestamp") else ""
            raise Denied(409, "AlreadyExists", f'{going}{qualified(kind)} "{name}" already exists', kind, name)
        new = copy.deepcopy(item)
        new["metadata"] |= {"namespace": self.namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now()}
        new.setdefault("status", {})
        if not dry_run:
            self.held[kind, name] = self._changed(new)
        return new

    def apply(self, item: Object, *, dry_run: bool = False) -> Object:
        """What server-side apply does. An object that is being deleted is changed all the same, and goes with the change."""
        kind, name = item["kind"], item["metadata"]["name"]
        there = self.held.get((kind, name))
        if there is None:
            return self.create(item, dry_run=dry_run)
        self._admit(item)
        if there["metadata"].get("deletionTimestamp"):
            self.warnings.append(f"Detected changes to resource {name} which is currently being deleted.")
        if dry_run:
            return there
        self._replace(there, merge(there, item))
        return there

    def patch(self, kind: str, name: str, change: Object) -> Object:
        """What PATCH with a merge patch does."""
        item = self.get(kind, name)
        merged = merge(item, change)
        if kind == "Job":
            self._check_size(item, merged, name)
        self._replace(item, merged)
        self._let_go(item)
        return item

    def delete(self, kind: str, name: str, policy: str = "Background") -> None:
        """What DELETE does: at once, or once its dependents and whoever has a finalizer have let it go."""
        item = self.get(kind, name)
        metadata = item["metadata"]
        if policy == "Foreground" and _FOREGROUND not in metadata.get("finalizers", []):
            metadata.setdefault("finalizers", []).append(_FOREGROUND)
        if policy == "Orphan":
            for other in self.held.values():
                _disown(other, {metadata["uid"]})
        metadata.setdefault("deletionTimestamp", now())
        self._let_go(item)

    def hold(self, kind: str, name: str) -> None:
        """Have an object's deletion take time, until ``release``."""
        self.get(kind, name)["metadata"].setdefault("finalizers", []).append(_HOLD)

    def release(self, kind: str, name: str) -> None:
        """Let a deletion come to its end."""
        item = self.get(kind, name)
        item["metadata"]["finalizers"] = [f for f in item["metadata"].get("finalizers", []) if f != _HOLD]
        self._let_go(item)

    def collect(self) -> None:
        """One turn of the garbage collector: what has no owner left goes, and what waited for its dependents."""
        uids = {item["metadata"]["uid"]: item["metadata"].get("finalizers", []) for item in self.held.values()}
        going = {uid for uid, finalizers in uids.items() if _FOREGROUND in finalizers}
        for (kind, name), item in list(self.held.items()):
            owners = {owner["uid"] for owner in item["metadata"].get("ownerReferences", [])}
            if owners and not owners & (uids.keys() - going):
                self.delete(kind, name)
            elif owners:
                _disown(item, owners - (uids.keys() - going))
        for item in [item for item in self.held.values() if item["metadata"]["uid"] in going]:
            if not self._is_waited_for(item["metadata"]["uid"]):
                item["metadata"]["finalizers"].remove(_FOREGROUND)
                self._let_go(item)

    def _is_waited_for(self, uid: str) -> bool:
        """Whether dependents that block it, or pods, are still there."""
        dependents = [o for item in self.held.values() for o in item["metadata"].get("ownerReferences", []) if o["uid"] == uid]
        return self.works(uid) or any(owner.get("blockOwnerDeletion") for owner in dependents)

    def _admit(self, item: Object) -> None:
        kind, name = item["kind"], item["metadata"]["name"]
        for policy in self.policies:
            if told := policy(item):
                raise Denied(403, "Forbidden", f'{qualified(kind)} "{name}" is forbidden: {told}', kind, name)
        if kind == "RoleBinding" and ("Role", role := item["roleRef"]["name"]) not in self.held:
            raise Denied(404, "NotFound", f'roles.rbac.authorization.k8s.io "{role}" not found', "Role", role)
        if kind == "TrainJob" and ("TrainingRuntime", runtime := item["spec"]["runtimeRef"]["name"]) not in self.held:
            told = f'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: {runtime} not found'
            raise Denied(403, "Forbidden", told, kind, name)

    def _check_size(self, item: Object, merged: Object, name: str) -> None:
        size, old = ({k: o["spec"].get(k) for k in ("completions", "parallelism")} for o in (merged, item))
        if size["completions"] not in (old["completions"], size["parallelism"]):
            told = f'Job.batch "{name}" is invalid: spec.completions can only be modified in tandem with spec.parallelism'
            raise Denied(422, "Invalid", told, "Job", name)

    def _replace(self, item: Object, new: Object) -> None:
        """Change an object in place, for whoever holds it."""
        kept = copy.deepcopy(new)
        item.clear()
        item.update(kept)
        self._changed(item)

    def _changed(self, item: Object) -> Object:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        return item

    def _let_go(self, item: Object) -> None:
        metadata = item["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self.held.pop((item["kind"], metadata["name"]), None)


def _disown(item: Object, owners: set[str]) -> None:
    if kept := [owner for owner in item["metadata"].get("ownerReferences", []) if owner["uid"] not in owners]:
        item["metadata"]["ownerReferences"] = kept
    else:
        item["metadata"].pop("ownerReferences", None)


def now() -> str:
    """The time of the cluster, to the second."""
    return time.strftime("%FT%TZ", time.gmtime())

"""Stands in for a cluster: takes objects from ``kubectl``'s commands, and has them run by ``kubelet.py`` and ``controller.py``.

It is a ``Kubectl`` that needs none, so what talks to a cluster talks to it unchanged; it knows the commands that are used here.
As with a real server, what is deleted in the foreground stays until its pods have ended, what has lost its owner is collected,
and what is said of an object that is being deleted is a warning with code 0.
"""

import json
import re
import subprocess
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import yaml
from controller import JobController
from kubelet import Object, Pod, Surroundings, free_port

from launcher.cluster.kubectl import Kubectl
from personmae.errors import UserError

_TURN_SECONDS = 0.05
_INDEX = "batch.kubernetes.io/job-completion-index"
_RESOURCES = {
    "jobs.batch": "Job",
    "deployments.apps": "Deployment",
    "services": "Service",
    "configmaps": "ConfigMap",
    "serviceaccounts": "ServiceAccount",
    "poddisruptionbudgets.policy": "PodDisruptionBudget",
    "networkpolicies.networking.k8s.io": "NetworkPolicy",
    "roles.rbac.authorization.k8s.io": "Role",
    "rolebindings.rbac.authorization.k8s.io": "RoleBinding",
    "secrets": "Secret",
}
Labels = dict[str, set[str]]  # the values that each may have
_Key = tuple[str, str]  # kind and name


class LocalCluster(Kubectl):
    """Objects and pods on this machine, in one namespace, until ``close``.

    ``factor`` shortens the back-off before a pod or a container is replaced. Pods have their logs and volumes below ``folder``.
    Each container runs its command, or the words of shell in ``script`` and no probe.
    """

    def __init__(self, folder: Path, namespace: str = "personmae", factor: float = 1.0, script: str = "") -> None:
        self.namespace, self.command, self._shown = namespace, ["kubectl"], set()
        self._folder, self._factor, self._script = folder, factor, script
        self._objects: dict[_Key, Object] = {}
        self._services: dict[str, int] = {}
        self.controllers: dict[str, JobController] = {}
        self._others: list[Pod] = []  # of Deployments
        self.events: list[Object] = []
        self.warnings: list[str] = []  # what admission says to each thing that is applied
        self.forbidden: set[str] = set()  # resources that this user may not list
        self.collects = True  # whether the garbage collector is at work
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._said: list[str] = []  # on standard error, by the command that is being answered
        self._thread = threading.Thread(target=self._work, daemon=True, name="cluster")
        self._thread.start()

    @property
    def pods(self) -> list[Pod]:
        """All pods of all times."""
        return [pod for controller in self.controllers.values() for pod in controller.pods] + self._others

    def close(self) -> None:
        """Switch everything off."""
        self._closed.set()
        self._thread.join()
        for pod in self.pods:
            pod.kill()

    def logs(self) -> str:
        """The last words of all containers, for a failure's message."""
        files = sorted(self._folder.glob("*/*.log"))
        return "\n".join(f"--- {f.parent.name} {f.name}\n{f.read_text(errors='replace')[-5000:]}" for f in files)

    def kinds(self) -> set[str]:
        return {*_RESOURCES} - {"secrets"}

    def may(self, verb: str, resource: str) -> bool:
        return True

    def _call(self, *args: str, text: str | None = None, seconds: int | None = None) -> "subprocess.CompletedProcess[str]":
        """What ``kubectl ARGS`` would do and say, however long that takes."""
        if args[0] == "exec":
            return next(pod for pod in self.pods if pod.name == args[1]).run(args[3], [*args[5:]])
        with self._lock:
            self._said, code, out = [], 0, ""
            try:
                out = self._answer(args, text)
            except UserError as error:
                self._said.append(f"Error from server: {error}")
            code = int(any(line.startswith("Error") for line in self._said))
            return subprocess.CompletedProcess([*args], code, out, "".join(f"{line}\n" for line in self._said))

    def _answer(self, args: tuple[str, ...], text: str | None) -> str:
        match args:
            case ("apply", *_):
                for item in yaml.safe_load(text or "")["items"]:
                    self._apply(item, _option([*args], "--field-manager"), dry_run="--dry-run=server" in args)
                return ""
            case ("get", "--raw", path, *_):
                return self._proxied(path)
            case ("get", *rest):
                return self._get(rest)
            case ("logs", *rest):
                return self._logs(_selector(rest), _option(rest, "-c"))
            case ("patch", kind, name, "--type", "merge", "-p", patch):
                self._patch(_kind(kind), name, json.loads(patch))
                return ""
            case ("create", "--raw", path, "-f", "-"):
                return self._evict(re.sub(r".*/pods/([^/]+)/eviction", r"\1", path))
            case ("delete", "pod", name, *_):
                next(pod for pod in self.pods if pod.name == name).delete()
                return ""
            case ("delete", *rest):
                return self._delete(rest)
        raise NotImplementedError(f"the stand-in knows no kubectl {' '.join(args)}")

    def _apply(self, item: Object, manager: str, *, dry_run: bool) -> None:
        """Server-side apply: what is there keeps its identity, even while it is being deleted."""
        kind, name = item["kind"], item["metadata"]["name"]
        self._said += [f"Warning: {line}" for line in self.warnings]
        there = self._objects.get((kind, name))
        if there and "deletionTimestamp" in there["metadata"]:
            self._said.append(f"Warning: Detected changes to resource {name} which is currently being deleted.")
        if dry_run:
            return
        if there:
            merged = _merge(there, item)
            there.clear()
            there.update(merged)
            return
        applied = {"manager": manager, "operation": "Apply"}
        own = {"uid": str(uuid.uuid4()), "namespace": self.namespace, "creationTimestamp": _now(), "managedFields": [applied]}
        item["metadata"] |= own
        item["status"] = {}
        self._objects[kind, name] = item
        if kind == "Service" and item["spec"].get("clusterIP") != "None":
            self._services |= {f"{name}:{port['port']}": free_port() for port in item["spec"]["ports"]}

    def _get(self, args: list[str]) -> str:
        """The one that is named, or a list; with the managers of fields only where these are asked for."""
        words = [word for word in args[: args.index("-l")] if word] if "-l" in args else args
        names = [word for word in words if not word.startswith("-") and word != "json"]
        whole = "--show-managed-fields" in args
        if names[0] == "pods":
            there = [pod for pod in self.pods if not (pod.ended and pod.deleted)]  # the others' objects are gone
            return json.dumps({"items": [p.to_object() for p in there if _matches(p.metadata, _selector(args))]})
        if names[0] == "events":
            return json.dumps({"items": self.events})
        if "/" not in names[0] and len(names) == 2:
            names = ["/".join(names)]
        if "/" in names[0]:
            keys = [(_kind(resource), name) for resource, name in (word.split("/") for word in names)]
            found = [_shown(self._objects[key], whole) for key in keys if key in self._objects]
            if len(keys) == 1:
                return json.dumps(found[0]) if found else ""
        else:
            found = [_shown(self._objects[key], whole) for key in self._listed(names[0], _selector(args))]
        return json.dumps({"kind": "List", "items": found})

    def _listed(self, resources: str, labels: Labels) -> list[_Key]:
        """Keys of the objects of several resources; those that may not be listed are told of, and the others returned."""
        asked = resources.split(",")
        for resource in self.forbidden.intersection(asked):
            told = f'{resource} is forbidden: User "me" cannot list resource "{resource.partition(".")[0]}"'
            self._said.append(f'Error from server (Forbidden): {told} in the namespace "{self.namespace}"')
        kinds = {_kind(resource) for resource in asked if resource not in self.forbidden}
        return [key for key, item in self._objects.items() if key[0] in kinds and _matches(item["metadata"], labels)]

    def _proxied(self, path: str) -> str:
        """What a pod's port answers, through the API server."""
        match = re.fullmatch(r"/api/v1/namespaces/[^/]+/pods/([^/:]+):(\d+)/proxy(/.*)", path)
        assert match, path
        pod = next(pod for pod in self.pods if pod.name == match[1])
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{pod.local_port(int(match[2]))}{match[3]}", timeout=1) as answer:
                return answer.read().decode()
        except OSError as error:
            raise UserError(f"error trying to reach service: {error}") from error

    def _logs(self, labels: Labels, container: str) -> str:
        files = [pod.folder / f"{container}.log" for pod in self.pods if _matches(pod.metadata, labels)]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def _patch(self, kind: str, name: str, patch: Object) -> None:
        item = self._objects[kind, name]
        merged = _merge(item, patch)
        size = {name: merged["spec"][name] for name in ("completions", "parallelism")} if kind == "Job" else {}
        if size and item["spec"]["completions"] != size["completions"] != size["parallelism"]:
            raise UserError("spec.completions can only be modified in tandem with spec.parallelism")
        item.clear()
        item.update(merged)

    def _evict(self, name: str) -> str:
        """What the eviction API does: ask the disruption budget, mark the pod, delete it."""
        pod = next(pod for pod in self.pods if pod.name == name)
        for (kind, _), budget in self._objects.items():
            if kind == "PodDisruptionBudget" and _matches(pod.metadata, labels := budget["spec"]["selector"]["matchLabels"]):
                ready = [p for p in self.pods if p.ready and not p.deleted and _matches(p.metadata, labels)]
                if pod in ready and len(ready) <= budget["spec"]["minAvailable"]:
                    raise UserError("Cannot evict pod as it would violate the pod's disruption budget.")
        pod.conditions["DisruptionTarget"] = "EvictionByEvictionAPI"
        pod.delete()
        return ""

    def _delete(self, args: list[str]) -> str:
        """Names of what is deleted, or is marked and stays until its pods have ended."""
        if "-l" in args:
            keys = self._listed(args[0], _selector(args))
        else:
            named = [word.split("/") for word in args if "/" in word]
            keys = [(_kind(resource), name) for resource, name in named if (_kind(resource), name) in self._objects]
        for key in keys:
            if "--cascade=foreground" in args and key[0] in ("Job", "Deployment"):
                self._objects[key]["metadata"].setdefault("deletionTimestamp", _now())
            else:
                del self._objects[key]
        return "".join(f"{kind.lower()}/{name}\n" for kind, name in keys)

    def _work(self) -> None:
        while not self._closed.wait(_TURN_SECONDS):
            with self._lock:
                if self.collects:
                    self._collect()
                self._begin()
                for pod in self.pods:
                    pod.turn()
                for uid, controller in self.controllers.items():
                    if uid in self._uids():
                        controller.turn()

    def _uids(self) -> set[str]:
        return {item["metadata"]["uid"] for item in self._objects.values()}

    def _collect(self) -> None:
        """What the garbage collector does: it deletes what has lost its owner, and owners whose pods are gone."""
        there = self._uids()
        going = {item["metadata"]["uid"] for item in self._objects.values() if "deletionTimestamp" in item["metadata"]}
        for pod in self.pods:
            if _owners(pod.metadata) & going or not _owners(pod.metadata) & there:
                pod.delete()
        held = {uid for pod in self.pods if not pod.ended for uid in _owners(pod.metadata)}
        for key, item in list(self._objects.items()):
            owners, uid = _owners(item["metadata"]), item["metadata"]["uid"]
            if (uid in going and uid not in held) or (owners and not owners & there):
                del self._objects[key]

    def _begin(self) -> None:
        """Give new Jobs their controller and Deployments the pods that they lack."""
        for (kind, name), item in list(self._objects.items()):
            uid = item["metadata"]["uid"]
            if kind == "Job" and uid not in self.controllers:
                self.controllers[uid] = JobController(item, self._creator(item), self._factor)
            elif kind == "Deployment" and "deletionTimestamp" not in item["metadata"]:
                own = [pod for pod in self._others if uid in _owners(pod.metadata) and not (pod.ended or pod.deleted)]
                self._others += [self._pod(item, name, {}) for _ in range(item["spec"]["replicas"] - len(own))]
                item["status"]["readyReplicas"] = sum(pod.ready for pod in own)

    def _creator(self, job: Object) -> Any:
        def create(index: int, failures: dict[str, str]) -> Pod:
            name = job["metadata"]["name"]
            labels = {"batch.kubernetes.io/job-name": name, _INDEX: str(index)}
            return self._pod(job, f"{name}-{index}", {"labels": labels, "annotations": {_INDEX: str(index)} | failures})

        return create

    def _pod(self, owner: Object, stem: str, told: Object) -> Pod:
        template, name = owner["spec"]["template"], f"{stem}-{uuid.uuid4().hex[:5]}"
        reference = {"kind": owner["kind"], "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        own = {"name": name, "namespace": self.namespace, "creationTimestamp": _now(), "ownerReferences": [reference]}
        metadata = _merge({"labels": {}, "annotations": {}}, _merge(template.get("metadata", {}), told)) | own
        ports = {}
        for (kind, service), item in self._objects.items():
            if kind == "Service" and _matches(metadata, item["spec"]["selector"]):
                for port in item["spec"]["ports"]:
                    if local := self._services.get(f"{service}:{port['port']}"):
                        ports[_target(template["spec"], port)] = local
        spec = _scripted(template["spec"], self._script) if self._script else template["spec"]
        around = Surroundings(lambda kind, name: self._objects[kind, name], self._services, self._factor)
        folder = self._folder / name
        folder.mkdir(parents=True)
        return Pod(metadata, spec, folder, around, ports)


def _now() -> str:
    return time.strftime("%FT%TZ", time.gmtime())


def _kind(resource: str) -> str:
    """The kind of a resource, however it is called: ``jobs.batch``, ``job``, ``networkpolicies``."""
    head = resource.partition(".")[0]
    return next(kind for name, kind in _RESOURCES.items() if head in (name.partition(".")[0], kind.lower()))


def _shown(item: Object, whole: bool) -> Object:
    """As kubectl prints it."""
    hidden = set() if whole else {"managedFields"}
    return item | {"metadata": {key: value for key, value in item["metadata"].items() if key not in hidden}}


def _owners(metadata: Object) -> set[str]:
    return {reference["uid"] for reference in metadata.get("ownerReferences", [])}


def _scripted(pod: Object, script: str) -> Object:
    """A pod whose containers do something simpler."""
    command = {"command": ["/usr/bin/tini", "--", "sh", "-c", script], "args": []}

    def simple(container: Object) -> Object:
        return {key: value for key, value in container.items() if not key.endswith("Probe")} | command

    return pod | {"containers": [simple(each) for each in pod["containers"]], "initContainers": []}


def _target(pod: Object, port: Object) -> int:
    ports = [p for c in pod["containers"] for p in c.get("ports", [])]
    return next(p["containerPort"] for p in ports if port["targetPort"] in (p.get("name"), p["containerPort"]))


def _option(args: list[str], name: str) -> str:
    return args[args.index(name) + 1]


def _selector(args: list[str]) -> Labels:
    if "-l" not in args:
        return {}
    found = {}
    for part in re.findall(r"[^,( ]+ in \([^)]*\)|[^,]+", _option(args, "-l")):
        key, values = part.split(" in ") if " in " in part else part.split("=")
        found[key] = set(values.strip("()").split(","))
    return found


def _matches(metadata: Object, labels: Labels | dict[str, str]) -> bool:
    own = metadata.get("labels", {})
    return all(own.get(key) in ({value} if isinstance(value, str) else value) for key, value in labels.items())


def _merge(item: Any, patch: Any) -> Any:
    """A JSON merge patch."""
    if not (isinstance(item, dict) and isinstance(patch, dict)):
        return patch
    merged = item | {key: _merge(item.get(key), value) for key, value in patch.items()}
    return {key: value for key, value in merged.items() if patch.get(key, value) is not None}

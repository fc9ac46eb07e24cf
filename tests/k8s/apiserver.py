"""Stands in for a cluster: takes objects from ``kubectl``'s commands, and has them run by ``kubelet.py`` and ``controller.py``.

It is a ``Kubectl`` that needs none, so what talks to a cluster talks to it unchanged; it knows the commands that are used here.
"""

import json
import re
import threading
import time
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


class LocalCluster(Kubectl):
    """Objects and pods on this machine, in one namespace, until ``close``.

    ``factor`` shortens the back-off before a pod or a container is replaced. Pods have their logs and volumes below ``folder``.
    """

    def __init__(self, folder: Path, namespace: str = "personmae", factor: float = 1.0) -> None:
        self.namespace, self._folder, self._factor = namespace, folder, factor
        self._objects: dict[tuple[str, str], Object] = {}
        self._services: dict[str, int] = {}
        self.controllers: dict[str, JobController] = {}
        self._others: list[Pod] = []  # of Deployments
        self._lock, self._closed = threading.RLock(), threading.Event()
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
        return {"jobs.batch", "deployments.apps", "services", "configmaps", "serviceaccounts", "poddisruptionbudgets.policy"}

    def run(self, *args: str, text: str | None = None, seconds: int | None = None) -> str:
        """What ``kubectl ARGS`` would do and say, however long that takes."""
        with self._lock:
            match args:
                case ("apply", *_):
                    for item in yaml.safe_load(text or "")["items"]:
                        self._apply(item)
                    return ""
                case ("get", "pods", *rest):
                    there = [pod for pod in self.pods if not (pod.ended and pod.deleted)]  # the others' objects are gone
                    return json.dumps({"items": [p.to_object() for p in there if _matches(p.metadata, _selector(rest))]})
                case ("get", kind, name, *_):
                    found = self._objects.get((_kind(kind), name))
                    return json.dumps(found) if found else ""
                case ("patch", kind, name, "--type", "merge", "-p", patch):
                    self._patch(_kind(kind), name, json.loads(patch))
                    return ""
                case ("create", "--raw", path, "-f", "-"):
                    return self._evict(re.sub(r".*/pods/([^/]+)/eviction", r"\1", path))
                case ("delete", "pod", name, *_):
                    next(pod for pod in self.pods if pod.name == name).delete()
                    return ""
                case ("delete", *_):
                    self._delete(_selector(list(args)))
                    return ""
        if args[0] == "exec":
            name, container, command = args[1], args[3], [*args[5:]]
            done = next(pod for pod in self.pods if pod.name == name).run(container, command)
            if done.returncode:
                raise UserError(f"kubectl exec was refused: {done.stderr}")
            return done.stdout
        raise NotImplementedError(f"the stand-in knows no kubectl {' '.join(args)}")

    def _apply(self, item: Object) -> None:
        kind, name = item["kind"], item["metadata"]["name"]
        item["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
        item["status"] = {}
        self._objects[kind, name] = item
        if kind == "Service" and item["spec"].get("clusterIP") != "None":
            self._services |= {f"{name}:{port['port']}": free_port() for port in item["spec"]["ports"]}

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

    def _delete(self, labels: dict[str, str]) -> None:
        for key, item in list(self._objects.items()):
            if _matches(item["metadata"], labels):
                del self._objects[key]
        for pod in self.pods:
            if _matches(pod.metadata, labels):
                pod.delete()

    def _work(self) -> None:
        while not self._closed.wait(_TURN_SECONDS):
            with self._lock:
                self._begin()
                for pod in self.pods:
                    pod.turn()
                for controller in self.controllers.values():
                    controller.turn()

    def _begin(self) -> None:
        """Give new Jobs their controller and new Deployments their pods."""
        known = {pod.metadata.get("owner") for pod in self._others}
        for (kind, name), item in self._objects.items():
            uid = item["metadata"]["uid"]
            if kind == "Job" and uid not in self.controllers:
                self.controllers[uid] = JobController(item, self._creator(item), self._factor)
            elif kind == "Deployment" and uid not in known:
                self._others += [self._pod(item, name, {"owner": uid}) for _ in range(item["spec"]["replicas"])]

    def _creator(self, job: Object) -> Any:
        def create(index: int, failures: dict[str, str]) -> Pod:
            name = job["metadata"]["name"]
            labels = {"batch.kubernetes.io/job-name": name, _INDEX: str(index)}
            return self._pod(job, f"{name}-{index}", {"labels": labels, "annotations": {_INDEX: str(index)} | failures})

        return create

    def _pod(self, owner: Object, stem: str, told: Object) -> Pod:
        template, name = owner["spec"]["template"], f"{stem}-{uuid.uuid4().hex[:5]}"
        own = {"name": name, "namespace": self.namespace, "creationTimestamp": _now()}
        metadata = _merge({"labels": {}, "annotations": {}}, _merge(template.get("metadata", {}), told)) | own
        ports = {}
        for (kind, service), item in self._objects.items():
            if kind == "Service" and _matches(metadata, item["spec"]["selector"]):
                for port in item["spec"]["ports"]:
                    if local := self._services.get(f"{service}:{port['port']}"):
                        ports[_target(template["spec"], port)] = local
        around = Surroundings(lambda kind, name: self._objects[kind, name], self._services, self._factor)
        folder = self._folder / name
        folder.mkdir(parents=True)
        return Pod(metadata, template["spec"], folder, around, ports)


def _now() -> str:
    return time.strftime("%FT%TZ", time.gmtime())


def _kind(resource: str) -> str:
    kinds = ("Job", "Deployment", "Service", "ConfigMap", "ServiceAccount", "PodDisruptionBudget", "Secret")
    singular = resource.partition(".")[0].removesuffix("s")
    return next(kind for kind in kinds if kind.lower() == singular)


def _target(pod: Object, port: Object) -> int:
    ports = [p for c in pod["containers"] for p in c.get("ports", [])]
    return next(p["containerPort"] for p in ports if port["targetPort"] in (p.get("name"), p["containerPort"]))


def _selector(args: list[str]) -> dict[str, str]:
    return dict(part.split("=") for part in args[args.index("-l") + 1].split(",")) if "-l" in args else {}


def _matches(metadata: Object, labels: dict[str, str]) -> bool:
    return labels.items() <= metadata.get("labels", {}).items()


def _merge(item: Any, patch: Any) -> Any:
    """A JSON merge patch."""
    if not (isinstance(item, dict) and isinstance(patch, dict)):
        return patch
    return item | {key: _merge(item.get(key), value) for key, value in patch.items()}

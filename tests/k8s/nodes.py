"""Nodes for a real API server that has none: its pods are processes of this machine.

Server, controllers and scheduler are the cluster's own. What a kubelet does is done here: containers are started, probed,
asked to end and reported (``kubelet.py``), in a network of their own (``network.py``), and their logs are served. Names of
services are in each pod's /etc/hosts. What it does not do: pull images, exec, and enforce limits.
"""

import base64
import contextlib
import http.client
import http.server
import json
import re
import ssl
import subprocess
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubelet import Container, Object, Pod, Surroundings
from network import GATEWAY, Network, forward

_TURN_SECONDS, _LEASE_SECONDS = 0.2, 10.0
_TOKEN_SECONDS = 86400
_ROOM = {"cpu": "64", "memory": "1Ti", "ephemeral-storage": "10Ti", "pods": "110", "nvidia.com/gpu": "8"}
_AWAY = (urllib.error.URLError, http.client.HTTPException, OSError)  # the server restarts now and then


class Api:
    """The API server as the user of a kubeconfig, through ``kubectl proxy``, which knows every way of logging in."""

    def __init__(self, kubeconfig: str) -> None:
        command = ["kubectl", "--kubeconfig", kubeconfig, "proxy", "--port=0"]
        self._proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._proxy.stdout
        line = self._proxy.stdout.readline()
        found = re.search(r"127\.0\.0\.1:\d+", line)
        assert found, line
        self._url = f"http://{found[0]}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> Any:
        """The answer; None where there is no such object. Raises ``HTTPError`` for any other refusal."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._url + path, data, {"Content-Type": kind}, method=method)
        try:
            with self._opener.open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                error.msg = error.read(2000).decode(errors="replace")
            raise

    def close(self) -> None:
        with self._proxy:
            self._proxy.kill()


@dataclass
class Here:
    """A pod that runs here."""

    path: str
    uid: str
    pod: Pod
    told: Object = field(default_factory=dict)  # its status, as the server knows it
    times: dict[tuple[str, int, str], str] = field(default_factory=dict)  # when a container began or ended first


class Nodes:
    """Nodes ``names`` of the cluster of ``kubeconfig``, ready until ``close``. Pods have their logs below ``folder``."""

    def __init__(self, kubeconfig: str, folder: Path, names: tuple[str, ...] = ("node-a", "node-b", "node-c")) -> None:
        self.faults: list[str] = []  # what went wrong here, for the test to see
        self._folder, self._names = folder, names
        self._api, self._network = Api(kubeconfig), Network()
        self._forward = forward(kubeconfig)
        self._here: dict[str, Here] = {}
        self._hosts: dict[str, str] = {}
        self._renewed = 0.0
        self._closed = threading.Event()
        self._logs = serve_logs(self, folder)
        for name in names:
            self._register(name)
        self._thread = threading.Thread(target=self._work, daemon=True, name="nodes")
        self._thread.start()

    @property
    def pods(self) -> list[Pod]:
        """Those that the server still knows."""
        return [here.pod for here in self._here.values()]

    def logs(self) -> str:
        """The last words of all containers of all times, for a failure's message."""
        files = sorted(self._folder.glob("*/*.log"))
        return "\n".join(f"--- {f.parent.name} {f.name}\n{f.read_text(errors='replace')[-4000:]}" for f in files)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        for here in self._here.values():
            here.pod.kill()
        for name in self._names:
            with contextlib.suppress(*_AWAY):
                self._api.ask("DELETE", f"/api/v1/nodes/{name}")
        for server in (self._logs, self._forward):
            server.shutdown()
            server.server_close()
        self._network.close()
        self._api.close()

    def _register(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": {}}
        if not self._api.ask("GET", f"/api/v1/nodes/{name}"):
            self._api.ask("POST", "/api/v1/nodes", node)
        now = _now()
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "a stand-in is ready"}
        status = {
            "capacity": _ROOM,
            "allocatable": _ROOM,
            "addresses": [{"type": "InternalIP", "address": GATEWAY}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._logs.server_address[1]}},
            "conditions": [ready | {"lastHeartbeatTime": now, "lastTransitionTime": now}],
        }
        self._patch(f"/api/v1/nodes/{name}/status", {"status": status})
        self._patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        self._renew(name)

    def _patch(self, path: str, body: Object) -> Any:
        return self._api.ask("PATCH", path, body, "application/strategic-merge-patch+json")

    def _renew(self, name: str) -> None:
        """Say that a node lives, or its pods would be taken away."""
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": _now().replace("Z", ".000000Z")}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": spec}
        if self._api.ask("PATCH", f"{leases}/{name}", {"spec": spec}, "application/merge-patch+json") is None:
            self._api.ask("POST", leases, lease)

    def _work(self) -> None:
        while not self._closed.wait(_TURN_SECONDS):
            try:
                self._turn()
            except _AWAY:
                continue
            except Exception:  # the thread must not end, and the test has to hear of it
                self.faults.append(traceback.format_exc())

    def _turn(self) -> None:
        if time.monotonic() - self._renewed > _LEASE_SECONDS:
            for name in self._names:
                self._renew(name)
            self._renewed = time.monotonic()
        listed = self._api.ask("GET", "/api/v1/pods")["items"]
        ours = {item["metadata"]["uid"]: item for item in listed if item["spec"].get("nodeName") in self._names}
        for uid in self._here.keys() - ours.keys():
            here = self._here.pop(uid)
            here.pod.kill()
            self._network.remove(here.pod.place)
        for uid, item in ours.items():
            if uid not in self._here and item["status"].get("phase") not in ("Succeeded", "Failed"):
                self._begin(uid, item)
        self._name()
        for uid, here in list(self._here.items()):
            with contextlib.suppress(urllib.error.HTTPError):  # it is gone, or somebody was faster: the next turn looks again
                self._look(here, ours[uid])

    def _begin(self, uid: str, item: Object) -> None:
        """Start a pod, unless it is to go already, or what it mounts is not there yet."""
        metadata = item["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        if metadata.get("deletionTimestamp"):
            self._remove(path, uid)
            return
        folder = self._folder / metadata["name"]
        folder.mkdir(parents=True, exist_ok=True)
        around = Surroundings(lambda kind, name: self._find(metadata["namespace"], kind, name))
        token = next((v["name"] for v in item["spec"].get("volumes", []) if "projected" in v), None)
        place = self._network.add(
            folder, item["spec"].get("hostname", metadata["name"]), account=folder / token if token else None
        )
        try:
            pod = Pod({"labels": {}, "annotations": {}} | metadata, item["spec"], folder, around, {}, place)
            for volume in item["spec"].get("volumes", []):
                self._project(metadata["namespace"], item["spec"], volume, folder)
        except LookupError as lacking:
            self._network.remove(place)
            self._wait_for(path, item, str(lacking))
            return
        self._here[uid] = Here(path, uid, pod)

    def _wait_for(self, path: str, item: Object, what: str) -> None:
        waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": what}}
        states = [_told(c, waiting) for c in item["spec"]["containers"]]
        self._patch(f"{path}/status", {"status": {"phase": "Pending", "containerStatuses": states}})

    def _find(self, namespace: str, kind: str, name: str) -> Object:
        found = self._api.ask("GET", f"/api/v1/namespaces/{namespace}/{kind.lower()}s/{name}")
        if found is None:
            raise LookupError(f'{kind.lower()} "{name}" not found')
        if kind == "Secret":
            held = {key: base64.b64decode(value).decode() for key, value in found.get("data", {}).items()}
            return found | {"data": held}
        return found

    def _project(self, namespace: str, spec: Object, volume: Object, folder: Path) -> None:
        """A service account's token, with what else is in its volume."""
        for source in volume.get("projected", {}).get("sources", []):
            target = folder / volume["name"]
            if "serviceAccountToken" in source:
                path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{spec['serviceAccountName']}/token"
                asked = {"spec": {"expirationSeconds": _TOKEN_SECONDS}}
                given = self._api.ask("POST", path, asked)
                (target / source["serviceAccountToken"]["path"]).write_text(given["status"]["token"])
            elif "configMap" in source:
                held = self._find(namespace, "ConfigMap", source["configMap"]["name"])["data"]
                for part in source["configMap"]["items"]:
                    (target / part["path"]).write_text(held[part["key"]])
            else:
                for part in source["downwardAPI"]["items"]:
                    assert part["fieldRef"]["fieldPath"] == "metadata.namespace"
                    (target / part["path"]).write_text(namespace)

    def _name(self) -> None:
        """Write into each pod's /etc/hosts which address a service has at present."""
        services = self._api.ask("GET", "/api/v1/services")["items"]
        for here in self._here.values():
            namespace = here.pod.metadata["namespace"]
            lines = ["127.0.0.1 localhost", f"{here.pod.place.address} {here.pod.name}", f"{GATEWAY} kubernetes.default.svc"]
            for service in services:
                name, where = service["metadata"]["name"], service["metadata"]["namespace"]
                behind = self._behind(service) if where == namespace else None
                if behind:
                    lines.append(f"{behind.place.address} {name} {name}.{where} {name}.{where}.svc")
            text = "\n".join([*lines, ""])
            if self._hosts.get(here.uid) != text:
                (here.pod.folder / "hosts").write_text(text)  # in place: it is mounted
                self._hosts[here.uid] = text

    def _behind(self, service: Object) -> Pod | None:
        """The first ready pod of a service."""
        selector, namespace = service["spec"].get("selector"), service["metadata"]["namespace"]
        for pod in self.pods:
            fits = selector and selector.items() <= pod.metadata["labels"].items()
            if fits and pod.metadata["namespace"] == namespace and pod.ready and not pod.deleted:
                return pod
        return None

    def _look(self, here: Here, item: Object) -> None:
        """One turn of a pod: what the server asks for, what its containers do, what the server is told."""
        pod = here.pod
        pod.metadata = {"labels": {}, "annotations": {}} | item["metadata"]
        if item["metadata"].get("deletionTimestamp"):
            pod.delete()
        pod.turn()
        status = _status(here)
        if status != here.told:
            self._patch(f"{here.path}/status", {"metadata": {"uid": here.uid}, "status": status})
            here.told = status
        if pod.ended and pod.deleted:
            self._remove(here.path, here.uid)

    def _remove(self, path: str, uid: str) -> None:
        self._api.ask("DELETE", path, {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})


def _now() -> str:
    return time.strftime("%FT%TZ", time.gmtime())


def _status(here: Here) -> Object:
    """As a kubelet tells it."""
    pod = here.pod
    began = here.times.setdefault(("", 0, "pod"), _now())
    conditions = []
    for kind, holds in (("PodReadyToStartContainers", True), ("Initialized", _initialized(pod)), ("Ready", pod.ready)):
        value = str(holds)
        changed = here.times.setdefault((kind, 0, value), _now())
        conditions.append({"type": kind, "status": value, "lastTransitionTime": changed})
        here.times.pop((kind, 0, str(not holds)), None)
    conditions.append(conditions[-1] | {"type": "ContainersReady"})
    status = {
        "phase": pod.phase,
        "hostIP": GATEWAY,
        "podIP": pod.place.address,
        "podIPs": [{"ip": pod.place.address}],
        "startTime": began,
        "conditions": conditions,
    }
    names = [c["name"] for c in pod.spec.get("initContainers", [])]
    for key, inits in (("initContainerStatuses", True), ("containerStatuses", False)):
        found = [_container(here, c) for c in pod.containers if (c.name in names) is inits]
        if found:
            status[key] = found
    return status


def _initialized(pod: Pod) -> bool:
    names = {c["name"] for c in pod.spec.get("initContainers", [])}
    return all(c.started if c.sidecar else c.code == 0 for c in pod.containers if c.name in names)


def _container(here: Here, container: Container) -> Object:
    when = {"startedAt": here.times.setdefault((container.name, container.restarts, "began"), _now())}
    if container.code is not None:
        why = "Completed" if container.code == 0 else "Error"
        ended = here.times.setdefault((container.name, container.restarts, "ended"), _now())
        state = {"terminated": {"exitCode": container.code, "reason": why, "finishedAt": ended} | when}
    elif container.begun:
        state = {"running": when}
    else:
        here.times.pop((container.name, container.restarts, "began"))
        state = {"waiting": {"reason": "PodInitializing"}}
    more = {"ready": container.ready and container.code is None, "restartCount": container.restarts}
    return _told(container.spec, state) | more | {"started": container.started and container.code is None}


def _told(container: Object, state: Object) -> Object:
    whose = {"name": container["name"], "image": container["image"], "imageID": ""}
    return whose | {"ready": False, "restartCount": 0, "state": state}


def serve_logs(nodes: Nodes, folder: Path) -> http.server.ThreadingHTTPServer:
    """A kubelet's server, for what ``kubectl logs`` asks; ``--since`` is not heeded, since lines have no times here."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            asked = dict(urllib.parse.parse_qsl(parts.query))
            _, what, namespace, name, wanted = parts.path.split("/")
            found = [p for p in nodes.pods if (p.metadata["namespace"], p.name) == (namespace, name)]
            container = next((c for p in found for c in p.containers if c.name == wanted), None)
            if what != "containerLogs" or container is None:
                return self.send_error(404)
            if not container.begun:
                told = f'container "{wanted}" in pod "{name}" is waiting to start: PodInitializing'
                return self._answer(400, told.encode())
            file = found[0].folder / f"{wanted}.log"
            text = file.read_bytes()
            if int(asked.get("tailLines", -1)) >= 0:
                text = b"".join(text.splitlines(keepends=True)[-int(asked["tailLines"]) or len(text) :])
            self._answer(200, text)
            with contextlib.suppress(OSError):
                self._follow(container, file) if asked.get("follow") == "true" else None
            return None

        def _answer(self, code: int, text: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(text)

        def _follow(self, container: Container, file: Path) -> None:
            with open(file, "rb") as log:
                log.seek(0, 2)
                while True:
                    over = container.code is not None
                    if text := log.read():
                        self.wfile.write(text)
                        self.wfile.flush()
                    elif over:
                        return
                    time.sleep(0.2)

    folder.mkdir(parents=True, exist_ok=True)
    key, certificate = folder / "kubelet.key", folder / "kubelet.crt"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kubelet"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer((GATEWAY, 0), Handler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

"""Stands in for the kubelet: the containers of a pod as processes of this machine, treated as its manifest says.

Commands, variables, mounted config maps, init containers, sidecars, probes, restarts, signals and the grace are the
manifest's; nothing of the test's own environment reaches a container. There is one address for all pods, so ports become
free ones, and paths of volumes become folders, wherever a command, a variable or a mounted file names them.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sample_requests import ROOT

Object = dict[str, Any]
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 10.0, 300.0  # of a container that is restarted in its pod
_INDEX = "batch.kubernetes.io/job-completion-index"
_VOLUMES = {"name", "emptyDir", "configMap", "projected"}
_MACHINE = {  # what the image and the node are: no GPU, few cores
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass(frozen=True)
class Surroundings:
    """What a pod finds: objects by kind and name, services as ``name:port`` with their local ports, how long a back-off is."""

    find: Callable[[str, str], Object]
    services: dict[str, int] = field(default_factory=dict)
    factor: float = 1.0  # of the back-off alone: probes and the grace end pods, and a busy machine is slow


@dataclass(frozen=True)
class Place:
    """Where a pod's processes run: its address, and the command that takes one of them there.

    Where all pods share an address, ports that they listen at become free ones.
    """

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()

    def port(self, wanted: int) -> int:
        return wanted if self.prefix else free_port()


class Container:
    """One container: a process, or the next after it, its probes, and its exit code as a container runtime tells it."""

    def __init__(self, pod: "Pod", spec: Object, *, init: bool) -> None:
        self.name, self.spec, self._pod = spec["name"], spec, pod
        self.sidecar = init and spec.get("restartPolicy") == "Always"
        self._again_and_again = self.sidecar or (not init and not pod.once)
        self.code: int | None = None
        self.restarts = 0
        self.killed = False  # it did not end within its grace
        self.sick = ""
        self.started = self.ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._again, self._deadline = 0.0, float("inf")

    @property
    def begun(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        command = [self._pod.expand(part, self) for part in (*self.spec["command"], *self.spec.get("args", []))]
        assert command[:2] == ["/usr/bin/tini", "--"], "what tini does, this class does: one child gets the signals"
        self.code, self.sick, self._deadline = None, "", float("inf")
        self.started, self.ready = "startupProbe" not in self.spec, "readinessProbe" not in self.spec
        with open(self._pod.folder / f"{self.name}.log", "ab") as log:
            inside = [*self._pod.place.prefix, *command[2:]]
            environ = self._pod.environment(self.spec)
            self._process = subprocess.Popen(inside, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        for kind in ("startup", "liveness", "readiness"):
            if f"{kind}Probe" in self.spec:
                threading.Thread(target=self._probe, args=(kind, self._process), daemon=True).start()

    def turn(self) -> None:
        """Take note of its end, end it when it is sick or late, start it again."""
        if not self._process:
            return
        if self.code is None and (code := self._process.poll()) is not None:
            self.code, self.ready = code if code >= 0 else 128 - code, False
            delay = min(_BACKOFF_SECONDS * 2 ** (self.restarts - 1), _LONGEST_BACKOFF_SECONDS) if self.restarts else 0.0
            self._again = time.monotonic() + delay * self._pod.around.factor
        elif self.code is None and self.sick:
            self.stop()
        if self.code is None and time.monotonic() > self._deadline:
            self.killed = True
            self._process.kill()
        if self.code is not None and self._again_and_again and not self._pod.leaving and time.monotonic() > self._again:
            self.restarts += 1
            self.start()

    def stop(self) -> None:
        """SIGTERM now, once, and SIGKILL when the pod's grace is over."""
        if self._process and self.code is None and self._deadline == float("inf"):
            self._deadline = time.monotonic() + self._pod.spec.get("terminationGracePeriodSeconds", 30)
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _probe(self, kind: str, process: subprocess.Popen[bytes]) -> None:
        probe, failures = self.spec[f"{kind}Probe"], 0
        while kind != "startup" and not self.started:
            if process.poll() is not None:
                return
            time.sleep(0.05)
        time.sleep(probe.get("initialDelaySeconds", 0))
        while process.poll() is None:
            good = self._answers(probe)
            failures = 0 if good else failures + 1
            lost = failures >= probe.get("failureThreshold", 3)
            if kind == "readiness":
                self.ready = process.poll() is None and (good or (self.ready and not lost))
            elif kind == "startup" and good:
                self.started = True
                return
            elif lost:
                self.sick = f"its {kind} probe has failed {failures} times"
                return
            time.sleep(probe.get("periodSeconds", 10))

    def _answers(self, probe: Object) -> bool:
        seconds = probe.get("timeoutSeconds", 1)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if "httpGet" in probe:
                where, path = self._pod.place.address, probe["httpGet"]["path"]
                url = f"http://{where}:{self._pod.port(self.spec, probe['httpGet']['port'])}{path}"
                urllib.request.urlopen(url, timeout=seconds).close()
            elif "tcpSocket" in probe:
                address = (self._pod.place.address, self._pod.port(self.spec, probe["tcpSocket"]["port"]))
                socket.create_connection(address, timeout=seconds).close()
            else:
                return self._pod.run(self.name, probe["exec"]["command"], seconds).returncode == 0
            return True
        return False


class Pod:
    """A pod on a node of its own, from its template; ``turn`` is called again and again."""

    def __init__(
        self,
        metadata: Object,
        spec: Object,
        folder: Path,
        around: Surroundings,
        ports: dict[int, int],
        place: Place = Place(),
    ) -> None:
        self.metadata, self.spec, self.folder, self.around, self._ports = metadata, spec, folder, around, ports
        self.place = place
        self.conditions: dict[str, str] = {}  # those that somebody else sets, with their reasons
        self.phase = "Pending"
        self.deleted = ""  # or when
        assert spec.get("restartPolicy", "Always") != "OnFailure", "a restart policy that the stand-in does not know"
        self.once = spec.get("restartPolicy") == "Never"
        self._inits = [Container(self, spec, init=True) for spec in spec.get("initContainers", [])]
        self._mains = [Container(self, spec, init=False) for spec in spec["containers"]]
        self.containers = [*self._inits, *self._mains]
        parts = [part for c in self.containers for part in (*c.spec["command"], *c.spec.get("args", []))]
        listening = {int(part.removeprefix("--port=")) for part in parts if part.startswith("--port=")}
        for port in listening | {p["containerPort"] for c in self.containers for p in c.spec.get("ports", [])}:
            self._ports.setdefault(port, place.port(port))
        self._paths = self._mount()
        self._path = _any_of((re.escape(path) for path in self._paths), before=r"(?<![\w/.-])", after=r"(?![\w.-])")
        self._service = _any_of((re.escape(name) for name in around.services), before=r"\b", after=r"\b")
        self._port = _any_of(map(str, self._ports), before=r"(?<![\w.])", after=r"(?!\w)")
        self._write_configs()

    @property
    def name(self) -> str:
        return self.metadata["name"]

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def leaving(self) -> bool:
        """Whether no container is started any more."""
        return self.ended or bool(self.deleted) or (self.once and self._over())

    @property
    def ready(self) -> bool:
        return not self.ended and all(c.begun and c.code is None and c.ready for c in self._mains)

    @property
    def index(self) -> int:
        return int(self.metadata["annotations"][_INDEX])

    def codes(self) -> dict[str, int]:
        """Exit codes of the containers that have ended."""
        return {c.name: c.code for c in self.containers if c.code is not None}

    def delete(self) -> None:
        """Ask it to end in good order."""
        self.deleted = self.deleted or time.strftime("%FT%TZ", time.gmtime())

    def turn(self) -> None:
        """Look at the containers and do what follows."""
        if self.ended:
            return
        for container in self.containers:
            container.turn()
        if not self.leaving:
            self._begin()
        if self.deleted:
            for container in self.containers:
                if not container.sidecar:
                    container.stop()
        if not self._over():
            return
        running = [c for c in self.containers if c.begun and c.code is None]
        for container in running:  # sidecars
            container.stop()
        if not running:
            done = all(c.begun and c.code == 0 for c in self._mains)
            self.phase = "Succeeded" if done else "Failed"

    def _begin(self) -> None:
        """Start the first container whose turn it is: init containers one after the other, then all the others."""
        for container in self._inits:
            if not container.begun:
                container.start()
            if not (container.started if container.sidecar else container.code == 0):
                return
        for container in self._mains:
            if not container.begun:
                container.start()
                self.phase = "Running"

    def _over(self) -> bool:
        """Whether nothing of it but sidecars runs, and nothing will."""
        own = [c for c in self.containers if not c.sidecar]
        if any(c.begun and c.code is None for c in own):
            return False
        failed = any(c.code for c in self._inits if not c.sidecar)
        return bool(self.deleted) or (self.once and (failed or all(c.begun for c in self._mains)))

    def kill(self) -> None:
        """The node is switched off."""
        self.delete()
        for container in self.containers:
            container.kill()
        self.turn()

    def run(self, container: str, command: list[str], seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """A command in a container."""
        spec = next(c.spec for c in self.containers if c.name == container)
        return subprocess.run(
            [*self.place.prefix, *(self._here(part) for part in command)],
            cwd=ROOT,
            env=self.environment(spec),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def local_port(self, number: int) -> int:
        """The port of this machine behind one of the pod's."""
        return self._ports[number]

    def port(self, container: Object, named: str | int) -> int:
        """The local port behind a container's port, or the name of one."""
        found = [p["containerPort"] for p in container.get("ports", []) if named in (p.get("name"), p["containerPort"])]
        return self._ports[found[0]]

    def expand(self, text: str, container: Container) -> str:
        """A part of a command with its variables, as it is to be run here."""
        return self._here(_expand(text, self._variables(container.spec)))

    def environment(self, container: Object) -> dict[str, str]:
        temporary = self._paths.get("/tmp", self.folder)  # no other file system is put over this machine's /tmp
        own = {name: self._moved(value) for name, value in self._variables(container).items()}
        given = {"HOSTNAME": self.name, "TMPDIR": str(temporary)}
        if _INDEX in self.metadata.get("annotations", {}):
            given["JOB_COMPLETION_INDEX"] = str(self.index)
        return _MACHINE | given | own

    def _variables(self, container: Object) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            kind, reference = ("ConfigMap", "configMapRef") if "configMapRef" in source else ("Secret", "secretRef")
            held = self.around.find(kind, source[reference]["name"])
            found |= held.get("data", {}) | held.get("stringData", {})
        for item in container.get("env", []):
            told = item["value"] if "value" in item else self._field(item["valueFrom"]["fieldRef"]["fieldPath"])
            found[item["name"]] = _expand(told, found)
        return found

    def _field(self, path: str) -> str:
        if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return self.metadata[match[1]][match[2]]
        return {"status.podIP": self.place.address}.get(path) or self.metadata[path.removeprefix("metadata.")]

    def _mount(self) -> dict[str, Path]:
        """Make the volumes; returns where each of their paths lies."""
        held = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        paths = {}
        for mount in [m for c in self.containers for m in c.spec.get("volumeMounts", [])]:
            assert set(held[mount["name"]]) <= _VOLUMES, f"a volume that the stand-in does not know: {held[mount['name']]}"
            paths[mount["mountPath"]] = self.folder / mount["name"]
            paths[mount["mountPath"]].mkdir(parents=True, exist_ok=True)
        return paths

    def _write_configs(self) -> None:
        """Mount the config maps as they are now."""
        for volume in self.spec.get("volumes", []):
            if "configMap" in volume:
                for name, text in self.around.find("ConfigMap", volume["configMap"]["name"])["data"].items():
                    (self.folder / volume["name"] / name).write_text(self._moved(text))

    def _moved(self, text: str) -> str:
        return self._path.sub(lambda m: str(self._paths[m[0]]), text)

    def _here(self, text: str) -> str:
        """A command's part with services, ports and paths as they are here."""
        text = self._service.sub(lambda m: f"127.0.0.1:{self.around.services[m[0]]}", text)
        return self._moved(self._port.sub(lambda m: str(self._ports[int(m[0])]), text))

    def to_object(self) -> Object:
        """As an API server tells it."""
        conditions = [{"type": kind, "status": "True", "reason": why} for kind, why in self.conditions.items()]
        conditions.append({"type": "Ready", "status": str(self.ready)})
        status = {"phase": self.phase, "podIP": self.place.address, "conditions": conditions}
        for name, containers in (("initContainerStatuses", self._inits), ("containerStatuses", self._mains)):
            status[name] = [
                {"name": c.name, "ready": c.ready, "restartCount": c.restarts, "state": _state(c)} for c in containers
            ]
        metadata = self.metadata | ({"deletionTimestamp": self.deleted} if self.deleted else {})
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec, "status": status}


def _any_of(patterns: Iterable[str], *, before: str, after: str) -> re.Pattern[str]:
    """The longest of several patterns in these surroundings; of none, one that matches nothing."""
    chosen = "|".join(sorted(patterns, key=len, reverse=True)) or "(?!)"
    return re.compile(f"{before}(?:{chosen}){after}")


def _state(container: Container) -> Object:
    if container.code is not None:
        return {"terminated": {"exitCode": container.code}}
    return {"running": {}} if container.begun else {"waiting": {"reason": "PodInitializing"}}


def _expand(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda m: variables.get(m[1], m[0]), text)

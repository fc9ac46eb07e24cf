"""``personmae logs``: what the containers of a run print; with ``-f`` across pods that replace each other, until the run ends.

``kubectl logs -f`` follows the pods that it finds and ends with them. So here the pods are looked at again and again, and each
container that begins is followed by a kubectl of its own, the first ones together.
"""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from launcher.cluster import deployed, pods
from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from launcher.cluster.objects import INSTANCE, OURS, finished
from personmae.errors import UserError, has_lost_reader

PAUSE_SECONDS = 2.0
_LOST_SECONDS = 5.0  # a connection that has ended is taken up again where its container still runs then
_LAST_SECONDS = 10.0  # for what is still under way when the run is over
_MISSES = 30  # looks in a row without an answer
_REFUSALS = 30  # kubectls in a row that fail before they print a line
_AT_REST = ("Running", "Succeeded", "-")
_MOST = "--max-log-requests=200"
Part = tuple[str, str]  # a pod and one of its containers


@dataclass(frozen=True)
class Request:
    """What is asked for: a run, perhaps one index of it, perhaps nothing older than ``since``."""

    run: str
    containers: Sequence[str]  # empty: all of them
    index: int | None = None
    since: str | None = None

    @property
    def selector(self) -> str:
        own = f"{INSTANCE}={self.run},{OURS},app.kubernetes.io/component=trainer"
        return own if self.index is None else f"{own},{pods.INDEX}={self.index}"


def show(kubectl: Kubectl, run: str, *, index: int | None, since: str | None, follow: bool) -> None:
    """Print the logs of a run.

    Raises:
        UserError: there is no such run, or kubectl has failed; its own words are on standard error.
        BrokenPipeError: nobody reads them any more.
    """
    resource, found = deployed.find(kubectl, run)
    fetches = found["metadata"].get("labels", {}).get("personmae/fetches")  # it may have failed before training began
    request = Request(run, [] if fetches else [deployed.trainer(found)], index, since)
    if follow:
        _Follower(kubectl, request, resource, found).follow()
    else:
        _print(kubectl, request)


def _print(kubectl: Kubectl, request: Request) -> None:
    there = kubectl.items("pods", "-l", request.selector)
    if not _parts(request, there):
        print(f"{request.run}: no container has begun: {_waiting(there)}", file=sys.stderr, flush=True)
        return
    containers = ["-c", request.containers[0]] if request.containers else ["--all-containers"]
    since = [f"--since={request.since}"] if request.since else []
    command = ["logs", "-l", request.selector, *containers, "--prefix", "--tail=-1", _MOST, "--ignore-errors", *since]
    code = subprocess.run([*kubectl.command, *command], check=False).returncode
    if code and has_lost_reader(sys.stdout):
        raise BrokenPipeError
    if code:
        raise UserError(f"kubectl logs ended with code {code}; its own words are above")


def _parts(request: Request, there: list[Object]) -> list[Part]:
    """The containers that are asked for and have begun."""
    return [
        (pod["metadata"]["name"], name)
        for pod in there
        for name in pods.begun(pod)
        if not request.containers or name in request.containers
    ]


def _waiting(there: list[Object]) -> str:
    """What keeps pods from running, in a line."""
    size = max(map(pods.index_of, there), default=-1) + 1
    rows = pods.by_index(there, size, time.time(), alive=True)
    waiting: dict[str, list[str]] = {}  # words -> the indexes that they are of
    for row in rows:
        if row["phase"] not in _AT_REST:
            waiting.setdefault(f"{row['phase']}, {row['reason']}", []).append(f"index {row['index']}")
    lines = [f"{deployed.several(of)}: {words}" for words, of in waiting.items()]
    return "; ".join(lines[:3]) + (" ..." if len(lines) > 3 else "") or "there is no pod yet"


@dataclass
class _Stream:
    """A kubectl that follows some containers."""

    parts: list[Part]
    process: "subprocess.Popen[str]"
    printer: threading.Thread
    printed: threading.Event
    ended: float | None = None  # of time.monotonic


@dataclass
class _Follower:
    """Follows the containers of a run until it is over."""

    kubectl: Kubectl
    request: Request
    resource: str
    workload: Object
    lock: threading.Lock = field(default_factory=threading.Lock)
    unread: threading.Event = field(default_factory=threading.Event)
    streams: list[_Stream] = field(default_factory=list)
    known: set[Part] = field(default_factory=set)
    refusals: int = 0
    said: str = ""

    def follow(self) -> None:
        """Print until the run is over.

        Raises:
            UserError: the cluster does not answer, or shows no logs, for too long.
            BrokenPipeError: nobody reads them any more.
        """
        try:
            self._follow()
        finally:
            for stream in self.streams:
                with contextlib.suppress(ProcessLookupError):
                    stream.process.terminate()
                stream.process.wait()
                stream.printer.join()
        if self.unread.is_set():
            raise BrokenPipeError

    def _follow(self) -> None:
        misses, end = 0, None
        while not end and not self.unread.is_set():
            try:
                found = self.kubectl.get(self.resource, self.workload["metadata"]["name"])
                there = self.kubectl.items("pods", "-l", self.request.selector)
                misses = 0
            except UserError as error:  # API servers are restarted
                misses += 1
                if misses == _MISSES:
                    raise
                self._say(f"the cluster did not answer, and is asked again: {error}")
                self.unread.wait(PAUSE_SECONDS)
                continue
            end = "it is deleted" if not _is_same(found, self.workload) else finished(found)
            self._take(there)
            if not end:
                self._tell(found or {}, there)
                self.unread.wait(PAUSE_SECONDS)
        self._drain()
        if end and not self.unread.is_set():
            print(f"{self.request.run}: {end}", file=sys.stderr, flush=True)

    def _take(self, there: list[Object]) -> None:
        """Follow the containers that have begun since the last look, and those whose connection was lost."""
        parts = _parts(self.request, there)
        running = [part for part in parts if _runs(there, part)]
        for stream in self.streams:
            if stream.ended is None and stream.process.poll() is not None:
                stream.ended = time.monotonic()
                self._count(stream)
            lost = stream.ended is not None and time.monotonic() - stream.ended > _LOST_SECONDS
            for part in [part for part in stream.parts if lost and part in running]:
                stream.parts.remove(part)
                self._start([part], [f"--since={time.monotonic() - (stream.ended or 0) + 1:.0f}s"])
        fresh = [part for part in parts if part not in self.known]
        since = [f"--since={self.request.since}"] if self.request.since and not self.known else []
        together = self.request.containers and not self.known and len(fresh) > 1
        for group in [fresh] if together else [[part] for part in fresh]:
            self._start(group, since)
        self.known.update(fresh)

    def _count(self, stream: _Stream) -> None:
        """Count failures in a row: a right that is missing never comes by itself."""
        self.refusals = self.refusals + 1 if stream.process.returncode and not stream.printed.is_set() else 0
        if self.refusals == _REFUSALS:
            raise UserError(f"kubectl logs has failed {_REFUSALS} times in a row; its own words are above")

    def _start(self, parts: list[Part], since: list[str]) -> None:
        """Follow containers: one by its name, several by what selects them all."""
        pod, container = parts[0]
        named = [pod] if len(parts) == 1 else ["-l", self.request.selector, "--tail=-1", _MOST, "--ignore-errors"]
        command = [*self.kubectl.command, "logs", *named, "-c", container, "--prefix", "--follow", *since]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
        assert process.stdout
        printed = threading.Event()
        printer = threading.Thread(target=self._print, args=(process.stdout, printed), daemon=True)
        printer.start()
        self.streams.append(_Stream(parts, process, printer, printed))

    def _print(self, lines: IO[str], printed: threading.Event) -> None:
        """Pass on whole lines, of several streams in turn."""
        with lines:
            for line in lines:
                printed.set()
                with self.lock:
                    try:
                        sys.stdout.write(line)
                        sys.stdout.flush()
                    except (BrokenPipeError, ValueError):
                        self.unread.set()
                        return

    def _tell(self, workload: Object, there: list[Object]) -> None:
        """A word where there is nothing to follow, which would look like a run that is silent."""
        if has_lost_reader(sys.stdout):
            self.unread.set()
        elif not any(_runs(there, part) for part in _parts(self.request, there)):
            suspended = workload.get("spec", {}).get("suspend")
            self._say(f"waiting: {f'it is suspended: personmae resume {self.request.run}' if suspended else _waiting(there)}")

    def _say(self, line: str) -> None:
        """On standard error, and again only where something else than a number has changed."""
        if re.sub(r"\d+", "", line) != self.said:
            self.said = re.sub(r"\d+", "", line)
            print(f"{self.request.run}: {line}", file=sys.stderr, flush=True)

    def _drain(self) -> None:
        deadline = time.monotonic() + _LAST_SECONDS
        for stream in self.streams:
            stream.printer.join(max(0.0, deadline - time.monotonic()))


def _is_same(found: Object | None, workload: Object) -> bool:
    return found is not None and found["metadata"].get("uid") == workload["metadata"].get("uid")


def _runs(there: list[Object], part: Part) -> bool:
    """Whether a container is at work."""
    for pod in there:
        status = pod.get("status", {})
        for each in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            if (pod["metadata"]["name"], each["name"]) == part:
                return "running" in each.get("state", {})
    return False

"""A network for pods that are processes of this machine: a bridge, and for each pod a namespace with an address of its own.

It needs root. What it makes is gone after ``close``.
"""

import contextlib
import json
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import urllib.parse
from pathlib import Path

from kubelet import Place

GATEWAY = "10.78.0.1"  # this machine, for the pods
_ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"


def missing() -> str:
    """What this machine lacks for such a network, or nothing."""
    if os.geteuid():
        return "root"
    lacking = [name for name in ("ip", "unshare", "openssl", "kubectl") if not shutil.which(name)]
    if lacking:
        return ", ".join(lacking)
    done = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False)
    return "leave to make namespaces" if done.returncode else ""


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


class Network:
    """The bridge, and who is on it."""

    def __init__(self) -> None:
        self._tag, self._count, self._names = f"pm{os.getpid() % 10**6}", 0, set[str]()
        ip("link", "add", self._tag, "type", "bridge")
        ip("address", "add", f"{GATEWAY}/16", "dev", self._tag)
        ip("link", "set", self._tag, "up")

    def add(self, folder: Path, hostname: str, *, account: Path | None = None) -> Place:
        """A namespace for a pod, whose ``folder`` holds its /etc/hosts and perhaps what its service account is given."""
        self._count += 1
        name, end = f"{self._tag}n{self._count}", f"{self._tag}v{self._count}"
        address = f"10.78.{1 + self._count // 250}.{1 + self._count % 250}"
        ip("netns", "add", name)
        self._names.add(name)
        ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", end, "master", self._tag, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "address", "add", f"{address}/16", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        steps = [f"hostname {hostname}", f"mount --bind {folder}/hosts /etc/hosts"]
        if account:
            steps += ["mount -t tmpfs none /run", f"mkdir -p {_ACCOUNT}", f"mount --bind {account} {_ACCOUNT}"]
        prepare = " && ".join([*steps, 'exec "$@"'])
        return Place(address, ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", prepare, "sh"))

    def remove(self, place: Place) -> None:
        name = place.prefix[3]
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "delete", name)
        self._names.discard(name)

    def close(self) -> None:
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
        ip("link", "delete", self._tag)


def forward(kubeconfig: str) -> socketserver.ThreadingTCPServer:
    """What pods reach as kubernetes.default.svc: port 443 of the gateway leads to the API server of ``kubeconfig``."""
    view = ["kubectl", "--kubeconfig", kubeconfig, "config", "view", "--minify", "-o", "json"]
    told = json.loads(subprocess.run(view, check=True, capture_output=True, text=True).stdout)
    server = urllib.parse.urlsplit(told["clusters"][0]["cluster"]["server"])
    where = (server.hostname, server.port or 443)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.create_connection(where, 10) as other:
                other.settimeout(None)
                back = threading.Thread(target=_copy, args=(other, self.request), daemon=True)
                back.start()
                _copy(self.request, other)
                back.join()

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    listening = socketserver.ThreadingTCPServer((GATEWAY, 443), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    return listening


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)

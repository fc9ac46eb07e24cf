"""An S3 server whose faults a test decides: moto in a process of its own, and before it a proxy that spoils answers."""

import contextlib
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

HOST = "127.0.0.1"
_BLOCK = 1 << 14


@dataclass
class Fault:
    """What becomes of the next ``times`` answers to requests whose path matches ``path``.

    With ``error`` (HTTP status, S3 code) the server is not asked. Otherwise ``what`` happens once ``after_bytes`` of the body
    are sent: "reset" and "close" end the connection, "stall" sends nothing for ``seconds``, "flip" changes the next byte.
    Requests signed with the access key ``spares`` are left alone.
    """

    path: str = r"\.mds$"
    times: float = float("inf")
    error: tuple[int, str] | None = None
    what: Literal["reset", "close", "stall", "flip"] | None = None
    after_bytes: int = 0
    seconds: float = 60.0
    spares: str = ""


@dataclass
class Request:
    """What came from a client, and how much of a body went back."""

    path: str
    authorization: str
    first_byte: int
    num_sent: int = 0


@dataclass
class FaultProxy:
    """Hands each connection's one request on to ``upstream`` and its answer back, faults applied; a thread for each."""

    upstream: int
    port: int = 0
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    def of(self, path: str) -> list[Request]:
        """The requests whose path matches."""
        return [request for request in list(self.requests) if re.search(path, request.path)]

    def start(self) -> None:
        """Listen; on the same port as before, if it has listened before."""
        self._stopped = threading.Event()
        self._listener = socket.create_server((HOST, self.port), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="fault proxy")]
        self._threads[0].start()

    def stop(self) -> None:
        """Listen no more and end all connections."""
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._handle, args=(client,), name="fault proxy", daemon=True))
                self._threads[-1].start()

    def _handle(self, client: socket.socket) -> None:
        with client, contextlib.suppress(ConnectionError, TimeoutError):  # the client may go at any time
            client.settimeout(5)
            if not (head := _head(client)):
                return
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            range_ = re.match(r"bytes=(\d+)-", headers.get("range", ""))
            request = Request(lines[0].split()[1], headers.get("authorization", ""), int(range_[1]) if range_ else 0)
            self.requests.append(request)
            fault = self._next_fault(request)
            if fault.error:
                client.sendall(_error(*fault.error))
                return
            with socket.create_connection((HOST, self.upstream), timeout=30) as server:
                server.sendall(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head[:-2]) + b"Connection: close\r\n\r\n")
                client.sendall(_head(server))
                self._relay_body(request, fault, server, client)

    def _next_fault(self, request: Request) -> Fault:
        with self._lock:
            for fault in self.faults:
                spared = fault.spares and f"Credential={fault.spares}/" in request.authorization
                if fault.times > 0 and re.search(fault.path, request.path) and not spared:
                    fault.times -= 1
                    return fault
        return Fault()

    def _relay_body(self, request: Request, fault: Fault, server: socket.socket, client: socket.socket) -> None:
        def relay(count: float, spoiled: int = 0) -> None:
            while count > 0 and not self._stopped.is_set() and (block := server.recv(int(min(count, _BLOCK)))):
                client.sendall(bytes([block[0] ^ spoiled]) + block[1:])
                request.num_sent += len(block)
                count -= len(block)

        relay(fault.after_bytes if fault.what else float("inf"))
        match fault.what:
            case "flip":
                relay(1, spoiled=1)
                relay(float("inf"))
            case "stall":
                self._stopped.wait(fault.seconds)
                relay(float("inf"))
            case "reset":
                self._stopped.wait(0.05)  # a reset takes back what has not been received
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _head(connection: socket.socket) -> bytes:
    """Everything before the body, byte by byte: what follows stays in the socket."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (byte := connection.recv(1)):
        head += byte
    return head


def _error(status: int, code: str) -> bytes:
    """An answer as S3 gives it."""
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>as the test asked</Message></Error>'
    head = ["HTTP/1.1 {status} {code}", "Connection: close", "Content-Type: application/xml", "Content-Length: {length}"]
    return "\r\n".join([*head, "", xml]).format(status=status, code=code, length=len(xml)).encode()


@contextmanager
def moto_process() -> Iterator[int]:
    """An S3 server of its own process; yields its port."""
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _answers(f"http://{HOST}:{port}/moto-api/"), seconds=60)
        yield port
    finally:
        server.kill()
        server.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    """Return once a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.01)

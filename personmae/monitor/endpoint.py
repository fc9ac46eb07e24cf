"""A small HTTP server in a background thread, for probes and for Prometheus."""

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

LOOPBACK = "127.0.0.1"
ALL = "all"  # every interface, by IPv6 and IPv4 where the host has both
Answer = Callable[[], tuple[int, bytes]]


class _Server(ThreadingHTTPServer):
    """For clients of IPv6 and of IPv4, on hosts that have both or either."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        dual = socket.has_dualstack_ipv6() if host == ALL else ":" in host
        self.address_family = socket.AF_INET6 if dual else socket.AF_INET
        super().__init__(("" if host == ALL else host, port), handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer's looks up the host's name, which nothing here needs and may take long


def serve(host: str, port: int, answers: Mapping[str, Answer]) -> ThreadingHTTPServer:
    """Answer GET by path with a code and a text, until ``shutdown`` is called on the returned server.

    ``host`` is an address of this host, or ``all``.

    Raises:
        OSError: the port is taken or not allowed, or the address is not of this host.
    """
    known = f"{', '.join(answers)}\n".encode()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # for a client that opens a connection and says nothing

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a probe waits only so long
                super().handle()

        def do_GET(self) -> None:
            code, body = answers.get(self.path.partition("?")[0], lambda: (404, known))()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = _Server(host, port, Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True, name="endpoint").start()
    return server


def health(sick: str) -> tuple[int, bytes]:
    """The answer of ``/healthz``: 200, or 503 with what is wrong."""
    return (503 if sick else 200), f"{sick or 'ok'}\n".encode()


def readiness(ready: bool) -> tuple[int, bytes]:
    """The answer of ``/readyz``."""
    return (200, b"training\n") if ready else (503, b"not training\n")

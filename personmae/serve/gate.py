"""What every request passes first: its host, its origin, its size and its rate. Every answer gets headers that protect it.

Starlette's own limits of a form are for fields alone: a file of any size is read, and written to the disk beyond 1 MB.
So the body is bounded here, by what it announces and again while it arrives.
"""

import asyncio
import contextlib
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personmae.serve.limits import Limits, Places, Rates, Refusal, later

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
_ENCODED: Final = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_DRAIN_BYTES, _DRAIN_SECONDS = 128_000_000, 10.0  # of a refused body that are read, so that the client hears the answer
_READING: Final = ("GET", "HEAD")
Guard = Callable[[Request], Awaitable[None]]


class Gate:
    """An app behind these checks. ``hosts`` are the names by which it may be called, None for any.

    ``guard`` raises a Refusal for who may not see the page. Such a client holds no place, however slowly it sends.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Iterable[str] | None, guard: Guard | None = None):
        self._app, self._limits, self._guard = app, limits, guard
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._rates, self._places = Rates(limits.burst, limits.per_second), Places(limits.inside, limits.inside_each)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = Body(receive, self._limits, is_whole=scope["method"] in _READING)

        has_begun = False

        async def answer(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                await body.drain()
                has_begun = True
                message = {**message, "headers": [*message.get("headers", []), *_ENCODED]}
            await send(message)

        try:
            self._require_known(Headers(scope=scope))
            if self._guard:
                await self._guard(Request(scope))
            if scope["method"] in _READING:  # of the answer to HEAD the server sends the headers alone
                await self._app({**scope, "method": "GET"}, body.receive, answer)
            else:
                self._require_sound(scope)
                with self._places.one(client_of(scope)):
                    await self._app(scope, body.receive, answer)
        except Refusal as refusal:
            await refusal.response()(scope, body.receive, answer)
        except asyncio.CancelledError:  # the server ends, and has waited for this request as long as it does
            body.give_up()
            if not has_begun:
                await Refusal(503, "the server ends: ask whoever runs it").response()(scope, body.receive, answer)

    def _require_known(self, headers: Headers) -> None:
        """A page of another site cannot be this server under another name, which its own DNS points here (DNS rebinding)."""
        name = host_of(headers.get("host", ""))
        if self._hosts is not None and name not in self._hosts and not is_address(name):
            raise Refusal(400, "this server does not go by that name: use the address that it printed when it was started")

    def _require_sound(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        require_same_origin(headers)
        if wait := self._rates.take(client_of(scope)):
            raise later(429, f"too many requests: wait {math.ceil(wait)} s and try again", wait)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.body:
            raise too_large(self._limits)


def client_of(scope: Scope) -> str:
    """The address that a request comes from, or its network: who has one IPv6 address has at least 2 ** 64 of them."""
    host = (scope.get("client") or ("", 0))[0]
    with contextlib.suppress(ValueError):
        if (address := ipaddress.ip_address(host.partition("%")[0])).version == 6:
            return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return host


class Body:
    """The body of a request on its way in, bounded in bytes and seconds."""

    def __init__(self, receive: Receive, limits: Limits, *, is_whole: bool = False):
        self._receive, self._limits, self._is_whole, self._bytes = receive, limits, is_whole, 0
        self._until = time.monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            Refusal: 413, there is too much of it, or 408, it comes too slowly.
        """
        if self._is_whole:
            return await self._receive()
        try:
            message = await self._next(self._until)
        except TimeoutError:
            raise Refusal(408, f"an upload may take {self._limits.body_seconds:g} s: use a smaller image") from None
        if self._bytes > self._limits.body:
            raise too_large(self._limits)
        return message

    def give_up(self) -> None:
        """Read nothing more."""
        self._is_whole = True

    async def drain(self) -> None:
        """Read what is left and keep nothing. A client that still writes would not read the answer."""
        until = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(TimeoutError):
            while not self._is_whole and self._bytes < _DRAIN_BYTES:
                await self._next(until)

    async def _next(self, until: float) -> Message:
        message = await asyncio.wait_for(self._receive(), max(0.0, until - time.monotonic()))
        self._bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)  # also once the client has gone
        return message


def too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"at most {limits.body / 1e6:g} MB are taken at once: use a smaller image, or fewer")


def require_same_origin(headers: Headers) -> None:
    """Raise a Refusal where another site's page sends a request, or nobody says who does."""
    origin = _parts(headers.get("origin", "")).netloc.lower()
    if not origin or origin != headers.get("host", "").lower():
        raise Refusal(403, "only this page itself may send that. A program has to send an Origin header with this address")


def host_of(header: str) -> str:
    """The name or address in a Host header, without its port."""
    return (_parts(f"//{header}").hostname or "").lower()


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that hold no address
        return urlsplit("")


def is_address(name: str) -> bool:
    """Whether a host is an address and no name. No site's DNS can point an address elsewhere."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False

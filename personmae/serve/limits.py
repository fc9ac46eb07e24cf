"""What a visitor may ask of the page, and the refusal of everything else."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from starlette.responses import JSONResponse

MOST_CLIENTS: Final = 4096  # whose rates are remembered


@dataclass(frozen=True)
class Limits:
    """How much is taken.

    ``body`` bytes of a request. ``pixels`` of an uploaded image, and how many ``images`` are taken as one person. ``inside``
    requests with a body are read and worked on at once, ``inside_each`` of one client. A body has ``body_seconds`` to arrive,
    a request line ``header_seconds``. A client may send ``burst`` requests at once and ``per_second`` after that, and try
    ``passwords`` wrong ones before it has to wait ``password_seconds`` for each.
    """

    body: int = 10_000_000
    pixels: int = 24_000_000
    images: int = 8
    inside: int = 8
    inside_each: int = 4
    body_seconds: float = 30.0
    header_seconds: float = 15.0
    burst: int = 40
    per_second: float = 2.0
    passwords: int = 10
    password_seconds: float = 10.0


class Refusal(Exception):  # noqa: N818 - names what it is
    """A request that is not served, in one line: what was required, and what to do. ``headers`` go with the answer."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None):
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers or {}

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.text}, self.status, self.headers)


def later(status: int, text: str, seconds: float) -> Refusal:
    """A refusal that says after how many seconds to come again."""
    return Refusal(status, text, {"Retry-After": str(max(1, math.ceil(seconds)))})


class Rates:
    """How often each client may do something: a bucket of tokens for each address."""

    def __init__(self, burst: float, per_second: float, clock: Callable[[], float] = time.monotonic):
        self._burst, self._per_second, self._clock = burst, per_second, clock
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def wait(self, client: str) -> float:
        """How many seconds a client has to wait for its next token. Nothing is taken."""
        return max(0.0, (1 - self._level(client)) / self._per_second)

    def take(self, client: str) -> float:
        """Take a token, and 0 is returned. Without one: the seconds until there is one."""
        level = self._level(client)
        self._buckets.pop(client, None)
        self._buckets[client] = (level - 1 if level >= 1 else level, self._clock())
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if level >= 1 else (1 - level) / self._per_second

    def _level(self, client: str) -> float:
        level, at = self._buckets.get(client, (self._burst, self._clock()))
        return min(self._burst, level + (self._clock() - at) * self._per_second)


class Places:
    """So many at once, a part of them for one client, and no queue behind them."""

    def __init__(self, most: int, most_each: int):
        self._most, self._most_each = most, most_each
        self._taken: collections.Counter[str] = collections.Counter()

    @property
    def taken(self) -> int:
        """How many are held."""
        return self._taken.total()

    @contextlib.contextmanager
    def one(self, client: str) -> Iterator[None]:
        """Hold a place.

        Raises:
            Refusal: 503, all are taken, or the client has its part of them.
        """
        if self.taken >= self._most or self._taken[client] >= self._most_each:
            raise later(
                503, f"at most {self._most} requests are worked on at once, {self._most_each} of one client: try again soon", 2
            )
        self._taken[client] += 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            self._taken += collections.Counter()  # forgets who has none

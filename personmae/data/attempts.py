"""How long a store is asked again for what it does not give: until it comes, or is wrong, or has been silent for too long."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from personmae.data.counters import StreamCounters
from personmae.errors import UserError
from personmae.system import retry
from personmae.system.retry import Patience

MAX_BAD_FETCHES = 3  # in a row, of one shard, with a wrong hash or expired credentials
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 30.0
_OF_AN_AGENT = "PERSONMAE_HEARTBEAT_DIR"  # heartbeat.DIRECTORY, set for ranks of an agent. Data knows no heartbeat
_BAD = ("hash", "expired")  # what comes back is wrong, and waiting does not help

T = TypeVar("T")


def persist(call: Callable[[], T], location: str, retry_seconds: float, counters: StreamCounters) -> T:
    """Make a small request of a store, and repeat it where the failure may pass. A wrong address is an error at once.

    But not below an agent: it may start ranks again while the store is away for a moment, and the run should go on.

    Raises:
        UserError: it cannot be had.
    """
    return retry.retry(call, Attempts(location, retry_seconds, counters).wait, _reason_of_request)


def _reason_of_request(error: Exception) -> str | None:
    from botocore.exceptions import EndpointConnectionError

    nobody_there = isinstance(error.__cause__, EndpointConnectionError) and _OF_AN_AGENT not in os.environ
    if nobody_there or not isinstance(error, UserError):
        return None
    reason = retry.passing_reason(error)
    return reason if reason not in _BAD else None


class Attempts:
    """When to try a read again, and when to give up."""

    def __init__(
        self,
        location: str,
        retry_seconds: float,
        counters: StreamCounters,
        pause: Callable[[float], bool] | None = None,
    ):
        self.location, self._retry_seconds, self._counters, self._bad = location, retry_seconds, counters, 0

        def delays() -> Iterator[float]:
            return retry.growing(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS, jitter=(0.5, 1.5))

        self._patience = Patience(delays, seconds=retry_seconds, pause=pause, log=self._log)

    def wait(self, error: Exception, *, progress: bool = False) -> bool:
        """Wait before the next try. Where bytes have come since the last one (``progress``), delays begin anew.

        Raises:
            UserError: it has been tried for long enough. The shard and the cause are named.
        """
        reason = retry.passing_reason(error) or ""
        self._bad = self._bad + 1 if reason in _BAD else 0
        if progress and not self._bad:
            self._patience.restart()
        if self._bad >= MAX_BAD_FETCHES or (not self._bad and self._patience.is_over):
            raise self._give_up(reason, error) from error
        self._counters.retries.labels(reason).inc()
        return self._patience.wait(error)

    def _log(self, error: Exception, tries: int, delay: float) -> None:
        if tries & (tries - 1) == 0:  # the first, second, third, fifth, ninth: a long outage is not a flood of lines
            line = f"shard {self.location}: {error} ({retry.passing_reason(error)}); again in {delay:.1f} s"
            print(line, file=sys.stderr, flush=True)

    def _give_up(self, reason: str, error: Exception) -> UserError:
        if reason == "hash":
            return UserError(
                f"shard {self.location} does not have the size and hash its index gives, fetched {self._bad} times in a row. "
                "Write it again"
            )
        if reason == "expired":
            return UserError(f"shard {self.location} cannot be read: the credentials have expired ({error}). Get new ones")
        return UserError(
            f"shard {self.location} cannot be read: {error}. Tried again for {self._retry_seconds:.0f} s "
            "(data.retry_seconds) without a byte: check the address and the network"
        )

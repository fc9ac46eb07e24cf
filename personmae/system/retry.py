"""Trying again: what may pass, how long to wait before the next try, and when that is enough.

This is the only loop of its kind. Who calls it brings the patience: a shard waits for a byte, an upload until a newer one is
there, an import for a few seconds. Whether an error of the operating system may pass, ``errors.is_passing`` says.
"""

import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from personmae.system import storage

LOST = (FileNotFoundError, PermissionError, IsADirectoryError)  # of one file, and for good
_MOST_DOUBLINGS = 60
_rng = random.Random()  # not the one that a program may have seeded
_Result = TypeVar("_Result")

# Answers of a server that another try may change, and what to call them in counts.
_PASSING_CODES = {
    "SlowDown": "throttled",
    "Throttling": "throttled",
    "ThrottlingException": "throttled",
    "RequestLimitExceeded": "throttled",
    "TooManyRequests": "throttled",
    "503": "throttled",
    "ServiceUnavailable": "throttled",
    "InternalError": "server_error",
    "500": "server_error",
    "502": "server_error",
    "504": "server_error",
    "RequestTimeout": "timeout",
    "ExpiredToken": "expired",
    "ExpiredTokenException": "expired",
    "RequestExpired": "expired",
}


class WrongHash(Exception):  # noqa: N818 - what was found
    """What has arrived is not what its index says. The connection may have spoiled it."""

    def __init__(self) -> None:
        super().__init__("wrong hash")


def retry(
    call: Callable[[], _Result],
    wait: Callable[[Exception], bool],
    reason_of: Callable[[Exception], str | None] | None = None,
) -> _Result:
    """The result of ``call``, tried again while its errors may pass and ``wait`` has waited.

    Credentials that have expired are read anew. ``reason_of`` is ``passing_reason`` where it is None.

    Raises:
        Exception: the last error of ``call``, or what ``wait`` raises.
    """
    while True:
        try:
            return call()
        except Exception as error:  # each store's client has errors of its own, and none is kept back
            reason = (reason_of or passing_reason)(error)
            if reason == "expired":
                storage.renew_credentials()
            if not reason or not wait(error):
                raise


class Patience:
    """Waits between two tries for the delays that ``delays`` gives, while they last and ``seconds`` are not over.

    The last try comes when the time is up. ``pause`` waits, and returns False where nothing is to be tried any more. ``log``
    gets the error, the number of delays before this one and this delay in seconds.
    """

    def __init__(
        self,
        delays: Callable[[], Iterator[float]],
        *,
        seconds: float = float("inf"),
        pause: Callable[[float], bool] | None = None,
        log: Callable[[Exception, int, float], None] = lambda error, tries, delay: None,
    ):
        self._new_delays, self._seconds, self._pause, self._log = delays, seconds, pause or _sleep, log
        self.restart()

    def restart(self) -> None:
        """Begin anew, with the first delay: something has come of the last try."""
        self._delays, self._tries, self._since = self._new_delays(), 0, time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._left() <= 0

    def wait(self, error: Exception) -> bool:
        """Wait for the next delay, also where the time is up. Returns whether to try again."""
        if (delay := next(self._delays, None)) is None:
            return False
        delay = min(delay, max(0.0, self._left()))
        self._log(error, self._tries, delay)
        self._tries += 1
        return self._pause(delay)

    def __call__(self, error: Exception) -> bool:
        """Wait before the next try. Returns whether there is to be one."""
        return not self.is_over and self.wait(error)

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._since)


def growing(first: float, most: float, jitter: tuple[float, float] = (0.5, 1.0)) -> Iterator[float]:
    """Delays in seconds that double up to ``most``, each times a share of ``jitter``: many hosts must not come back at once."""
    for tries in itertools.count():
        yield min(first * 2.0 ** min(tries, _MOST_DOUBLINGS), most) * _rng.uniform(*jitter)


def passing_reason(error: BaseException | None) -> str | None:
    """Why a store may answer when it is asked again, in a word: by an error or one that it was raised from. Else None."""
    while error:
        if reason := _reason(error):
            return reason
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def disk_reason(error: Exception) -> str | None:
    """The same of a disk or a network file system: any of its errors may pass but ``LOST``."""
    return "disk" if isinstance(error, OSError) and not isinstance(error, LOST) else None


def _reason(error: BaseException) -> str | None:
    from botocore import exceptions as boto
    from urllib3 import exceptions as http

    match error:
        case WrongHash() | boto.FlexibleChecksumError():
            return "hash"
        case boto.ClientError():
            code = error.response.get("Error", {}).get("Code", "")
            status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
            return _PASSING_CODES.get(code) or _PASSING_CODES.get(status)
        case boto.ReadTimeoutError() | boto.ConnectTimeoutError() | http.ReadTimeoutError() | TimeoutError():
            return "timeout"
        case boto.IncompleteReadError() | http.IncompleteRead():
            return "truncated"
        case boto.CredentialRetrievalError() | boto.TokenRetrievalError():
            return "expired"
        case boto.ConnectionError() | boto.HTTPClientError() | http.HTTPError() | ConnectionError() | socket.gaierror():
            return "connection"
    return None


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True

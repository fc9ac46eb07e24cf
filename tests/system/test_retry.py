"""One loop for all that is tried again: what may pass, how long is waited, and when that is enough."""

import itertools
from collections.abc import Callable, Iterator

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError

from personmae.errors import UserError
from personmae.system import storage
from personmae.system.retry import LOST, Patience, WrongHash, disk_reason, growing, passing_reason, retry

NOBODY = EndpointConnectionError(endpoint_url="http://nowhere")


def refusal(code: str, status: int = 400) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def failing(*errors: Exception) -> Callable[[], int]:
    """A call that raises these, then returns how often it was made."""
    left, calls = list(errors), itertools.count(1)

    def call() -> int:
        number = next(calls)
        if left:
            raise left.pop(0)
        return number

    return call


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.waited = 0.0, list[float]()
        monkeypatch.setattr("personmae.system.retry.time.monotonic", lambda: self.now)

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        self.waited.append(seconds)
        return True


def doubling() -> Iterator[float]:
    return growing(1.0, 8.0, jitter=(1.0, 1.0))


def test_delays_double_up_to_the_most_and_never_overflow():
    assert list(itertools.islice(doubling(), 6)) == [1, 2, 4, 8, 8, 8]
    assert next(itertools.islice(doubling(), 5000, None)) == 8
    with_jitter = list(itertools.islice(growing(1.0, 1.0, jitter=(0.5, 1.5)), 200))
    assert 0.5 <= min(with_jitter) < 0.7
    assert 1.3 < max(with_jitter) <= 1.5


def test_the_last_try_comes_when_the_time_is_up(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(TimeoutError, match="the sixth"):
        retry(failing(*[TimeoutError()] * 5, TimeoutError("the sixth")), Patience(doubling, seconds=20.0, pause=clock.pause))
    assert clock.waited == [1, 2, 4, 8, 5]
    assert clock.now == 20.0


def test_without_time_there_is_one_try_and_with_no_end_to_it_as_many_as_are_needed(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(TimeoutError):
        retry(failing(TimeoutError()), Patience(doubling, seconds=0.0, pause=clock.pause))
    assert clock.waited == []
    assert retry(failing(*[TimeoutError()] * 99), Patience(doubling, pause=clock.pause)) == 100


def test_what_has_brought_something_begins_with_the_first_delay_again(monkeypatch):
    clock = Clock(monkeypatch)
    patience = Patience(doubling, seconds=10.0, pause=clock.pause)
    assert [patience(NOBODY) for _ in range(3)] == [True, True, True]
    patience.restart()
    assert patience(NOBODY)
    assert clock.waited == [1, 2, 4, 1]
    assert not patience.is_over


def test_delays_that_end_and_a_pause_that_says_no_end_the_trying(monkeypatch):
    clock, logged = Clock(monkeypatch), []
    finite = Patience(
        lambda: iter((0.1, 1.0)), pause=clock.pause, log=lambda error, tries, delay: logged.append((tries, delay))
    )
    with pytest.raises(OSError, match="third"):
        retry(failing(OSError("first"), OSError("second"), OSError("third")), finite, disk_reason)
    assert logged == [(0, 0.1), (1, 1.0)]
    with pytest.raises(TimeoutError):
        retry(failing(TimeoutError()), Patience(doubling, pause=lambda delay: False))


@pytest.mark.parametrize("error", [UserError("wrong address"), refusal("AccessDenied"), RuntimeError("a client's own")])
def test_what_cannot_pass_is_raised_at_once(error):
    with pytest.raises(type(error)):
        retry(failing(error), lambda _: pytest.fail("it waits"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (refusal("SlowDown"), "throttled"),
        (refusal("no such code", 503), "throttled"),
        (refusal("InternalError"), "server_error"),
        (refusal("ExpiredToken"), "expired"),
        (ReadTimeoutError(endpoint_url="http://x"), "timeout"),
        (NOBODY, "connection"),
        (ConnectionResetError(), "connection"),
        (WrongHash(), "hash"),
        (refusal("NoSuchKey", 404), None),
        (ValueError(), None),
    ],
)
def test_what_may_pass_has_a_word(error, reason):
    assert passing_reason(error) == reason
    explained = UserError("reading s3://b/x failed")
    explained.__cause__ = error
    assert passing_reason(explained) == reason


def test_an_error_that_hides_what_it_came_from_does_not_pass():
    def hide() -> None:
        try:
            raise NOBODY
        except EndpointConnectionError:
            raise UserError("S3_ENDPOINT_URL must be an address") from None

    with pytest.raises(UserError) as caught:
        hide()
    assert passing_reason(caught.value) is None


def test_credentials_that_have_expired_are_read_anew(monkeypatch):
    renewed: list[bool] = []
    monkeypatch.setattr(storage, "renew_credentials", lambda: renewed.append(True))
    assert retry(failing(refusal("ExpiredToken"), TimeoutError()), lambda _: True) == 3
    assert renewed == [True]


@pytest.mark.parametrize("kind", LOST)
def test_of_a_disk_a_file_that_is_lost_is_not_asked_for_again(kind):
    assert disk_reason(kind()) is None
    assert disk_reason(OSError(5, "Input/output error")) == "disk"
    assert disk_reason(ValueError()) is None

"""The last few blocks of a file: read once each, whoever asks."""

import threading

import pytest

from personmae.data.blocks import Recent


def test_a_block_is_read_again_when_others_came_between_or_it_failed():
    recent, calls = Recent[list[bytes]](2), []

    def load(value: int) -> list[bytes]:
        calls.append(value)
        if calls == [7]:
            raise OSError("away")
        return [bytes([value])]

    with pytest.raises(OSError, match="away"):
        recent.get("a", lambda: load(7))
    for value in (7, 8, 7, 9, 8, 7):
        assert recent.get(value, lambda value=value: load(value)) == [bytes([value])]
    assert calls == [7, 7, 8, 9, 8, 7]


def test_threads_that_want_one_block_wait_for_the_first_of_them():
    recent, calls, begun, may_end = Recent[bytes](2), [], threading.Event(), threading.Event()

    def load() -> bytes:
        calls.append(1)
        begun.set()
        assert may_end.wait(60)
        return b"x"

    found = []
    threads = [threading.Thread(target=lambda: found.append(recent.get(0, load))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    may_end.set()
    for thread in threads:
        thread.join()
    assert (found, calls) == ([b"x"] * 3, [1])

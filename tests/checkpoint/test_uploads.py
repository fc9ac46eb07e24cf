"""What the writer uploads to a store, and what it does when the store is away, hangs or refuses."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from writers import make, opened, sample, steps, uploads

from personmae.checkpoint import portable, remote
from personmae.checkpoint import writer as writer_module
from personmae.checkpoint.writer import Writer
from personmae.errors import UserError


class Store:
    """What a store would hold, instead of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], Exception | None] = lambda _: None):
        self.held: list[int] = []
        self.tries = itertools.count(1)
        self.fails = fails
        monkeypatch.setattr(remote, "send", self.send)
        monkeypatch.setattr(remote, "steps", lambda _: sorted(self.held))
        monkeypatch.setattr(remote, "delete", lambda _, step: self.held.remove(step))
        monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.01)
        monkeypatch.setattr(remote, "set_aside", lambda store, step: (self.held.remove(step), f"{store}/passed-over/{step}")[1])

    def send(self, store: str, path: Path, step: int, sent: set[str], *, anew: bool = False) -> None:
        if error := self.fails(next(self.tries)):
            raise error
        assert portable.find_fault(path) is None
        if step not in self.held:
            self.held.append(step)


def away() -> UserError:
    error = UserError("writing s3://b/run failed: could not connect")
    error.__cause__ = EndpointConnectionError(endpoint_url="http://nowhere")
    return error


def test_what_is_committed_is_uploaded_and_the_store_keeps_as_many(tmp_path, monkeypatch):
    store = Store(monkeypatch)
    with opened(tmp_path, upload_to="s3://b/run/", keep_every=2) as writer:
        for step in range(1, 7):
            writer.save(make(step), wait=True)
    assert max(store.held) == 6
    assert set(store.held) >= {2, 4, 6}
    assert steps(tmp_path) == [2, 4, 5, 6]


def test_a_failing_upload_is_tried_again_counted_and_told_once(tmp_path, monkeypatch, capsys):
    store = Store(monkeypatch, lambda tries: away() if tries < 4 else None)
    with opened(tmp_path, upload_to="s3://b/run") as writer:
        writer.save(make(1))
    assert (store.held, uploads(writer)) == ([1], 1)
    assert sample(writer, "checkpoint_failures_total", stage="upload") == 3
    assert capsys.readouterr().out == (
        "checkpoint s3://b/run/step-00000001 is not uploaded yet: writing s3://b/run failed: could not connect. Trying again\n"
    )


@pytest.mark.parametrize("error", [UserError("refused (AccessDenied)"), RuntimeError("a client's own")])
def test_an_upload_that_cannot_succeed_ends_nothing_and_the_next_is_tried(tmp_path, monkeypatch, capsys, error):
    store = Store(monkeypatch, lambda tries: error if tries == 1 else None)
    with opened(tmp_path, upload_to="s3://b/run") as writer:
        writer.save(make(1), wait=True)
        while writer._queue or writer._in_upload:
            pass
        writer.save(make(2))
    assert store.held == [2]
    assert f"step-00000001 is not uploaded: {error}. " in capsys.readouterr().out


def test_a_store_that_stays_away_holds_up_neither_saves_nor_for_long_the_close(tmp_path, monkeypatch, capsys):
    Store(monkeypatch, lambda _: away())
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 5.0)
    writer = Writer(tmp_path, keep_last=1, upload_to="s3://b/run", close_seconds=0.2)
    for step in range(1, 5):
        assert writer.save(make(step), wait=True) < 2
    writer.close()
    assert uploads(writer) == 0
    assert steps(tmp_path) == [4]
    printed = capsys.readouterr().out
    assert f"step-00000004 is not uploaded: {away()}. {portable.folder(tmp_path)}/step-00000004 is kept here" in printed


def test_an_upload_that_hangs_does_not_keep_the_run_from_ending(tmp_path, monkeypatch, capsys):
    gate = threading.Event()
    Store(monkeypatch)
    monkeypatch.setattr(writer_module, "_LAST_WORD_SECONDS", 0.01)
    monkeypatch.setattr(remote, "send", lambda *_, **__: gate.wait(10))
    writer = Writer(tmp_path, keep_last=1, upload_to="s3://b/run", close_seconds=0.2)
    writer.save(make(1))
    writer.close()
    writer.close()
    gate.set()
    kept = f"{portable.folder(tmp_path)} keeps what is not"
    assert capsys.readouterr().out == f"checkpoint: not all is uploaded to s3://b/run after 0.2 s. {kept}\n"


def test_a_second_interrupt_waits_for_no_upload(tmp_path, monkeypatch, capsys):
    Store(monkeypatch, lambda _: away())
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 5.0)
    writer = Writer(tmp_path, keep_last=1, upload_to="s3://b/run", close_seconds=30)
    waited: list[float | None] = []
    writer.save(make(1), wait=True)
    thread = writer._uploading
    assert thread
    join = thread.join
    monkeypatch.setattr(thread, "join", lambda seconds=None: (waited.append(seconds), join(seconds))[1])
    with pytest.raises(KeyboardInterrupt), contextlib.closing(writer):
        raise KeyboardInterrupt
    assert waited == [0.0, writer_module._LAST_WORD_SECONDS]
    assert steps(tmp_path) == [1]


def test_an_interrupt_while_an_upload_is_waited_for_ends_the_waiting(tmp_path, monkeypatch, capsys):
    Store(monkeypatch, lambda _: away())
    writer = Writer(tmp_path, keep_last=1, upload_to="s3://b/run", close_seconds=30)
    writer.save(make(1), wait=True)
    thread = writer._uploading
    assert thread

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    monkeypatch.setattr(thread, "join", lambda *_: pytest.fail("it is given up"))
    writer.close()


def test_a_checkpoint_is_not_deleted_while_it_is_uploaded(tmp_path, monkeypatch):
    gate, begun = threading.Event(), threading.Event()
    store = Store(monkeypatch)
    real = store.send
    monkeypatch.setattr(remote, "send", lambda *args, **_: (begun.set(), gate.wait(10), real(*args)))
    with opened(tmp_path, keep_last=1, upload_to="s3://b/run") as writer:
        writer.save(make(1), wait=True)
        begun.wait(10)
        for step in (2, 3):
            writer.save(make(step), wait=True)
        assert steps(tmp_path) == [1, 3]
        gate.set()
    assert steps(tmp_path) == [3]
    assert store.held == [3]


def test_the_checkpoint_that_a_run_goes_on_from_is_uploaded_if_it_was_not(tmp_path, monkeypatch):
    with opened(tmp_path) as writer:
        writer.save(make(7))
    store = Store(monkeypatch)
    with opened(tmp_path, upload_to="s3://b/run", resumed=portable.newest(tmp_path)):
        pass
    assert store.held == [7]


def test_one_that_a_store_does_not_delete_keeps_no_other_from_being_deleted_and_is_named_once(tmp_path, monkeypatch, capsys):
    store = Store(monkeypatch)

    def refuse_one(_: str, step: int) -> None:
        if step == 1:
            raise UserError("deleting was refused")
        store.held.remove(step)

    monkeypatch.setattr(remote, "delete", refuse_one)
    with opened(tmp_path, upload_to="s3://b/run", keep_last=1) as writer:
        for step in range(1, 5):
            writer.save(make(step), wait=True)
            while uploads(writer) != step:
                time.sleep(0.001)
    assert store.held == [1, 4]
    output = "checkpoint s3://b/run/step-00000001 is no longer needed and is left: deleting was refused"
    assert capsys.readouterr().out.count(output) == 1


def test_a_store_that_cannot_be_tidied_ends_nothing(tmp_path, monkeypatch, capsys):
    store = Store(monkeypatch)

    def refused(_: str) -> list[int]:
        raise UserError("listing was refused")

    monkeypatch.setattr(remote, "steps", refused)
    with opened(tmp_path, upload_to="s3://b/run") as writer:
        writer.save(make(1))
    assert store.held == [1]
    assert "checkpoint s3://b/run is no longer needed and is left: listing was refused" in capsys.readouterr().out

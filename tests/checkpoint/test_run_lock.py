"""A run directory belongs to one process, and a second one is told which."""

import os
import socket
import threading

import pytest

from personmae.checkpoint import run_lock
from personmae.errors import Unavailable, UserError


def test_who_comes_second_is_told_whom_the_run_belongs_to(tmp_path):
    with run_lock.lock(tmp_path):
        for _ in range(2):  # the first refusal must not take the holder's name away
            with pytest.raises(UserError) as caught:
                run_lock.lock(tmp_path)
            assert f"at work in {tmp_path}, PID {os.getpid()} on host {socket.gethostname()}: stop it first" in str(
                caught.value
            )
    run_lock.lock(tmp_path).close()


def test_a_lock_of_an_earlier_version_refuses_without_a_name(tmp_path):
    with run_lock.lock(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(UserError, match=f"at work in {tmp_path}: stop it first"):
            run_lock.lock(tmp_path)


def test_a_rank_that_is_started_again_waits_for_the_one_before_it(tmp_path, monkeypatch):
    held = run_lock.lock(tmp_path)
    with pytest.raises(UserError, match="Another process is at work"):
        run_lock.lock(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(run_lock, "_WAIT_SECONDS", 0.3)
    with pytest.raises(Unavailable, match="has not ended within"):
        run_lock.lock(tmp_path)
    monkeypatch.setattr(run_lock, "_WAIT_SECONDS", 30.0)
    threading.Timer(0.3, held.close).start()
    run_lock.lock(tmp_path).close()

"""The processes that read, decode and draw."""

import os

import pytest

from personmae.data.import_workers import workers


def test_processes_have_the_environment_of_now_not_that_of_the_first_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERSONMAE_TEST", "before")
    with workers(2) as pool:
        assert pool.submit(os.getenv, "PERSONMAE_TEST").result() == "before"
    monkeypatch.setenv("PERSONMAE_TEST", "now")
    with workers(2) as pool:
        assert pool.submit(os.getenv, "PERSONMAE_TEST").result() == "now"
    monkeypatch.delenv("PERSONMAE_TEST")
    with workers(2) as pool:
        assert pool.submit(os.getenv, "PERSONMAE_TEST").result() is None

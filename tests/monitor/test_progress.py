"""Lines of a long work outside a terminal: the first at once, then by time, with the rate and the time to go of lately."""

import re
import sys
import time

import pytest

from personmae.commands.arguments import Progress
from personmae.monitor.progress import log, log_to_stderr


def test_a_line_comes_at_once_and_then_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("shards write", "images") as progress:
        progress(5000, 1_000_000)  # done before it was resumed
        for done in range(5001, 5061):  # 4 a second, then 1 in 2 seconds: slower, as where a disk fills its cache
            now[0] += 0.25 if done <= 5050 else 2
            progress(done, 1_000_000)
        progress(1_000_000, 1_000_000)
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "shards write: preparing ..."
    assert lines[1] == "shards write: 5,000 of 1,000,000 images"
    assert lines[2] == "shards write: 5,040 of 1,000,000 images, 4 a second, 2 d 21:05:40 to go"
    assert lines[-1].startswith("shards write: 1,000,000 of 1,000,000 images, ")
    assert lines[-1].endswith(" a second")
    assert len(lines) == 6  # before, seconds 0, 10, 20.5, 30.5 and the end


def test_every_plain_line_has_the_time_of_day(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("synth", "images") as progress:
        progress(1, 1)
    assert all(re.match(r"\d\d:\d\d:\d\d synth: ", line) for line in capsys.readouterr().err.splitlines())


def test_a_program_without_a_standard_output_says_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    log("lost")
    log_to_stderr("lost")

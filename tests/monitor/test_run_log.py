"""What a run writes down and shows: nothing is lost on the way, and what comes out can be read."""

import contextlib
import errno
import io
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from full_disk import full_disk
from rich.console import Console

from personmae.errors import Stopped
from personmae.monitor import environment, progress, run_log
from personmae.monitor.progress import Pace, duration
from personmae.monitor.run_log import RunLog, read_records, record_run

RECORD: dict[str, Any] = {"config_yaml": "seed: 1\n", "config_hash": "abc", "seed": 1, "versions": {"torch": "2"}}


def log_of(run_dir: Path, *, first_step: int = 0, total_steps: int = 100, is_first: bool = True) -> RunLog:
    return RunLog(run_dir, is_first=is_first, title="pretrain", total_steps=total_steps, first_step=first_step)


def written(run_dir: Path, steps: range) -> str:
    """The run's ``metrics.jsonl`` with a record for each of the steps."""
    log = log_of(run_dir)
    for step in steps:
        log.record(step, {"loss": 1 / step}, images_per_step=8)
    log.close()
    return (run_dir / "metrics.jsonl").read_text()


class NoBoard:
    """TensorBoard's file is its own matter: it is never read back."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def close(self) -> None: ...


def test_a_full_disk_at_the_instant_of_a_resume_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(tmp_path, range(1, 41))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", NoBoard)
    with full_disk(), contextlib.suppress(OSError):
        log_of(tmp_path, first_step=40).close()
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_what_stays_of_the_records_is_not_written_again(tmp_path: Path) -> None:
    """A kill between emptying the file and writing it anew would leave nothing; so it is only ever shortened."""
    lines = written(tmp_path, range(1, 6)).splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill
    sizes: list[int] = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.truncate" and str(args[0]) == str(path):
            sizes.append(path.stat().st_size)

    sys.addaudithook(note)
    log = log_of(tmp_path, first_step=3)
    assert sizes == [len("".join(lines)) + 15]
    assert path.read_text() == "".join(lines[:3])
    log.record(4, {"loss": 0.5}, images_per_step=8)
    log.close()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_is_valid_json_and_is_read_back_as_such(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.record(1, {"loss": float("nan"), "grad_norm": float("inf")}, images_per_step=8)
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["loss"], record["grad_norm"]) == (None, None)
    (read,) = read_records(tmp_path)
    assert read["loss"] != read["loss"]
    assert read["step"] == 1


def test_the_first_step_is_shown_at_once_and_then_one_every_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log, shown = log_of(tmp_path, total_steps=1000), []
    for step in range(1, 20):
        due = step == 1 or log.is_due()  # as the loops ask, before the step
        now[0] += 100 if step == 1 else 3  # the first one compiles
        if due:
            log.display(step, {"loss": 0.5}, images_per_step=30)
            shown.append(step)
    log.close()
    assert shown == [1, 6, 11, 16]
    first, *others = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d pretrain 1/1000  loss 0\.5  the first step took 100\.0 s", first)
    assert [line[9:] for line in others[1:]] == [  # the rate of the steps since the first
        "pretrain 11/1000  loss 0.5  10 images/s  00:49:27 to go",
        "pretrain 16/1000  loss 0.5  10 images/s  00:49:12 to go",
    ]
    assert read_records(tmp_path) == []  # for people alone


def test_other_ranks_are_never_due(tmp_path: Path) -> None:
    log = log_of(tmp_path, is_first=False)
    assert not log.is_due()
    log.display(1, {"loss": 0.5}, images_per_step=1)
    log.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (59.6, "00:01:00"),
        (86399, "23:59:59"),
        (86400, "1 d 00:00:00"),
        (274200, "3 d 04:10:00"),
        (-3, "00:00:00"),
    ],
)
def test_durations_have_days(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_to_go_is_of_the_recent_rate() -> None:
    now = [0.0]
    pace = Pace(0, clock=lambda: now[0])
    assert pace.left(100) is None
    for step in range(1, 11):  # ten seconds each
        now[0] += 10
        pace.mark(step)
    for step in range(11, 131):  # then one each
        now[0] += 1
        pace.mark(step)
    assert pace.rate == pytest.approx(1.0)
    assert pace.left(86400 + 130) == pytest.approx(86400)


def test_a_work_that_was_resumed_is_not_credited_with_what_was_done_before() -> None:
    now = [0.0]
    pace = Pace(1000, clock=lambda: now[0])
    now[0] += 10
    pace.mark(1010)
    assert pace.rate == pytest.approx(1.0)


def test_sessions_are_added_with_times_host_and_a_command(tmp_path: Path) -> None:
    record_run(tmp_path, **RECORD, first_step=0)
    log = log_of(tmp_path)
    log.advance(7)
    with pytest.raises(Stopped), contextlib.closing(log):
        raise Stopped("at step 7")
    record_run(tmp_path, **{**RECORD, "seed": 2}, first_step=7)
    log = log_of(tmp_path, first_step=7)
    log.advance(9)
    log.close()
    record_run(tmp_path, **RECORD, first_step=9)  # killed
    run = json.loads((tmp_path / "run.json").read_text())
    first, second, third = run["sessions"]
    assert [(s["first_step"], s["last_step"], s["outcome"]) for s in run["sessions"]] == [
        (0, 7, "stopped"),
        (7, 9, "complete"),
        (9, None, None),
    ]
    assert first["started"] <= first["ended"] <= second["started"] <= second["ended"]
    assert re.search(r"[+-]\d\d:\d\d$", first["started"])  # with its zone
    assert third["ended"] is None
    assert (third["cwd"], third["ranks"]) == (str(Path.cwd()), 1)
    assert third["host"]
    assert run["command"] == third["command"] == shlex.join(sys.orig_argv)
    assert (run["seed"], run["config_hash"], run["versions"]["torch"]) == (1, "abc", "2")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize("old", ['{"command": ["a", "b"], "commit": "f00", "seed": 3}', "{", "[]"])
def test_a_record_of_before_there_were_sessions_is_the_first(tmp_path: Path, old: str) -> None:
    (tmp_path / "run.json").write_text(old)
    record_run(tmp_path, **RECORD, first_step=0)
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["sessions"]) == (2 if "commit" in old else 1)
    assert run["sessions"][0].get("commit") in ("f00", environment.git_commit())


def test_a_full_disk_leaves_the_record_of_the_last_session(tmp_path: Path) -> None:
    record_run(tmp_path, **RECORD, first_step=0)
    before = (tmp_path / "run.json").read_text()
    with full_disk():
        with pytest.raises(OSError, match="large"):
            record_run(tmp_path, **RECORD, first_step=3)
        environment.end(tmp_path, last_step=3, failure=None)  # nobody minds
    assert (tmp_path / "run.json").read_text() == before
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


def test_a_command_with_a_launcher_is_the_launchers_and_can_be_pasted(tmp_path: Path) -> None:
    """A rank is started with another interpreter's options and, by deepspeed, with a ``--local_rank`` of its own."""
    rank = "import sys; from personmae.monitor.environment import command; print(command())"
    launcher = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {rank!r}, '--local_rank=0', *sys.argv[1:]], env=os.environ | {{'RANK': '0'}})"
    )
    arguments = ["--config", "my config.yaml", "run_dir=/tmp/a $b"]
    typed = [sys.executable, "-c", launcher, *arguments]
    root = Path(__file__).resolve().parents[2]
    output = subprocess.run(typed, cwd=root, capture_output=True, text=True, check=True).stdout
    assert shlex.split(output) == typed


def test_the_end_says_where_how_long_and_what_comes_next() -> None:
    output = progress.ending("pretrain", 3725, "checkpoint runs/a", "personmae finetune X init=runs/a")
    assert output == "pretrain: done in 01:02:05; checkpoint runs/a\nnext: personmae finetune X init=runs/a"


def test_a_record_that_cannot_be_read_at_present_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(tmp_path, **RECORD, first_step=0)
    before = (tmp_path / "run.json").read_text()

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match="Input/output"):
            record_run(tmp_path, **RECORD, first_step=3)
    assert (tmp_path / "run.json").read_text() == before


class FullBoard(NoBoard):
    """A full disk below TensorBoard's file."""

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_closed_says_so_in_the_record_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(tmp_path, **RECORD, first_step=0)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", FullBoard)
    log = log_of(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        log.close()
    session = json.loads((tmp_path / "run.json").read_bytes())["sessions"][-1]
    assert session["ended"]
    assert session["outcome"] == "failed: OSError"


def test_a_line_in_a_terminal_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(run_log, "Console", lambda: Console(file=shown, force_terminal=True, width=120, no_color=True))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", NoBoard)
    log = log_of(tmp_path)
    try:
        log.log("saved in runs/[x]/[/bold] :smile:")
    finally:
        log.close()
    assert "saved in runs/[x]/[/bold] :smile:" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())

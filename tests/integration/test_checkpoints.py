"""A kill at any instant of a checkpoint's life leaves the last committed one, here and in a store; two ranks write as one.

The kills are swept by children of one process that has imported everything: a child for every file operation, write or request
at which it kills itself, and a child for every delay after which it is killed.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from boto3.session import Session
from fault_proxy import Fault, FaultProxy, moto_process
from on_disk import write_checkpoint
from programs import ROOT, environment

from personmae.checkpoint import commit, host_copy, portable, remote, resume_point
from personmae.checkpoint.portable import Checkpoint
from personmae.checkpoint.writer import Writer, join_ranks
from personmae.system import storage

pytestmark = [pytest.mark.integration]
BUCKET = "runs"
KINDS = ("student", "exp_avg")
SHAPE = (64, 33)


def make(step: int) -> Checkpoint:
    tensors = {kind: {"w": torch.full(SHAPE, step + 0.5), "n": torch.tensor(step)} for kind in KINDS}
    return Checkpoint(step, tensors, {"seed": step})


def read_step(path: Path) -> int:
    """The step of a checkpoint whose content is checked."""
    read = portable.read(path)
    assert read.state["seed"] == read.step
    assert read.tensors.keys() == set(KINDS)
    for tensors in read.tensors.values():
        assert torch.equal(tensors["w"], torch.full(SHAPE, read.step + 0.5))
        assert int(tensors["n"]) == read.step
    return read.step


# --- in the process of the sweep ---


@dataclass
class Kill:
    """What one child had reported when it ended, and whether it was killed."""

    name: str
    committed: int = 0
    uploaded: int = 0
    killed: bool = True


def sweep(how: str, root: str, store: str, *points: str) -> None:
    """Fork a child for every point, and print what became of it.

    Points are delays in seconds, or are counted until a child survives.
    """
    if store:
        storage.s3_client()  # made once: children inherit it, and what it has loaded, without a connection
    for number, point in enumerate(points or itertools.count(1)):
        name = f"{how}-{number:04d}"
        kill = _fork(name, Path(root) / name, f"{store}/{name}" if store else None, point if how == "call" else float(point))
        print(json.dumps(asdict(kill)), flush=True)
        if not points and not kill.killed:
            return


def _fork(name: str, run: Path, store: str | None, point: Any) -> Kill:
    reports, child_end = os.pipe()
    if not (child := os.fork()):
        os.close(reports)
        _be_killed(run, store, child_end, None if isinstance(point, float) else point)
    os.close(child_end)
    if isinstance(point, float):
        os.read(reports, 1)  # it has begun
        time.sleep(point)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reports) as lines:
        output = [line.split() for line in lines if line.endswith("\n") and len(line) > 1]
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{name} failed by itself"
    last = {what: int(step) for what, step in output}
    return Kill(name, last.get("committed", 0), last.get("uploaded", 0), os.WIFSIGNALED(status))


def _be_killed(run: Path, store: str | None, reports: int, at_call: int | None) -> None:
    """The child: saves, until it is killed or has saved enough."""
    _report(commit, "commit", lambda args: f"committed {args[1]}", reports)
    _report(remote, "send", lambda args: f"uploaded {args[2]}", reports)
    if at_call:
        _kill_at(at_call, ("http.client.send",) if store else ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"))
    os.write(reports, b"\n")
    code = 1
    try:
        writer = Writer(run, keep_last=1, upload_to=store)
        for step in range(1, 4 if at_call else 100_000):
            writer.save(make(step))
            while at_call and store and (writer._queue or writer._in_upload):
                time.sleep(0.001)
        writer.close()
        if not store:
            write_checkpoint(run, make(3), keep_last=1)  # in the place of itself
        code = 0
    finally:
        os._exit(code)


def _report(module: Any, name: str, text: Callable[[tuple[Any, ...]], str], reports: int) -> None:
    """Tell the parent as soon as a function has returned."""
    call = getattr(module, name)

    def output(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        os.write(reports, f"{text(args)}\n".encode())
        return result

    setattr(module, name, output)


def _kill_at(number: int, events: tuple[str, ...]) -> None:
    """Kill this process before the numbered one of the operations that change files or ask a server, or in mid write."""
    calls = itertools.count(1)

    def count() -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_event(event: str, args: tuple[Any, ...]) -> None:
        if event in events and (event != "open" or args[1] not in (None, "r", "rb")):
            count()

    sync, put = os.fsync, host_copy._put

    def counted_sync(file: int) -> None:
        count()
        sync(file)

    def counted_put(file: Any, block: bytes | memoryview) -> None:
        count()
        put(file, block[: len(block) // 2])
        count()
        put(file, block[len(block) // 2 :])

    sys.addaudithook(count_event)
    if "open" in events:
        os.fsync, host_copy._put = counted_sync, counted_put


# --- in the process of the tests ---


def swept(how: str, root: Path, store: str, *points: float, env: dict[str, str] | None = None) -> list[Kill]:
    """Run a sweep in a process of its own; what its children left lies below ``root`` and ``store``."""
    code = "import sys; sys.path.append('..'); import test_checkpoints; test_checkpoints.sweep(*sys.argv[1:])"
    line = ["-c", code, how, root, store, *points]
    done = warm.run(line, cwd=ROOT / "tests" / "integration", env=environment(env), timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Kill(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process need not wait for the disk; the children do."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def assert_whole_or_without_manifest(printed: str) -> None:
    """What has a manifest was whole at every instant: a reader that looks at it then is not misled."""
    output = [line for line in printed.splitlines() if "passed over" in line]
    assert [line for line in output if not line.endswith("it has no manifest.json")] == []


def assert_goes_on(run: Path, kill: Kill) -> None:
    """A run finds what was committed and can save again, whatever the kill has left."""
    found = resume_point.newest(run)
    assert (read_step(found.path) if found else 0) >= kill.committed, kill
    step = (read_step(found.path) if found else 0) + 1
    writer = Writer(run, keep_last=1, resumed=found.path if found else None)
    writer.save(make(step))
    writer.close()
    assert sorted(path.name for path in portable.folder(run).iterdir()) == ["LATEST", portable.name_of(step)], kill
    again = resume_point.newest(run)
    assert again is not None
    assert read_step(again.path) == step


@pytest.mark.slow
def test_a_kill_before_and_within_every_file_operation_loses_nothing_committed(tmp_path, no_sync, capsys):
    kills = swept("call", tmp_path, "")
    assert [kill.killed for kill in kills] == [True] * (len(kills) - 1) + [False]
    assert len(kills) > 60
    assert {kill.committed for kill in kills} == {0, 1, 2, 3}
    for kill in kills:
        assert_goes_on(tmp_path / kill.name, kill)
    assert_whole_or_without_manifest(capsys.readouterr().out)


def test_a_kill_after_any_delay_loses_nothing_committed(tmp_path, no_sync, capsys):
    kills = swept("delay", tmp_path, "", *(0.005 * number for number in range(30)))
    assert all(kill.killed for kill in kills)
    assert max(kill.committed for kill in kills) >= 3
    for kill in kills:
        assert_goes_on(tmp_path / kill.name, kill)
    assert_whole_or_without_manifest(capsys.readouterr().out)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, dict[str, str]]]:
    """The port of an S3 server with a bucket, and the environment that points at it."""
    with moto_process() as port, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        settings = {
            "NO_PROXY": "127.0.0.1",
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        storage.s3_client.cache_clear()
        client = Session().client("s3", endpoint_url=settings["S3_ENDPOINT_URL"])
        client.create_bucket(Bucket=BUCKET)
        yield port, settings
        client.close()
        storage.s3_client.cache_clear()


def assert_store_goes_on(root: Path, store: str, kill: Kill) -> None:
    """Where the host was lost the store has what was uploaded; with its disk, the run has what was committed."""
    found = resume_point.newest(root / f"{kill.name}-elsewhere", f"{store}/{kill.name}")
    assert (read_step(found.path) if found else 0) >= kill.uploaded, kill
    found = resume_point.newest(root / kill.name, f"{store}/{kill.name}")
    assert (read_step(found.path) if found else 0) >= kill.committed, kill


@pytest.mark.slow
def test_a_kill_before_and_within_every_request_loses_nothing_uploaded(tmp_path, server, capsys):
    store = f"s3://{BUCKET}/calls"
    kills = swept("call", tmp_path, store, env=server[1])
    assert [kill.killed for kill in kills] == [True] * (len(kills) - 1) + [False]
    assert len(kills) > 30
    assert {kill.uploaded for kill in kills} == {0, 1, 2, 3}
    for kill in kills:
        assert_store_goes_on(tmp_path, store, kill)
    assert_whole_or_without_manifest(capsys.readouterr().out)


def test_a_kill_after_any_delay_loses_nothing_uploaded(tmp_path, server, capsys):
    store = f"s3://{BUCKET}/delays"
    kills = swept("delay", tmp_path, store, *(0.035 * number for number in range(16)), env=server[1])
    assert all(kill.killed for kill in kills)
    assert max(kill.uploaded for kill in kills) >= 1
    for kill in kills:
        assert_store_goes_on(tmp_path, store, kill)
    assert_whole_or_without_manifest(capsys.readouterr().out)


def test_a_run_goes_on_from_a_store_whose_connections_break_and_passes_over_what_it_spoils(
    tmp_path, server, monkeypatch, capsys
):
    store = f"s3://{BUCKET}/broken"
    writer = Writer(tmp_path / "first", keep_last=2, upload_to=store, keep_every=1)
    for step in (1, 2):
        writer.save(make(step))
    writer.close()
    proxy = FaultProxy(server[0])
    proxy.start()
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.01)
    storage.s3_client.cache_clear()
    file = r"step-00000002/student\.safetensors"
    try:
        proxy.faults = [Fault(file, times=2, what="reset", after_bytes=3_000)]
        found = resume_point.newest(tmp_path / "second", store)
        assert found is not None
        assert read_step(found.path) == 2
        proxy.faults = [Fault(file, what="flip", after_bytes=3_000)]
        found = resume_point.newest(tmp_path / "third", store)
        assert found is not None
        assert read_step(found.path) == 1
    finally:
        storage.s3_client.cache_clear()
        proxy.stop()
    assert (
        f"{store}/step-00000002 is passed over: student.safetensors does not have the size and hash" in capsys.readouterr().out
    )


# --- two ranks ---


def be_rank(rank: int, run: str, port: int) -> None:
    """One of two ranks: each writes its tensors of step 1; at step 2 the second cannot."""
    import torch.distributed as tdist

    tdist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    writer = Writer(run, keep_last=2, rank=rank, world_size=2, barrier=tdist.barrier)
    for step in (1, 2):
        if step == 2 and rank == 1:
            host_copy._put = _refuse
        own = {kind: dict([sorted(tensors.items())[rank]]) for kind, tensors in make(step).tensors.items()}
        writer.save(Checkpoint(step, own, {"seed": step}), wait=step == 1)
    try:
        writer.close()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    tdist.destroy_process_group()


def _refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def look(rank: int, folder: str, port: int) -> None:
    """One of two ranks, each with a disk of its own: do they see the same run directory?"""
    import torch.distributed as tdist

    tdist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    apart = join_ranks(Path(folder) / f"disk{rank}" / "run")
    shared = join_ranks(Path(folder) / "shared" / "run")
    shared.pop("barrier")()
    print(json.dumps([apart, shared]), flush=True)
    tdist.destroy_process_group()


def two_ranks(call: str, folder: Path) -> list[tuple[str, str]]:
    """What two processes have said that did a function of this file, which must succeed."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    code = f"import sys; sys.path.append('..'); import test_checkpoints as t; t.{call}({{}}, {str(folder)!r}, {port})"
    ranks = [
        warm.start(
            ["-c", code.format(rank)],
            cwd=ROOT / "tests" / "integration",
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return said


def test_ranks_write_together_only_where_all_see_the_run_directory(tmp_path):
    said = two_ranks("look", tmp_path)
    assert [json.loads(out.splitlines()[-1]) for out, _ in said] == [[{}, {"rank": rank, "world_size": 2}] for rank in range(2)]
    assert [*(tmp_path / "shared" / "run").iterdir()] == []  # nothing is left of the question


def test_two_ranks_write_one_checkpoint_together_or_none(tmp_path):
    said = two_ranks("be_rank", tmp_path)
    found = portable.newest(tmp_path)
    assert found is not None
    assert read_step(found) == 1
    assert sorted(path.name for path in found.glob("*.safetensors")) == [
        f"{kind}-0000{part}-of-00002.safetensors" for kind in sorted(KINDS) for part in (1, 2)
    ]
    assert "RankError: a checkpoint needs the parts of all 2 ranks. 1 are in" in said[0][0]
    assert "OSError: [Errno 28] No space left on device" in said[1][0]
    assert [path.name for path in portable.folder(tmp_path).iterdir() if path.name.startswith(".")] == []

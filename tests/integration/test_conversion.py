"""Imports by several processes, killed and interrupted in every way, into directories and a bucket: the bytes stay the same."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from programs import environment, personmae

from personmae.data import importer
from personmae.errors import Stopped

pytestmark = pytest.mark.integration
SHARD_MB = 0.004
SHARD_BYTES = int(SHARD_MB * 2**20)


@pytest.fixture(scope="module")
def many(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images and two that are none."""
    folder = tmp_path_factory.mktemp("many")
    for copy in range(6):
        shutil.copytree(images, folder / str(copy))
    (folder / "2" / "note.jpg").write_text("hello")
    (folder / "4" / "empty.jpg").touch()
    return folder


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an import without interruption by one process writes."""
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    assert importer.write(many, str(target), shard_bytes=SHARD_BYTES) == 300
    assert len(list(target.glob("*.mds"))) > 100
    return tree(target)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def num_records(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.partial").glob("import-*.json")))


def test_three_processes_write_the_bytes_of_one(many, undisturbed, tmp_path):
    assert importer.write(many, str(tmp_path / "out"), shard_bytes=SHARD_BYTES, num_processes=3) == 300
    assert tree(tmp_path / "out") == undisturbed


# Forks from a process that has imported everything, for an import takes seconds to load and milliseconds to be killed.
_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from personmae.data import importer
from personmae.system import mosaic
mosaic.load("streaming.base.format.mds.writer")

source, out, shard_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chance = random.Random(0)
count = lambda: len(list(Path(out + ".partial").glob("import-*.json")))
for _ in range(10):
    before, wanted = count(), chance.randrange(6)
    child = os.fork()
    if child == 0:
        os.setsid()
        importer.write(source, out, shard_bytes=shard_bytes)
        os._exit(0)
    while (os.getpgid(child) != child or count() < before + wanted) and not Path(out).exists():
        time.sleep(0.0002)
    time.sleep(chance.random() * 0.01)
    os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it had finished before the kill"
    print(count())
"""


def test_an_import_killed_ten_times_at_random_ends_with_the_bytes_of_an_undisturbed_one(many, undisturbed, tmp_path):
    out = tmp_path / "out"
    killed = warm.run(["-c", _KILLER, many, out, SHARD_BYTES], env=environment())
    assert killed.returncode == 0, killed.stderr
    finished = [int(line) for line in killed.stdout.split()]
    assert len(finished) == 10
    assert finished == sorted(finished)  # nothing that was finished is lost
    assert 10 < finished[-1] < len(undisturbed)
    assert not out.exists()
    assert importer.write(many, str(out), shard_bytes=SHARD_BYTES) == 300
    assert tree(out) == undisturbed
    assert os.listdir(tmp_path) == ["out"]


def start(source: Path, out: Path) -> warm.Process:
    """The command with two processes, as the leader of a process group."""
    command = ["-m", "personmae", "shards", "write", source, out, "--shard-mb", SHARD_MB, "--processes", 2]
    return warm.start(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def group_is_gone(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def interrupt(
    source: Path, out: Path, num_shards: int, end: Callable[[int, int], None], how: int
) -> tuple[warm.Process, str] | None:
    """The command, ended with work left, and its errors; None and a clean start where it was as good as done by then."""
    before, command = num_records(out), start(source, out)
    await_true(lambda: num_records(out) > before or out.exists())
    os.kill(command.pid, signal.SIGSTOP)  # so that it cannot finish between the look and the signal
    has_work = not out.exists() and num_records(out) < num_shards - 8
    end(command.pid, how)
    os.kill(command.pid, signal.SIGCONT)
    _, errors = command.communicate(timeout=60)
    if not has_work:
        shutil.rmtree(out, ignore_errors=True)
    return (command, errors) if has_work else None


@pytest.mark.slow
def test_however_the_command_is_ended_its_workers_end_and_the_same_command_goes_on(many, undisturbed, tmp_path):
    out = tmp_path / "out"
    ways: list[tuple[Callable[[int, int], None], signal.Signals, int]] = [
        (os.killpg, signal.SIGKILL, -signal.SIGKILL),
        (os.killpg, signal.SIGINT, 75),
        (os.kill, signal.SIGTERM, 75),
        (os.kill, signal.SIGKILL, -signal.SIGKILL),
    ]
    num_shards = sum(name.endswith(".mds") for name in undisturbed)
    for end, how, code in ways:
        tries = (interrupt(many, out, num_shards, end, how) for _ in range(5))
        command, errors = next(tried for tried in tries if tried)  # a busy machine may look too late
        assert command.returncode == code, (how, errors)
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if "shards write: " not in line]
        if code == 75:
            assert len(lines) == 1, errors
            assert lines[0].startswith("stopped: ")
            assert "run the same command again" in lines[0].lower()
        await_true(lambda command=command: group_is_gone(command.pid))
        assert not out.exists()
    last = personmae("shards", "write", many, out, "--shard-mb", str(SHARD_MB), "--processes", "2")
    assert "300 images written" in last.stdout, last.stderr
    assert ". 2 left out, listed in " in last.stdout
    assert tree(out) == undisturbed


def test_the_loss_of_a_worker_stops_the_import_and_the_same_call_goes_on(many, undisturbed, tmp_path):
    def kill_a_worker(done: int, total: int) -> None:
        if 0 < done < total and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    killed: list = []
    with pytest.raises(Stopped, match=r"a worker process was killed.*Run the same command again"):
        importer.write(many, str(tmp_path / "out"), shard_bytes=SHARD_BYTES, num_processes=2, progress=kill_a_worker)
    assert killed
    assert importer.write(many, str(tmp_path / "out"), shard_bytes=SHARD_BYTES, num_processes=2) == 300
    assert tree(tmp_path / "out") == undisturbed


def test_an_interrupted_upload_goes_on_and_uploads_no_shard_twice(many, undisturbed, s3_server):
    bucket = s3_server.bucket("resumed")
    s3_server.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    s3_server.client.put_object(Bucket=bucket, Key="neighbour/x", Body=b"data")

    def stop(done: int, total: int) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        importer.write(many, f"s3://{bucket}/set", shard_bytes=SHARD_BYTES, progress=stop)
    left = set(s3_server.keys(bucket))
    assert {"set/import.json", "set/import-00000.json", "set/shard.00000.mds"} <= left
    assert "set/index.json" not in left
    assert importer.write(many, f"s3://{bucket}/set", shard_bytes=SHARD_BYTES) == 300
    found = {key: s3_server.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in s3_server.keys(bucket)}
    assert found == {f"set/{name}": content for name, content in undisturbed.items()} | {"neighbour/x": b"data"}
    versions = s3_server.client.list_object_versions(Bucket=bucket)["Versions"]
    uploads = [version["Key"] for version in versions if version["Key"] in left and version["Key"].endswith(".mds")]
    recorded = {f"set/shard.{name[-10:-5]}.mds" for name in left if "import-" in name}
    assert recorded
    assert not [key for key in recorded if uploads.count(key) != 1]


def test_another_plan_on_an_unfinished_bucket_is_refused(many, s3_server):
    bucket = s3_server.bucket("unfinished")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        importer.write(many, f"s3://{bucket}/set/", shard_bytes=SHARD_BYTES, progress=stop)
    other = personmae("shards", "write", many, f"s3://{bucket}/set", "--shard-mb", "1")
    assert other.returncode == 78
    assert f"error: s3://{bucket}/set holds an unfinished import with shard_bytes={SHARD_BYTES}" in other.stderr


def test_the_command_line_selects_shrinks_and_says_what_it_did(many, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{copy}/p{i:02}\n" for copy in range(6) for i in range(50) if i % 5))
    options = ["--list", tmp_path / "list.txt", "--first", "0.5", "--fraction", "0.25", "--seed", "3", "--max-side", "64"]
    written = personmae("shards", "write", many, tmp_path / "out", *options)
    assert written.stdout.strip() == f"30 images written to {tmp_path}/out", written.stderr
    assert "shards write: 30 of 30 images, " in written.stderr
    (entry,) = json.loads((tmp_path / "out" / "index.json").read_text())["shards"]
    assert entry["samples"] == 30
    again = personmae("shards", "write", many, tmp_path / "out", "--if-missing")
    assert again.stdout.strip() == f"{tmp_path}/out already holds a data set"


def test_the_help_says_what_a_source_may_be_and_shows_examples():
    helped = personmae("shards", "write", "--help")
    assert helped.returncode == 0
    assert all(part in helped.stdout for part in ("an LMDB", "WebDataset", "--trust-pickle-list", "examples:", "rejects.jsonl"))

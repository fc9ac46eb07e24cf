"""Every command ends without a traceback where nobody reads what it prints, as before ``head``."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
DIGEST = "sha256:" + "0" * 64
PLACES = ["data.shards=s3://bucket/shards", "checkpoint.upload_to=s3://bucket/run"]
RUN = ["configs/pretrain_vit_base.yaml", *PLACES, f"--image=registry.test/personmae@{DIGEST}", "--name=run"]
COMMANDS = [
    ["-m", "personmae"],
    ["-m", "personmae", "help", "shards"],
    ["-m", "personmae", "--version"],
    ["-m", "personmae", "keys"],
    ["-m", "personmae", "keys", "pretrain"],
    ["-m", "personmae", "completion", "bash"],
    ["-m", "personmae", "pretrain", "configs/quickstart.yaml", "--print-config"],
    ["-m", "personmae", "shards", "stats", "{shards}"],
    ["-m", "personmae", "shards", "verify", "{shards}"],
    ["-m", "personmae", "render", *RUN],
    ["-m", "personmae", "render", *RUN, "-o", "json"],
    ["-m", "personmae", "submit", *RUN, "--no-bucket-check", "--dry-run=client"],
    ["-m", "personmae", "status", "run"],
    ["-m", "personmae", "status", "run", "-o", "json", "--watch"],
    ["-m", "personmae", "logs", "run"],
    ["-m", "personmae", "logs", "run", "-f"],
    ["-m", "personmae", "scale", "run", "--nodes", "4"],
    ["-m", "personmae", "suspend", "run"],
    ["-m", "personmae", "resume", "run"],
    ["-m", "personmae", "adopt", "run"],
    ["-m", "personmae", "delete", "run"],
]
HELP = [["personmae"], ["personmae", "shards"], ["launcher.cluster.cli", "status"], ["launcher.cluster.bucket", "fetch"]]
KUBECTL = """#!/usr/bin/env python3
import json, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as kubectl, which ends where nobody reads it
metadata = {"name": "run-trainer", "uid": "u", "creationTimestamp": "2026-01-02T03:04:05Z",
            "labels": {"personmae/run": "run", "app.kubernetes.io/instance": "run"}}
job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"parallelism": 8}}
state = {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]}
pod = {"metadata": metadata | {"name": "run-trainer-0-abcde"}, "spec": {}, "status": state}
words = sys.argv[1:]
if "api-resources" in words:
    print("jobs.batch")
elif "get" in words and "pods" in words:
    print(json.dumps({"items": [pod]}))
elif "get" in words and "run-trainer" in words:
    print(json.dumps(job))
elif "get" in words and any(word.startswith("jobs.batch") for word in words):
    print(json.dumps({"kind": "List", "items": [job]}))
elif "get" in words and "configmap" in words and "run-run" in words:
    print(json.dumps({"data": {"NODES": "1:8", "RANKS": "8", "BATCH": "2048"}}))
elif "logs" in words:
    print("a line\\n" * 1000)
"""


@pytest.fixture
def unread() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    source, sink = os.pipe()
    os.close(source)
    yield sink
    os.close(sink)


def check(code: int, said: str) -> None:
    assert code in (0, 141), said
    assert not [word for word in ("Traceback", "Exception ignored", "BrokenPipe", "Broken pipe") if word in said], said


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_whose_output_nobody_reads_ends_quietly(
    command: list[str], unread: int, shard_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    environ = os.environ | warm.FIXED | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    line = [part.format(shards=shard_dir) for part in command]
    with (tmp_path / "said").open("w+") as said:
        code = warm.start(line, cwd=ROOT, env=environ, stdout=unread, stderr=said).wait(120)
        said.seek(0)
        check(code, said.read())


@pytest.mark.parametrize("module", HELP, ids=" ".join)
def test_a_help_that_nobody_reads_ends_quietly(module: list[str], unread: int) -> None:
    command = [sys.executable, "-m", module[0], *module[1:], "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=unread, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    check(done.returncode, done.stderr)

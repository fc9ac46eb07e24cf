"""``run.json``: what ran, from which commit, on which machine and when, and the command that starts it again.

A resumed run adds an entry to ``sessions``. Next to that list are the facts of the newest session.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from personmae.system import files

FILE = "run.json"
_OF_A_SESSION = ("command", "commit", "versions", "hardware")
_MOST_PARENTS = 8  # between a rank and the command that was typed


def begin(run_dir: str | Path, record: dict[str, Any], *, first_step: int) -> None:
    """Add a session to the run's record, whose other entries become ``record``.

    Raises:
        OSError: it cannot be read or written. The old record is whole.
    """
    path = Path(run_dir) / FILE
    session = {
        "started": _now(),
        "ended": None,
        "seconds": None,
        "outcome": None,
        "first_step": first_step,
        "last_step": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "command": command(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        **{name: record[name] for name in _OF_A_SESSION if name in record},
    }
    _write(path, record | {"command": session["command"], "sessions": [*_sessions(path), session]})


def end(run_dir: str | Path, *, last_step: int, failure: BaseException | None) -> None:
    """Say in the newest session, if this process began it, when and how it ended. A full disk is no reason to fail now."""
    path = Path(run_dir) / FILE
    try:
        record = json.loads(path.read_bytes())
        session = record["sessions"][-1]
        if (session["pid"], session["host"]) != (os.getpid(), socket.gethostname()):
            return
        started = datetime.fromisoformat(session["started"])
        session["ended"], session["seconds"] = _now(), round(time.time() - started.timestamp(), 1)
        session["outcome"] = _outcome(failure)
        session["last_step"] = last_step
        _write(path, record)
    except (OSError, ValueError, LookupError, TypeError):  # the record was removed or changed by hand meanwhile
        return


def command() -> str:
    """What was typed to start this process, as a shell takes it: that of the launcher where there is one."""
    ours = [argument for argument in sys.argv[1:] if not argument.startswith("--local")]  # deepspeed adds --local_rank
    typed, pid = sys.orig_argv, os.getppid()
    for _ in range(_MOST_PARENTS if ours and "RANK" in os.environ else 0):
        argv, pid = _parent(pid)
        if argv[-len(ours) :] == ours:
            typed = argv
    return shlex.join(typed)


def _parent(pid: int) -> tuple[list[str], int]:
    """The arguments of a process and the number of its parent. Empty where the system does not say."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="surrogateescape").split("\0")
        return argv, int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return [], 0


def _outcome(failure: BaseException | None) -> str:
    if failure is None:
        return "complete"
    return "stopped" if type(failure).__name__ == "Stopped" else f"failed: {type(failure).__name__}"


def _sessions(path: Path) -> list[dict[str, Any]]:
    """Those before this one. A record of before there were sessions is one."""
    try:
        old = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # one that cannot be read at present must not be taken for none
        return []
    if not isinstance(old, dict):
        return []
    if isinstance(found := old.get("sessions"), list):
        return found
    return [{name: old[name] for name in _OF_A_SESSION if name in old}]


def _write(path: Path, record: dict[str, Any]) -> None:
    files.replace(path, files.to_json(record, indent=1))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The checkout's commit, with '+' when files differ from it. None outside a checkout."""
    where = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=where, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and GPUs by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": memory, "gpus": gpus}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

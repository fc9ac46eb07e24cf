"""What a hung rank was doing: where each of its threads is and, on GPUs, the last collectives that NCCL has recorded."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PY_SPY_SECONDS = 30.0
_ANSWER_SECONDS = 3.0


def read_traces(pid: int, file: Path) -> str:
    """Where each thread of a rank is: from py-spy where it is installed and allowed, else from the rank's own fault handler.

    ``file`` is where that handler writes, see personmae/monitor/heartbeat.py.
    """
    state = process_state(pid)
    if traces := _ask_py_spy(pid):
        return f"state {state}, by py-spy\n{traces}"
    if not file.exists():
        return f"state {state}; no traces: the rank has no heartbeat, and py-spy is not installed or not allowed to look"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    _wait_for_whole(file)
    return f"state {state}\n{file.read_text(encoding='utf-8', errors='replace') or 'no traces: the rank does not answer'}"


def process_state(pid: int) -> str:
    """As the kernel has it: ``S (sleeping)``, ``T (stopped)``, ..."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("State:"):
                return line.split(":", 1)[1].strip()
    return "unknown"


def flight_environment(pipes: Path, records: Path, round_number: int) -> dict[str, str]:
    """What makes NCCL record its last collectives, and write them to ``records`` when asked; without GPUs nothing reads it."""
    return {
        "TORCH_FR_BUFFER_SIZE": os.environ.get("TORCH_FR_BUFFER_SIZE", "2000"),
        "TORCH_FR_DUMP_TEMP_FILE": str(records.absolute() / f"flight-round-{round_number}-rank-"),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(pipes / "flight-"),  # torch appends the rank and .pipe
    }


def ask_flight_record(environ: dict[str, str]) -> Path | None:
    """Have a rank with this environment write its flight record; where it lies, None where NCCL is not in use.

    torch.distributed.flight_recorder reads such files. They are pickles, so nothing here does.
    """
    rank = environ["RANK"]
    pipe = Path(f"{environ.get('TORCH_NCCL_DEBUG_INFO_PIPE_FILE')}{rank}.pipe")
    record = Path(f"{environ.get('TORCH_FR_DUMP_TEMP_FILE')}{rank}")
    try:
        number = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):  # no NCCL, or its watcher is gone
            return None
        raise
    with open(number, "wb", buffering=0) as file, contextlib.suppress(OSError):
        file.write(b"1\n")
    _wait_for_whole(record)
    return record if record.exists() else None


def _ask_py_spy(pid: int) -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not (program := shutil.which("py-spy", path=places)):
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_PY_SPY_SECONDS, check=False
        )
        return done.stdout if done.returncode == 0 else ""
    return ""


def _wait_for_whole(file: Path) -> None:
    """Until somebody has written a file and seems to be done with it, within reason."""
    deadline, size = time.monotonic() + _ANSWER_SECONDS, 0
    while time.monotonic() < deadline:
        before, size = size, file.stat().st_size if file.exists() else 0
        if size and size == before:
            return
        time.sleep(0.2)

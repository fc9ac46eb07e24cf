"""A run directory belongs to one process at a time. Who comes second is told whom it belongs to, and what to do."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from personmae.errors import Unavailable, UserError

_WAIT_SECONDS = 30.0


def lock(run_dir: str | Path) -> IO[str]:
    """Hold a run directory for this process until the returned file is closed or the process ends.

    The lock is the operating system's (``flock``), so that it goes with the process. ``RUN/.lock`` says who has it.

    Raises:
        UserError: another process is running there.
        Unavailable: it is, under an agent that starts ranks again, and did not end in time.
    """
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / ".lock").open("a+", encoding="utf-8")  # not "w": that would take the holder's name away
    restarted = "TORCHELASTIC_RUN_ID" in os.environ  # set by our agent and torchrun: the holder may be a rank that is ending
    deadline = time.monotonic() + _WAIT_SECONDS * restarted
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            held = f"a run directory belongs to one run. Another process is at work in {run_dir}{_holder(file)}"
            file.close()
            if restarted:
                raise Unavailable(f"{held}, and has not ended within {_WAIT_SECONDS:g} s") from None
            raise UserError(f"{held}: stop it first, with SIGTERM it saves its state") from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        return file


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as far as the file says."""
    file.seek(0)
    try:
        known = json.loads(file.read())
        return f", PID {known['pid']} on host {known['host']}"
    except (ValueError, LookupError, TypeError):  # it was locked a moment ago, or by an earlier version
        return ""

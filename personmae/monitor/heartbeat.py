"""What a rank tells the agent that started it: what it is doing and which step it has reached.

One small mapped file a rank, below the directory that ``PERSONMAE_HEARTBEAT_DIR`` names; without that variable nothing
happens. The agent reads the file; nothing is sent, and the rank never waits.
"""

import faulthandler
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

DIRECTORY = "PERSONMAE_HEARTBEAT_DIR"
Phase = Literal["start", "compile", "step", "checkpoint", "wait_data", "evaluate"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# How long a rank may say nothing new, by what it said last; the agent's options have these defaults.
PATIENCE_SECONDS: dict[Phase, float] = {
    "start": 600,
    "compile": 900,
    "step": 300,
    "checkpoint": 600,
    "wait_data": 1800,
    "evaluate": 3600,
}
_RECORD = struct.Struct("<qqq")  # phase, step, time in ns of the clock that all processes of a host share
_TIME = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank's last word: ``step`` optimizer steps are done, and ``phase`` began or went on at ``time``."""

    phase: Phase
    step: int
    time: float  # of time.monotonic


class Heartbeat:
    """This rank's end. It also lets the agent ask for the stacks of all threads, by SIGUSR1, however stuck they are."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        directory = os.environ.get(DIRECTORY)
        if not directory:
            return
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        with open(beat_file(directory, local_rank), "w+b") as file:
            file.write(bytes(_RECORD.size))  # a page that a full disk could not give later would be a bus error
            file.flush()
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        stacks = os.open(stacks_file(directory, local_rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # open until the end
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        self.beat("start", 0)

    def beat(self, phase: Phase, step: int) -> None:
        """Say that ``phase`` begins or goes on, ``step`` steps being done."""
        if self._map is not None:
            _TIME.pack_into(self._map, _RECORD.size - _TIME.size, now := time.monotonic_ns())
            _RECORD.pack_into(self._map, 0, PHASES.index(phase), step, now)  # a new phase is never seen with an old time


def beat_file(directory: str | Path, local_rank: int) -> Path:
    """Where a rank's last beat is kept."""
    return Path(directory) / f"{local_rank}.beat"


def stacks_file(directory: str | Path, local_rank: int) -> Path:
    """Where a rank's stacks go when the agent asks for them."""
    return Path(directory) / f"{local_rank}.stacks"


def read_beat(directory: str | Path, local_rank: int) -> Beat | None:
    """A rank's last beat; None before the first."""
    try:
        raw = beat_file(directory, local_rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != _RECORD.size:
        return None
    phase, step, nanoseconds = _RECORD.unpack(raw)
    return Beat(PHASES[phase], step, nanoseconds / 1e9) if nanoseconds else None

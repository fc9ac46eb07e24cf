"""Heartbeats: a rank writes its phase and its step for the agent that started it.

Each rank maps one small file in the directory ``PERSONMAE_HEARTBEAT_DIR``. Without that variable nothing happens. The
agent reads the file. Nothing is sent, and the rank never waits.
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
Phase = Literal["start", "compile", "step", "checkpoint", "data_wait", "evaluate"]
PHASES: tuple[Phase, ...] = get_args(Phase)
OLD_PHASES: dict[Phase, str] = {"data_wait": "wait_data"}  # names that are exported beside the new ones for one release
# How long a rank may be silent in each phase. The agent's options have these defaults.
PATIENCE_SECONDS: dict[Phase, float] = {
    "start": 600,
    "compile": 900,
    "step": 300,
    "checkpoint": 600,
    "data_wait": 1800,
    "evaluate": 3600,
}
_RECORD = struct.Struct("<qqq")  # phase, step, time in ns of the clock that all processes of a host share
_TIME = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank's last beat: ``step`` optimizer steps are done, and ``phase`` began or continued at ``time``."""

    phase: Phase
    step: int
    time: float  # of time.monotonic


class Heartbeat:
    """The rank's side. It also lets the agent ask for the stacks of all threads by SIGUSR1, even where they are stuck."""

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
        """Record that ``phase`` begins or continues after ``step`` steps."""
        if self._map is not None:
            _TIME.pack_into(self._map, _RECORD.size - _TIME.size, now := time.monotonic_ns())
            _RECORD.pack_into(self._map, 0, PHASES.index(phase), step, now)  # a new phase is never seen with an old time


def beat_file(directory: str | Path, local_rank: int) -> Path:
    """Where a rank's last beat is kept."""
    return Path(directory) / f"{local_rank}.beat"


def stacks_file(directory: str | Path, local_rank: int) -> Path:
    """Where a rank's stacks go when the agent asks for them."""
    return Path(directory) / f"{local_rank}.stacks"


def phase_values(phase: Phase) -> dict[str, float]:
    """1 for the current phase and 0 for the others, by name, with the old names of the last release."""
    values = {name: float(name == phase) for name in PHASES}
    return values | {old: values[new] for new, old in OLD_PHASES.items()}


def read_beat(directory: str | Path, local_rank: int) -> Beat | None:
    """A rank's last beat. None before the first."""
    try:
        raw = beat_file(directory, local_rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) != _RECORD.size:
        return None
    phase, step, nanoseconds = _RECORD.unpack(raw)
    return Beat(PHASES[phase], step, nanoseconds / 1e9) if nanoseconds else None

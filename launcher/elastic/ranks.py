"""The ranks of this host as processes: started, listened to, signalled, watched and ended."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.elastic.membership import Round
from launcher.elastic.traces import ask_flight_record, flight_environment, process_state, read_traces
from personmae.errors import EXIT_COMPLETE, EXIT_STOPPED, EXIT_USER_ERROR
from personmae.monitor import heartbeat
from personmae.monitor.heartbeat import PATIENCE_SECONDS, Beat, Phase

_TAIL_LINES = 200
_LINE_BYTES = 1 << 16  # a progress bar may never end its line
_PR_SET_PDEATHSIG = 1
_printing = threading.Lock()


def log(text: str, prefix: str = "elastic") -> None:
    """Print lines of the agent's own, or of a rank. A full disk below the log must not end a run, nor spoil its exit code."""
    left = "".join(f"[{prefix}] {line}\n" for line in text.splitlines()).encode(errors="backslashreplace")
    with _printing, contextlib.suppress(OSError, ValueError):
        while left:  # with no buffer, which would be tried again when the agent ends
            left = left[os.write(sys.stdout.fileno(), left) :]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rank may be silent, by the phase of its last heartbeat."""

    start_seconds: float = PATIENCE_SECONDS["start"]
    compile_seconds: float = PATIENCE_SECONDS["compile"]
    step_seconds: float = PATIENCE_SECONDS["step"]
    checkpoint_seconds: float = PATIENCE_SECONDS["checkpoint"]
    data_wait_seconds: float = PATIENCE_SECONDS["data_wait"]
    evaluate_seconds: float = PATIENCE_SECONDS["evaluate"]

    def of(self, phase: Phase) -> float:
        return float(getattr(self, f"{phase}_seconds"))


def rank_environment(now: Round, node_id: str, *, run_id: str, beats: Path, interface: str | None) -> list[dict[str, str]]:
    """What ``torchrun`` would export to each rank of a node."""
    place = now.place(node_id)
    assert place, "a node of the round asks"
    first, share = place
    group = [i for i, s in enumerate(now.shares) if s]
    host = [node.id for node in now.nodes].index(node_id)
    shared = {
        "WORLD_SIZE": str(now.world_size),
        "LOCAL_WORLD_SIZE": str(share),
        "ROLE_WORLD_SIZE": str(now.world_size),
        "GROUP_RANK": str(host),
        "GROUP_WORLD_SIZE": str(len(group)),
        "MASTER_ADDR": now.nodes[0].address,
        "MASTER_PORT": str(now.nodes[0].port),
        "TORCHELASTIC_RESTART_COUNT": str(now.number - 1),
        "TORCHELASTIC_RUN_ID": run_id,
        heartbeat.DIRECTORY: str(beats),
    }
    if interface:  # gloo would look the host's name up, which need not lead to the address that the others reach
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    ranks = range(first, first + share)
    return [shared | {"RANK": str(r), "ROLE_RANK": str(r), "LOCAL_RANK": str(r - first)} for r in ranks]


class RankProcess:
    """One rank: a process group of its own, whose output is prefixed with its number and whose last lines are kept."""

    def __init__(self, command: Sequence[str], environ: dict[str, str], *, beats: Path, log_file: Path | None) -> None:
        self.rank, self.local_rank = int(environ["RANK"]), int(environ["LOCAL_RANK"])
        self.started = time.monotonic()
        self.ended_at = 0.0  # of time.time
        self._asked = self._cleared = False
        self._beats, self._environ = beats, environ
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process = subprocess.Popen(
            command,
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(_die_with, os.getpid()),
        )
        self._reader = threading.Thread(target=self._read, args=(log_file,), daemon=True, name=f"rank-{self.rank}")
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, log_file: Path | None) -> None:
        assert self._process.stdout
        with self._process.stdout as pipe:
            while raw := pipe.readline(_LINE_BYTES):
                line = raw.decode(errors="replace").rstrip("\n")
                self._tail.append(line)
                log(line or " ", str(self.rank))
                log_file = self._write(log_file, raw) if log_file else None
        self.ended_at = self.ended_at or time.time()

    def _write(self, log_file: Path, raw: bytes) -> Path | None:
        """Append to the rank's file; None when that cannot be written, since a rank must not wait for a reader that is gone."""
        try:
            with log_file.open("ab") as file:
                file.write(raw)
        except OSError as error:
            log(f"{log_file} is not written any further: {error.strerror}")
            return None
        return log_file

    def code(self) -> int | None:
        """The exit code as a shell gives it; None while the rank runs.

        Ranks agree to stop as soon as one is asked. Another that is asked while its interpreter is already ending, and has
        given up its handlers, dies of the signal although all is saved: that is a stop too, unless it had not even begun.
        """
        code = self._process.poll()
        if code is None:
            return None
        self.ended_at = self.ended_at or time.time()
        self._clear()
        has_begun = not ((beat := self.beat()) and beat.phase == "start")
        if self._asked and code in (-signal.SIGTERM, EXIT_STOPPED):
            return EXIT_STOPPED if has_begun else 128 + signal.SIGTERM
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ask the rank, and not its children, to save its state and end."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                self._asked = True
                os.kill(self.pid, signal.SIGTERM)

    def kill(self, *, wait: bool = True) -> None:
        """End the rank and all that it has started."""
        self._clear()
        if not wait:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in the hands of a driver does not die
            self._process.wait(timeout=5)
        self._reader.join(timeout=2)

    def _clear(self) -> None:
        """Kill the group, once: later its number may belong to others."""
        if not self._cleared:
            self._cleared = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def tail(self, num_lines: int = 40) -> str:
        self._reader.join(timeout=1)
        return "\n".join(list(self._tail)[-num_lines:])[-4000:]

    def error_line(self) -> str:
        """The line that names what the user has to fix, if this rank has printed it."""
        self._reader.join(timeout=1)
        return next((line for line in reversed(self._tail) if line.startswith("error:")), "")

    def beat(self) -> Beat | None:
        return heartbeat.read_beat(self._beats, self.local_rank)

    def silent(self) -> tuple[Phase, float]:
        """The phase of the rank's last heartbeat and how many seconds ago it came."""
        beat = self.beat()
        return (beat.phase, time.monotonic() - beat.time) if beat else ("start", time.monotonic() - self.started)

    def traces(self) -> str:
        """What it was doing, for the log."""
        phase, seconds = self.silent()
        where = read_traces(self.pid, heartbeat.stacks_file(self._beats, self.local_rank))
        record = ask_flight_record(self._environ)
        lines = f"traces of rank {self.rank}, {seconds:.1f} s after its last heartbeat, in phase {phase}, {where}"
        return f"{lines}\nflight record of rank {self.rank}: {record}" if record else lines


class Ranks:
    """All ranks of this host in one round; it may be none."""

    def __init__(self, command: Sequence[str], environs: Sequence[dict[str, str]], beats: Path, log_dir: Path | None) -> None:
        for old in beats.iterdir():
            old.unlink()
        self.all: list[RankProcess] = []
        self._stopped = False
        try:
            for environ in environs:
                number = int(environ["TORCHELASTIC_RESTART_COUNT"]) + 1
                log_file = log_dir / f"round-{number}-rank-{environ['RANK']}.log" if log_dir else None
                recording = flight_environment(beats, log_dir, number) if log_dir else {}
                self.all.append(RankProcess(command, environ | recording, beats=beats, log_file=log_file))
        except BaseException:
            self.kill()  # one could not be started: the others have nobody yet who watches them
            raise

    def codes(self) -> dict[int, int]:
        """Exit codes, by rank, of those that have ended."""
        return {rank.rank: code for rank in self.all if (code := rank.code()) is not None}

    def ended(self) -> bool:
        return len(self.codes()) == len(self.all)

    def stop(self) -> None:
        """Ask all at once, and only once: a second request would end a rank in the middle of saving."""
        if not self._stopped:
            self._stopped = True
            for rank in self.all:
                rank.stop()

    def kill(self) -> None:
        """End all at once."""
        for rank in self.all:
            rank.kill(wait=False)
        for rank in self.all:
            rank.kill()

    def step(self) -> int:
        """The highest step that a heartbeat of a rank has had."""
        return max((beat.step for rank in self.all if (beat := rank.beat())), default=0)

    def under_way(self) -> bool:
        """Whether all ranks with heartbeats have begun to train; ranks without any count as such."""
        beats = [rank.beat() for rank in self.all]
        return not any(beats) or all(beat and beat.phase not in ("start", "compile") for beat in beats)

    def hung(self, limits: Limits, awake_seconds: float = float("inf")) -> RankProcess | None:
        """The rank that has been silent beyond what its phase allows, a stopped one first.

        ``awake_seconds``: since this agent was last asleep, and the ranks with it, if it ever was.
        """
        late = []
        for rank in self.all:
            phase, seconds = rank.silent()
            if min(seconds, awake_seconds) > limits.of(phase) and rank.code() is None:
                late.append(rank)
        return min(late, key=lambda rank: (process_state(rank.pid) != "T (stopped)", rank.rank)) if late else None

    def traces(self) -> list[str]:
        """What all ranks are doing, asked of all at once."""
        with ThreadPoolExecutor(max_workers=len(self.all) or 1) as pool:
            return list(pool.map(lambda rank: rank.traces(), self.all))

    def first_failed(self) -> RankProcess:
        """The rank that ended first among those that neither completed nor stopped in good order."""
        failed = [rank for rank in self.all if rank.code() not in (None, EXIT_COMPLETE, EXIT_STOPPED)]
        return min(failed, key=lambda rank: rank.ended_at)

    def user_error(self) -> str:
        """The one line of a user error, from whichever rank has printed it."""
        lines = [rank.error_line() for rank in self.all if rank.code() == EXIT_USER_ERROR]
        return next((line for line in lines if line), "")


def reach(host: str, port: int) -> str:
    """The address of this host that is used to reach another, so one that the other can reach."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), 0x8915, name.encode().ljust(256, b"\0"))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def reserve_port(address: str) -> socket.socket:
    """A socket that keeps a free port of this host for a rank, which may bind it too, from anybody else until it is closed.

    Both sides ask for SO_REUSEADDR, as torch's store does: the port is nobody else's, and is given out for no connection.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, 0))
    return held


_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def _die_with(agent: int) -> None:
    """A rank does not outlive its agent, however that ends; called between fork and exec."""
    if _prctl:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != agent:  # it has ended already
            os._exit(1)

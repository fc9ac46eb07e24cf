"""``worker.py`` without torch, so that many of them start at once: ranks agree on each step over a socket of rank 0.

``light_worker.py RUN_DIR`` goes on until RUN_DIR has a file ``finish``. ``trained-ROUND-RANK-WORLD.txt`` there lists the
step and the sample ids of each step that this rank trained; ``state`` is the checkpoint, a step.
"""

import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from personmae.monitor.heartbeat import Heartbeat

GLOBAL_BATCH = 12
EVERY_STEPS = 10
_FLAGS = struct.Struct("<??")


class Group:
    """All ranks of a round: rank 0 collects the others' flags and answers with what any of them has said."""

    def __init__(self, rank: int, world_size: int) -> None:
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if rank:
            self._peers = [connect(address)]
        else:
            with socket.create_server(address) as server:
                self._peers = [server.accept()[0] for _ in range(world_size - 1)]
        self._rank = rank

    def any(self, *flags: bool) -> tuple[bool, ...]:
        if self._rank:
            self._peers[0].sendall(_FLAGS.pack(*flags))
            return self._receive(self._peers[0])
        received = [flags, *map(self._receive, self._peers)]
        together = tuple(map(any, zip(*received, strict=True)))
        for peer in self._peers:
            peer.sendall(_FLAGS.pack(*together))
        return together

    def _receive(self, peer: socket.socket) -> tuple[bool, ...]:
        data = peer.recv(_FLAGS.size, socket.MSG_WAITALL)
        if len(data) < _FLAGS.size:
            raise ConnectionError("a peer is gone")
        return _FLAGS.unpack(data)


def connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(address, timeout=20)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main() -> int:
    heartbeat = Heartbeat()
    run_dir, stop = Path(sys.argv[1]), []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    number = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    (run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    print("begins", os.environ["GROUP_RANK"], flush=True)
    group, state = Group(rank, world_size), run_dir / "state"
    step = int(state.read_text()) if state.exists() else 0
    with open(run_dir / f"trained-{number}-{rank}-{world_size}.txt", "w", buffering=1) as trained:
        while True:
            heartbeat.beat("step", step)
            stopping, finishing = group.any(bool(stop), (run_dir / "finish").exists())
            if stopping or finishing:
                break
            ids = range(step * GLOBAL_BATCH + rank, (step + 1) * GLOBAL_BATCH, world_size)
            trained.write(" ".join(map(str, [step, *ids])) + "\n")
            step += 1
            if rank == 0 and step % EVERY_STEPS == 0:
                save(state, step)
            time.sleep(0.02)
    if rank == 0:
        save(state, step)
    group.any(True, True)  # nobody goes before all is saved
    return 75 if stopping else 0


def save(state: Path, step: int) -> None:
    state.with_suffix(".partial").write_text(str(step))
    state.with_suffix(".partial").replace(state)


if __name__ == "__main__":
    sys.exit(main())

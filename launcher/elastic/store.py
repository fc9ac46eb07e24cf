"""The rendezvous store and an agent's link to it: the one place of the launcher that needs torch, for its TCPStore.

Only text goes through it. torch's own rendezvous unpickles what it reads there and compares the hosts' wall clocks; here the
record is JSON, and every agent dates the others' signs of life by its own clock.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from launcher.elastic import membership
from launcher.elastic.membership import Policy, Record
from personmae.errors import UserError

INTERVAL_SECONDS = 0.5  # between two looks at the store
_CALL_SECONDS = 10.0  # a call that takes longer means that the store is gone
Change = Callable[[Record], Record]


def serve(port: int, stopped: threading.Event) -> None:
    """Be the store until ``stopped``."""
    try:
        store = _tcp_store()("0.0.0.0", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"the store needs port {port}, which is taken or not allowed; give another with --port") from error
    print(f"store: serving on port {store.port}", flush=True)
    stopped.wait()


def _tcp_store() -> Any:
    """torch's TCPStore; the import takes a second or two."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = before or "ERROR"  # the agent logs a broken connection, in one line
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    if before is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # ranks inherit the environment
    return TCPStore


@dataclass(frozen=True, slots=True)
class StoreView:
    """What an agent knows: the record, and when it last saw a sign of life of each node."""

    record: Record = field(default_factory=Record)
    heard: dict[str, float] = field(default_factory=dict)  # of time.monotonic


class Link:
    """A thread that reads the record, applies this agent's changes to it and watches over the other agents.

    The agent's own thread never waits for the network: it reads ``view``, and gives changes to ``post``. Changes stay in the
    queue while the store is away. A store that comes back empty is given the last record that this agent knew; where another
    agent was faster and knew less, the later record takes the place of its.
    """

    def __init__(
        self,
        address: tuple[str, int],
        run_id: str,
        node_id: str,
        policy: Policy,
        *,
        keep_alive_seconds: float,
        settle_seconds: float,
    ) -> None:
        self.view = StoreView()
        self.changed = threading.Event()
        self._address, self._prefix, self._node_id, self._policy = address, f"personmae/{run_id}", node_id, policy
        self._keep_alive, self._settle = keep_alive_seconds, settle_seconds
        self._queue: deque[Change] = deque()
        self._wake = threading.Event()
        self._contact = self._begun = time.monotonic()
        self._waiting_since: tuple[frozenset[str], float] = (frozenset(), 0.0)
        self._counts: dict[str, int] = {}
        self._closed = False
        self._generation = 0
        self.connected = False

    def start(self) -> None:
        """Begin; the store's silence is counted from here."""
        _tcp_store()
        self._contact = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._generation += 1
        self._begun = time.monotonic()
        threading.Thread(target=self._run, args=(self._generation,), daemon=True, name="store-link").start()

    def post(self, change: Change) -> None:
        """Have the record changed, soon and once."""
        self._queue.append(change)
        self._wake.set()

    def silent_seconds(self) -> float:
        """How long the store has not answered."""
        return time.monotonic() - self._contact

    @property
    def idle(self) -> bool:
        """Whether everything posted has arrived."""
        return not self._queue

    def forgive(self) -> None:
        """This process was asleep: the store was not silent meanwhile."""
        self._contact = time.monotonic()

    def revive(self) -> None:
        """Leave a call that does not return to its thread, and begin another."""
        if min(self.silent_seconds(), time.monotonic() - self._begun) > _CALL_SECONDS + 5:
            self._begin()

    def flush(self, seconds: float) -> None:
        """Wait until everything posted has arrived, within reason."""
        deadline = time.monotonic() + seconds
        while self._queue and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.02)

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _run(self, generation: int) -> None:
        store: Any = None
        while not self._closed and generation == self._generation:
            try:
                if store is None:
                    store = self._connect()
                self._exchange(store, generation)
            except (RuntimeError, OSError, ValueError):  # what torch raises when a connection breaks, or a name is not known
                store = None
            self.changed.set()
            self._wake.wait(INTERVAL_SECONDS)
            self._wake.clear()

    def _connect(self) -> Any:
        with socket.create_connection(self._address, timeout=2):
            pass  # torch would print at length that nobody is there
        timeout = timedelta(seconds=_CALL_SECONDS)
        store = _tcp_store()(*self._address, is_master=False, wait_for_workers=False, timeout=timeout)
        store.compare_set(self._key, "", membership.to_json(self.view.record))
        self.view = StoreView(self.view.record, dict.fromkeys(self.view.heard, time.monotonic()))  # nobody could be heard
        self._counts.clear()
        self.connected = True
        return store

    @property
    def _key(self) -> str:
        return f"{self._prefix}/record"

    def _exchange(self, store: Any, generation: int) -> None:
        now = time.monotonic()
        if now - self._contact > self._keep_alive / 2:  # we were away or asleep: that makes nobody silent
            self.view = StoreView(self.view.record, dict.fromkeys(self.view.heard, now))
        store.add(f"{self._prefix}/beat/{self._node_id}", 1)
        while True:
            text = store.get(self._key).decode()
            found, known = membership.from_json(text), self.view.record
            record = found if found.version >= known.version else known
            heard = self._listen(store, record)
            queued = len(self._queue)
            changed = record
            for change in list(self._queue)[:queued]:
                changed = change(changed)
            changed = self._watch(changed, heard)
            if changed != found:
                changed = replace(changed, version=record.version + 1)
                wanted = membership.to_json(changed)
                if generation != self._generation:
                    return  # this call was given up for stuck; another thread does its work
                if store.compare_set(self._key, text, wanted).decode() != wanted:
                    continue  # another agent was faster
            if generation != self._generation:
                return
            for _ in range(queued):
                self._queue.popleft()
            self._contact = time.monotonic()
            self.view = StoreView(changed, heard)
            return

    def _listen(self, store: Any, record: Record) -> dict[str, float]:
        """When each node of the record was last heard: when its count last moved, by our clock."""
        now, heard = time.monotonic(), {}
        for node_id in {*record.round.active, *(n.id for n in record.waiting)} - {self._node_id}:
            count = store.add(f"{self._prefix}/beat/{node_id}", 0)
            moved = self._counts.get(node_id) != count
            heard[node_id] = now if moved else self.view.heard.get(node_id, now)
            self._counts[node_id] = count
        return heard

    def _watch(self, record: Record, heard: dict[str, float]) -> Record:
        """What any agent may do: expire the silent, form the next round."""
        now = time.monotonic()
        silent = {node_id for node_id, at in heard.items() if now - at > self._keep_alive}
        if silent:
            record = membership.expire(record, silent, self._policy)
        waiting = frozenset(n.id for n in record.waiting)
        if waiting != self._waiting_since[0]:
            self._waiting_since = (waiting, now)
        settled = now - self._waiting_since[1] >= self._settle
        if self._node_id in waiting:
            record = membership.form(record, self._policy, settled=settled)
        return record

    def settled(self) -> bool:
        """Whether those who wait have been the same for as long as first-comers are waited for."""
        return time.monotonic() - self._waiting_since[1] >= self._settle

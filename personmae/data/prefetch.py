"""Prefetch of the shards in the global order: open them before their use, and release them after it."""

import contextlib
import math
import threading
import time
from typing import Any

import numpy as np

from personmae.data import order
from personmae.data.cache import Cancelled, HeldShard, NotNow, ShardCache
from personmae.data.mds import MappedShard
from personmae.data.order import EpochOrder
from personmae.errors import UserError

_RETRY_SECONDS = 0.1  # until a shard is asked for again for which there was no room, or which another rank was fetching


class Orders:
    """The orders of the epochs that are read now and next, made when they are first asked for."""

    def __init__(self, shard_sizes: list[int], *, seed: int, block_size: int):
        self._arguments: dict[str, Any] = {"shard_sizes": shard_sizes, "seed": seed, "block_size": block_size}
        self._num_shards = len(shard_sizes)
        self._lock = threading.Lock()
        self._made: dict[int, tuple[EpochOrder, order.Ids]] = {}

    def __getitem__(self, epoch: int) -> EpochOrder:
        return self._make(epoch)[0]

    def shard_at(self, place: int) -> int:
        """The shard at a place of all epochs' shards in order."""
        epoch, number = divmod(place, self._num_shards)
        return int(self[epoch].shards[number])

    def num_before(self, epoch: int, shard: int) -> int:
        """How many shards come before this one in an epoch."""
        return int(self._make(epoch)[1][shard])

    def places(self, epoch: int, shards: order.Ids) -> order.Ids:
        """The places of an epoch's shards."""
        return epoch * self._num_shards + self._make(epoch)[1][shards]

    def place_at(self, epoch: int, offset: int) -> int:
        """The first place whose shard is not needed for the samples before ``offset`` of an epoch."""
        return epoch * self._num_shards + int(np.searchsorted(self[epoch].starts, offset, side="left"))

    def _make(self, epoch: int) -> tuple[EpochOrder, order.Ids]:
        with self._lock:
            if epoch not in self._made:
                made = order.epoch_order(**self._arguments, epoch=epoch)
                num_before = np.empty_like(made.shards)
                num_before[made.shards] = np.arange(len(num_before))
                self._made = {e: m for e, m in self._made.items() if abs(e - epoch) <= 1}
                self._made[epoch] = made, num_before
            return self._made[epoch]


class Prefetcher:
    """The shards of the global order: ``num_connections`` threads open them before their use, and they are released after it.

    Epochs follow each other without end. Shards are opened in the order of their first use, at most ``prefetch_shards`` beyond
    those that are in use now, and none from place ``end`` on.
    """

    def __init__(
        self,
        cache: ShardCache,
        orders: Orders,
        *,
        epoch: int,
        num_connections: int,
        prefetch_shards: int,
        end: int | None = None,
    ):
        self._cache, self._orders = cache.for_reader(self._next_use, self._give_back), orders
        self._prefetch_shards = min(prefetch_shards, len(cache.shards))  # never beyond the next epoch
        self._end = math.inf if end is None else end
        self._numbers = {shard.name: index for index, shard in enumerate(cache.shards)}
        self._condition = threading.Condition()
        self._opened: dict[int, HeldShard] = {}
        self._busy: set[int] = set()
        self._put_off: dict[int, tuple[float, NotNow | None]] = {}  # until when, and why
        self._beside: tuple[int, HeldShard] | None = None
        self._error: BaseException | None = None
        # Places number the shards of all epochs in order; those from passed up to in_use are in use now.
        self._passed = self._in_use = epoch * len(cache.shards)
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, name=f"shards-{i}", daemon=True) for i in range(num_connections)]
        for thread in self._threads:
            thread.start()

    def move_to(self, epoch: int, start: int, stop: int) -> None:
        """Say that samples from ``start`` up to ``stop`` of an epoch's order are used now, and none before them again."""
        found, before = self._orders[epoch], epoch * len(self._cache.shards)
        passed = before + int(np.searchsorted(found.stops, start, side="right"))
        with self._condition:
            self._in_use = before + int(np.searchsorted(found.starts, stop, side="left"))
            self._passed = passed
            for place in [place for place in self._opened if place < passed]:
                self._opened.pop(place).release()
            self._put_off = {place: put_off for place, put_off in self._put_off.items() if place >= passed}
            self._condition.notify_all()

    def get(self, place: int) -> MappedShard:
        """The shard at a place, once it is open."""
        with self._condition:
            while place not in self._opened:
                if self._error:
                    raise self._error
                if self._stopped:
                    raise Cancelled
                if place not in self._busy:
                    break
                self._condition.wait(1.0)
            else:
                return self._opened[place].mapped
            self._busy.add(place)
        self._open(place, needed=True)
        with self._condition:
            return self._opened[place].mapped

    def open_beside(self, index: int) -> MappedShard:
        """A shard out of order. The previous one is released. For one thread at a time."""
        if self._beside is None or self._beside[0] != index:
            held = self._cache.open(index)
            if self._beside:
                self._beside[1].release()
            self._beside = index, held
        return self._beside[1].mapped

    def stop(self) -> None:
        """Open nothing more. A thread that waits for a shard gets ``Cancelled``."""
        self._cache.close()
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def close(self) -> None:
        """End the threads and let all shards go."""
        self.stop()
        deadline = time.monotonic() + 2.0
        for thread in self._threads:  # one that waits for the network ends with its time-out
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        with self._condition:
            opened, self._opened = list(self._opened.values()), {}
        if self._beside:
            opened.append(self._beside[1])
        for held in opened:
            held.release()

    def _work(self) -> None:
        with contextlib.suppress(Cancelled):
            while (place := self._wait_for_place()) is not None:
                try:
                    self._open(place, needed=False)
                except (UserError, OSError) as error:
                    with self._condition:
                        self._error = error  # for the consumer, in whose way it lies
                        self._put_off[place] = math.inf, None
                        self._condition.notify_all()

    def _wait_for_place(self) -> int | None:
        """The first place that can be opened now, taken for this thread. None after ``stop``."""
        with self._condition:
            while not self._stopped:
                if (place := self._first_place(time.monotonic())) is not None:
                    self._busy.add(place)
                    return place
                self._condition.wait(_RETRY_SECONDS)
        return None

    def _first_place(self, now: float) -> int | None:
        for place in range(self._passed, int(min(self._in_use + self._prefetch_shards, self._end))):
            until, why = self._put_off.get(place, (0.0, None))
            if place not in self._opened and place not in self._busy and until <= now:
                return place
            if why is NotNow.NO_ROOM:  # none goes before it, or the room would never come
                return None
        return None

    def _open(self, place: int, *, needed: bool) -> None:
        """Open a shard that this thread has taken, or put it off."""
        held = None
        try:
            index = self._orders.shard_at(place)
            held = self._cache.open(index) if needed else self._cache.open_if_possible(index)
        finally:
            with self._condition:
                self._busy.discard(place)
                self._put_off.pop(place, None)
                if isinstance(held, NotNow):
                    self._put_off[place] = time.monotonic() + _RETRY_SECONDS, held
                elif held and not needed and (self._stopped or place < self._passed):
                    held.release()
                elif held:
                    self._opened[place] = held
                self._condition.notify_all()

    def _give_back(self) -> bool:
        """Release the shard with the latest use, to make room for one in use now. False where there is none."""
        with self._condition:
            last = max(self._opened, default=-1)
            if last < self._in_use:
                return False
            self._opened.pop(last).release()
            return True

    def _next_use(self, name: str) -> float:
        """The place at which a shard is used next."""
        if name not in self._numbers:
            return float("inf")
        index, num_shards = self._numbers[name], len(self._cache.shards)
        epoch = self._passed // num_shards
        place = epoch * num_shards + self._orders.num_before(epoch, index)
        return place if place >= self._passed else (epoch + 1) * num_shards + self._orders.num_before(epoch + 1, index)

"""Batches of decoded images in the global order: shards are prefetched, and threads decode the images.

mosaicml-streaming's own iterator reads sample by sample, under a lock for the whole node. This reader maps each shard once and
takes slices of it.
"""

import collections
import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from personmae import dist
from personmae.data import order
from personmae.data.decode import BadImage, decode_onto
from personmae.data.order import EpochOrder, MicroBatch
from personmae.data.prefetch import Orders, Prefetcher
from personmae.data.shard_set import ShardSet
from personmae.errors import RankError, UserError

_MIN_SEEN = 1000  # images read before the share of bad ones can stop a run


class JpegReader:
    """Micro-batches of one rank in the global order, as JPEG bytes: slices of mapped shards.

    The first batch belongs to step ``first_step``. Epochs follow each other, and each drops only the tail that does not fill
    a global batch. With ``total_steps`` the last batch belongs to the step before it, and no shard beyond is fetched.

    Raises:
        UserError: there are fewer samples than one global batch needs, or the cache's limit is too small for the order.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        first_step: int,
        total_steps: int | None = None,
        block_size: int = 1 << 18,
        num_connections: int = 8,
        prefetch_shards: int = 64,
    ):
        if len(shards) < global_batch_size:
            raise UserError(f"one global batch needs {global_batch_size} samples. {shards.root} holds {len(shards)}")
        self.steps_per_epoch = len(shards) // global_batch_size
        self._shards, self._global_batch_size = shards, global_batch_size
        self._share = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
        self._orders = Orders(shards.sizes, seed=seed, block_size=block_size)
        self._first_epoch, self._first_step = divmod(first_step, self.steps_per_epoch)
        self._end = None if total_steps is None else divmod(total_steps, self.steps_per_epoch)  # (epoch, step in it)
        self._check_limit(self._orders[self._first_epoch], num_connections)
        self._prefetcher = Prefetcher(
            shards.cache,
            self._orders,
            epoch=self._first_epoch,
            num_connections=num_connections,
            prefetch_shards=prefetch_shards,
            end=self._end and self._orders.place_at(self._end[0], self._end[1] * global_batch_size),
        )

    def __iter__(self) -> Iterator[tuple[MicroBatch, list[memoryview]]]:
        for batch in self._batches():
            self._prefetcher.move_to(batch.epoch, batch.offset - self._global_batch_size, batch.offset)
            shards, positions = self._shards.locate(batch.ids)
            places = self._orders.places(batch.epoch, shards)
            opened = {place: self._prefetcher.get(place) for place in np.unique(places).tolist()}
            yield batch, [opened[place].jpeg(at) for place, at in zip(places.tolist(), positions.tolist(), strict=True)]

    def jpeg(self, sample_id: int) -> memoryview:
        """The bytes of a sample out of order. Its shard is opened in addition to those of the order."""
        shard, position = self._shards.locate(np.array([sample_id]))
        return self._prefetcher.open_beside(int(shard[0])).jpeg(int(position[0]))

    def stop(self) -> None:
        """Open nothing more. An iteration that waits for a shard ends with ``Cancelled``."""
        self._prefetcher.stop()

    def close(self) -> None:
        """End the threads and let all shards go. Slices that were handed out stay readable."""
        self._prefetcher.close()

    def _batches(self) -> Iterator[MicroBatch]:
        first_step = self._first_step
        for epoch in itertools.count(self._first_epoch):
            last_offset = len(self._shards)
            if self._end and epoch == self._end[0]:
                last_offset = self._end[1] * self._global_batch_size
            options = {"epoch": epoch, "first_step": first_step, "global_batch_size": self._global_batch_size}
            for batch in order.micro_batches(self._orders[epoch], **options, **self._share):
                if batch.offset > last_offset:
                    return
                yield batch
            if self._end and epoch == self._end[0]:
                return
            first_step = 0

    def _check_limit(self, first: EpochOrder, num_connections: int) -> None:
        """Refuse a cache that cannot hold what is in use at once, as the first epoch has it. Later ones differ little."""
        limit, cache = self._shards.cache_limit_bytes, self._shards.cache
        if limit is None or not cache.remote:
            return
        nbytes = np.concatenate([[0], np.cumsum([cache.shards[i].num_bytes for i in first.shards])])
        starts = np.arange(0, len(first.ids), self._global_batch_size)
        passed = np.searchsorted(first.stops, starts, side="right")
        in_use = np.searchsorted(first.starts, starts + self._global_batch_size, side="left")
        largest = max(shard.num_bytes for shard in cache.shards)
        needed = int((nbytes[in_use] - nbytes[passed]).max()) + (num_connections + 1) * largest
        if limit < needed:
            raise UserError(
                f"data.cache_limit_gb must be at least {math.ceil(needed / 1e6) / 1e3:g} for shuffle blocks of this size and "
                f"{num_connections} connections. It is {limit / 1e9:.3g}: raise it, or lower data.shuffle_block_size"
            )


class CanvasBatch(NamedTuple):
    """One micro-batch of a rank, on the host. It is overwritten some time after the next one was asked for."""

    canvas: Tensor  # uint8 (B, Hc, Wc, 3), RGB: each image in the upper left corner, the rest undefined
    size: Tensor  # int64 (B, 2): height, width of the image on its canvas
    native_size: Tensor  # int64 (B, 2): height, width of the upright image in the JPEG
    keys: Tensor  # int64 (B,): all randomness of a sample


class BatchReader:
    """What a ``JpegReader`` reads, decoded ahead of its use by ``num_threads`` threads.

    An unreadable image is counted, named in ``bad_samples`` and replaced by the next sample. Above ``max_bad_ratio`` the
    run ends. ``reading`` are the arguments of ``JpegReader``, which raises the same errors.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        canvas_size: tuple[int, int],
        num_threads: int,
        prefetch_batches: int,
        max_bad_ratio: float,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        **reading: Any,
    ):
        self._source = JpegReader(
            shards, seed=seed, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, **reading
        )
        self.steps_per_epoch = self._source.steps_per_epoch
        self.bad_samples: list[str] = []
        self._bad: set[int] = set()
        self.counters = shards.counters
        self._shards, self._seed, self._num_threads, self._max_bad_ratio = shards, seed, num_threads, max_bad_ratio
        self._rank, self._world_size, self._micro_batch_size = rank, world_size, micro_batch_size
        # One batch is with the consumer, two are being decoded, the others wait.
        self._free: queue.Queue[_Slot] = queue.Queue()
        for _ in range(prefetch_batches + 3):
            self._free.put(_Slot(micro_batch_size, canvas_size))
        self._queue: queue.Queue[_Slot | BaseException] = queue.Queue(prefetch_batches)
        self._handed_out: _Slot | None = None
        self._num_seen, self._waited, self._last_asked = 0, 0.0, time.monotonic()
        self._stop = threading.Event()
        self._replacing = threading.Lock()
        cv2.setNumThreads(1)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._producer = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._producer.start()

    def __iter__(self) -> Iterator[CanvasBatch]:
        return self

    def __next__(self) -> CanvasBatch:
        if self._handed_out:
            self._handed_out.hand_back()
            self._free.put(self._handed_out)
            self._handed_out = None
        start = time.monotonic()
        item = self._queue.get()
        self._count_wait(start)
        self.counters.queue.set(self._queue.qsize() * self._micro_batch_size)
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            if isinstance(item, UserError) and self._world_size > 1:
                raise RankError(f"rank {self._rank}: {item}") from item
            raise item
        self.counters.samples.inc(self._micro_batch_size)
        self._handed_out = item
        return item.batch

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Return when the next batch is ready, or ``stopped()``. Signal handlers run while it waits."""
        start = time.monotonic()
        with self._queue.not_empty:
            while not self._queue.queue and not stopped():
                self._queue.not_empty.wait(0.1)
        self._count_wait(start)

    def _count_wait(self, start: float) -> None:
        self._waited += time.monotonic() - start
        self.counters.wait_seconds.inc(time.monotonic() - start)

    def share_waited(self) -> float:
        """Share of the time since the last call that the consumer spent waiting for a batch."""
        now = time.monotonic()
        share = self._waited / max(1e-9, now - self._last_asked)
        self._waited, self._last_asked = 0.0, now
        return share

    def close(self) -> None:
        """Stop reading ahead and end the threads."""
        self._stop.set()
        self._source.stop()
        while self._producer.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()

    def _produce(self) -> None:
        try:
            decoding: collections.deque[tuple[_Slot, list[Future[None]]]] = collections.deque()
            for batch, jpegs in self._source:
                slot = self._free_slot()
                if slot is None:
                    return
                decoding.append((slot, self._start(slot, batch, jpegs)))
                if len(decoding) == 2:
                    self._finish(*decoding.popleft())
            while decoding:
                self._finish(*decoding.popleft())
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _start(self, slot: "_Slot", batch: MicroBatch, jpegs: list[memoryview]) -> "list[Future[None]]":
        """Begin to decode a batch onto a slot."""
        slot.keys[:] = order.sample_keys(batch.ids, seed=self._seed, epoch=batch.epoch)

        def decode(rows: range) -> None:
            for row in rows:
                try:
                    slot.place(row, jpegs[row])
                except BadImage as error:
                    self._replace(slot, row, int(batch.ids[row]), error)

        threads = min(self._num_threads, len(jpegs))
        return [self._pool.submit(decode, range(first, len(jpegs), threads)) for first in range(threads)]

    def _replace(self, slot: "_Slot", row: int, sample_id: int, error: BadImage) -> None:
        """Put the next readable sample where an unreadable one should be."""
        with self._replacing:
            for candidate in range(sample_id, sample_id + len(self._shards)):
                self._note_bad(candidate % len(self._shards), error)
                following = (candidate + 1) % len(self._shards)
                if following in self._bad:
                    continue
                try:
                    return slot.place(row, self._source.jpeg(following))
                except BadImage as another:
                    error = another
        raise UserError(f"{self._shards.root} holds no readable image")

    def _note_bad(self, sample_id: int, error: BadImage) -> None:
        if sample_id not in self._bad:
            self._bad.add(sample_id)
            self.bad_samples.append(f"{self._shards.where(sample_id)}: {error}")
            self.counters.bad_samples.inc()

    def _finish(self, slot: "_Slot", decoding: "list[Future[None]]") -> None:
        for part in decoding:
            part.result()
        self._num_seen += self._micro_batch_size
        num_seen = max(min(self._num_seen, len(self._shards)), _MIN_SEEN)
        expected = self._max_bad_ratio * num_seen
        if len(self._bad) > expected + 3 * expected**0.5:  # more than chance gives
            raise UserError(
                f"at most {self._max_bad_ratio:.1%} of the images may be unreadable. {len(self._bad)} of the first "
                f"{self._num_seen} are, the last being {self.bad_samples[-1]}. "
                f"Run 'personmae shards verify {self._shards.root}'"
            )
        self._put(slot)

    def _free_slot(self) -> "_Slot | None":
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                slot = self._free.get(timeout=0.1)
                slot.wait_until_copied()
                return slot
        return None

    def _put(self, item: "_Slot | BaseException") -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return


class _Slot:
    """Memory for one batch, used again and again. Pinned where the batch goes to a GPU."""

    def __init__(self, batch_size: int, canvas_size: tuple[int, int]):
        pinned = dist.use_cuda()
        self.batch = CanvasBatch(
            torch.empty((batch_size, *canvas_size, 3), dtype=torch.uint8, pin_memory=pinned),
            *(torch.empty((batch_size, *shape), dtype=torch.int64, pin_memory=pinned) for shape in ((2,), (2,), ())),
        )
        self.canvas, self.size, self.native_size, self.keys = (tensor.numpy() for tensor in self.batch)
        self._copied = torch.cuda.Event() if pinned else None

    def place(self, row: int, jpeg: memoryview) -> None:
        """Decode a JPEG onto a row."""
        self.native_size[row], self.size[row] = decode_onto(jpeg, self.canvas[row])

    def hand_back(self) -> None:
        """The consumer is done, but for copies that it has queued on its stream."""
        if self._copied:
            self._copied.record()

    def wait_until_copied(self) -> None:
        """Wait for those copies."""
        if self._copied:
            self._copied.synchronize()


def to_device(batch: CanvasBatch, device: torch.device, copies: torch.cuda.Stream | None) -> CanvasBatch:
    """Copy a host batch from pinned memory, on a stream of its own: while the device works on the batch before."""
    if copies is None:
        return batch
    with torch.cuda.stream(copies):
        moved = CanvasBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))
    now = torch.cuda.current_stream()
    now.wait_stream(copies)
    for tensor in moved:
        tensor.record_stream(now)
    return moved

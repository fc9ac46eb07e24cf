"""Shards to batches: fetch, check, map, and decode in the global order.

The format is MDS. mosaicml-streaming's own iterator reads sample by sample under a lock that a whole node shares; this
reader maps each shard once and takes slices of it.
"""

import contextlib
import hashlib
import json
import mmap
import os
import queue
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import xxhash
from torch import Tensor

from personmae import dist
from personmae.data import order, storage
from personmae.data.decode import BadImage, decode_onto
from personmae.errors import RankError, UserError

_INDEX = "index.json"
_MIN_SEEN = 1000  # pictures read before the share of bad ones can stop a run


@dataclass(frozen=True, slots=True)
class Shard:
    """One entry of the index."""

    name: str
    samples: int
    num_bytes: int
    hashes: dict[str, str]
    columns: tuple[str, ...]
    column_sizes: tuple[int | None, ...]  # None where each sample stores its own


class ShardSet:
    """All samples of a data set, numbered shard by shard; shards are fetched when first needed and stay mapped.

    Raises:
        UserError: the location cannot be read, is not an MDS data set, or a shard is missing or truncated.
    """

    def __init__(self, root: str, cache_dir: str | Path):
        self.root = root.rstrip("/")
        self.remote = storage.is_remote(root)
        self.directory = Path(cache_dir) if self.remote else Path(root)
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        present = storage.list_sizes(self.root)
        if present is not None and _INDEX not in present:
            raise UserError(f"a data set with {_INDEX} is required; {root} has none: write it with 'personmae shards write'")
        self.shards = self._read_index()
        for shard in self.shards:
            if present is not None and present.get(shard.name) != shard.num_bytes:
                came = f"{present[shard.name]} bytes" if shard.name in present else "missing"
                raise UserError(
                    f"shard {self.root}/{shard.name} must have {shard.num_bytes} bytes and is {came}; write the data set again"
                )
        self.sizes = [shard.samples for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all shards."""
        with self._lock:
            maps, self._maps = list(self._maps.values()), {}
        for mapped, _ in maps:
            with contextlib.suppress(BufferError):  # a slice is still in use; the map goes with it
                mapped.close()

    def jpeg(self, sample_id: int) -> memoryview:
        """The JPEG bytes of a sample, a slice of its mapped shard."""
        index = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.sample(index, sample_id - int(self._starts[index]))["jpeg"]

    def where(self, sample_id: int) -> str:
        """Shard and position of a sample, for messages."""
        index = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return f"sample {sample_id - self._starts[index]} of {self.root}/{self.shards[index].name}"

    def sample(self, index: int, position: int) -> dict[str, memoryview]:
        """All columns of a sample, as raw bytes."""
        mapped, offsets = self._map(index)
        shard, start = self.shards[index], int(offsets[position])
        own = sum(size is None for size in shard.column_sizes)
        stored = iter(np.frombuffer(mapped, np.uint32, own, start).tolist())
        start += 4 * own
        view, columns = memoryview(mapped), {}
        for name, size in zip(shard.columns, shard.column_sizes, strict=True):
            length = next(stored) if size is None else size
            columns[name] = view[start : start + length]
            start += length
        return columns

    def check_hash(self, index: int) -> None:
        """Raise a UserError if a shard's content does not have the hash that the index gives."""
        shard = self.shards[index]
        self._map(index)
        if not _agrees(self.directory / shard.name, shard):
            raise UserError(f"shard {self.root}/{shard.name} does not have the hash its index gives; write it again")

    def _map(self, index: int) -> tuple[mmap.mmap, np.ndarray]:
        if (mapped := self._maps.get(index)) is not None:
            return mapped
        with self._lock:
            lock = self._locks.setdefault(index, threading.Lock())
        with lock:
            if index not in self._maps:
                shard = self.shards[index]
                path = self.directory / shard.name
                if self.remote and not _agrees(path, shard):  # not there, or cached from another data set
                    self._fetch(shard.name, shard)
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[index] = mapped, np.frombuffer(mapped, np.uint32, shard.samples + 1, 4)
            return self._maps[index]

    def _read_index(self) -> list[Shard]:
        path = self.directory / _INDEX
        if self.remote:
            self._fetch(_INDEX, None)
        try:
            return [_shard(entry) for entry in json.loads(path.read_bytes())["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.root}/{_INDEX} must be an MDS index with a jpeg column; reading it gave: {error}"
            ) from error

    def _fetch(self, name: str, shard: Shard | None) -> None:
        """Download to a name of our own, check, and rename: what has its final name is whole, also with several ranks."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            storage.fetch(self.root, name, temporary)
            if shard and not _agrees(temporary, shard):
                raise UserError(f"shard {self.root}/{name} does not have the size and hash its index gives; write it again")
            temporary.replace(self.directory / name)
        finally:
            temporary.unlink(missing_ok=True)


def _shard(entry: dict) -> Shard:
    if entry["format"] != "mds" or entry.get("compression") or "jpeg" not in entry["column_names"]:
        raise ValueError("uncompressed MDS shards with a column 'jpeg' are required")
    raw = entry["raw_data"]
    return Shard(
        name=raw["basename"],
        samples=entry["samples"],
        num_bytes=raw["bytes"],
        hashes=raw["hashes"],
        columns=tuple(entry["column_names"]),
        column_sizes=tuple(entry["column_sizes"]),
    )


def _agrees(path: Path, shard: Shard) -> bool:
    """Whether a file is there and has the size and hashes of the index."""
    if not path.exists() or path.stat().st_size != shard.num_bytes:
        return False
    for name, expected in shard.hashes.items():
        digest = xxhash.xxh64() if name == "xxh64" else hashlib.new(name)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            return False
    return True


class CanvasBatch(NamedTuple):
    """One micro-batch of a rank, on the host."""

    canvas: Tensor  # uint8 (B, Hc, 3, Wc), RGB: each row of a picture colour by colour
    native_size: Tensor  # int64 (B, 2): height, width before the canvas
    keys: Tensor  # int64 (B,): all randomness of a sample


class BatchReader:
    """Micro-batches of one rank in the global order, decoded ahead of their use by threads.

    The first batch belongs to step ``first_step``; epochs follow each other without end, and each drops only the tail
    that does not fill a global batch. An unreadable picture is counted, named in ``bad_samples`` and replaced by the next
    sample; above ``max_bad_ratio`` the run ends.

    Raises:
        UserError: there are fewer samples than one global batch needs.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        canvas_size: tuple[int, int],
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        first_step: int,
        num_threads: int,
        prefetch_batches: int,
        block_size: int,
        max_bad_ratio: float,
    ):
        if len(shards) < global_batch_size:
            raise UserError(f"one global batch needs {global_batch_size} samples; {shards.root} holds {len(shards)}")
        self.steps_per_epoch = len(shards) // global_batch_size
        self.bad_samples: list[str] = []
        self._seen = 0
        self._shards, self._canvas_size, self._seed = shards, canvas_size, seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank, self._world_size, self._block_size = rank, world_size, block_size
        self._num_threads, self._max_bad_ratio = num_threads, max_bad_ratio
        self._queue: queue.Queue[CanvasBatch | BaseException] = queue.Queue(prefetch_batches)
        self._stop = threading.Event()
        cv2.setNumThreads(1)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._producer = threading.Thread(target=self._produce, args=(first_step,), name="batches", daemon=True)
        self._producer.start()

    def __iter__(self) -> Iterator[CanvasBatch]:
        return self

    def __next__(self) -> CanvasBatch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            if isinstance(item, UserError) and self._world_size > 1:
                raise RankError(f"rank {self._rank}: {item}") from item
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead and end the threads."""
        self._stop.set()
        while self._producer.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _produce(self, first_step: int) -> None:
        try:
            for epoch, ids in self._rank_batches(first_step):
                for start in range(0, len(ids), self._micro_batch_size):
                    self._put(self._load(ids[start : start + self._micro_batch_size], epoch))
                    if self._stop.is_set():
                        return
        except BaseException as error:
            self._put(error)

    def _rank_batches(self, first_step: int) -> Iterator[tuple[int, order.Ids]]:
        epoch, step = divmod(first_step, self.steps_per_epoch)
        while True:
            ids = order.epoch_order(self._shards.sizes, seed=self._seed, epoch=epoch, block_size=self._block_size)
            for index in range(step, self.steps_per_epoch):
                batch = ids[index * self._global_batch_size : (index + 1) * self._global_batch_size]
                yield epoch, order.rank_slice(batch, self._rank, self._world_size)
            epoch, step = epoch + 1, 0

    def _load(self, ids: order.Ids, epoch: int) -> CanvasBatch:
        height, width = self._canvas_size
        canvas = np.empty((len(ids), height, 3, width), np.uint8)
        native = np.empty((len(ids), 2), np.int64)

        def load(rows: range) -> None:
            for row in rows:
                native[row] = self._decode(int(ids[row]), canvas[row])

        list(self._pool.map(load, [range(i, len(ids), self._num_threads) for i in range(self._num_threads)]))
        keys = order.sample_keys(ids, seed=self._seed, epoch=epoch)
        batch = CanvasBatch(torch.from_numpy(canvas), torch.from_numpy(native), torch.from_numpy(keys))
        return CanvasBatch(*(t.pin_memory() for t in batch)) if dist.use_cuda() else batch

    def _decode(self, sample_id: int, canvas: np.ndarray) -> tuple[int, int]:
        self._seen += 1
        for candidate in range(sample_id, sample_id + len(self._shards)):
            try:
                return decode_onto(self._shards.jpeg(candidate % len(self._shards)), canvas)
            except BadImage as error:
                self._count_bad(candidate % len(self._shards), error)
        raise UserError(f"{self._shards.root} holds no readable picture")

    def _count_bad(self, sample_id: int, error: BadImage) -> None:
        where = f"{self._shards.where(sample_id)}: {error}"
        self.bad_samples.append(where)
        if len(self.bad_samples) > self._max_bad_ratio * max(self._seen, _MIN_SEEN):
            raise UserError(
                f"at most {self._max_bad_ratio:.1%} of the pictures may be unreadable; {len(self.bad_samples)} of the first "
                f"{self._seen} are, the last being {where}; run 'personmae shards verify {self._shards.root}'"
            )

    def _put(self, item: CanvasBatch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return

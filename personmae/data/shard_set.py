"""A data set of MDS shards as one numbered list of samples."""

from pathlib import Path

import numpy as np
import xxhash

from personmae.data import mds, order
from personmae.data.attempts import persist
from personmae.data.cache import HeldShard, ShardCache
from personmae.data.counters import StreamCounters
from personmae.data.mds import MappedShard
from personmae.errors import UserError
from personmae.system import storage


class ShardSet:
    """All samples of a data set, numbered shard by shard.

    Raises:
        UserError: the location cannot be read, is not an MDS data set, or a shard is missing or truncated.
    """

    def __init__(self, root: str, cache_dir: str | Path, *, cache_limit_bytes: int | None = None, retry_seconds: float = 60.0):
        self.root = root.rstrip("/")
        self.counters = StreamCounters()
        present = persist(lambda: storage.list_sizes(self.root), self.root, retry_seconds, self.counters)
        index = None
        if present is None or mds.INDEX in present:
            location = f"{self.root}/{mds.INDEX}"
            index = persist(lambda: storage.read(self.root, mds.INDEX), location, retry_seconds, self.counters)
        if index is None:
            raise UserError(
                f"a data set with {mds.INDEX} is required. {root} has none: write it with 'personmae shards write SRC {root}', "
                f"or import images that lie there with 'personmae shards write {root} OUT'"
            )
        self.cache = ShardCache(
            self.root,
            index,
            Path(cache_dir),
            limit_bytes=cache_limit_bytes,
            retry_seconds=retry_seconds,
            counters=self.counters,
        )
        self.cache_limit_bytes = cache_limit_bytes
        self.digest = xxhash.xxh64_hexdigest(index)  # of the index, and so of every sample's number and content
        self.shards = self.cache.shards
        for shard in self.shards:
            if present is not None and present.get(shard.name) != shard.num_bytes:
                came = f"{present[shard.name]} bytes" if shard.name in present else "missing"
                raise UserError(
                    f"shard {self.root}/{shard.name} must have {shard.num_bytes} bytes and is {came}. Write the data set again"
                )
        self.sizes = [shard.samples for shard in self.shards]
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._opened: tuple[int, HeldShard] | None = None

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all shards and end what is being fetched."""
        self.cache.close()
        if self._opened:
            self._opened[1].release()
        self._opened = None

    def open(self, index: int) -> MappedShard:
        """A shard, fetched if it is missing, and checked. The previous one is released."""
        if self._opened is None or self._opened[0] != index:
            held = self.cache.open(index)
            if self._opened:
                self._opened[1].release()
            self._opened = index, held
        return self._opened[1].mapped

    def locate(self, ids: order.Ids) -> tuple[order.Ids, order.Ids]:
        """Shards of samples, and their positions in them."""
        shards = np.searchsorted(self._firsts, ids, side="right") - 1
        return shards, ids - self._firsts[shards]

    def jpeg(self, sample_id: int) -> memoryview:
        """The JPEG bytes of a sample, a slice of its mapped shard."""
        shard, position = self.locate(np.array([sample_id]))
        return self.open(int(shard[0])).jpeg(int(position[0]))

    def where(self, sample_id: int) -> str:
        """Shard and position of a sample, for messages."""
        shard, position = self.locate(np.array([sample_id]))
        return f"sample {position[0]} of {self.root}/{self.shards[int(shard[0])].name}"

"""What tests of the shards' cache share: reading through one, and what lies in it."""

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from personmae.data import mds
from personmae.data.cache import ShardCache
from personmae.data.counters import StreamCounters
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, CanvasBatch

NUM_SHARDS = 64
OPTIONS: dict[str, Any] = {
    "canvas_size": (40, 20),
    "seed": 3,
    "global_batch_size": 8,
    "rank": 0,
    "world_size": 1,
    "micro_batch_size": 8,
    "first_step": 0,
    "num_threads": 2,
    "prefetch_batches": 2,
    "block_size": 8,  # two shards
    "max_bad_ratio": 0.1,
    "num_connections": 1,
}


def num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.mds"))


def present(data: ShardSet) -> list[str]:
    return sorted(path.name for path in data.cache.directory.iterdir())


def read_epochs(data: ShardSet, count: int = 1, **options) -> list[CanvasBatch]:
    """Every batch of the first epochs, black where there is no image."""
    batches = []
    with closing(BatchReader(data, **(OPTIONS | options))) as reader:
        for batch in islice(reader, count * reader.steps_per_epoch):
            batches.append(CanvasBatch(*(tensor.clone() for tensor in batch)))
            for canvas, (height, width) in zip(batches[-1].canvas, batch.size.tolist(), strict=True):
                canvas[height:], canvas[:, width:] = 0, 0
    return batches


def assert_same(got: list[CanvasBatch], expected: list[CanvasBatch]) -> None:
    assert len(got) == len(expected) > 0
    assert all(torch.equal(a, b) for one, other in zip(got, expected, strict=True) for a, b in zip(one, other, strict=True))


def cache_of(directory: Path, folder: Path, *, limit_bytes: int | None = None, root: str = "s3://no-such/set") -> ShardCache:
    """A cache of a data set without the rest of a reader."""
    index = (directory / mds.INDEX).read_bytes()
    return ShardCache(root, index, folder, limit_bytes=limit_bytes, retry_seconds=5, counters=StreamCounters())


def remote_set(directory: Path, folder: Path, limit_bytes: int | None) -> ShardSet:
    """A data set whose shards come through ``copying``."""
    data = ShardSet(str(directory), folder)
    data.cache, data.cache_limit_bytes = cache_of(directory, folder / "cache", limit_bytes=limit_bytes), limit_bytes
    data.cache._counters = data.counters
    return data

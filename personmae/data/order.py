"""The global sample order: a pure function of (seed, epoch) that is the same for any number of ranks.

A global batch is a slice of it, and a rank takes a slice of that. So a run is resumed by one integer: the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """One epoch: its samples in order, and which shards they come from.

    ``shards[i]`` is used by samples from ``starts[i]`` up to ``stops[i]`` of ``ids`` only. Both ascend.
    """

    ids: Ids
    shards: Ids
    starts: Ids
    stops: Ids


def epoch_order(shard_sizes: list[int], *, seed: int, epoch: int, block_size: int) -> EpochOrder:
    """All sample ids of an epoch: shards in random order, samples shuffled within blocks of whole shards.

    Samples are numbered shard by shard. A block holds the fewest shards that together have ``block_size`` samples, so
    reading ahead touches few shards at a time.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    firsts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = rng.permutation(len(shard_sizes))
    ids, starts, stops, block, size, done = [], [], [], [], 0, 0
    for number, shard in enumerate(shards, start=1):
        block.append(np.arange(firsts[shard], firsts[shard + 1]))
        size += len(block[-1])
        if size >= block_size or number == len(shards):
            ids.append(rng.permutation(np.concatenate(block)))
            starts += [done] * len(block)
            stops += [done + size] * len(block)
            block, size, done = [], 0, done + size
    return EpochOrder(np.concatenate(ids), shards, np.array(starts, np.int64), np.array(stops, np.int64))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's next samples ``ids``, which are before ``offset`` in the order of ``epoch``."""

    epoch: int
    ids: Ids
    offset: int


def micro_batches(
    order: EpochOrder,
    *,
    epoch: int,
    first_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[MicroBatch]:
    """One rank's part of each global batch of an epoch, from its ``first_step`` on. The tail that fills none is dropped."""
    for step in range(first_step, len(order.ids) // global_batch_size):
        stop = (step + 1) * global_batch_size
        ids = rank_slice(order.ids[stop - global_batch_size : stop], rank, world_size)
        for start in range(0, len(ids), micro_batch_size):
            yield MicroBatch(epoch, ids[start : start + micro_batch_size], stop)


def rank_slice(batch_ids: Ids, rank: int, world_size: int) -> Ids:
    """The part of a global batch that belongs to a rank: a contiguous share."""
    share = len(batch_ids) // world_size
    return batch_ids[rank * share : (rank + 1) * share]


def sample_keys(ids: Ids, *, seed: int, epoch: int) -> Ids:
    """One 64-bit key per (seed, epoch, sample id): everything random about the sample is drawn from it (splitmix64)."""
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + _mix(np.uint64(seed) + _mix(np.uint64(epoch)))
        return _mix(x).view(np.int64)


def _mix(x: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

"""The global sample order: a pure function of (seed, epoch), the same for any number of ranks.

A global batch is a slice of it and a rank takes a slice of that, so a run is resumed by one integer: the step.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def epoch_order(shard_sizes: list[int], *, seed: int, epoch: int, block_size: int) -> Ids:
    """All sample ids of an epoch: shards in random order, samples shuffled within blocks of whole shards.

    Samples are numbered shard by shard. A block holds the fewest shards that together have ``block_size`` samples, so
    reading ahead touches few shards at a time.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    order, block = [], []
    for shard in rng.permutation(len(shard_sizes)):
        block.append(np.arange(starts[shard], starts[shard + 1]))
        if sum(map(len, block)) >= block_size:
            order.append(rng.permutation(np.concatenate(block)))
            block = []
    if block:
        order.append(rng.permutation(np.concatenate(block)))
    return np.concatenate(order)


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

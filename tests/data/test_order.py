"""The global order: every sample once, the same for any number of ranks, shards read one after the other."""

from itertools import chain, pairwise

import numpy as np
import pytest

from personmae.batch_plan import plan_batch
from personmae.data.order import epoch_order, micro_batches, rank_slice, sample_keys

SIZES = [7, 12, 1, 9, 20, 3, 8, 15, 11, 14]
TOTAL = sum(SIZES)
SHARD_OF = np.repeat(np.arange(len(SIZES)), SIZES)


def order_of(seed: int = 0, epoch: int = 0, block_size: int = 25) -> np.ndarray:
    return epoch_order(SIZES, seed=seed, epoch=epoch, block_size=block_size).ids


def batches(world_size: int, *, epoch: int = 0, global_batch_size: int = 8) -> list[list[list[int]]]:
    """steps x ranks x ids."""
    order = order_of(epoch=epoch)
    slices = [order[i : i + global_batch_size] for i in range(0, TOTAL - global_batch_size + 1, global_batch_size)]
    return [[rank_slice(ids, rank, world_size).tolist() for rank in range(world_size)] for ids in slices]


@pytest.mark.parametrize("block_size", [1, 25, 10_000])
def test_an_epoch_holds_every_sample_exactly_once(block_size):
    order = order_of(block_size=block_size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(TOTAL))


def test_the_order_is_a_function_of_seed_and_epoch_and_nothing_else():
    np.random.seed(1)  # the global generator must not matter
    first = order_of(seed=3, epoch=5)
    np.random.seed(2)
    assert np.array_equal(first, order_of(seed=3, epoch=5))
    others = [order_of(seed=3, epoch=6), order_of(seed=5, epoch=3), order_of(seed=4, epoch=5)]
    assert not any(np.array_equal(first, other) for other in others)


def test_the_order_is_the_one_that_earlier_runs_had():
    order = epoch_order([3, 2, 4], seed=1, epoch=2, block_size=4).ids.tolist()
    assert order == [4, 2, 1, 0, 3, 6, 5, 7, 8]  # or a run that is resumed under a newer numpy reads other images


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_ranks_of_any_world_size_share_the_same_global_batches(world_size):
    alone = batches(1)
    for step, ranks in enumerate(batches(world_size)):
        assert {len(ids) for ids in ranks} == {8 // world_size}
        assert list(chain(*ranks)) == alone[step][0]


def test_no_sample_comes_twice_in_an_epoch():
    seen = [i for step in batches(4) for ids in step for i in ids]
    assert len(seen) == len(set(seen)) == TOTAL // 8 * 8


@pytest.mark.parametrize("block_size", [1, 25, 40, 50])
def test_a_window_of_the_order_touches_few_shards(block_size):
    sizes = [20] * 200
    order = epoch_order(sizes, seed=0, epoch=0, block_size=block_size).ids
    shard = order // 20
    per_block = -(-block_size // 20)
    for start in range(0, len(order) - 100, 37):
        blocks = -(-100 // (20 * per_block)) + 1
        assert len(np.unique(shard[start : start + 100])) <= blocks * per_block
    for block in range(0, len(order), 20 * per_block):  # each block is whole shards
        assert len(np.unique(shard[block : block + 20 * per_block])) == min(per_block, (len(order) - block) // 20)


def test_a_block_is_the_fewest_shards_that_have_its_size():
    shards = SHARD_OF[order_of(block_size=25)].tolist()
    whole = [n for n in range(TOTAL + 1) if sum(SIZES[s] for s in set(shards[:n])) == n]  # no shard is cut here
    blocks = [set(shards[start:stop]) for start, stop in pairwise(whole)]
    assert len(blocks) >= 3
    for block in blocks[:-1]:
        sizes = sorted(SIZES[s] for s in block)
        assert sum(sizes[:-1]) < 25 <= sum(sizes)


@pytest.mark.parametrize("block_size", [1, 25, 40, 10_000])
def test_a_shard_is_used_between_its_start_and_its_stop_only(block_size):
    found = epoch_order(SIZES, seed=0, epoch=3, block_size=block_size)
    assert sorted(found.shards.tolist()) == list(range(len(SIZES)))
    assert (np.diff(found.starts) >= 0).all()
    assert (np.diff(found.stops) >= 0).all()
    assert found.stops[-1] == TOTAL
    shard_of_place = SHARD_OF[found.ids]
    for shard, start, stop in zip(found.shards, found.starts, found.stops, strict=True):
        used = np.flatnonzero(shard_of_place == shard)
        assert start <= used.min()
        assert used.max() < stop
    narrow = {(int(a), int(b)) for a, b in zip(found.starts, found.stops, strict=True)}
    assert sorted(a for a, _ in narrow) == sorted({0, *(b for _, b in narrow)} - {TOTAL})  # blocks follow each other


def test_shards_without_samples_have_a_place_and_change_nothing():
    found = epoch_order([3, 0, 2, 0], seed=0, epoch=0, block_size=2)
    assert sorted(found.ids.tolist()) == list(range(5))
    assert sorted(found.shards.tolist()) == [0, 1, 2, 3]
    assert len(found.starts) == len(found.stops) == 4


# --- the same global batches for every world ---

BIG_SIZES = [997, 1013, 640, 1, 2048, 1500, 333, 1024, 777, 1200] * 3  # 28,599 samples
GLOBAL_BATCH, EPOCHS = 1024, 2
WORLDS = [(1, 1), (1, 2), (2, 2), (3, 1), (4, 8), (16, 8)]  # nodes x ranks of each


def global_batches(
    world_size: int, max_micro: int, *, first_step: int = 0, global_batch: int = GLOBAL_BATCH
) -> list[list[int]]:
    """The ids of every global batch of two epochs from ``first_step`` on, put together from what the ranks read."""
    plan = plan_batch(global_batch, world_size, max_micro)
    steps_per_epoch, found = sum(BIG_SIZES) // global_batch, []
    for epoch in range(first_step // steps_per_epoch, EPOCHS):
        order = epoch_order(BIG_SIZES, seed=5, epoch=epoch, block_size=3000)
        options = {"epoch": epoch, "global_batch_size": global_batch, "micro_batch_size": plan.micro_batch_size}
        first = max(0, first_step - epoch * steps_per_epoch)
        ranks = [
            [batch.ids for batch in micro_batches(order, first_step=first, rank=rank, world_size=world_size, **options)]
            for rank in range(world_size)
        ]
        for step in range(len(ranks[0]) // plan.grad_accum_steps):
            micros = range(step * plan.grad_accum_steps, (step + 1) * plan.grad_accum_steps)
            found.append(sorted(int(i) for batches in ranks for micro in micros for i in batches[micro]))
    return found


@pytest.mark.parametrize(("nodes", "ranks"), WORLDS)
@pytest.mark.parametrize("max_micro", [1024, 64, 7])
def test_every_global_batch_of_two_epochs_is_the_same_in_every_world(nodes, ranks, max_micro):
    global_batch = GLOBAL_BATCH if GLOBAL_BATCH % (nodes * ranks) == 0 else 960  # three ranks cannot share 1,024
    alone = global_batches(1, global_batch, global_batch=global_batch)
    assert len(alone) == EPOCHS * (sum(BIG_SIZES) // global_batch)
    assert global_batches(nodes * ranks, max_micro, global_batch=global_batch) == alone
    for epoch in range(EPOCHS):
        seen = [i for batch in alone[epoch * len(alone) // 2 : (epoch + 1) * len(alone) // 2] for i in batch]
        assert len(seen) == len(set(seen)) > sum(BIG_SIZES) - global_batch


@pytest.mark.parametrize("step", range(EPOCHS * (sum(BIG_SIZES) // GLOBAL_BATCH)))
def test_a_resume_at_any_step_onto_another_world_goes_on_with_the_same_batches(step):
    alone = global_batches(1, GLOBAL_BATCH)
    for world_size, max_micro in ((4, 32), (32, 1024)):
        assert global_batches(world_size, max_micro, first_step=step) == alone[step:]


def test_samples_are_shuffled_within_a_block_and_shards_among_each_other():
    order = epoch_order([1000], seed=0, epoch=0, block_size=1000).ids
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    shards = epoch_order([1] * 1000, seed=0, epoch=0, block_size=1).ids
    assert abs(np.corrcoef(shards, np.arange(1000))[0, 1]) < 0.15


def test_every_sample_has_its_own_64_bit_key_in_every_epoch_of_every_seed():
    ids = np.arange(20_000, dtype=np.int64)
    keys = [sample_keys(ids, seed=seed, epoch=epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(k.dtype == np.int64 for k in keys)
    together = np.concatenate(keys)
    assert len(np.unique(together)) == len(together)
    bits = (together.view(np.uint64)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / len(together) ** 0.5


def test_a_key_depends_on_the_sample_and_not_on_its_place():
    ids = np.array([5, 3, 5, 99], np.int64)
    keys = sample_keys(ids, seed=7, epoch=1)
    assert keys[0] == keys[2] == sample_keys(ids[:1], seed=7, epoch=1)[0]
    assert np.array_equal(sample_keys(ids[::-1].copy(), seed=7, epoch=1), keys[::-1])


def test_keys_equal_splitmix64_written_with_python_integers():
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for seed, epoch in ((0, 0), (1, 0), (123_456, 99)):
        keys = sample_keys(np.array([0, 1, 4_180_242], np.int64), seed=seed, epoch=epoch)
        expected = [mix((i + mix((seed + mix(epoch)) % 2**64)) % 2**64) for i in (0, 1, 4_180_242)]
        assert [int(key) % 2**64 for key in keys] == expected

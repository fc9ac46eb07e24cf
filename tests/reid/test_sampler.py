"""P x K batches: properties over random data sets."""

import numpy as np
import pytest

from personmae.errors import UserError
from personmae.reid.sampler import pk_batches


def random_pids(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.repeat(rng.permutation(100)[:23], rng.integers(1, 20, size=23)))


@pytest.mark.parametrize("seed", range(8))
def test_every_batch_holds_p_distinct_ids_with_k_images_each(seed):
    pids = random_pids(seed)
    batches = pk_batches(pids, num_ids=5, num_instances=4, seed=seed, epoch=3)
    assert batches.dtype == np.int64
    assert batches.shape[1] == 20
    by_id = pids[batches].reshape(len(batches), 5, 4)
    assert (by_id == by_id[:, :, :1]).all()
    assert all(len(set(ids)) == 5 for ids in by_id[:, :, 0].tolist())


@pytest.mark.parametrize("seed", range(8))
def test_images_repeat_only_where_an_id_has_too_few(seed):
    pids = random_pids(seed)
    used = pk_batches(pids, num_ids=5, num_instances=4, seed=seed, epoch=0).flatten()
    images, counts = np.unique(used, return_counts=True)
    num_images = np.array([np.count_nonzero(pids == pids[image]) for image in images])
    assert (counts[num_images >= 4] == 1).all()
    assert (counts[num_images < 4] <= 4).all()


@pytest.mark.parametrize("seed", range(8))
def test_the_epoch_ends_when_fewer_than_p_ids_have_images_left(seed):
    pids = random_pids(seed)
    batches = pk_batches(pids, num_ids=5, num_instances=4, seed=seed, epoch=0)
    ids, counts = np.unique(pids, return_counts=True)
    groups = dict(zip(ids.tolist(), np.maximum(counts // 4, 1).tolist(), strict=True))
    for pid in pids[batches[:, ::4]].flatten().tolist():
        groups[pid] -= 1
    assert all(left >= 0 for left in groups.values())
    assert sum(left > 0 for left in groups.values()) < 5


def test_an_id_with_too_few_images_shows_all_of_them():
    pids = np.array([1, 1, 1, 2, 2, 2, 2])
    batches = pk_batches(pids, num_ids=2, num_instances=4, seed=0, epoch=0)
    assert len(batches) == 1
    assert set(batches[0].tolist()) == set(range(7))


def test_batches_are_a_function_of_seed_and_epoch():
    pids = random_pids(0)

    def draw(seed: int, epoch: int) -> list[list[int]]:
        return pk_batches(pids, num_ids=5, num_instances=4, seed=seed, epoch=epoch).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3)
    assert draw(1, 2) != draw(2, 2)


def test_over_epochs_every_image_is_seen():
    pids = random_pids(1)
    epochs = [pk_batches(pids, num_ids=5, num_instances=4, seed=0, epoch=epoch) for epoch in range(30)]
    assert set(np.concatenate([batches.flatten() for batches in epochs]).tolist()) == set(range(len(pids)))


def test_fewer_identities_than_a_batch_needs_is_an_error():
    with pytest.raises(UserError, match=r"num_ids=3 .* there are 2"):
        pk_batches(np.array([1, 1, 2]), num_ids=3, num_instances=2, seed=0, epoch=0)

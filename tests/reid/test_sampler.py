"""P x K batches of people and of clusters: properties over random data sets."""

import numpy as np
import pytest

from personmae.errors import UserError
from personmae.reid.sampler import cluster_batches, pk_batches


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


def random_clusters(seed: int, num_clusters: int = 23) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-labels with outliers among them, clusters of one image too, and cameras of which some are unknown."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 20, size=num_clusters)
    labels = rng.permutation(np.concatenate([np.repeat(np.arange(num_clusters), sizes), np.full(30, -1)]))
    return labels, rng.integers(-1, 4, len(labels))


def draw_clusters(seed: int, **changes: int) -> np.ndarray:
    labels, camids = random_clusters(seed)
    settings = {"num_ids": 5, "num_instances": 4, "num_batches": 30, "seed": seed, "epoch": 3} | changes
    return cluster_batches(labels, camids, **settings)


@pytest.mark.parametrize("seed", range(8))
def test_every_batch_holds_p_distinct_clusters_with_k_images_each_and_no_outlier(seed):
    labels, _ = random_clusters(seed)
    batches = draw_clusters(seed)
    assert batches.shape == (30, 20)
    assert batches.dtype == np.int64
    by_cluster = labels[batches].reshape(30, 5, 4)
    assert (by_cluster == by_cluster[:, :, :1]).all()
    assert all(len(set(ids)) == 5 for ids in by_cluster[:, :, 0].tolist())
    assert (by_cluster >= 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_companions_are_from_other_cameras_where_there_are_any_and_repeat_only_for_want_of_more(seed):
    labels, camids = random_clusters(seed)
    for first, *companions in draw_clusters(seed).reshape(-1, 4).tolist():
        mine = np.flatnonzero(labels == labels[first]).tolist()
        elsewhere = [i for i in mine if camids[first] >= 0 and camids[i] >= 0 and camids[i] != camids[first]]
        allowed = elsewhere or [i for i in mine if i != first] or [first]
        assert set(companions) <= set(allowed)
        assert len(set(companions)) == 3 or len(allowed) < 3


def test_all_three_kinds_of_companions_occur():
    _, camids = random_clusters(0)
    rows = draw_clusters(0).reshape(-1, 4)
    other = (camids[rows[:, 1:]] != camids[rows[:, :1]]) & (camids[rows[:, 1:]] >= 0) & (camids[rows[:, :1]] >= 0)
    assert other.all(axis=1).any()
    assert (~other).all(axis=1).any()
    assert (rows == rows[:, :1]).all(axis=1).any()


def test_every_cluster_takes_its_turn_before_a_new_order_begins():
    labels = np.repeat(np.arange(12), 5)
    batches = cluster_batches(labels, num_ids=5, num_instances=4, num_batches=8, seed=0, epoch=0)
    turns = labels[batches[:, ::4]].reshape(4, 10)  # two whole batches fit into an order of twelve
    assert all(len(set(turn)) == 10 for turn in turns.tolist())
    assert len({tuple(turn) for turn in turns.tolist()}) == 4


def test_without_cameras_companions_are_any_others():
    labels = np.repeat(np.arange(6), 9)
    unknown = cluster_batches(labels, np.full(54, -1), num_ids=3, num_instances=4, num_batches=50, seed=0, epoch=0)
    assert unknown.tolist() == cluster_batches(labels, num_ids=3, num_instances=4, num_batches=50, seed=0, epoch=0).tolist()
    assert all(len(set(images)) == 4 for images in unknown.reshape(-1, 4).tolist())
    assert set(unknown.flatten().tolist()) == set(range(54))


def test_cluster_batches_are_a_function_of_seed_and_epoch():
    labels, camids = random_clusters(0)

    def draw(seed: int, epoch: int) -> list[list[int]]:
        settings = {"num_ids": 5, "num_instances": 4, "num_batches": 10}
        return cluster_batches(labels, camids, **settings, seed=seed, epoch=epoch).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3)
    assert draw(1, 2) != draw(2, 2)


@pytest.mark.parametrize(("labels", "found"), [([0, 0, 1, -1], "2 with 3 of 4"), ([-1, -1], "0 with 0 of 2")])
def test_fewer_clusters_than_a_batch_needs_is_an_error(labels, found):
    with pytest.raises(UserError, match=rf"num_ids=3 clusters .* found {found} images. Lower num_ids"):
        cluster_batches(np.array(labels), num_ids=3, num_instances=2, num_batches=1, seed=0, epoch=0)

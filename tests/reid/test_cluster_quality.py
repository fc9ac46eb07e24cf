"""Scores of clusters against their definitions: loops over pairs, and mutual information with an expectation by shuffling."""

import itertools

import numpy as np
import pytest

from personmae.reid.cluster_quality import ClusterQuality, follows_cameras, of_one_camera, one_camera_share, quality

N = 90


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, people and cameras, each with some that are not known."""
    rng = np.random.default_rng(seed)
    pids, camids = rng.integers(-1, 8, N), rng.integers(-1, 4, N)
    labels = np.where(rng.random(N) < 0.6, pids * 2 + (camids > 1), rng.integers(-1, 9, N))
    _, labels = np.unique(np.where(labels < 0, -1, labels), return_inverse=True)
    return labels - 1, pids, camids


def entropy(*partitions: np.ndarray) -> float:
    shares = np.unique(np.stack(partitions), axis=1, return_counts=True)[1] / len(partitions[0])
    return float(-(shares * np.log(shares)).sum())


def adjusted(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted mutual information, chance by 3,000 shuffles."""
    rng = np.random.default_rng(1)

    def information(b: np.ndarray) -> float:
        return entropy(a) + entropy(b) - entropy(a, b)

    chance = np.mean([information(rng.permutation(b)) for _ in range(3000)])
    return float((information(b) - chance) / ((entropy(a) + entropy(b)) / 2 - chance))


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_pairs_equal_their_definition(seed):
    labels, pids, camids = drawn(seed)
    found = quality(labels, pids, camids)
    pairs = list(itertools.combinations(range(N), 2))
    together = [(i, j) for i, j in pairs if labels[i] == labels[j] >= 0 and min(pids[i], pids[j]) >= 0]
    assert found.pair_precision == pytest.approx(np.mean([pids[i] == pids[j] for i, j in together]))
    across = [(i, j) for i, j in pairs if pids[i] == pids[j] >= 0 and camids[i] != camids[j] and min(camids[i], camids[j]) >= 0]
    assert found.recall_across_cameras == pytest.approx(np.mean([labels[i] == labels[j] >= 0 for i, j in across]))
    assert (found.num_clusters, found.num_outliers) == (len({*labels.tolist()} - {-1}), np.count_nonzero(labels < 0))


@pytest.mark.parametrize("seed", range(2))
def test_mutual_information_is_adjusted_for_chance(seed):
    labels, pids, camids = drawn(seed)
    found = quality(labels, pids, camids)
    people, cameras = (labels >= 0) & (pids >= 0), (labels >= 0) & (camids >= 0)
    assert found.ami_people == pytest.approx(adjusted(labels[people], pids[people]), abs=0.01)
    assert found.ami_cameras == pytest.approx(adjusted(labels[cameras], camids[cameras]), abs=0.01)
    assert found.ami_people is not None
    assert found.ami_people > 0.2


def test_ari_equals_its_definition():
    labels, pids, _ = drawn()
    known = (labels >= 0) & (pids >= 0)
    a, b, n = labels[known], pids[known], np.count_nonzero(known)
    table = np.array([[np.count_nonzero((a == i) & (b == j)) for j in range(8)] for i in range(labels.max() + 1)])
    both, rows, columns = ((c * (c - 1) / 2).sum() for c in (table, table.sum(axis=1), table.sum(axis=0)))
    expected = rows * columns / (n * (n - 1) / 2)
    assert quality(labels, pids).ari == pytest.approx((both - expected) / ((rows + columns) / 2 - expected))


def test_true_people_under_other_names_score_one():
    pids = np.array([7, 7, 3, 3, 9, 9, 9])
    perfect = quality(np.array([0, 0, 1, 1, 2, 2, 2]), pids, np.array([1, 2, 1, 2, 1, 2, 3]))
    assert (perfect.num_clusters, perfect.num_outliers) == (3, 0)
    assert (perfect.ari, perfect.ami_people) == (pytest.approx(1), pytest.approx(1))
    assert (perfect.pair_precision, perfect.recall_across_cameras, perfect.one_camera_share) == (1, 1, 0)
    assert perfect.ami_cameras == pytest.approx(0, abs=0.5)


def test_shuffled_labels_are_at_chance_where_information_alone_is_high():
    """Many small clusters share much information with anything: what the score in the log hid before."""
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(100), 6)
    labels = rng.permutation(pids)
    assert (entropy(labels) + entropy(pids) - entropy(labels, pids)) / entropy(pids) > 0.6
    assert quality(labels, pids).ami_people == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("pids", [None, np.full(4, -1), np.array([-1, -1, -1, 5])])
def test_without_known_people_in_clusters_there_are_counts_alone(pids):
    assert quality(np.array([0, 0, 1, -1]), pids) == ClusterQuality(2, 1)


@pytest.mark.parametrize("camids", [None, np.full(4, -1), np.array([3, 3, 3, -1])])
def test_without_two_known_cameras_clusters_cannot_follow_them(camids):
    found = quality(np.array([0, 0, 1, -1]), np.array([1, 1, 1, 1]), camids)
    assert (found.ami_cameras, found.one_camera_share, found.recall_across_cameras) == (None, None, None)


def test_no_cluster_at_all_has_no_scores():
    found = quality(np.full(5, -1), np.arange(5) // 2, np.arange(5) % 2)
    assert found == ClusterQuality(0, 5, recall_across_cameras=0.0)


def test_a_cluster_is_of_one_camera_if_all_its_images_are_known_to_be():
    labels, camids = np.array([0, 0, 1, 1, 2, 2, 3, -1]), np.array([4, 4, 4, 5, 5, -1, -1, 4])
    assert of_one_camera(labels, camids).tolist() == [True, False, False, False]
    assert one_camera_share(labels, camids) == 0.25
    assert one_camera_share(np.full(3, -1), np.arange(3)) is None


@pytest.mark.parametrize(
    ("ami", "share", "follows"), [(0.3, 0.7, True), (0.1, 0.7, False), (0.3, 0.2, False), (None, None, False)]
)
def test_clusters_follow_cameras_where_both_scores_say_so(ami, share, follows):
    assert follows_cameras(ami, share) is follows


def test_clusters_made_of_cameras_are_found_out():
    rng = np.random.default_rng(0)
    pids, camids = np.repeat(np.arange(60), 10), np.tile(np.arange(5), 120)
    by_camera = camids * 20 + rng.integers(0, 20, 600)
    followers, honest = quality(by_camera, pids, camids), quality(pids, pids, camids)
    assert follows_cameras(followers.ami_cameras, followers.one_camera_share)
    assert not follows_cameras(honest.ami_cameras, honest.one_camera_share)

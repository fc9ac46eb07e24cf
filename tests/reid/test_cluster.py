"""Clustering against the dense definition: loops over sets, N x N matrices, fp64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_allclose
from scipy import sparse
from sklearn.cluster import DBSCAN

from personmae.errors import UserError
from personmae.reid import cluster
from personmae.reid.cluster import (
    k_reciprocal_encoding,
    minimum_sums,
    neighbours,
    pseudo_labels,
    radius_graph,
    similarities,
    without_one_camera,
)

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def crowd(num_images: int, num_ids: int, noise: float, seed: int = 0, dim: int = 24) -> tuple[torch.Tensor, np.ndarray]:
    """Features of people scattered around random directions, and who they are."""
    draw = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(num_ids, dim, generator=draw), dim=1)
    pids = torch.randint(num_ids, (num_images,), generator=draw)
    scatter = torch.randn(num_images, dim, generator=draw) * noise / dim**0.5
    return centres[pids] + scatter, pids.numpy()


def slow_cosines(features: torch.Tensor) -> np.ndarray:
    unit = F.normalize(features.float(), dim=1).numpy().astype(np.float64)
    return (unit @ unit.T).astype(np.float32)


def slow_nearest(cosines: np.ndarray, k: int) -> list[list[int]]:
    def order(i: int) -> list[int]:
        return sorted(range(len(cosines)), key=lambda j: (j != i, -cosines[i, j], j))

    return [order(i)[:k] for i in range(len(cosines))]


def slow_encoding(features: torch.Tensor, k1: int, k2: int, half: int, spread: np.ndarray | None = None) -> np.ndarray:
    """Sets of arXiv 1701.08398 with the weights of cluster-contrast, image by image."""
    cosines = slow_cosines(features)
    nearest = slow_nearest(cosines, k1)

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in nearest[i][:k] if i in nearest[j][:k]}

    dense = np.zeros(cosines.shape, np.float32)
    for i in range(len(dense)):
        core = reciprocal(i, k1)
        members = set(core)
        for j in core:
            near = reciprocal(j, half)
            if 3 * len(near & core) > 2 * len(near):
                members |= near
        columns = sorted(members)
        weights = np.exp((2 * cosines[i, columns].astype(np.float64) - 2) / (1 if spread is None else spread[i]))
        dense[i, columns] = weights / weights.sum()
    if k2 == 1:
        return dense
    return np.stack([dense[nearest[i][:k2]].astype(np.float64).mean(axis=0).astype(np.float32) for i in range(len(dense))])


def slow_distances(encoding: np.ndarray) -> np.ndarray:
    wide = encoding.astype(np.float64)
    sums = np.stack([np.minimum(row, wide).sum(axis=1) for row in wide])
    return 1 - sums / (2 - sums)


def slow_labels(features: torch.Tensor, k1: int, k2: int, eps: float, min_samples: int) -> np.ndarray:
    distances = slow_distances(slow_encoding(features, k1, k2, round(k1 / 2) + 1))
    found = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(np.maximum(distances, 0))
    names: dict[int, int] = {-1: -1}
    return np.array([names.setdefault(label, len(names) - 1) for label in found.tolist()])


@pytest.fixture(params=["large blocks", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        for name, size in {
            "_BLOCK": 2000,
            "_ROWS": 7,
            "_GATHERED": 5000,
            "_PAIRS": 3000,
            "_SUMS": 1000,
            "_SET_ROWS": 50,
        }.items():
            monkeypatch.setattr(cluster, name, size)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("noise", [0.8, 1.2, 1.6, 3.0])
@pytest.mark.parametrize(("k1", "k2", "eps", "min_samples"), [(30, 6, 0.6, 4), (12, 3, 0.5, 4), (7, 1, 0.4, 2)])
def test_labels_are_those_of_the_dense_definition(noise, k1, k2, eps, min_samples, device):
    features, _ = crowd(280, 20, noise)
    labels = pseudo_labels(features.to(device), k1=k1, k2=k2, eps=eps, min_samples=min_samples)
    assert labels.tolist() == slow_labels(features, k1, k2, eps, min_samples).tolist()


def test_the_trials_hold_clusters_and_outliers():
    easy, hard, noise = (pseudo_labels(crowd(280, 20, noise)[0], eps=0.5) for noise in (0.8, 1.2, 3.0))
    assert easy.max() + 1 >= 18
    assert 10 <= hard.max() + 1 <= 20
    assert 20 < np.count_nonzero(hard < 0) < 140
    assert np.count_nonzero(noise < 0) > 140


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("k1", "k2", "half"), [(30, 6, None), (21, 6, 11), (8, 1, 4), (100, 100, None)])
def test_the_encoding_is_that_of_the_definition(k1, k2, half):
    features, _ = crowd(90, 8, 1.2)
    encoding = k_reciprocal_encoding(features, k1, k2, half_k1=half)
    assert encoding.dtype == np.float32
    assert encoding.has_sorted_indices
    slow = slow_encoding(features, k1, k2, round(k1 / 2) + 1 if half is None else half)
    np.testing.assert_array_equal(encoding.toarray() > 0, slow > 0)
    assert_allclose(encoding.toarray(), slow, rtol=2e-7)
    assert_allclose(encoding.sum(axis=1), 1, rtol=1e-6)


def test_a_spread_divides_the_distances_of_its_image():
    features, _ = crowd(90, 8, 1.2)
    spread = torch.linspace(0.5, 4, 90)
    fast = k_reciprocal_encoding(features, 15, 4, spread=spread).toarray()
    assert_allclose(fast, slow_encoding(features, 15, 4, 9, spread.numpy()), rtol=1e-6)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("k", [1, 5, 30, 400])
def test_neighbours_are_nearer_first_then_of_lower_index(k, device):
    features, _ = crowd(200, 9, 1.0)
    features[50:90] = features[10:50] * 3  # forty pairs of equal images
    features[120:160] = features[119]  # forty equal ones
    features[7] = features[170] = 0  # and two without a direction
    assert neighbours(features.to(device), k).tolist() == slow_nearest(slow_cosines(features), k)


@pytest.mark.usefixtures("blocks")
def test_when_all_images_are_equal_an_image_is_followed_by_the_first_ones():
    expected = [[i, *[j for j in range(6) if j != i]][:5] for i in range(100)]
    assert neighbours(torch.ones(100, 8), 5).tolist() == expected


def arc(step: float, dim: int = 384) -> torch.Tensor:
    """Images along an arc, ``step`` radians apart."""
    angles = torch.arange(300, dtype=torch.float64) * step
    plane = torch.linalg.qr(torch.randn(dim, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    return (torch.stack([angles.cos(), angles.sin()], dim=1) @ plane.T).float()


def test_neighbours_that_fp32_confuses_are_told_apart():
    features = arc(1e-5)  # cosines of neighbours differ in the last places of fp32
    assert neighbours(features, 40).tolist() == slow_nearest(slow_cosines(features), 40)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_neighbours_do_not_depend_on_the_precision_of_the_program(precision):
    features = arc(1e-4)
    torch.set_float32_matmul_precision(precision)
    try:
        assert neighbours(features, 20).tolist() == slow_nearest(slow_cosines(features), 20)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_neighbours_are_not_searched_in_bf16_under_autocast():
    features = arc(1e-3, dim=2)  # bf16 takes hundreds of images for equally near
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert neighbours(features, 20).tolist() == slow_nearest(slow_cosines(features), 20)


@pytest.mark.usefixtures("blocks")
def test_similarities_are_rounded_once():
    features, _ = crowd(40, 4, 1.0)
    unit, others = F.normalize(features, dim=1).numpy(), np.tile(np.arange(40), (30, 1))
    np.testing.assert_array_equal(similarities(unit, slice(10, 40), others), slow_cosines(features)[10:])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("num_rows", [1, 33, None])
def test_sums_of_minima_are_exact(num_rows):
    encoding = k_reciprocal_encoding(crowd(150, 12, 1.2)[0], 20, 4)
    wide = encoding.toarray().astype(np.float64)
    rows = wide[:num_rows]
    backwards = np.stack([np.minimum(row, wide)[:, ::-1].cumsum(axis=1)[:, -1] for row in rows])
    spans, found = zip(*minimum_sums(encoding, num_rows), strict=True)
    np.testing.assert_array_equal(np.concatenate(found), backwards)
    assert [span.start for span in spans] == [0, *[span.stop for span in spans[:-1]]]
    assert spans[-1].stop == len(rows)


def test_a_pair_at_exactly_eps_is_near():
    encoding = sparse.csr_array(np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.75, 0.25, 0]], np.float32))
    eps = 1 - 0.5 / 1.5
    assert radius_graph(encoding, eps).toarray().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    assert radius_graph(encoding, np.nextafter(eps, 0)).toarray().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert radius_graph(encoding, 1.0).toarray().all()


def test_clusters_are_numbered_in_the_order_of_their_first_member():
    labels = pseudo_labels(crowd(280, 20, 1.2, seed=5)[0])
    numbers, first = np.unique(labels[labels >= 0], return_index=True)
    assert numbers.tolist() == list(range(len(numbers)))
    assert (np.diff(first) > 0).all()


def test_a_border_image_may_open_the_cluster_of_a_later_core():
    renamed = cluster._numbered_by_first_member(np.array([2, -1, 0, 0, 2, 1]))
    assert renamed.tolist() == [0, -1, 1, 1, 0, 2]


def test_strangers_are_all_outliers_and_equal_images_one_cluster():
    strangers = torch.eye(40)
    assert pseudo_labels(strangers, k1=2).tolist() == [-1] * 40
    assert pseudo_labels(torch.ones(10, 4)).tolist() == [0] * 10
    assert pseudo_labels(torch.ones(1, 4)).tolist() == [-1]


def test_features_that_are_not_finite_are_refused():
    features = torch.ones(5, 4)
    features[3, 1] = torch.nan
    for use in (pseudo_labels, lambda x: neighbours(x, 2), lambda x: k_reciprocal_encoding(x, 3, 1)):
        check: Callable[[torch.Tensor], object] = use
        with pytest.raises(UserError, match=r"1 of 5 features are not finite \(first: image 3\)"):
            check(features)


def test_images_of_a_cluster_that_one_camera_has_seen_become_outliers():
    labels = np.array([0, 1, 1, 0, 2, 2, -1, 3, 3])
    camids = np.array([5, 1, 2, 5, 1, -1, 3, 2, 2])
    assert without_one_camera(labels, camids).tolist() == [-1, 0, 0, -1, 1, 1, -1, -1, -1]


def test_where_nothing_is_left_all_images_are_outliers():
    assert without_one_camera(np.array([0, 0, 1]), np.array([1, 1, 2])).tolist() == [-1, -1, -1]
    assert without_one_camera(np.array([-1, -1]), np.array([1, 2])).tolist() == [-1, -1]

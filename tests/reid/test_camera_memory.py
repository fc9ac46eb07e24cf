"""Camera proxies against the definition of CAP (arXiv 2012.10674), image by image in fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_allclose

from personmae.reid.memory import CameraMemory, camera_proxies, mean_centroids

NUM_CLUSTERS, DIM, TEMPERATURE = 9, 7, 0.1


def crowd(num_images: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels with outliers, and cameras of which one is not known; no cluster is without an image."""
    rng = np.random.default_rng(seed)
    labels, camids = rng.integers(-1, NUM_CLUSTERS, num_images), rng.choice([-1, 2, 3, 7], num_images)
    labels[:NUM_CLUSTERS] = np.arange(NUM_CLUSTERS)
    return labels, camids


def memory(**options: float) -> CameraMemory:
    proxies = camera_proxies(*crowd())
    draw = torch.Generator().manual_seed(1)
    centroids = F.normalize(torch.randn(len(proxies.clusters), DIM, generator=draw), dim=1)
    sides = (torch.from_numpy(of) for of in (proxies.clusters, proxies.cameras))
    return CameraMemory(centroids, *sides, temperature=TEMPERATURE, **options)  # pyright: ignore[reportArgumentType]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of any length of some images, and their proxies."""
    proxies = camera_proxies(*crowd()).labels
    chosen = np.flatnonzero(proxies >= 0)[:40]
    return torch.randn(40, DIM, generator=torch.Generator().manual_seed(2)) * 3, torch.from_numpy(proxies[chosen])


def slow_losses(fast: CameraMemory, features: torch.Tensor, labels: torch.Tensor, num_negatives: int) -> torch.Tensor:
    """(2,): within and across cameras, by loops; differentiable."""
    centroids, clusters, cameras = fast.centroids.double(), fast.clusters.tolist(), fast.cameras.tolist()
    sums = torch.zeros(2, dtype=torch.float64)
    for feature, own in zip(features.double(), labels.tolist(), strict=True):
        scores = centroids @ (feature / feature.norm()) / TEMPERATURE
        of_camera = [q for q, camera in enumerate(cameras) if camera == cameras[own]]
        positive = [q for q, cluster in enumerate(clusters) if cluster == clusters[own]]
        others = [q for q in range(len(clusters)) if q not in positive]
        hardest = sorted(others, key=lambda q: -scores[q].item())[:num_negatives]
        across = scores[positive + hardest].logsumexp(0) - scores[positive].mean()
        sums = sums + torch.stack([scores[of_camera].logsumexp(0) - scores[own], across])
    return sums / len(labels)


def test_proxies_are_pairs_of_cluster_and_camera_in_order():
    found = camera_proxies(np.array([1, 0, -1, 1, 0, 1]), np.array([4, 3, 3, 2, 3, -1]))
    assert found.clusters.tolist() == [0, 1, 1, 1]
    assert found.cameras.tolist() == [3, -1, 2, 4]
    assert found.labels.tolist() == [3, 0, -1, 2, 0, 1]


def test_a_proxy_begins_as_the_mean_of_its_images():
    labels, camids = crowd()
    features = torch.randn(len(labels), DIM, generator=torch.Generator().manual_seed(3))
    proxies = camera_proxies(labels, camids)
    expected = []
    for cluster, camera in zip(proxies.clusters, proxies.cameras, strict=True):
        mine = features.double().numpy()[(labels == cluster) & (camids == camera)]
        mean = (mine / np.linalg.norm(mine, axis=1, keepdims=True)).mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    assert_allclose(mean_centroids(features, torch.from_numpy(proxies.labels)).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("num_negatives", [1, 5, 50])
@pytest.mark.parametrize(("intra", "inter"), [(1.0, 0.5), (0.0, 1.0), (2.0, 0.0)])
def test_the_loss_and_its_gradient_are_those_of_the_definition(num_negatives, intra, inter):
    fast = memory(intra_weight=intra, inter_weight=inter, num_negatives=num_negatives)
    features, labels = batch()
    loss = fast.loss(features.requires_grad_(), labels)
    loss.backward()
    exact = features.detach().double().requires_grad_()
    expected = slow_losses(fast, exact, labels, num_negatives) @ torch.tensor([intra, inter], dtype=torch.float64)
    expected.backward()
    assert features.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_allclose(features.grad.numpy(), exact.grad.numpy(), atol=1e-5, rtol=1e-3)


def test_both_losses_are_there_by_default_with_the_weights_of_the_paper():
    fast, (features, labels) = memory(), batch()
    within, across = slow_losses(fast, features, labels, 50).tolist()
    assert fast.loss(features, labels).item() == pytest.approx(within + 0.5 * across, rel=1e-5)
    assert within > 0.5 < across


def test_two_ranks_halves_have_the_mean_loss_of_the_whole():
    fast, (features, labels) = memory(), batch()
    halves = [fast.loss(features[part], labels[part]).item() for part in (slice(0, 20), slice(20, 40))]
    assert np.mean(halves) == pytest.approx(fast.loss(features, labels).item(), rel=1e-6)


def test_an_update_moves_the_proxies_of_the_batch_one_image_after_the_other():
    fast, (features, labels) = memory(momentum=0.3), batch()
    expected = fast.centroids.double().numpy().copy()
    before = fast.centroids.clone()
    for feature, label in zip(features.double().numpy(), labels.tolist(), strict=True):
        moved = 0.3 * expected[label] + 0.7 * feature / np.linalg.norm(feature)
        expected[label] = moved / np.linalg.norm(moved)
    fast.loss(features, labels)
    assert torch.equal(fast.centroids, before)
    fast.update(features, labels)
    assert_allclose(fast.centroids.numpy(), expected, atol=1e-6)
    untouched = sorted({*range(len(before))} - {*labels.tolist()})
    assert untouched
    assert torch.equal(fast.centroids[untouched], before[untouched])


def test_the_loss_is_fp32_under_autocast():
    fast, (features, labels) = memory(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast.loss(features, labels), memory().loss(features, labels))

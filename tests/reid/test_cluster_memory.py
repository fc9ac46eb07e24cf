"""The cluster memory against loops over the batch in fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_allclose

from personmae.reid.memory import ClusterMemory, mean_centroids


def batch(num_images: int = 40, num_clusters: int = 6, dim: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of any length, and labels of which some are missing and none are in order."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_clusters - 1, (num_images,), generator=draw)
    return torch.randn(num_images, dim, generator=draw) * 3, labels


def memory(mode: str = "mean", momentum: float = 0.1, num_clusters: int = 6, dim: int = 9) -> ClusterMemory:
    centroids = F.normalize(torch.randn(num_clusters, dim, generator=torch.Generator().manual_seed(1)), dim=1)
    assert mode == "mean" or mode == "hard"
    return ClusterMemory(centroids, momentum=momentum, mode=mode)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def slow_mean(centroids: np.ndarray, features: np.ndarray, labels: list[int], momentum: float) -> np.ndarray:
    """Image by image, in the order of the batch."""
    new = centroids.copy()
    for feature, label in zip(features, labels, strict=True):
        new[label] = unit(momentum * new[label] + (1 - momentum) * unit(feature))
    return new


def slow_hard(centroids: np.ndarray, features: np.ndarray, labels: list[int], momentum: float) -> np.ndarray:
    new = centroids.copy()
    for label in set(labels):
        mine = [unit(feature) for feature, other in zip(features, labels, strict=True) if other == label]
        hardest = min(mine, key=lambda feature: feature @ centroids[label])
        new[label] = unit(momentum * centroids[label] + (1 - momentum) * hardest)
    return new


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.2, 0.9])
@pytest.mark.parametrize(("mode", "slow"), [("mean", slow_mean), ("hard", slow_hard)])
def test_an_update_is_the_loop_over_the_batch(mode, slow, momentum):
    fast, (features, labels) = memory(mode, momentum), batch()
    before = fast.centroids.double().numpy()
    fast.update(features, labels)
    expected = slow(before, features.double().numpy(), labels.tolist(), momentum)
    assert_allclose(fast.centroids.numpy(), expected, atol=1e-6)
    assert fast.centroids[5].tolist() == before[5].tolist()  # no image of it was there


def test_the_order_of_a_clusters_images_counts_and_that_of_clusters_does_not():
    features, labels = batch()
    plain, sorted_by_cluster, reversed_order = memory(), memory(), memory()
    plain.update(features, labels)
    order = labels.argsort(stable=True)
    sorted_by_cluster.update(features[order], labels[order])
    reversed_order.update(features.flip(0), labels.flip(0))
    assert torch.equal(plain.centroids, sorted_by_cluster.centroids)
    assert (plain.centroids - reversed_order.centroids).abs().max() > 0.1


def test_of_two_images_equally_hard_the_earlier_one_moves_the_centroid():
    fast = ClusterMemory(torch.tensor([[1.0, 0, 0]]), mode="hard", momentum=0.5)
    fast.update(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(fast.centroids, F.normalize(torch.tensor([[1.0, 1, 0]])))


@pytest.mark.parametrize("mode", ["mean", "hard"])
def test_centroids_keep_length_one_and_fp32_under_autocast(mode):
    fast, (features, labels) = memory(mode), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(30):
            fast.update(features.bfloat16(), labels)
    assert fast.centroids.dtype == torch.float32
    torch.testing.assert_close(fast.centroids.norm(dim=1), torch.ones(6))


def test_the_loss_is_cross_entropy_over_all_centroids():
    fast, (features, labels) = memory(), batch()
    expected = 0.0
    for feature, label in zip(features.double().numpy(), labels.tolist(), strict=True):
        scores = fast.centroids.double().numpy() @ unit(feature) / 0.05
        expected -= (scores[label] - np.log(np.exp(scores).sum())) / len(labels)
    assert fast.loss(features, labels).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_definition_in_fp64():
    fast, (features, labels) = memory(), batch()
    fast.loss(features.requires_grad_(), labels).backward()
    exact = features.detach().double().requires_grad_()
    cosines = (exact / exact.norm(dim=1, keepdim=True)) @ fast.centroids.double().T
    scores = (cosines / 0.05).exp()
    (scores.sum(dim=1).log() - scores[torch.arange(40), labels].log()).mean().backward()
    assert features.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(features.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)


def test_loss_and_backward_leave_the_memory_alone():
    fast, (features, labels) = memory(), batch()
    before = fast.centroids.clone()
    for _ in range(2):  # as under gradient accumulation
        fast.loss(features.requires_grad_(), labels).backward()
    assert torch.equal(fast.centroids, before)
    assert not fast.centroids.requires_grad


def test_an_update_carries_no_gradient():
    fast, (features, labels) = memory(), batch()
    fast.update(features.requires_grad_(), labels)
    assert not fast.centroids.requires_grad


def test_the_loss_is_fp32_under_autocast():
    fast, (features, labels) = memory(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast.loss(features, labels), memory().loss(features, labels))
        assert fast.loss(features.bfloat16(), labels).dtype == torch.float32


def test_a_memory_goes_on_from_its_saved_centroids():
    features, labels = batch()
    straight = memory("hard", 0.2)
    straight.update(features, labels)
    saved = straight.centroids.clone()
    straight.update(features.flip(0), labels)
    resumed = ClusterMemory(saved, mode="hard", momentum=0.2)
    resumed.update(features.flip(0), labels)
    assert torch.equal(straight.centroids, resumed.centroids)
    assert not torch.equal(saved, resumed.centroids)  # the tensor that was given is not written to


def test_centroids_are_means_of_unit_features_without_the_outliers():
    features, labels = batch()
    labels[::7] = -1
    labels[3] = 5
    expected = []
    for cluster in range(6):
        mine = [unit(x) for x, label in zip(features.double().numpy(), labels.tolist(), strict=True) if label == cluster]
        expected.append(unit(np.mean(mine, axis=0)))
    assert_allclose(mean_centroids(features, labels).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("labels", [[0, 0, 2], [-1, -1, -1], [1, 1, 1]])
def test_a_cluster_without_an_image_has_no_centroid(labels):
    with pytest.raises(ValueError, match="every cluster from 0"):
        mean_centroids(torch.ones(3, 4), torch.tensor(labels))


@pytest.mark.parametrize("mode", ["mean", "hard"])
def test_a_skipped_step_leaves_the_memory_as_it_was_whatever_its_features(mode):
    fast, other, (features, labels) = memory(mode), memory(mode), batch()
    before = fast.centroids.clone()
    broken = features.clone()
    broken[3] = float("nan")
    fast.update(broken, labels, torch.tensor(1.0))
    assert torch.equal(fast.centroids, before)
    fast.update(features, labels, torch.tensor(0.0))
    other.update(features, labels)
    assert torch.equal(fast.centroids, other.centroids)
    assert not torch.equal(fast.centroids, before)

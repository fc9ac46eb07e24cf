"""Losses against loops written from their definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from personmae.reid.losses import batch_hard_triplet, pairwise_distances, reid_loss, smoothed_cross_entropy


def random_embeddings(count: int = 12, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(3))


def slow_triplet(embeddings: torch.Tensor, labels: list[int], margin: float | None) -> float:
    x, terms = embeddings.double().numpy(), []
    for i, label in enumerate(labels):
        distances = [np.sqrt(((x[i] - other) ** 2).sum()) for other in x]
        positives = [d for j, d in enumerate(distances) if labels[j] == label and j != i]
        negatives = [d for j, d in enumerate(distances) if labels[j] != label]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            terms.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_is_shared_by_the_wrong_classes_alone(smoothing):
    logits, labels = random_embeddings(), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
    expected = 0.0
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        log_probs = row - np.log(np.exp(row).sum())
        for c, log_prob in enumerate(log_probs):
            expected -= (1 - smoothing if c == label else smoothing / 4) * log_prob / len(labels)
    assert smoothed_cross_entropy(logits, labels, smoothing=smoothing).item() == pytest.approx(expected, rel=1e-5)


def test_without_smoothing_it_is_pytorchs_cross_entropy():
    logits, labels = random_embeddings(), torch.arange(12) % 5
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, smoothing=0.0), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("margin", [None, 0.0, 0.3])
@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 0, 7]])
def test_triplet_equals_brute_force(margin, labels):
    embeddings = random_embeddings()
    loss = batch_hard_triplet(embeddings, torch.tensor(labels), margin=margin)
    assert loss.item() == pytest.approx(slow_triplet(embeddings, labels, margin), rel=1e-5)


@pytest.mark.parametrize("labels", [[0] * 12, list(range(12))])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_a_batch_without_triplets_costs_nothing_and_moves_nothing(labels, margin):
    embeddings = random_embeddings().requires_grad_()
    loss = batch_hard_triplet(embeddings, torch.tensor(labels), margin=margin)
    loss.backward()
    assert loss.item() == 0.0
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() == 0


def test_identical_images_have_distance_zero_and_a_finite_gradient():
    embeddings = torch.ones(4, 6).requires_grad_()
    assert pairwise_distances(embeddings).abs().max() == 0
    batch_hard_triplet(embeddings, torch.tensor([0, 0, 1, 1])).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_triplet_gradient_is_the_numerical_one():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    embeddings = random_embeddings(6, 4).requires_grad_()
    batch_hard_triplet(embeddings, labels).backward()
    step = torch.zeros_like(embeddings)
    step[2, 1] = 1e-2
    with torch.no_grad():
        slope = (batch_hard_triplet(embeddings + step, labels) - batch_hard_triplet(embeddings - step, labels)) / 2e-2
    assert embeddings.grad is not None
    assert slope.item() == pytest.approx(embeddings.grad[2, 1].item(), abs=1e-3)


def test_losses_are_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batch_hard_triplet(random_embeddings().bfloat16(), torch.arange(12) // 3)
        assert loss.dtype == torch.float32
        assert smoothed_cross_entropy(random_embeddings().bfloat16(), torch.arange(12) % 5).dtype == torch.float32


def test_mgn_weights_are_an_eighth_per_classifier_and_a_fifth_per_triplet():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(12) // 3
    logits = [torch.randn(12, 4, generator=draw) for _ in range(8)]
    embeddings = [torch.randn(12, 6, generator=draw) for _ in range(5)]
    losses = reid_loss({"logits": logits, "embeddings": embeddings}, labels)
    expected = sum(0.125 * smoothed_cross_entropy(x, labels) for x in logits)
    expected += sum(0.2 * batch_hard_triplet(x, labels) for x in embeddings)
    torch.testing.assert_close(losses["loss"], torch.as_tensor(expected))
    torch.testing.assert_close(losses["id_loss"] + losses["triplet_loss"], losses["loss"])
    assert losses["accuracy"] == (logits[0].argmax(1) == labels).float().mean()


def test_bnneck_weights_are_one_and_one():
    labels = torch.arange(12) // 3
    logits, embeddings = random_embeddings(12, 4), random_embeddings(12, 6)
    losses = reid_loss({"logits": [logits], "embeddings": [embeddings]}, labels, smoothing=0.0, margin=0.3)
    expected = F.cross_entropy(logits, labels) + batch_hard_triplet(embeddings, labels, margin=0.3)
    torch.testing.assert_close(losses["loss"], expected)

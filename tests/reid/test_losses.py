"""Losses against loops written from their definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_allclose

from personmae.reid.losses import (
    arc_softmax_logits,
    batch_hard_triplet,
    circle_softmax_logits,
    pairwise_distances,
    reid_loss,
    smoothed_cross_entropy,
)


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


def random_cosines(count: int = 12, num_classes: int = 5) -> torch.Tensor:
    """Between -1 and 1, both ends included."""
    cosines = torch.rand(count, num_classes, generator=torch.Generator().manual_seed(4)) * 2 - 1
    cosines[0, 0], cosines[1, 1], cosines[2, 0] = 1, -1, -1
    return cosines


def slow_circle(cosine: float, is_true: bool, scale: float, margin: float) -> float:
    optimum, delta = (1 + margin, 1 - margin) if is_true else (-margin, margin)
    alpha = max(0.0, optimum - cosine if is_true else cosine - optimum)
    return scale * alpha * (cosine - delta)


def slow_arc(cosine: float, is_true: bool, scale: float, margin: float) -> float:
    angle = math.acos(cosine)
    if not is_true:
        return scale * cosine
    return scale * (math.cos(angle + margin) if angle + margin < math.pi else cosine - margin * math.sin(margin))


WITH_MARGIN = [(circle_softmax_logits, slow_circle), (arc_softmax_logits, slow_arc)]


@pytest.mark.parametrize(("fast", "slow"), WITH_MARGIN)
@pytest.mark.parametrize(("scale", "margin"), [(64.0, 0.35), (30.0, 0.5), (1.0, 0.0)])
def test_logits_with_a_margin_equal_their_definition(fast, slow, scale, margin):
    cosines, labels = random_cosines(), torch.arange(12) % 5
    logits = fast(cosines, labels, scale=scale, margin=margin)
    expected = [
        [slow(cosine, column == label, scale, margin) for column, cosine in enumerate(row)]
        for row, label in zip(cosines.double().tolist(), labels.tolist(), strict=True)
    ]
    assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("fast", "slow"), WITH_MARGIN)
def test_a_margin_lowers_the_true_class_and_leaves_no_gain_in_turning_away(fast, slow):
    cosines = torch.linspace(-0.999, 0.999, 200)[:, None]
    true = fast(cosines, torch.zeros(200, dtype=torch.long))
    wrong = fast(cosines, torch.ones(200, dtype=torch.long))
    assert (true <= wrong).all()
    if fast is arc_softmax_logits:
        assert (true.diff(dim=0) > 0).all()


def test_the_weights_of_the_circle_carry_no_gradient():
    cosines = torch.tensor([[0.4, 0.3]], requires_grad=True)
    circle_softmax_logits(cosines, torch.tensor([0]), scale=64.0, margin=0.35).sum().backward()
    assert cosines.grad is not None
    assert_allclose(cosines.grad.numpy(), [[64 * 0.95, 64 * 0.65]], rtol=1e-5)


def test_the_gradient_of_the_arc_is_minus_the_sine_of_the_moved_angle():
    cosines = torch.tensor([[0.3], [-0.5], [-0.99], [1.0], [-1.0]], requires_grad=True)
    arc_softmax_logits(cosines, torch.zeros(5, dtype=torch.long), scale=1.0, margin=0.35).sum().backward()
    assert cosines.grad is not None
    expected = [math.sin(math.acos(x) + 0.35) / math.sin(math.acos(x)) for x in (0.3, -0.5)]
    assert_allclose(cosines.grad[:3, 0].numpy(), [*expected, 1], rtol=1e-4)
    assert cosines.grad.isfinite().all()


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


@pytest.mark.parametrize("margin", [None, 0.3])
def test_images_that_are_equally_hard_share_the_gradient(margin):
    # A cross: anchor 0 has two farthest positives and two nearest negatives, anchors 1 and 2 two nearest negatives each.
    embeddings = torch.tensor([[0.0, 0], [3, 0], [-3, 0], [0, 1], [0, -1]], requires_grad=True)
    labels = [0, 0, 0, 1, 1]
    loss = batch_hard_triplet(embeddings, torch.tensor(labels), margin=margin)
    assert loss.item() == pytest.approx(slow_triplet(embeddings.detach(), labels, margin), rel=1e-5)
    loss.backward()
    assert embeddings.grad is not None
    pulls = embeddings.grad
    assert pulls[1, 0] == -pulls[2, 0] > 0
    assert pulls[3, 1] == -pulls[4, 1] != 0
    torch.testing.assert_close(pulls[0], torch.zeros(2))


def test_the_soft_margin_is_the_softplus_of_the_gap_at_any_size():
    for gap in (-80.0, -1.0, 0.0, 1.0, 80.0):
        positive, negative = max(gap, 0.0) + 5, max(-gap, 0.0) + 5
        line = torch.tensor([[0.0, 0], [positive, 0], [0, negative], [500, 500]])
        loss = batch_hard_triplet(line, torch.tensor([0, 0, 1, 2]))
        assert loss.item() == pytest.approx(slow_triplet(line, [0, 0, 1, 2], None), rel=1e-5)


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


@pytest.mark.parametrize(("classifier", "with_margin"), [("circle", circle_softmax_logits), ("arc", arc_softmax_logits)])
def test_a_classifier_with_a_margin_takes_the_logits_for_cosines(classifier, with_margin):
    labels, cosines, embeddings = torch.arange(12) // 3, random_cosines(12, 4), random_embeddings(12, 6)
    losses = reid_loss(
        {"logits": [cosines, -cosines], "embeddings": [embeddings]},
        labels,
        classifier=classifier,
        class_margin=0.2,
        scale=16.0,
    )
    scores = [with_margin(x, labels, scale=16.0, margin=0.2) for x in (cosines, -cosines)]
    expected = (smoothed_cross_entropy(scores[0], labels) + smoothed_cross_entropy(scores[1], labels)) / 2
    torch.testing.assert_close(losses["id_loss"], expected)
    assert losses["accuracy"] == (cosines.argmax(1) == labels).float().mean()


@pytest.mark.parametrize(("fast", "slow"), WITH_MARGIN)
def test_logits_with_a_margin_are_fp32_under_autocast(fast, slow):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(random_cosines().bfloat16(), torch.arange(12) % 5).dtype == torch.float32


def test_triplets_are_searched_among_vectors_of_all_ranks_where_these_are_given():
    logits, labels = random_embeddings(4, 4), torch.tensor([0, 0, 1, 1])
    gathered, everyone = random_embeddings(12, 6), torch.arange(12) // 2 % 4
    losses = reid_loss({"logits": [logits], "embeddings": [gathered]}, labels, everyone)
    torch.testing.assert_close(losses["triplet_loss"], batch_hard_triplet(gathered, everyone))
    torch.testing.assert_close(losses["id_loss"], smoothed_cross_entropy(logits, labels))

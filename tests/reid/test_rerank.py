"""Re-ranking against loops written from the formulas of the papers, on whole matrices in double precision."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from personmae.errors import UserError
from personmae.reid.ranking import Labels, Similarity, cosine, evaluate
from personmae.reid.rerank import alpha_query_expansion, k_reciprocal

NUM_QUERIES, NUM_GALLERY, NUM_PIDS = 13, 71, 8


def people(seed: int, *, noise: float = 0.7) -> tuple[torch.Tensor, torch.Tensor, Labels]:
    """Features of several images of some people, of any length, and the labels."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((NUM_PIDS, 12))
    pids = [rng.integers(0, NUM_PIDS, count) for count in (NUM_QUERIES, NUM_GALLERY)]
    query, gallery = (centres[p] + noise * rng.standard_normal((len(p), 12)) for p in pids)
    labels = Labels(pids[0], np.full(NUM_QUERIES, 1), pids[1], np.full(NUM_GALLERY, 2))
    return torch.from_numpy(query).float(), torch.from_numpy(gallery * 3).float(), labels


def unit(features: torch.Tensor) -> np.ndarray:
    values = features.double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def slow_expansion(query: torch.Tensor, gallery: torch.Tensor, k: int, alpha: float) -> np.ndarray:
    """Cosine of each expanded query with the gallery."""
    rows = []
    for q in unit(query):
        expanded = q.copy()
        for g in sorted(unit(gallery), key=lambda g: -(q @ g))[:k]:
            expanded += (q @ g) ** alpha * g if q @ g > 0 else 0
        rows.append([expanded @ g / np.linalg.norm(expanded) for g in unit(gallery)])
    return np.array(rows)


def slow_k_reciprocal(query: torch.Tensor, gallery: torch.Tensor, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Distances of each query and the gallery, with sets; an image is the first of its own neighbours."""
    images = np.concatenate([unit(query), unit(gallery)])
    original = 2 - 2 * images @ images.T
    original /= original.max(axis=1, keepdims=True)
    everyone = range(len(images))
    nearest = [sorted(everyone, key=lambda j, i=i: (j != i, original[i, j])) for i in everyone]

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    weights = np.zeros_like(original)
    for i in everyone:
        expanded = set(own := reciprocal(i, k1))
        for j in own:
            theirs = reciprocal(j, round(k1 / 2))
            if len(own & theirs) > 2 / 3 * len(theirs):
                expanded |= theirs
        for j in expanded:
            weights[i, j] = np.exp(-original[i, j])
        weights[i] /= weights[i].sum()
    weights = np.array([np.mean([weights[j] for j in nearest[i][:k2]], axis=0) for i in everyone])
    distances = np.zeros((len(query), len(gallery)))
    for i in range(len(query)):
        for g in range(len(gallery)):
            ours, theirs = weights[i], weights[len(query) + g]
            jaccard = 1 - np.minimum(ours, theirs).sum() / np.maximum(ours, theirs).sum()
            distances[i, g] = (1 - lambda_value) * jaccard + lambda_value * original[i, len(query) + g]
    return distances


def whole(similarity: Similarity) -> np.ndarray:
    return similarity(np.arange(NUM_QUERIES)).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k", "alpha"), [(1, 3.0), (5, 3.0), (5, 0.0), (200, 1.5)])
def test_query_expansion_equals_the_loop(seed, k, alpha):
    query, gallery, _ = people(seed)
    expected = slow_expansion(query, gallery, k, alpha)
    assert np.abs(whole(alpha_query_expansion(query, gallery, k=k, alpha=alpha)) - expected).max() < 1e-5
    assert np.abs(whole(cosine(query, gallery)) - expected).max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (7, 1, 0.0), (4, 3, 0.8), (100, 2, 0.3)])
def test_k_reciprocal_distances_equal_the_loop_over_sets(seed, k1, k2, lambda_value):
    query, gallery, _ = people(seed)
    expected = slow_k_reciprocal(query, gallery, k1, k2, lambda_value)
    found = whole(k_reciprocal(query, gallery, k1=k1, k2=k2, lambda_value=lambda_value))
    assert np.abs(found + expected).max() < 1e-5


def test_blocks_of_queries_give_the_rows_of_the_whole():
    query, gallery, _ = people(0)
    similarity = k_reciprocal(query, gallery)
    queries = np.array([11, 2, 5])
    assert np.abs(similarity(queries).numpy() - whole(similarity)[queries]).max() < 1e-6


def test_the_original_distance_alone_ranks_as_the_cosine_does():
    query, gallery, labels = people(1)
    assert evaluate(k_reciprocal(query, gallery, lambda_value=1.0), labels) == evaluate(cosine(query, gallery), labels)


@pytest.mark.parametrize("rerank", [alpha_query_expansion, k_reciprocal])
def test_neighbours_help_where_features_are_noisy(rerank: Callable[[torch.Tensor, torch.Tensor], Similarity]):
    gains = []
    for seed in range(5):
        query, gallery, labels = people(seed, noise=1.0)
        gains.append(evaluate(rerank(query, gallery), labels).mAP - evaluate(cosine(query, gallery), labels).mAP)
    assert np.mean(gains) > 0.03


@pytest.mark.parametrize("rerank", [alpha_query_expansion, k_reciprocal])
def test_features_that_are_not_finite_are_an_error(rerank: Callable[[torch.Tensor, torch.Tensor], Similarity]):
    query, gallery, _ = people(0)
    gallery[3, 1] = torch.inf
    with pytest.raises(UserError, match="1 of 71 gallery features are not finite"):
        rerank(query, gallery)

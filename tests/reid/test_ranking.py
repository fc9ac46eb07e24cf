"""Retrieval scores against a loop written from the protocol."""

import numpy as np
import pytest
import torch

from personmae.errors import UserError
from personmae.reid.ranking import evaluate, rank_lists

NUM_QUERIES, NUM_GALLERY = 17, 60


def random_benchmark(seed: int, *, ties: bool) -> dict:
    """Features and labels; with ``ties`` every distance is one of nine exact values."""
    rng = np.random.default_rng(seed)

    def features(count: int) -> torch.Tensor:
        signs = rng.choice([-0.25, 0.25], (count, 16)) if ties else rng.standard_normal((count, 16))
        return torch.from_numpy(signs.astype(np.float32))

    return {
        "query_features": features(NUM_QUERIES),
        "gallery_features": features(NUM_GALLERY),
        "query_pids": rng.integers(1, 9, NUM_QUERIES),
        "query_camids": rng.integers(1, 4, NUM_QUERIES),
        "gallery_pids": rng.integers(0, 7, NUM_GALLERY),  # 0 is a distractor; queries 7 and 8 have no match
        "gallery_camids": rng.integers(1, 4, NUM_GALLERY),
    }


def slow_lists(data: dict) -> list[list[int]]:
    """Gallery indices from near to far, for each query, the same pid and camera left out."""
    query, gallery = data["query_features"].double().numpy(), data["gallery_features"].double().numpy()
    lists = []
    for q, pid, camid in zip(query, data["query_pids"], data["query_camids"], strict=True):
        kept = [j for j in range(len(gallery)) if not (data["gallery_pids"][j] == pid and data["gallery_camids"][j] == camid)]
        cosine = [q @ g / np.linalg.norm(q) / np.linalg.norm(g) for g in gallery]
        lists.append(sorted(kept, key=lambda j: (-cosine[j], j)))
    return lists


def slow_scores(data: dict, max_rank: int) -> tuple[float, float, list[float], int]:
    aps, inps, firsts = [], [], []
    for pid, ranked in zip(data["query_pids"], slow_lists(data), strict=True):
        hit_ranks = [rank for rank, j in enumerate(ranked, start=1) if data["gallery_pids"][j] == pid]
        if not hit_ranks:
            continue
        aps.append(sum(n / rank for n, rank in enumerate(hit_ranks, start=1)) / len(hit_ranks))
        inps.append(len(hit_ranks) / hit_ranks[-1])
        firsts.append(hit_ranks[0])
    cmc = [sum(first <= k for first in firsts) / len(firsts) for k in range(1, max_rank + 1)]
    return sum(aps) / len(aps), sum(inps) / len(inps), cmc, len(aps)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [1, 5, 256])
def test_scores_equal_the_naive_loop(seed, ties, block_size):
    data = random_benchmark(seed, ties=ties)
    result = evaluate(**data, block_size=block_size, max_rank=20)
    mean_ap, mean_inp, cmc, num_valid = slow_scores(data, 20)
    assert result.mAP == pytest.approx(mean_ap, abs=1e-9)
    assert result.mINP == pytest.approx(mean_inp, abs=1e-9)
    assert result.cmc == pytest.approx(cmc, abs=1e-9)
    assert (result.num_queries, result.num_valid) == (NUM_QUERIES, num_valid)
    assert num_valid < NUM_QUERIES


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [5, NUM_GALLERY + 3])
def test_rank_lists_equal_the_naive_loop(ties, top_k):
    data = random_benchmark(0, ties=ties)
    expected = [(ranked + [-1] * top_k)[:top_k] for ranked in slow_lists(data)]
    assert rank_lists(**data, top_k=top_k, block_size=4).tolist() == expected


def line(pids: list[int], camids: list[int] | None = None) -> dict:
    """One query of pid 1, camera 1; the gallery is ranked in the order given, by growing angle."""
    angles = torch.arange(1, len(pids) + 1) * 0.1
    return {
        "query_features": torch.tensor([[1.0, 0.0]]),
        "gallery_features": torch.stack([angles.cos(), angles.sin()], dim=1) * 3,
        "query_pids": np.array([1]),
        "query_camids": np.array([1]),
        "gallery_pids": np.array(pids),
        "gallery_camids": np.array(camids or [2] * len(pids)),
    }


def test_the_worked_example():
    result = evaluate(**line([1, 5, 1, 6, 7, 1]))
    assert result.mAP == pytest.approx(0.7222, abs=5e-5)
    assert result.mINP == pytest.approx(0.5)
    assert result.rank(1) == 1.0


def test_images_of_the_query_camera_are_neither_right_nor_wrong():
    with_same_camera = evaluate(**line([1, 5, 1, 1], [1, 2, 1, 2]))
    assert with_same_camera == evaluate(**line([5, 1]))
    assert rank_lists(**line([1, 5, 1, 1], [1, 2, 1, 2]), top_k=3).tolist() == [[1, 3, -1]]


def test_others_from_the_query_camera_stay_as_negatives():
    assert evaluate(**line([5, 1], [1, 2])).rank(1) == 0.0


def test_distractors_are_negatives():
    assert evaluate(**line([0, 0, 1])).mAP == pytest.approx(1 / 3)


def test_equal_distances_keep_the_order_of_the_gallery():
    data = line([5, 1, 6, 1])
    data["gallery_features"] = torch.ones(4, 2)
    assert rank_lists(**data, top_k=4).tolist() == [[0, 1, 2, 3]]
    assert evaluate(**data).mAP == pytest.approx(0.5)


def test_rank_k_beyond_the_gallery_is_still_given():
    result = evaluate(**line([5, 1]))
    assert (result.rank(1), result.rank(2), result.rank(10)) == (0.0, 1.0, 1.0)


def test_the_scale_of_features_does_not_matter():
    data = random_benchmark(1, ties=False)
    scaled = data | {"query_features": data["query_features"] * 7}
    assert evaluate(**data) == evaluate(**scaled)


def test_no_common_pid_is_an_error_that_says_so():
    with pytest.raises(UserError, match="no pid in common"):
        evaluate(**line([2, 3]))


def test_a_single_camera_is_an_error_that_says_so():
    with pytest.raises(UserError, match="query's own camera"):
        evaluate(**line([1, 1, 2], [1, 1, 1]))


def test_features_that_are_not_finite_are_an_error():
    data = line([1, 2, 3])
    data["gallery_features"][1, 0] = torch.nan
    with pytest.raises(UserError, match="1 of 3 gallery features are not finite"):
        evaluate(**data)

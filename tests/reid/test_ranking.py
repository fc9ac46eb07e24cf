"""Retrieval scores against a loop written from the protocol, which sorts the whole gallery for every query."""

import numpy as np
import pytest
import torch
from ranked_cases import NUM_GALLERY, NUM_QUERIES, Case, odd_case, random_case, slow_lists

from personmae.errors import UserError
from personmae.reid import ranking
from personmae.reid.ranking import Labels, cosine, evaluate, rank_lists


def slow_scores(case: Case, max_rank: int) -> dict | None:
    """The scores by their definitions; None where no query has a match."""
    aps, trapezoids, inps, firsts, by_query = [], [], [], [], []
    for pid, ranked in zip(case[2].query_pids, slow_lists(case), strict=True):
        hit_ranks = [rank for rank, j in enumerate(ranked, start=1) if case[2].gallery_pids[j] == pid]
        if not hit_ranks:
            by_query.append(None)
            continue
        aps.append(sum(n / rank for n, rank in enumerate(hit_ranks, start=1)) / len(hit_ranks))
        by_query.append(aps[-1])
        areas, num_found = [], 0
        for rank in range(1, hit_ranks[-1] + 1):  # precision over recall, by the trapezoid rule
            before = num_found / (rank - 1) if rank > 1 else 1.0
            num_found += rank in hit_ranks
            areas.append((before + num_found / rank) / 2 / len(hit_ranks) if rank in hit_ranks else 0.0)
        trapezoids.append(sum(areas))
        inps.append(len(hit_ranks) / hit_ranks[-1])
        firsts.append(hit_ranks[0])
    if not aps:
        return None
    cmc = [sum(first <= k for first in firsts) / len(firsts) for k in range(1, max_rank + 1)]
    means = {name: sum(v) / len(v) for name, v in (("mAP", aps), ("mAP_trapezoid", trapezoids), ("mINP", inps))}
    return means | {"cmc": cmc, "ap": by_query, "num_queries": len(case[0]), "num_valid": len(aps)}


def assert_equal(result: ranking.RankingResult, expected: dict) -> None:
    for name, value in expected.items():
        found, value = (np.array(v, dtype=float) for v in (getattr(result, name), value))  # None becomes NaN
        assert found.shape == value.shape
        assert np.allclose(found, value, rtol=0, atol=1e-12, equal_nan=name == "ap"), name


def scores(case: Case, **settings: int) -> ranking.RankingResult:
    return evaluate(cosine(case[0], case[1]), case[2], **settings)


def lists(case: Case, top_k: int) -> list[list[int]]:
    return rank_lists(cosine(case[0], case[1]), case[2], queries=np.arange(len(case[0])), top_k=top_k, block_size=4).tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [1, 5, 256])
def test_scores_equal_the_naive_loop(seed, ties, block_size):
    case = random_case(seed, ties=ties)
    expected = slow_scores(case, 20)
    assert expected
    assert expected["num_valid"] < NUM_QUERIES
    assert_equal(scores(case, block_size=block_size, max_rank=20), expected)


def test_scores_equal_the_naive_loop_on_thousands_of_odd_cases():
    num_scored, num_refused = 0, 0
    for seed in range(2000):
        case = odd_case(seed)
        expected = slow_scores(case, 5)
        if expected is None:
            num_refused += 1
            with pytest.raises(UserError, match="no query can be scored"):
                scores(case)
        else:
            num_scored += 1
            assert_equal(scores(case, block_size=1 + seed % 5, max_rank=5), expected)
    assert num_scored > 1200
    assert num_refused > 600


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [5, NUM_GALLERY + 3])
def test_rank_lists_equal_the_naive_loop(ties, top_k):
    case = random_case(0, ties=ties)
    assert lists(case, top_k) == [(ranked + [-1] * top_k)[:top_k] for ranked in slow_lists(case)]


def test_rank_lists_of_odd_cases_equal_the_naive_loop():
    for seed in range(300):
        case = odd_case(seed)
        assert lists(case, 6) == [(ranked + [-1] * 6)[:6] for ranked in slow_lists(case)]


def test_rank_lists_are_of_the_queries_asked_for():
    query, gallery, labels = random_case(2, ties=True)
    found = rank_lists(cosine(query, gallery), labels, queries=np.array([11, 3]), top_k=4)
    assert found.tolist() == [lists((query, gallery, labels), 4)[i] for i in (11, 3)]


def line(pids: list[int], camids: list[int] | None = None, **labels: np.ndarray) -> Case:
    """One query of pid 1, camera 1; the gallery is ranked in the order given, by growing angle."""
    angles = torch.arange(1, len(pids) + 1) * 0.1
    columns = {
        "query_pids": np.array([1]),
        "query_camids": np.array([1]),
        "gallery_pids": np.array(pids),
        "gallery_camids": np.array(camids or [2] * len(pids)),
    }
    return torch.tensor([[1.0, 0.0]]), torch.stack([angles.cos(), angles.sin()], dim=1) * 3, Labels(**(columns | labels))


def test_the_worked_example():
    result = scores(line([1, 5, 1, 6, 7, 1]))
    assert result.mAP == pytest.approx(0.7222, abs=5e-5)
    assert result.mAP_trapezoid == pytest.approx(0.6778, abs=5e-5)
    assert result.mINP == pytest.approx(0.5)
    assert result.rank(1) == 1.0


def test_the_trapezoid_starts_at_precision_one():
    result = scores(line([5, 1, 6, 1]))
    assert result.mAP == pytest.approx(0.5)
    assert result.mAP_trapezoid == pytest.approx((0 + 1 / 2) / 4 + (1 / 3 + 2 / 4) / 4)
    assert scores(line([1, 5])).mAP_trapezoid == 1.0


def test_images_of_the_query_camera_are_neither_right_nor_wrong():
    with_same_camera = line([1, 5, 1, 1], [1, 2, 1, 2])
    assert scores(with_same_camera) == scores(line([5, 1]))
    assert lists(with_same_camera, 3) == [[1, 3, -1]]


def test_junk_is_neither_right_nor_wrong():
    assert scores(line([-1, 5, -1, 1])) == scores(line([5, 1]))
    assert lists(line([-1, 5, -1, 1]), 3) == [[1, 3, -1]]


def test_others_from_the_query_camera_stay_as_negatives():
    assert scores(line([5, 1], [1, 2])).rank(1) == 0.0


def test_distractors_are_negatives():
    assert scores(line([0, 0, 1])).mAP == pytest.approx(1 / 3)


def test_a_query_of_no_known_camera_removes_nothing():
    unknown = np.array([-1])
    assert scores(line([1, 5, 1], [-1, -1, -1], query_camids=unknown)).mAP == pytest.approx((1 + 2 / 3) / 2)
    assert lists(line([1, 5, 1], [-1, 2, 1], query_camids=unknown), 3) == [[0, 1, 2]]


def test_the_own_image_is_removed_and_nothing_else():
    case = line([1, 5, 1], [-1, -1, -1], query_camids=np.array([-1]), own_index=np.array([0]))
    assert scores(case) == scores(line([5, 1]))
    assert lists(case, 3) == [[1, 2, -1]]


def test_equal_similarities_keep_the_order_of_the_gallery():
    query, _, labels = line([5, 1, 6, 1])
    case = query, torch.ones(4, 2), labels
    assert lists(case, 4) == [[0, 1, 2, 3]]
    assert scores(case).mAP == pytest.approx(0.5)


def test_rank_k_beyond_the_gallery_is_still_given():
    result = scores(line([5, 1]))
    assert (result.rank(1), result.rank(2), result.rank(10)) == (0.0, 1.0, 1.0)


def test_the_length_of_features_does_not_matter():
    query, gallery, labels = random_case(1, ties=True)  # powers of two, so that ties stay ties
    lengths = 2.0 ** torch.arange(-30, 30)[:, None]
    assert scores((query * 4, gallery * lengths, labels)) == scores((query, gallery, labels))


def test_half_precision_and_double_features_are_taken():
    query, gallery, labels = random_case(1, ties=True)
    assert scores((query.half(), gallery.half(), labels)) == scores((query, gallery, labels))
    assert scores((query.double(), gallery.double(), labels)) == scores((query, gallery, labels))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ties", [False, True])
def test_a_gpu_gives_the_same_scores_and_lists(ties):
    query, gallery, labels = random_case(0, ties=ties)
    on_gpu = query.cuda(), gallery.cuda(), labels
    assert scores(on_gpu, block_size=5) == scores((query, gallery, labels))
    assert lists(on_gpu, 10) == lists((query, gallery, labels), 10)


def test_any_similarity_can_rank():
    query, gallery, labels = random_case(3, ties=False)
    distances = torch.cdist(query, gallery)
    by_distance = rank_lists(lambda queries: -distances[torch.from_numpy(queries)], labels, queries=np.array([0]), top_k=5)
    kept = set(slow_lists((query, gallery, labels))[0])
    expected = [j for j in distances[0].argsort().tolist() if j in kept][:5]
    assert by_distance[0].tolist() == expected
    assert lists((query, gallery, labels), 5)[0] != expected


def test_no_common_pid_is_an_error_that_says_so():
    with pytest.raises(UserError, match="no pid in common"):
        scores(line([2, 3]))


def test_a_single_camera_is_an_error_that_says_so():
    with pytest.raises(UserError, match="query's own camera"):
        scores(line([1, 1, 2], [1, 1, 1]))


def test_features_that_are_not_finite_are_an_error():
    query, gallery, labels = line([1, 2, 3])
    gallery[1, 0] = torch.nan
    with pytest.raises(UserError, match="1 of 3 gallery features are not finite"):
        scores((query, gallery, labels))

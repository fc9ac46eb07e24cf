"""Scores by camera pair and by groups of queries, next to a loop over the queries that is written from the definition."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from ranked_cases import Case, odd_case, random_case, slow_lists

from personmae.errors import UserError
from personmae.reid.breakdown import CameraPairs, by_camera_pair, by_group, to_record
from personmae.reid.ranking import Hits, Labels, cosine, evaluate, find_hits

GROUPS = ("small", "large", "hidden")


def hits_of(case: Case, block_size: int = 256) -> Hits:
    return find_hits(cosine(case[0], case[1]), case[2], block_size=block_size)


def average_precision(right: list[bool]) -> float:
    ranks = [rank for rank, is_right in enumerate(right, start=1) if is_right]
    return sum(n / rank for n, rank in enumerate(ranks, start=1)) / len(ranks)


def slow_pairs(case: Case) -> dict[tuple[int, int], list[tuple[float, bool]]]:
    """(AP, whether the first is right) of each query, by cameras: ranked again for each camera, without others' matches."""
    labels, found = case[2], {}
    for query, ranked in enumerate(slow_lists(case)):
        pid = labels.query_pids[query]
        for camera in set(labels.gallery_camids.tolist()):
            kept = [j for j in ranked if labels.gallery_pids[j] != pid or labels.gallery_camids[j] == camera]
            right = [bool(labels.gallery_pids[j] == pid) for j in kept]
            if any(right):
                pair = int(labels.query_camids[query]), camera
                found.setdefault(pair, []).append((average_precision(right), right[0]))
    return found


def assert_equal(pairs: CameraPairs, expected: dict[tuple[int, int], list[tuple[float, bool]]]) -> None:
    for row, of_query in enumerate(pairs.query_cameras.tolist()):
        for column, of_gallery in enumerate(pairs.gallery_cameras.tolist()):
            found = expected.get((of_query, of_gallery), [])
            assert pairs.num_queries[row, column] == len(found)
            for scores, place in ((pairs.mAP, 0), (pairs.rank1, 1)):
                mean = sum(values[place] for values in found) / len(found) if found else math.nan
                assert scores[row, column] == pytest.approx(mean, rel=0, abs=1e-12, nan_ok=not found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 256])
def test_pairs_equal_a_ranking_for_each_camera(ties: bool, block_size: int) -> None:
    case = random_case(5, ties=ties)
    pairs, expected = by_camera_pair(hits_of(case, block_size), case[2]), slow_pairs(case)
    assert len(expected) == 6  # three cameras, and the protocol leaves nothing on the diagonal
    assert pairs.num_queries.diagonal().tolist() == [0, 0, 0]
    assert np.isnan(pairs.mAP.diagonal()).all()
    assert_equal(pairs, expected)


def test_pairs_equal_it_on_hundreds_of_odd_cases() -> None:
    scored = 0
    for seed in range(500):
        case = odd_case(seed)
        if expected := slow_pairs(case):
            scored += 1
            assert_equal(by_camera_pair(hits_of(case), case[2]), expected)
        else:
            with pytest.raises(UserError, match="no query can be scored"):
                hits_of(case)
    assert scored > 300


def test_the_worked_example() -> None:
    """Ranked: the person by camera 2, another, the person by camera 3, another, the person by camera 2."""
    angles = torch.arange(1, 6) * 0.1
    labels = Labels(np.array([1]), np.array([1]), np.array([1, 5, 1, 6, 1]), np.array([2, 2, 3, 3, 2]))
    case = torch.tensor([[1.0, 0.0]]), torch.stack([angles.cos(), angles.sin()], dim=1), labels
    pairs = by_camera_pair(hits_of(case), labels)
    assert (pairs.query_cameras.tolist(), pairs.gallery_cameras.tolist()) == ([1], [2, 3])
    assert pairs.mAP.tolist() == [[(1 + 2 / 4) / 2, 1 / 2]]
    assert pairs.rank1.tolist() == [[1.0, 0.0]]
    assert pairs.num_queries.tolist() == [[1, 1]]


def test_with_two_cameras_the_pairs_are_parts_of_the_whole() -> None:
    query, gallery, labels = random_case(1, ties=False)
    two = Labels(labels.query_pids, labels.query_camids % 2, labels.gallery_pids, labels.gallery_camids % 2)
    pairs, whole = by_camera_pair(hits_of((query, gallery, two)), two), evaluate(cosine(query, gallery), two)
    assert pairs.num_queries.sum() == whole.num_valid
    assert np.nansum(pairs.mAP * pairs.num_queries) / whole.num_valid == pytest.approx(whole.mAP, abs=1e-12)
    assert np.nansum(pairs.rank1 * pairs.num_queries) / whole.num_valid == pytest.approx(whole.rank(1), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_groups_equal_a_loop_over_their_queries(seed: int) -> None:
    case = random_case(seed, ties=True)
    labels, lists = case[2], slow_lists(case)
    groups = [GROUPS[i % 3] for i in range(len(lists))]
    found = by_group(hits_of(case), groups)
    assert tuple(found) == GROUPS
    for name, scores in found.items():
        own = [i for i, group in enumerate(groups) if group == name]
        right = [[bool(labels.gallery_pids[j] == labels.query_pids[i]) for j in lists[i]] for i in own]
        valid = [of_query for of_query in right if any(of_query)]
        assert (scores.num_queries, scores.num_valid) == (len(own), len(valid))
        assert scores.mAP == pytest.approx(sum(map(average_precision, valid)) / len(valid), abs=1e-12)
        assert scores.rank1 == pytest.approx(sum(of_query[0] for of_query in valid) / len(valid), abs=1e-12)


def test_one_group_is_the_whole_and_one_without_a_match_has_no_score() -> None:
    case = random_case(3, ties=False)
    whole = evaluate(cosine(case[0], case[1]), case[2])
    num_queries = len(case[0])
    found = by_group(hits_of(case), ["all"] * num_queries)
    assert list(found) == ["all"]
    assert astuple(found["all"]) == pytest.approx((whole.mAP, whole.rank(1), num_queries, whole.num_valid), abs=1e-12)
    assert whole.rank(1) > 0
    split = by_group(hits_of(case), ["matched" if ap is not None else "not" for ap in whole.ap])
    assert split["not"].num_queries == num_queries - whole.num_valid > 0
    assert split["not"].num_valid == 0
    assert math.isnan(split["not"].mAP)
    assert math.isnan(split["not"].rank1)
    assert split["matched"].mAP == pytest.approx(whole.mAP)


def test_a_record_has_none_where_there_is_no_number() -> None:
    case = random_case(0, ties=False)
    pairs = by_camera_pair(hits_of(case), case[2])
    record = to_record(pairs)
    for name in ("mAP", "rank1"):
        assert [[value is None for value in line] for line in record[name]] == np.isnan(getattr(pairs, name)).tolist()
        known = [value for line in record[name] for value in line if value is not None]
        assert known == pytest.approx(getattr(pairs, name)[pairs.num_queries > 0].tolist(), abs=1e-6)
    assert record["num_queries"] == pairs.num_queries.tolist()
    assert record["query_cameras"] == [1, 2, 3]

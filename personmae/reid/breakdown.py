"""Where a retrieval's score comes from: mAP and Rank-1 by pair of cameras, and by any groups of queries.

A pair is scored as the code of Market-1501 does (Zheng et al., ICCV 2015, ``compute_AP_multiCam``). The matches of a query that
other cameras saw are set aside, neither right nor wrong. All other people stay in the gallery, whatever camera saw them. So
nothing is ranked again: within its pair a match has its rank, less the matches of other cameras before it. The work is a sort
of the matches, and no array of queries times gallery is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from personmae.reid.ranking import Hits, Labels


@dataclass(frozen=True, slots=True)
class CameraPairs:
    """Scores in [0, 1] of queries of one camera against matches of another, both in ascending order.

    ``num_queries`` counts the queries of a pair that have a match in it, over which the scores are means. Where there is none
    they are NaN: so on the diagonal, since the protocol removes what the query's own camera saw.
    """

    query_cameras: Int[np.ndarray, " C"]
    gallery_cameras: Int[np.ndarray, " D"]
    mAP: Float[np.ndarray, "C D"]  # noqa: N815 - the field's name
    rank1: Float[np.ndarray, "C D"]
    num_queries: Int[np.ndarray, "C D"]


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores in [0, 1], means over the ``num_valid`` of ``num_queries`` queries that have a match. NaN where none has."""

    mAP: float  # noqa: N815 - the field's name
    rank1: float
    num_queries: int
    num_valid: int


def by_camera_pair(hits: Hits, labels: Labels) -> CameraPairs:
    """Scores by the camera of the query and that of its matches. An unknown camera (-1) is one like any other."""
    query_cameras, row = np.unique(labels.query_camids, return_inverse=True)
    gallery_cameras, column = np.unique(labels.gallery_camids, return_inverse=True)
    shape = len(query_cameras), len(gallery_cameras)
    pair = hits.query * shape[1] + column[hits.gallery]  # of a query and a camera
    order = np.lexsort((hits.rank, pair))
    others_before = _nth(hits.query)[order] - _nth(pair[order])
    pairs, average_precision, first = _by_key(pair[order], hits.rank[order] - others_before)
    cell = row[pairs // shape[1]] * shape[1] + pairs % shape[1]
    size = shape[0] * shape[1]
    scores, rank1 = (_mean_by(cell, values, size).reshape(shape) for values in (average_precision, first == 1))
    return CameraPairs(query_cameras, gallery_cameras, scores, rank1, np.bincount(cell, minlength=size).reshape(shape))


def by_group(hits: Hits, groups: Sequence[str]) -> dict[str, GroupScores]:
    """Scores by the label of each query, in the order in which labels are first seen. Each query has one."""
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    group = np.array([names[name] for name in groups], dtype=np.int64)
    queries, average_precision, first = _by_key(hits.query, hits.rank)
    of_valid = group[queries]
    means = (_mean_by(of_valid, values, len(names)).tolist() for values in (average_precision, first == 1))
    counts = (np.bincount(of_all, minlength=len(names)).tolist() for of_all in (group, of_valid))
    return {name: GroupScores(*scores) for name, *scores in zip(names, *means, *counts, strict=True)}


def to_record(pairs: CameraPairs) -> dict[str, Any]:
    """The pairs for JSON: lists by query camera, scores with six digits, None where no query has a match."""

    def rounded(scores: Float[np.ndarray, "C D"]) -> list[list[float | None]]:
        return [[None if np.isnan(score) else round(score, 6) for score in line] for line in scores.tolist()]

    return {
        "query_cameras": pairs.query_cameras.tolist(),
        "gallery_cameras": pairs.gallery_cameras.tolist(),
        "mAP": rounded(pairs.mAP),
        "rank1": rounded(pairs.rank1),
        "num_queries": pairs.num_queries.tolist(),
    }


def _by_key(
    keys: Int[np.ndarray, " P"], ranks: Int[np.ndarray, " P"]
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"], Int[np.ndarray, " K"]]:
    """Each key once, the mean of the precision at its hits, and its first rank. Hits come by key, then rank."""
    distinct, starts, num_hits = np.unique(keys, return_index=True, return_counts=True)
    return distinct, np.add.reduceat(_nth(keys) / ranks, starts) / num_hits, ranks[starts]


def _nth(keys: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """The place of each among those of its key, from 1. Equal keys stand together, in ascending order."""
    _, starts, counts = np.unique(keys, return_index=True, return_counts=True)
    return np.arange(1, len(keys) + 1) - starts.repeat(counts)


def _mean_by(cell: Int[np.ndarray, " K"], values: np.ndarray, size: int) -> Float[np.ndarray, " size"]:
    """The mean of the values in each of ``size`` cells, NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(cell, weights=values, minlength=size) / np.bincount(cell, minlength=size)

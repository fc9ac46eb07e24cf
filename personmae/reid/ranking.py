"""Retrieval scores: mAP, CMC and mINP under the single-query protocol of Market-1501, streamed by blocks of queries.

Gallery images of the query's own pid and camera are removed. Queries without a match are left out of every mean.
Distance is 1 - cosine. Equal distances keep the order of the gallery (stable sort). AP is the mean of the precision at
each hit, without interpolation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.errors import UserError


@dataclass(frozen=True, slots=True)
class RankingResult:
    """Scores in [0, 1]. ``cmc[k - 1]`` is rank-k; ``mINP`` is the mean of hits / last rank (arXiv 2001.04193)."""

    mAP: float  # noqa: N815 - the field's name
    cmc: tuple[float, ...]
    mINP: float  # noqa: N815
    num_queries: int
    num_valid: int

    def rank(self, k: int) -> float:
        """Share of valid queries with a match among the first ``k``."""
        return self.cmc[k - 1]


@dataclass(frozen=True, slots=True)
class Ranked:
    """The gallery in ranked order for one block of queries; removed images come last."""

    order: Int[Tensor, "b G"]
    hits: Bool[Tensor, "b G"]
    removed: Bool[Tensor, "b G"]


def evaluate(
    query_features: Float[Tensor, "Q F"],
    gallery_features: Float[Tensor, "G F"],
    *,
    query_pids: Int[np.ndarray, " Q"],
    query_camids: Int[np.ndarray, " Q"],
    gallery_pids: Int[np.ndarray, " G"],
    gallery_camids: Int[np.ndarray, " G"],
    block_size: int = 128,
    max_rank: int = 50,
) -> RankingResult:
    """Score a retrieval on the device of the features; memory is about 120 bytes * ``block_size`` * G.

    Raises:
        UserError: a feature is not finite, or no query has a match from another camera.
    """
    scores = []
    for ranked in _ranked_blocks(
        query_features, gallery_features, (query_pids, query_camids), (gallery_pids, gallery_camids), block_size
    ):
        scores.append(_score(ranked.hits).cpu())  # one transfer per block
    ap, inp, first = torch.cat(scores).unbind(1)
    valid = first > 0
    if not valid.any():
        raise UserError(_why_no_match(query_pids, gallery_pids))
    ranks = torch.arange(1, max_rank + 1)
    cmc = (first[valid][:, None] <= ranks).double().mean(dim=0)
    return RankingResult(
        mAP=ap[valid].mean().item(),
        cmc=tuple(cmc.tolist()),
        mINP=inp[valid].mean().item(),
        num_queries=len(valid),
        num_valid=int(valid.sum()),
    )


def rank_lists(
    query_features: Float[Tensor, "Q F"],
    gallery_features: Float[Tensor, "G F"],
    *,
    query_pids: Int[np.ndarray, " Q"],
    query_camids: Int[np.ndarray, " Q"],
    gallery_pids: Int[np.ndarray, " G"],
    gallery_camids: Int[np.ndarray, " G"],
    top_k: int,
    block_size: int = 128,
) -> Int[Tensor, "Q top_k"]:
    """Gallery indices of the ``top_k`` nearest images of each query, the query's own pid and camera removed.

    Places without an image left hold -1.

    Raises:
        UserError: a feature is not finite.
    """
    lists = []
    for ranked in _ranked_blocks(
        query_features, gallery_features, (query_pids, query_camids), (gallery_pids, gallery_camids), block_size
    ):
        best = ranked.order.masked_fill(ranked.removed, -1)[:, :top_k].cpu()
        lists.append(F.pad(best, (0, top_k - best.shape[1]), value=-1))
    return torch.cat(lists)


def _ranked_blocks(
    query_features: Float[Tensor, "Q F"],
    gallery_features: Float[Tensor, "G F"],
    query_labels: tuple[np.ndarray, np.ndarray],
    gallery_labels: tuple[np.ndarray, np.ndarray],
    block_size: int,
) -> Iterator[Ranked]:
    query, gallery = _unit_length(query_features, "query"), _unit_length(gallery_features, "gallery")
    query_pids, query_camids = (torch.tensor(ids, device=query.device) for ids in query_labels)
    gallery_pids, gallery_camids = (torch.tensor(ids, device=query.device) for ids in gallery_labels)
    for start in range(0, len(query), block_size):
        block = slice(start, start + block_size)
        same_pid = query_pids[block, None] == gallery_pids
        removed = same_pid & (query_camids[block, None] == gallery_camids)
        distances = (1 - query[block] @ gallery.T).masked_fill_(removed, torch.inf)
        order = distances.sort(dim=1, stable=True).indices
        yield Ranked(order, (same_pid & ~removed).gather(1, order), removed.gather(1, order))


def _score(hits: Bool[Tensor, "b G"]) -> Float[Tensor, "b 3"]:
    """AP, INP and the rank of the first hit of each query; all zero where there is no hit."""
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    found = hits.cumsum(dim=1)
    num_hits = found[:, -1].double()
    ap = (hits * (found.double() / ranks)).sum(dim=1) / num_hits.clamp(min=1)
    last = (hits * ranks).amax(dim=1)
    inp = num_hits / last.clamp(min=1)
    first = ((found == 0).sum(dim=1) + 1) * (last > 0)
    return torch.stack([ap, inp, first.double()], dim=1)


def _unit_length(features: Float[Tensor, "N F"], name: str) -> Float[Tensor, "N F"]:
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} of {len(features)} {name} features are not finite (first: {int(bad.nonzero()[0])}); "
            "the model has diverged, evaluate an earlier checkpoint"
        )
    return F.normalize(features.float(), dim=1)


def _why_no_match(query_pids: Int[np.ndarray, " Q"], gallery_pids: Int[np.ndarray, " G"]) -> str:
    if not np.isin(query_pids, gallery_pids).any():
        return "no query can be scored: query and gallery have no pid in common; check that they belong together"
    return (
        "no query can be scored: every gallery image with a query's pid comes from the query's own camera, "
        "and those are removed by the protocol; check the camera numbers"
    )

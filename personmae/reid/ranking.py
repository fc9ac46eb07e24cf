"""Retrieval scores: mAP, CMC and mINP under the single-query protocol of Market-1501, computed by blocks of queries.

For each query the gallery images of its own pid and camera, its own image and junk (pid -1) are removed. Camera -1 means
unknown: such a query removes no other image. Queries without a match are left out of every mean.

Images are ranked by falling similarity, and equal ones keep the order of the gallery. The compared numbers are fp32 from
one matrix product. The place of a match is one more than the number of images before it. So nothing is sorted but the bare
values of a row, and no array of all queries times the gallery is ever held.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.errors import UserError
from personmae.reid.datasets import JUNK_PID
from personmae.reid.samples import UNKNOWN_CAMID

BLOCK_SIZE = 256
Similarity = Callable[[Int[np.ndarray, " b"]], Float[Tensor, "b G"]]  # queries by number to a new tensor, finite, fp32


@dataclass(frozen=True, slots=True)
class Labels:
    """Who is seen by which camera. ``own_index`` is the query's own image in the gallery, -1 where it is not there."""

    query_pids: Int[np.ndarray, " Q"]
    query_camids: Int[np.ndarray, " Q"]
    gallery_pids: Int[np.ndarray, " G"]
    gallery_camids: Int[np.ndarray, " G"]
    own_index: Int[np.ndarray, " Q"] | None = None


@dataclass(frozen=True, slots=True)
class RankingResult:
    """Scores in [0, 1], means over the queries with a match. ``cmc[k - 1]`` is rank-k.

    AP is the mean of the precision at each hit. ``mAP_trapezoid`` is for cross-checks with the Matlab code of Market-1501:
    it takes the mean of the precision at each hit and just before it. That code also divides CMC by all queries, which is
    ``cmc`` times ``num_valid / num_queries``. ``mINP`` is the mean of hits / last rank (arXiv 2001.04193). ``ap`` has the AP
    of each query in their order, None where it has no match.
    """

    mAP: float  # noqa: N815 - the field's name
    cmc: tuple[float, ...]
    mINP: float  # noqa: N815
    mAP_trapezoid: float  # noqa: N815
    num_queries: int
    num_valid: int
    ap: tuple[float | None, ...]

    def rank(self, k: int) -> float:
        """Share of valid queries with a match among the first ``k``."""
        return self.cmc[k - 1]


@dataclass(frozen=True, slots=True)
class Hits:
    """Every match that is not removed, by query and then rank: both images by number, and the match's rank from 1."""

    query: Int[np.ndarray, " P"]
    rank: Int[np.ndarray, " P"]
    gallery: Int[np.ndarray, " P"]


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries: what is removed has similarity -inf. ``candidates`` are gallery images that may be matches."""

    queries: Int[np.ndarray, " b"]
    similarity: Float[Tensor, "b G"]
    candidates: Int[Tensor, "b M"]
    matches: Bool[Tensor, "b M"]


def cosine(query_features: Float[Tensor, "Q F"], gallery_features: Float[Tensor, "G F"]) -> Similarity:
    """Cosine similarity on the device of the features, which are not copied when they are fp32.

    Raises:
        UserError: a feature is not finite.
    """
    query, gallery = query_features.detach().float(), gallery_features.detach().float()
    query_scale, gallery_scale = _inverse_lengths(query, "query"), _inverse_lengths(gallery, "gallery")

    def block(queries: Int[np.ndarray, " b"]) -> Float[Tensor, "b G"]:
        rows = torch.from_numpy(queries).to(query.device)
        return ((query[rows] * query_scale[rows, None]) @ gallery.T).mul_(gallery_scale)

    return block


def evaluate(similarity: Similarity, labels: Labels, *, block_size: int = BLOCK_SIZE, max_rank: int = 50) -> RankingResult:
    """Score a retrieval: ``score`` of ``find_hits``, which say what it costs and what is refused."""
    return score(find_hits(similarity, labels, block_size=block_size), len(labels.query_pids), max_rank=max_rank)


def find_hits(similarity: Similarity, labels: Labels, *, block_size: int = BLOCK_SIZE) -> Hits:
    """The rank of every match. Memory besides the features is about 12 bytes * ``block_size`` * G, on a GPU 40.

    Raises:
        UserError: no query has a match that is not removed.
    """
    queries = np.arange(len(labels.query_pids))
    found = [_hit_ranks(block) for block in _blocks(similarity, labels, queries, block_size)]
    hits = np.concatenate([np.empty((3, 0), np.int64), *found], axis=1)
    if not hits.shape[1]:
        raise UserError(_why_no_match(labels))
    return Hits(*hits[:, np.lexsort((hits[1], hits[0]))])


def score(hits: Hits, num_queries: int, *, max_rank: int = 50) -> RankingResult:
    """The scores of a retrieval of so many queries out of its matches, of which there is one at least."""
    query, ranks = hits.query, hits.rank
    starts, num_hits = np.unique(query, return_index=True, return_counts=True)[1:]  # of the valid queries alone
    nth = np.arange(1, len(query) + 1) - starts.repeat(num_hits)  # 1 at a query's first hit
    precision = nth / ranks
    just_before = np.where(ranks > 1, (nth - 1) / np.maximum(ranks - 1, 1), 1.0)
    average_precision = np.add.reduceat(precision, starts) / num_hits
    by_query = dict(zip(query[starts].tolist(), average_precision.tolist(), strict=True))
    return RankingResult(
        mAP=float(average_precision.mean()),
        cmc=tuple((ranks[starts, None] <= np.arange(1, max_rank + 1)).mean(axis=0).tolist()),
        mINP=float((num_hits / ranks[starts + num_hits - 1]).mean()),
        mAP_trapezoid=float((np.add.reduceat((precision + just_before) / 2, starts) / num_hits).mean()),
        num_queries=num_queries,
        num_valid=len(starts),
        ap=tuple(by_query.get(i) for i in range(num_queries)),
    )


def rank_lists(
    similarity: Similarity, labels: Labels, *, queries: Int[np.ndarray, " q"], top_k: int, block_size: int = BLOCK_SIZE
) -> Int[Tensor, "q top_k"]:
    """Gallery indices of the ``top_k`` most similar images of some queries. Places without an image left hold -1."""
    lists = []
    for block in _blocks(similarity, labels, queries, block_size):
        best = block.similarity.sort(dim=1, descending=True, stable=True)
        indices = best.indices[:, :top_k].masked_fill(best.values[:, :top_k] == -torch.inf, -1).cpu()
        lists.append(F.pad(indices, (0, top_k - indices.shape[1]), value=-1))
    return torch.cat(lists)


def closest_wrong(
    similarity: Similarity, labels: Labels, *, block_size: int = BLOCK_SIZE
) -> tuple[Float[Tensor, " Q"], Int[Tensor, " Q"]]:
    """The similarity of the closest gallery image of another person to each query, and its index. -inf and -1 without one."""
    values, indices = [], []
    for block in _blocks(similarity, labels, np.arange(len(labels.query_pids)), block_size):
        rows, slots = block.matches.nonzero().unbind(1)
        block.similarity[rows, block.candidates[rows, slots]] = -torch.inf
        best = block.similarity.max(dim=1)
        values.append(best.values.cpu())
        indices.append(best.indices.masked_fill(best.values == -torch.inf, -1).cpu())
    return torch.cat(values), torch.cat(indices)


def _blocks(similarity: Similarity, labels: Labels, queries: Int[np.ndarray, " q"], block_size: int) -> Iterator[_Block]:
    junk = torch.from_numpy(np.flatnonzero(labels.gallery_pids == JUNK_PID))
    by_pid = np.argsort(labels.gallery_pids, kind="stable")
    for start in range(0, len(queries), block_size):
        block = queries[start : start + block_size]
        values = similarity(block)
        candidates, exists = _same_pid(labels, by_pid, block)
        same_camera = labels.gallery_camids[candidates] == labels.query_camids[block, None]
        removed = same_camera & (labels.query_camids[block, None] != UNKNOWN_CAMID)
        matches = exists & ~removed & (labels.query_pids[block, None] != JUNK_PID)
        rows, slots = np.nonzero(exists & removed)
        _remove(values, rows, candidates[rows, slots])
        if labels.own_index is not None:
            own = labels.own_index[block]
            matches &= candidates != own[:, None]
            _remove(values, *(ids[own >= 0] for ids in (np.arange(len(block)), own)))
        values[:, junk.to(values.device)] = -torch.inf
        yield _Block(block, values, *(torch.from_numpy(array).to(values.device) for array in (candidates, matches)))


def _remove(values: Float[Tensor, "b G"], rows: Int[np.ndarray, " P"], columns: Int[np.ndarray, " P"]) -> None:
    values[tuple(torch.from_numpy(ids).to(values.device) for ids in (rows, columns))] = -torch.inf


def _same_pid(
    labels: Labels, by_pid: Int[np.ndarray, " G"], queries: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, "b M"], Bool[np.ndarray, "b M"]]:
    """Gallery images with the pid of each query, and which of the places hold one. M is the largest number of them."""
    pids, in_order = labels.query_pids[queries], labels.gallery_pids[by_pid]
    first, end = (np.searchsorted(in_order, pids, side=side) for side in ("left", "right"))
    places = first[:, None] + np.arange((end - first).max())
    return by_pid[np.minimum(places, len(by_pid) - 1)], places < end[:, None]


def _hit_ranks(block: _Block) -> Int[np.ndarray, "3 P"]:
    """Query, rank from 1, and gallery image of every match."""
    similarity, candidates = block.similarity, block.candidates
    values = similarity.gather(1, candidates)
    ascending = _ascending(similarity)
    below, up_to = (torch.searchsorted(ascending, values, right=right) for right in (False, True))
    ranks = similarity.shape[1] - up_to + 1
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    tied = (block.matches & (up_to - below > 1)).nonzero()
    for rows, slots in (part.unbind(1) for part in tied.split(len(similarity))):
        equal = similarity[rows] == values[rows, slots, None]
        ranks[rows, slots] += (equal & (columns < candidates[rows, slots, None])).sum(dim=1)
    matches = block.matches.cpu().numpy()
    found = (array.cpu().numpy()[matches] for array in (ranks, candidates))
    return np.stack([block.queries[np.nonzero(matches)[0]], *found])


def _ascending(similarity: Float[Tensor, "b G"]) -> Float[Tensor, "b G"]:
    """The values of each row in order. Torch cannot sort without indices, which takes a CPU 30 times as long."""
    if similarity.is_cuda:
        return similarity.sort(dim=1).values
    return torch.from_numpy(np.sort(similarity.numpy(), axis=1))


def _inverse_lengths(features: Float[Tensor, "N F"], name: str) -> Float[Tensor, " N"]:
    lengths = torch.linalg.vector_norm(features, dim=1)
    bad = ~lengths.isfinite()
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} of {len(features)} {name} features are not finite (first: {int(bad.nonzero()[0])}). "
            "The model has diverged, evaluate an earlier checkpoint"
        )
    return 1 / lengths.clamp(min=1e-12)


def _why_no_match(labels: Labels) -> str:
    if not np.isin(labels.query_pids, np.setdiff1d(labels.gallery_pids, JUNK_PID)).any():
        return "no query can be scored: query and gallery have no pid in common. Check that they belong together"
    return (
        "no query can be scored: every gallery image with a query's pid comes from the query's own camera or is the query's "
        "own image, and those are removed by the protocol. Check the camera numbers"
    )

"""Pseudo-labels of unlabelled images: k-reciprocal Jaccard distances (arXiv 1701.08398) and DBSCAN, without an N x N matrix.

An image is encoded as weights over the images near it, a sparse row that sums to one. Two images without a common neighbour
have distance 1 and are never compared. So time and memory follow the number of neighbours.

The result does not depend on the order of sums. A GPU or fp32 only chooses candidates. The similarity of two images is
their dot product in fp64, rounded to fp32. Weights are fp32 and above 2^-29, so fp64 adds them exactly and in any order.
Every order of adding compares the same number with ``eps``.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from personmae.errors import UserError
from personmae.reid.cluster_quality import of_one_camera

_BLOCK = 1 << 22  # similarities held at once
_ROWS = 256  # images compared with all at once at least; fewer slow the product down
_GATHERED = 1 << 19  # numbers of features copied at once
_NUM_SPARE = 16  # candidates beyond k, against ties and rounding at the k-th
_SET_ROWS = 4096  # sets expanded at once
_PAIRS = 1 << 20  # weights compared at once
_SUMS = 1 << 16  # sums kept at once; they should fit the processor's cache


def pseudo_labels(
    features: Float[Tensor, "N F"], *, k1: int = 30, k2: int = 6, eps: float = 0.6, min_samples: int = 4
) -> Int[np.ndarray, " N"]:
    """Cluster of each image, -1 for an outlier. Clusters are numbered in the order of their first member.

    DBSCAN over Jaccard distances of at most ``eps``. An image counts among its own ``min_samples``. No cluster is empty,
    but there may be none or a single one: that is for the caller to judge. Features are on any device, of any length.

    Raises:
        UserError: a feature is not finite.
    """
    from sklearn.cluster import DBSCAN

    near = radius_graph(k_reciprocal_encoding(features, k1, k2), eps)
    # The graph holds ones alone, so that no distance is rounded and compared a second time.
    found = DBSCAN(eps=1.0, min_samples=min_samples, metric="precomputed").fit_predict(near)
    return _numbered_by_first_member(found)


def without_one_camera(labels: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The labels with clusters of one camera turned into outliers. The others are renumbered.

    A cluster with an image of an unknown camera (-1) is kept.
    """
    dropped = of_one_camera(labels, camids)[labels] & (labels >= 0) if (labels >= 0).any() else np.zeros(len(labels), bool)
    return _numbered_by_first_member(np.where(dropped, -1, labels))


def neighbours(features: Float[Tensor, "N F"], k: int) -> Int[np.ndarray, "N k"]:
    """The image itself and its nearest others: nearer first, then the lower index. All images where there are fewer than k.

    Exact: a matrix product in fp32 finds more candidates than its rounding can confuse, and fp64 orders them. At a time 16 MB
    of similarities are held, or 1 kB per image. More, and slower, only where very many images are equally near.

    Raises:
        UserError: a feature is not finite.
    """
    features = _unit_length(features)
    on_cpu = features.cpu().numpy()
    nearest = np.empty((len(features), min(k, len(features))), np.int32)
    step = max(_ROWS, _BLOCK // len(features))
    for start in range(0, len(features), step):
        rows = slice(start, min(start + step, len(features)))
        candidates = _candidates(features, rows, nearest.shape[1])
        cosines = similarities(on_cpu, rows, candidates)
        cosines[candidates == np.arange(rows.start, rows.stop)[:, None]] = np.inf  # an image comes first among its equals
        order = np.argsort(-cosines, axis=1, kind="stable")[:, : nearest.shape[1]]
        nearest[rows] = np.take_along_axis(candidates, order, axis=1)
    return nearest


def similarities(features: Float[np.ndarray, "N F"], rows: slice, others: Int[np.ndarray, "b m"]) -> Float[np.ndarray, "b m"]:
    """Dot products of each row's image with its others, summed in fp64 and rounded to fp32."""
    mine, found = features[rows], np.empty(others.shape, np.float32)
    step = max(1, _GATHERED // (others.shape[1] * features.shape[1]))
    for start in range(0, len(mine), step):
        some = slice(start, start + step)
        found[some] = np.einsum("bmf,bf->bm", features[others[some]], mine[some], dtype=np.float64)
    return found


def k_reciprocal_encoding(
    features: Float[Tensor, "N F"],
    k1: int,
    k2: int,
    *,
    half_k1: int | None = None,
    spread: Float[Tensor, " N"] | None = None,
) -> sparse.csr_array:
    """Weights (N, N) of the images near each image, fp32. A row sums to one.

    ``k1``, ``k2`` and ``half_k1`` count the image itself. The set of an image is R(k1), those of its k1 nearest that have it
    among their own, and R(half_k1) of each member that shares more than two thirds of it. ``half_k1`` is round(k1 / 2) + 1 by
    default, as in the code of cluster-contrast. Weights are exp(-d), d = 2 - 2 cos or that divided by the image's ``spread``.
    Last, each row becomes the mean over its k2 nearest.

    Raises:
        UserError: a feature is not finite.
    """
    features = _unit_length(features)
    nearest = neighbours(features, k1)
    members = _expanded_sets(nearest, round(k1 / 2) + 1 if half_k1 is None else half_k1)
    encoding = _weighted(members, features.cpu().numpy(), None if spread is None else spread.cpu().numpy())
    if k2 > 1:
        encoding = _mean_of_nearest(encoding, nearest[:, :k2])
    return encoding


def minimum_sums(
    encoding: sparse.csr_array, num_rows: int | None = None
) -> Iterator[tuple[slice, Float[np.ndarray, "rows N"]]]:
    """Sum of minima of each of the first ``num_rows`` rows with every row, block by block. 1 - s / (2 - s) is the distance.

    Sums are exact. A block is a few rows.
    """
    columns = encoding.T.tocsr()  # by neighbour: who has it
    sizes = np.diff(columns.indptr).astype(np.int64)
    per_row = np.add.reduceat(sizes[encoding.indices], encoding.indptr[:-1])
    for rows in _blocks(per_row[:num_rows], max(1, _SUMS // len(sizes))):
        yield rows, _sums_of_rows(encoding, columns, rows)


def radius_graph(encoding: sparse.csr_array, eps: float) -> sparse.csr_array:
    """Ones (N, N) where the Jaccard distance is at most ``eps``. Memory is 12 bytes per such pair."""
    indices, counts = [], []
    for _, sums in minimum_sums(encoding):
        near = 1 - sums / (2 - sums) <= eps
        indices.append(np.nonzero(near)[1].astype(np.int32))
        counts.append(near.sum(axis=1))
    return _csr(np.concatenate(indices), np.concatenate(counts), np.float64)


def _candidates(features: Float[Tensor, "N F"], rows: slice, k: int) -> Int[np.ndarray, "b m"]:
    """All images that could be among the k nearest of the rows, each row's own included. Ascending, m >= k."""
    with torch.autocast(features.device.type, enabled=False):
        rough = features[rows] @ features.T
    best = rough.topk(min(k + _NUM_SPARE, len(features)))
    least = best.values[:, k - 1] - 2 * _rounding(features)  # what is among the k has at least this
    if best.values.shape[1] < len(features) and (best.values[:, -1] >= least).any():
        best = rough.topk(int((rough >= least[:, None]).sum(dim=1).max()))
    return best.indices.sort(dim=1).values.cpu().numpy()


def _rounding(features: Float[Tensor, "N F"]) -> float:
    """Largest error of a dot product of two features of length one, as the matrix product computes it."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return (features.shape[1] + 4) * 2.0**-24 if exact else 2.0**-7  # else inputs may be cut to bf16


def _expanded_sets(nearest: Int[np.ndarray, "N k1"], half_k1: int) -> sparse.csr_array:
    """Ones (N, N) at the members of each image's expanded reciprocal set."""
    whole, half = _reciprocal(nearest), _reciprocal(nearest[:, :half_k1])
    half_sizes, half_columns = np.diff(half.indptr), half.T.tocsr()
    blocks = []
    for start in range(0, len(nearest), _SET_ROWS):
        rows = whole[start : start + _SET_ROWS]
        shared = rows.multiply(rows @ half_columns).tocsr()  # at (i, c): how many of c's half set are in i's set
        shared.data = (3 * shared.data > 2 * half_sizes[shared.indices]).astype(np.int32)
        blocks.append(rows + shared @ half)
    members = sparse.csr_array(sparse.vstack(blocks, format="csr"))
    members.eliminate_zeros()
    members.sort_indices()
    return members


def _reciprocal(nearest: Int[np.ndarray, "N k"]) -> sparse.csr_array:
    """Ones (N, N) where two images are each among the other's nearest."""
    forward = _csr(nearest.ravel(), np.full(len(nearest), nearest.shape[1]), np.int32)
    return forward.multiply(forward.T.tocsr()).tocsr()


def _weighted(
    members: sparse.csr_array, features: Float[np.ndarray, "N F"], spread: Float[np.ndarray, " N"] | None
) -> sparse.csr_array:
    """exp(-distance) at the members, normalised."""
    sizes = np.diff(members.indptr)
    distances = np.empty(members.nnz)
    for rows in _blocks(sizes, 256):
        filled = np.arange(sizes[rows].max()) < sizes[rows][:, None]  # rows are as long as the longest of the block
        others = np.zeros(filled.shape, np.int32)
        span = slice(members.indptr[rows.start], members.indptr[rows.stop])
        others[filled] = members.indices[span]
        distances[span] = 2 - 2 * similarities(features, rows, others)[filled].astype(np.float64)
    if spread is not None:
        distances /= np.repeat(spread, sizes)
    weights = np.exp(-distances)
    weights /= np.repeat(np.add.reduceat(weights, members.indptr[:-1]), sizes)
    return sparse.csr_array((weights.astype(np.float32), members.indices, members.indptr), shape=members.shape)


def _mean_of_nearest(encoding: sparse.csr_array, nearest: Int[np.ndarray, "N k2"]) -> sparse.csr_array:
    """Local query expansion: the mean of the rows of each image's nearest, itself among them."""
    k2 = nearest.shape[1]
    choose = _csr(nearest.ravel(), np.full(len(nearest), k2), np.float64)
    mean = sparse.csr_array(choose @ encoding.astype(np.float64))
    mean.sort_indices()
    return sparse.csr_array(((mean.data / k2).astype(np.float32), mean.indices, mean.indptr), shape=mean.shape)


def _sums_of_rows(encoding: sparse.csr_array, columns: sparse.csr_array, rows: slice) -> Float[np.ndarray, "rows N"]:
    """Minima of every weight of the rows with all weights of its column, added up by (row, other row)."""
    num_rows, num_images = rows.stop - rows.start, columns.indptr.size - 1
    span = slice(encoding.indptr[rows.start], encoding.indptr[rows.stop])
    having = columns[encoding.indices[span]]  # for each weight of the rows, who has a weight there
    lengths = np.diff(having.indptr)
    minima = np.minimum(having.data, np.repeat(encoding.data[span], lengths))
    row_of = np.repeat(np.arange(num_rows), np.diff(encoding.indptr[rows.start : rows.stop + 1]))
    pairs = np.repeat(row_of * num_images, lengths) + having.indices
    return np.bincount(pairs, weights=minima, minlength=num_rows * num_images).reshape(num_rows, num_images)


def _blocks(costs: Int[np.ndarray, " N"], most_rows: int) -> Iterator[slice]:
    """Consecutive rows, at most ``most_rows`` and of a total cost of at most ``_PAIRS``. At least one row."""
    start, ends = 0, np.cumsum(costs)
    while start < len(costs):
        spent = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, spent + _PAIRS, side="right"))
        stop = min(max(stop, start + 1), start + most_rows, len(costs))
        yield slice(start, stop)
        start = stop


def _csr(indices: Int[np.ndarray, " n"], counts: Int[np.ndarray, " N"], dtype: type) -> sparse.csr_array:
    """Ones (N, N) at the given columns, ``counts`` of them in each row."""
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return sparse.csr_array((np.ones(len(indices), dtype), indices, indptr), shape=(len(counts), len(counts)))


def _numbered_by_first_member(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    members = labels[labels >= 0]
    _, first, places = np.unique(members, return_index=True, return_inverse=True)
    numbered = np.full(len(labels), -1, np.int64)
    numbered[labels >= 0] = np.argsort(np.argsort(first))[places]
    return numbered


def _unit_length(features: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} of {len(features)} features are not finite (first: image {int(bad.nonzero()[0])}). "
            "The model has diverged, start again from an earlier checkpoint or with a lower learning rate"
        )
    return F.normalize(features.detach().float(), dim=1)

"""The nearest rows of a gallery, exactly: a blocked matrix product that keeps the best of each block.

Shapes: Q queries, n rows of a block, k rows that are found. Order: falling similarity, and equal ones in the gallery's order.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.gallery.catalog import Gallery

_SIMILARITIES: Final = 1 << 24  # held at once
_QUERIES: Final = 1024  # compared at once
_LARGEST_BLOCK: Final = 1 << 16
Block = tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n D"]]
Hidden = Callable[[slice, Int[np.ndarray, " n"]], Bool[Tensor, "Q n"] | None]  # (queries, rows) to what is not to be found


class Found(NamedTuple):
    """Cosines and row numbers. Places without a row hold -inf and -1."""

    scores: Float[Tensor, "Q k"]
    rows: Int[Tensor, "Q k"]


def search(
    gallery: Gallery,
    queries: Float[Tensor, "Q D"],
    k: int,
    *,
    allowed: Bool[np.ndarray, " N"] | None = None,
    hidden: Hidden = lambda queries, rows: None,
) -> Found:
    """The ``k`` rows nearest to each query of length one. Memory does not depend on the gallery's size.

    ``allowed`` holds for all queries and ``hidden`` for each alone.
    """
    found = []
    for start in range(0, len(queries), _QUERIES):
        some = slice(start, min(start + _QUERIES, len(queries)))
        blocks = gallery.blocks(block_rows(some.stop - start), allowed)
        found.append(top_k(queries[some], blocks, k, lambda rows, some=some: hidden(some, rows)))
    return Found(torch.cat([part.scores for part in found]), torch.cat([part.rows for part in found]))


def block_rows(num_queries: int) -> int:
    """How many rows are compared at once with so many queries."""
    return min(_LARGEST_BLOCK, max(1, _SIMILARITIES // max(1, num_queries)))


def top_k(
    queries: Float[Tensor, "Q D"],
    blocks: Iterable[Block],
    k: int,
    hidden: Callable[[Int[np.ndarray, " n"]], Bool[Tensor, "Q n"] | None] = lambda rows: None,
) -> Found:
    """The ``k`` best of all blocks, whose rows are in rising order."""
    best = Found(torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64))
    for rows, features in blocks:
        scores = queries @ torch.from_numpy(features).float().T
        if (mask := hidden(rows)) is not None:
            scores.masked_fill_(mask, -torch.inf)
        values, places = _largest(scores, k)
        both = torch.cat([best.scores, values], dim=1), torch.cat([best.rows, torch.from_numpy(rows)[places]], dim=1)
        order = both[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
        best = Found(both[0].gather(1, order), both[1].gather(1, order))
    return Found(best.scores, best.rows.masked_fill(best.scores == -torch.inf, -1))


def _largest(scores: Float[Tensor, "Q n"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """As the head of a stable sort, which would take a CPU ten times as long."""
    if k >= scores.shape[1]:
        return _head_of_sorted(scores, k)
    values, places = scores.topk(k + 1, dim=1)
    # Which of several equal rows topk takes is not known, unless the last that it takes is better than the next one.
    tied = (values[:, -1] == values[:, -2]) & (values[:, -1] > -torch.inf)
    places, order = places[:, :k].sort(dim=1)
    values, order = values[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order)
    if tied.any():
        values[tied], places[tied] = _head_of_sorted(scores[tied], k)
    return values, places


def _head_of_sorted(scores: Float[Tensor, "Q n"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    values, places = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], places[:, :k]

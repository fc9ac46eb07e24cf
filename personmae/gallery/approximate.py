"""The nearest rows of a large gallery by FAISS, with what that misses measured beside the exact search.

The index holds 8 bits a number and compares a query with a part of the gallery. The best are compared again by their own
features. So scores are those of the exact search, and only rows can be missing.
"""

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from personmae.errors import UserError
from personmae.gallery import exact
from personmae.gallery.catalog import Gallery
from personmae.gallery.exact import Found
from personmae.gallery.segment import sync

TARGET: Final = 0.95  # of recall@10, for which more of the gallery is looked at
K, SAMPLE = 10, 256  # recall@10, over so many rows
_POINTS, _ROUNDS = 64, 10  # of k-means, for each centre
_ADD_ROWS: Final = 1 << 15
_SPARE: Final = 4  # candidates for each row that is wanted
_RESCORED: Final = 16  # queries
_SEED: Final = 0


def load() -> ModuleType:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise UserError(
            "faiss is required for an approximate index and is not installed: pip install 'personmae[gallery]', or use "
            "--index exact"
        ) from None


def is_there() -> bool:
    """Whether FAISS is installed."""
    try:
        load()
    except UserError:
        return False
    return True


def build(gallery: Gallery) -> Any:
    """An index of all rows by their keys: lists around about sqrt(N) centres, 8 bits a number.

    Raises:
        UserError: FAISS is not installed, or the gallery is empty.
    """
    faiss = load()
    if not len(gallery):
        raise UserError("an index needs at least one image. The gallery is empty: use --index exact")
    num_lists = 2 ** round(math.log2(math.sqrt(len(gallery))))
    index = faiss.index_factory(gallery.manifest.dim, kind(num_lists), faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.spherical, index.cp.min_points_per_centroid = _ROUNDS, _SEED, True, 1
    num_points = min(len(gallery), num_lists * _POINTS)
    index.train(gallery.features(np.linspace(0, len(gallery) - 1, num_points).astype(np.int64)))
    add(index, gallery, 0)
    return index


def kind(num_lists: int) -> str:
    """The index in the words of FAISS."""
    return f"IVF{num_lists},SQ8"


def add(index: Any, gallery: Gallery, first_key: int) -> None:
    """Add the rows of a gallery from a key on."""
    keys = gallery.rows["key"].to_numpy()
    new = None if first_key == 0 else keys >= first_key
    for rows, features in gallery.blocks(_ADD_ROWS, new):
        index.add_with_ids(np.ascontiguousarray(features, np.float32), np.ascontiguousarray(keys[rows]))


def remove(index: Any, keys: np.ndarray) -> None:
    """Remove rows by their keys."""
    index.remove_ids(np.ascontiguousarray(keys, np.int64))


def write(index: Any, path: Path) -> None:
    """Write an index, and have it on the disk.

    Raises:
        OSError: it cannot be written.
    """
    try:
        load().write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    sync(path)


def read(path: Path, *, to_change: bool = False) -> Any:
    """Read an index: mapped into memory for a search, as a whole to change it.

    Raises:
        FileNotFoundError: it is not there any more.
        UserError: it is damaged, or FAISS is not installed.
    """
    faiss = load()
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        return (
            faiss.read_index(str(path))
            if to_change
            else faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        )
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): build the gallery again") from error


def search(index: Any, gallery: Gallery, queries: Float[Tensor, "Q D"], k: int, *, num_probes: int) -> Found:
    """As ``exact.search``, out of the ``num_probes`` lists nearest to each query."""
    faiss = load()
    wanted = min(len(gallery), _SPARE * k)
    _, keys = index.search(queries.numpy(), wanted, params=faiss.SearchParametersIVF(nprobe=num_probes))
    rows = np.searchsorted(gallery.rows["key"].to_numpy(), keys)
    exists = keys >= 0
    scores = _rescored(gallery, queries.numpy(), np.where(exists, rows, 0)).masked_fill(~torch.from_numpy(exists), -torch.inf)
    ordered = torch.from_numpy(np.where(exists, rows, len(gallery))).sort(dim=1)
    best = scores.gather(1, ordered.indices).sort(dim=1, descending=True, stable=True)
    found = ordered.values.gather(1, best.indices)[:, :k]
    return Found(best.values[:, :k], found.masked_fill(best.values[:, :k] == -torch.inf, -1))


def _rescored(gallery: Gallery, queries: Float[np.ndarray, "Q D"], rows: Int[np.ndarray, "Q c"]) -> Float[Tensor, "Q c"]:
    """Cosines of each query with its candidates, a few queries at a time: their copies stay in a cache."""
    scores = np.empty(rows.shape, np.float32)
    for start in range(0, len(queries), _RESCORED):
        some = slice(start, start + _RESCORED)
        scores[some] = (gallery.features(rows[some]) @ queries[some, :, None])[..., 0]
    return torch.from_numpy(scores)


def measure(index: Any, gallery: Gallery) -> dict[str, Any]:
    """How many lists to look at, by doubling, and the recall@10 of the exact search that this gives.

    The queries are rows of the gallery, and a query is not among what it should find.
    """
    rows = np.unique(np.linspace(0, len(gallery) - 1, SAMPLE).astype(np.int64))
    queries = torch.from_numpy(gallery.features(rows))
    wanted = _others(exact.search(gallery, queries, K + 1), rows)
    num_probes = 1
    while True:
        found = _others(search(index, gallery, queries, K + 1, num_probes=num_probes), rows)
        recall = recall_of(found, wanted)
        if recall >= TARGET or num_probes >= index.nlist:
            return {"num_probes": num_probes, "num_lists": index.nlist, "recall": recall, "sample": len(rows)}
        num_probes = min(2 * num_probes, index.nlist)


def recall_of(found: list[set[int]], wanted: list[set[int]]) -> float:
    """The share of what should be found that is."""
    return sum(len(a & b) for a, b in zip(found, wanted, strict=True)) / max(1, sum(map(len, wanted)))


def _others(found: Found, own: np.ndarray) -> list[set[int]]:
    """The first ten rows for each query without its own."""
    return [
        set([row for row in line if row not in (-1, query)][:K])
        for line, query in zip(found.rows.tolist(), own.tolist(), strict=True)
    ]

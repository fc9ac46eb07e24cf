"""The MDS format: the index of a data set, and shards mapped into memory.

mosaicml-streaming defines and writes the format and reads the same files. Its reader opens a file for every sample.
"""

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from personmae.errors import UserError

INDEX = "index.json"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One entry of the index."""

    name: str
    samples: int
    num_bytes: int
    hashes: dict[str, str]
    columns: tuple[str, ...]
    column_sizes: tuple[int | None, ...]  # in bytes; None where each sample stores its own


def parse_index(content: bytes, location: str) -> list[Shard]:
    """The shards of an ``index.json``.

    Raises:
        UserError: it is not the index of uncompressed MDS shards with a column ``jpeg``.
    """
    try:
        entries = json.loads(content)["shards"]
        foreign = next(filter(None, map(_foreign, entries)), None)
        shards = [] if foreign else [_shard(entry) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{location} must be an MDS index with a jpeg column. Reading it gave: {error}") from error
    if foreign:
        root = location.removesuffix(INDEX).rstrip("/")
        raise UserError(
            f"{location} must be the index of uncompressed MDS shards with a column 'jpeg' of bytes. These have {foreign}: "
            f"import them with 'personmae shards write {root} OUT', and read OUT"
        )
    return shards


def _foreign(entry: dict) -> str | None:
    """How a shard written by others differs from ours, or None."""
    if entry["format"] != "mds":
        raise ValueError("shards of the format 'mds' are required")
    if entry.get("compression"):
        return f"the compression {entry['compression']}"
    columns = dict(zip(entry["column_names"], entry.get("column_encodings", ()), strict=False))
    if "jpeg" not in entry["column_names"] or columns.get("jpeg", "bytes") not in ("bytes", "jpeg"):
        return f"the columns {', '.join(f'{name} ({columns.get(name)})' for name in entry['column_names'])}"
    return None


def _shard(entry: dict) -> Shard:
    raw = entry["raw_data"]
    if unknown := set(raw["hashes"]) - xxhash.algorithms_available - hashlib.algorithms_available:
        raise ValueError(f"the hash {min(unknown)} is not known here")
    if raw["bytes"] < 4 * (entry["samples"] + 2):
        raise ValueError(f"{raw['basename']} of {raw['bytes']} bytes cannot hold {entry['samples']} samples")
    return shard_of(entry)


def shard_of(entry: dict) -> Shard:
    """An entry of an index, whoever wrote it."""
    raw = entry["raw_data"]
    return Shard(
        name=raw["basename"],
        samples=entry["samples"],
        num_bytes=raw["bytes"],
        hashes=raw["hashes"],
        columns=tuple(entry["column_names"]),
        column_sizes=tuple(entry["column_sizes"]),
    )


def agrees(path: Path, shard: Shard) -> bool:
    """Whether a file has the size and the hashes that the index gives.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if path.stat().st_size != shard.num_bytes:
        return False
    for name, expected in shard.hashes.items():
        digest = getattr(xxhash, name)() if name in xxhash.algorithms_available else hashlib.new(name)
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != expected:
            return False
    return True


class MappedShard:
    """A shard's samples by position, without copies.

    Slices that were handed out keep the memory mapped for as long as they live, also when the file is gone.
    """

    def __init__(self, path: Path, shard: Shard):
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(mapped)
        # A file is its number of samples, where each begins, and where the last one ends; then the samples.
        offsets = np.frombuffer(mapped, np.uint32, shard.samples + 1, 4).astype(np.int64)
        self._bounds = column_bounds(mapped, offsets[:-1], shard)
        self._columns, self._jpeg = shard.columns, shard.columns.index("jpeg")

    def jpeg(self, position: int) -> memoryview:
        """The JPEG bytes of a sample."""
        return self._view[self._bounds[position, self._jpeg] : self._bounds[position, self._jpeg + 1]]

    def sample(self, position: int) -> dict[str, memoryview]:
        """All columns of a sample, as raw bytes."""
        bounds = self._bounds[position].tolist()
        return {name: self._view[start:stop] for name, start, stop in zip(self._columns, bounds[:-1], bounds[1:], strict=True)}


def column_bounds(mapped: mmap.mmap | bytes, starts: NDArray[np.int64], shard: Shard) -> NDArray[np.int64]:
    """(samples, columns + 1): where each column of each sample begins, and where the last one ends.

    A sample is the sizes of those of its columns that have no fixed one, as 32-bit numbers, and then the columns.
    """
    content, num_own = np.frombuffer(mapped, np.uint8), sum(size is None for size in shard.column_sizes)
    sizes = np.empty((len(starts), len(shard.columns)), np.int64)
    own = 0
    for column, size in enumerate(shard.column_sizes):
        if size is None:
            where = starts[:, None] + 4 * own + np.arange(4)
            sizes[:, column] = content[where].view(np.uint32)[:, 0]
            own += 1
        else:
            sizes[:, column] = size
    first = (starts + 4 * num_own)[:, None]
    return np.concatenate([first, first + np.cumsum(sizes, axis=1)], axis=1)

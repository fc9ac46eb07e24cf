"""A segment of a gallery: some rows with features, ids, cameras, times and thumbnails. Its files are written once.

Shapes: n rows, D numbers in a feature.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

FEATURES, ROWS, THUMBNAILS = "features.npy", "rows.arrow", "thumbnails.bin"
UNKNOWN_CAMERA: Final = ""
PIECE_ROWS: Final = 8192  # rows that are copied at a time
SCHEMA: Final = pa.schema(
    [
        ("key", pa.int64()),
        ("id", pa.string()),
        ("camera", pa.string()),
        ("time", pa.float64()),
        ("thumbnail_end", pa.int64()),
    ]
)


class Piece(NamedTuple):
    """Some rows. Features have length one.

    ``keys`` number rows for ever, in rising order. ``cameras`` are "" and ``times`` NaN where they are not known.
    ``thumbnails`` are JPEGs, or empty.
    """

    keys: Int[np.ndarray, " n"]
    ids: list[str]
    cameras: list[str]
    times: Float[np.ndarray, " n"]
    thumbnails: list[bytes]
    features: Float[np.ndarray, "n D"]

    def part(self, rows: slice) -> "Piece":
        """Some of its rows."""
        keys, ids, cameras, times, thumbnails, features = self
        return Piece(keys[rows], ids[rows], cameras[rows], times[rows], thumbnails[rows], features[rows])


@dataclass(frozen=True)
class Segment:
    """A segment that is open. Its files stay readable here when somebody deletes them."""

    name: str
    features: Float[np.ndarray, "n D"]
    rows: pa.Table
    thumbnails: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    def thumbnail(self, row: int) -> bytes:
        """The JPEG of a row, or nothing."""
        ends = self.rows["thumbnail_end"]
        start = ends[row - 1].as_py() if row else 0
        return self.thumbnails[start : ends[row].as_py()].tobytes()

    def pieces(self, keep: Bool[np.ndarray, " n"] | None = None) -> Iterator[Piece]:
        """All rows, or those to keep."""
        for start in range(0, len(self), PIECE_ROWS):
            numbers = np.arange(start, min(start + PIECE_ROWS, len(self)))
            numbers = numbers if keep is None else numbers[keep[numbers]]
            if len(numbers):
                yield self._piece(numbers)

    def _piece(self, numbers: Int[np.ndarray, " n"]) -> Piece:
        rows = self.rows.take(pa.array(numbers))
        return Piece(
            rows["key"].to_numpy(),
            rows["id"].to_pylist(),
            rows["camera"].to_pylist(),
            rows["time"].to_numpy(),
            [self.thumbnail(row) for row in numbers.tolist()] if len(self.thumbnails) else [b""] * len(numbers),
            self.features[numbers],
        )


def write(folder: Path, pieces: Iterable[Piece], *, num_rows: int, dim: int, dtype: str) -> None:
    """Make a segment of so many rows in a new folder, and have it on the disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True)
    place = end = 0
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (num_rows, dim)}
    # Written, not mapped: where the disk is full a mapped file ends the process by a signal.
    features, jpegs = (folder / FEATURES).open("wb"), (folder / THUMBNAILS).open("wb")
    rows = pa.OSFile(str(folder / ROWS), "wb")
    with features, jpegs, rows, pa.ipc.new_file(rows, SCHEMA) as table:
        np.lib.format.write_array_header_2_0(features, header)
        for piece in pieces:
            features.write(np.ascontiguousarray(piece.features, dtype).data)
            ends = end + np.cumsum([len(jpeg) for jpeg in piece.thumbnails], dtype=np.int64)
            table.write_batch(_batch(piece, ends))
            jpegs.writelines(piece.thumbnails)
            place, end = place + len(piece.ids), int(ends[-1])
    assert place == num_rows
    for name in (FEATURES, ROWS, THUMBNAILS):
        sync(folder / name)
    sync(folder)


def _batch(piece: Piece, ends: Int[np.ndarray, " n"]) -> pa.RecordBatch:
    columns = [piece.keys, piece.ids, piece.cameras, piece.times, ends]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def read(folder: Path) -> Segment:
    """Open a segment, mapped into memory.

    Raises:
        FileNotFoundError: it is not there, or not any more.
        ValueError, pa.ArrowException: it is damaged.
    """
    # A private mapping: torch wants one that could be written to. Nobody writes.
    features = np.load(folder / FEATURES, mmap_mode="c")
    rows = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
    path = folder / THUMBNAILS
    empty = path.stat().st_size == 0  # which cannot be mapped
    thumbnails = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
    if len(rows) != len(features):
        raise ValueError(f"{folder} has {len(features)} features and {len(rows)} ids")
    return Segment(folder.name, features, rows, thumbnails)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a power failure."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

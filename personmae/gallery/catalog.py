"""A gallery as a reader sees it: one state of it, which no writer changes while it is open."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from personmae.errors import UserError
from personmae.gallery import segment, store
from personmae.gallery.segment import Segment
from personmae.gallery.store import Manifest

_ATTEMPTS: Final = 100  # a writer may commit while a reader opens what it has just replaced


@dataclass(frozen=True)
class Gallery:
    """A gallery that is open. Rows are numbered from 0 in its order. N is their number, D that of a feature's numbers."""

    folder: Path
    manifest: Manifest
    segments: list[Segment]

    def __len__(self) -> int:
        return self.manifest.num_rows

    @cached_property
    def rows(self) -> pa.Table:
        """Key, id, camera and time of each row."""
        return pa.concat_tables([part.rows for part in self.segments]) if self.segments else segment.SCHEMA.empty_table()

    @cached_property
    def starts(self) -> Int[np.ndarray, " S"]:
        """The first row of each segment, and the end."""
        return np.cumsum([0, *(len(part) for part in self.segments)])

    def rows_of(self, ids: Sequence[str]) -> Int[np.ndarray, " n"]:
        """The row of each id, -1 where there is none."""
        if not len(self):
            return np.full(len(ids), -1)
        known = self.rows["id"].combine_chunks()
        found = pc.call_function("index_in", [pa.array(ids, pa.string())], pc.SetLookupOptions(value_set=known))
        return np.array([-1 if row is None else row for row in found.to_pylist()], np.int64)

    def features(self, rows: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... D"]:
        """Features of some rows, in fp32."""
        flat, found = rows.ravel(), np.empty((rows.size, self.manifest.dim), np.float32)
        parts = np.searchsorted(self.starts, flat, side="right") - 1
        for number in np.unique(parts).tolist():
            places = np.flatnonzero(parts == number)
            found[places] = self.segments[number].features[flat[places] - self.starts[number]]
        return found.reshape(*rows.shape, self.manifest.dim)

    def blocks(
        self, most_rows: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n D"]]]:
        """Row numbers and features of all rows, or of those that are allowed, at most so many at a time."""
        for start, part in zip(self.starts, self.segments, strict=False):
            for begin in range(0, len(part), most_rows):
                rows = np.arange(start + begin, start + min(begin + most_rows, len(part)))
                features = part.features[begin : begin + most_rows]
                if allowed is not None and not (chosen := allowed[rows]).all():
                    rows, features = rows[chosen], features[chosen]
                if len(rows):
                    yield rows, features

    def thumbnail(self, row: int) -> bytes:
        """The JPEG of a row, or nothing."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number].thumbnail(row - int(self.starts[number]))

    def is_current(self) -> bool:
        """Whether the folder still has what was opened.

        The whole manifest is compared. A gallery that was deleted and built again counts its changes from the start.
        """
        try:
            return store.read_manifest(self.folder) == self.manifest
        except UserError:  # there is none any more
            return False


def open_gallery_of(folder: Path, manifest: Manifest) -> Gallery:
    """What a manifest describes, which need not be the one that is valid.

    Raises:
        OSError, ValueError, pa.ArrowException: a segment is not there, or is damaged.
    """
    return Gallery(folder, manifest, [segment.read(folder / store.SEGMENTS / name) for name, _ in manifest.segments])


def open_gallery(folder: str | Path) -> Gallery:
    """The gallery in a folder, as it is now.

    Raises:
        UserError: it is no gallery, or it is damaged.
    """
    folder, before = Path(folder), None
    for _ in range(_ATTEMPTS):
        manifest = store.read_manifest(folder)
        try:
            found = open_gallery_of(folder, manifest)
        except (OSError, ValueError, pa.ArrowException) as error:
            if before == manifest:
                raise UserError(f"{folder} is damaged, part of it cannot be read ({error}): build it again") from error
            before = manifest
            continue
        if found.is_current():  # else its segments may be another gallery's, built in its place with the same names
            return found
    raise UserError(f"{folder} changes faster than it can be read: wait for those who write it")

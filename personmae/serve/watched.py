"""A gallery that other processes may change: what a request sees of it is its state at that time."""

import threading
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from personmae.errors import UserError
from personmae.gallery import facts
from personmae.gallery.catalog import Gallery, open_gallery
from personmae.serve.limits import Refusal

PAGE_ROWS: Final = 48


class Row(NamedTuple):
    """What is known of an image. ``key`` is its number for ever. ``time`` is in words, and "" where it is unknown."""

    key: int
    id: str
    camera: str
    time: str
    has_thumbnail: bool


class View:
    """One state of a gallery. N is its number of rows."""

    def __init__(self, gallery: Gallery):
        self.gallery = gallery

    @cached_property
    def keys(self) -> Int[np.ndarray, " N"]:
        """Rising numbers, one a row."""
        return self.gallery.rows["key"].to_numpy()

    @cached_property
    def cameras(self) -> list[str]:
        """All cameras that are known."""
        return sorted(filter(None, self.gallery.rows["camera"].unique().to_pylist()), key=lambda name: (len(name), name))

    def row_of(self, key: int, name: str | None = None) -> int:
        """The row with a key, and with an id where that is given. A gallery that was built again has others by the same keys.

        Raises:
            Refusal: 410, it is not there, or not any more.
        """
        row = int(np.searchsorted(self.keys, key))
        is_there = row < len(self.keys) and self.keys[row] == key
        if not is_there or name not in (None, self.gallery.rows["id"][row].as_py()):
            raise Refusal(410, "that image is not in the gallery any more: choose another one")
        return row

    def describe(self, rows: Int[np.ndarray, " n"]) -> list[Row]:
        """Some rows, in the order given."""
        gallery, kind = self.gallery, self.gallery.manifest.times
        known = gallery.rows.select(["key", "id", "camera", "time"]).take(rows).to_pylist() if len(rows) else []
        return [
            Row(line["key"], line["id"], line["camera"], facts.in_words(line["time"], kind), bool(gallery.thumbnail(int(row))))
            for row, line in zip(rows, known, strict=True)
        ]

    def page(self, number: int, camera: str, part_of_id: str) -> tuple[list[Row], int]:
        """A page of the rows of a camera, "" for any, with a text in their ids, and how many rows there are of these."""
        rows = np.flatnonzero(self._chosen(camera, part_of_id))
        return self.describe(rows[number * PAGE_ROWS : (number + 1) * PAGE_ROWS]), len(rows)

    def _chosen(self, camera: str, part_of_id: str) -> Bool[np.ndarray, " N"]:
        chosen = np.ones(len(self.gallery), bool)
        if not len(chosen):
            return chosen
        if camera:
            chosen &= pc.call_function("equal", [self.gallery.rows["camera"], camera]).to_numpy()
        if part_of_id:
            options = pc.MatchSubstringOptions(part_of_id, ignore_case=True)
            chosen &= pc.call_function("match_substring", [self.gallery.rows["id"]], options).to_numpy()
        return chosen

    def span(self) -> list[str]:
        """The first and the last time in words, or nothing."""
        known = self.gallery.rows["time"].to_numpy()
        known = known[~np.isnan(known)]
        kind = self.gallery.manifest.times
        return [facts.in_words(float(time), kind) for time in (known.min(), known.max())] if len(known) else []


class Watched:
    """The newest state of a gallery, opened again where another process has changed it."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder.absolute(), threading.Lock()  # whole, for ``hide`` takes it out of messages
        self._view = View(open_gallery(self.folder))

    def now(self) -> View:
        """The state that holds.

        Raises:
            Refusal: 503, it cannot be read at present.
        """
        with self._lock:
            try:
                if not self._view.gallery.is_current():
                    self._view = View(open_gallery(self.folder))
            except UserError as error:
                raise Refusal(503, f"the gallery cannot be read: {hide(error, self.folder)}") from error
            return self._view


def hide(error: Exception, folder: Path) -> str:
    """The message of an error without a path of the server's own, which has to be whole: a word may be its last part."""
    return str(error).replace(str(folder), "it")

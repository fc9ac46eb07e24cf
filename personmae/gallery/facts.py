"""What is known of an image beside its feature: its camera and its time, from a table, a column or its name."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float

from personmae.errors import UserError
from personmae.gallery.segment import UNKNOWN_CAMERA
from personmae.monitor.progress import counted
from personmae.reid.samples import CAMERA

DATE, NUMBER = "date", "number"
_FIRST, _END = -62_135_596_800, 253_402_300_800  # seconds of what a datetime can show in UTC
_COLUMNS: Final = ("camera", "time")


class Facts(NamedTuple):
    """Cameras, "" where unknown, and times in seconds, NaN where unknown. ``kind`` says how times were written."""

    cameras: list[str]
    times: Float[np.ndarray, " n"]
    kind: str | None


def camera_of(name: str) -> str:
    """The camera in a file name, such as 2 in ``0001_c2s1_000451.jpg``, or ""."""
    match = CAMERA.search(name.rpartition("/")[2])
    return match[1] if match else UNKNOWN_CAMERA


def of_names(ids: Iterable[str]) -> Facts:
    """Cameras as names have them, and no times."""
    cameras = [camera_of(name) for name in ids]
    return Facts(cameras, np.full(len(cameras), np.nan), None)


def of_columns(cameras: Sequence[object] | None, times: Sequence[object] | None, ids: Sequence[str], where: str) -> Facts:
    """Cameras and times of columns. Cameras are those of the names where there is no such column.

    Raises:
        UserError: a time is neither a number nor a date.
    """
    named = [UNKNOWN_CAMERA if value is None else str(value) for value in cameras] if cameras else of_names(ids).cameras
    texts = ["" if value is None else str(value) for value in times] if times else [""] * len(ids)
    return Facts(named, *parse_times(texts, where))


@dataclass(frozen=True)
class Table:
    """Cameras and times of a CSV file, in the order of its rows. ``places`` has the row of each id."""

    path: Path
    places: dict[str, int]
    facts: Facts

    def in_words(self, ids: Sequence[str]) -> str:
        """How many images it names, and how many of its rows name none.

        Raises:
            UserError: it names none of ``ids``.
        """
        known = set(ids)
        others = [name for name in self.places if name not in known]
        num_named = len(self.places) - len(others)
        if not num_named:
            raise UserError(f"{self.path} must name ids of the images, such as {ids[0]}. It names none of them")
        words = f"{self.path} names {num_named:,} of {counted(len(ids), 'image')}"
        if not others:
            return words
        rows = "1 row names" if len(others) == 1 else f"{len(others):,} rows name"
        return f"{words}, and {rows} no image, such as {others[0]}"

    def over(self, ids: Sequence[str], known: Facts) -> Facts:
        """What it has of ``ids``, and what is ``known`` already where it has nothing.

        Times that are known and written another way than its own are left out.
        """
        rows = [self.places.get(name, -1) for name in ids]  # -1 is the unknown one, behind the last
        cameras, times = [*self.facts.cameras, UNKNOWN_CAMERA], np.append(self.facts.times, np.nan)[rows]
        if self.facts.kind is None or known.kind in (None, self.facts.kind):
            times = np.where(np.isnan(times), known.times, times)
        found = [cameras[row] or camera for row, camera in zip(rows, known.cameras, strict=True)]
        return Facts(found, times, self.facts.kind or known.kind)


def read_table(path: Path) -> Table:
    """A CSV file with the columns id and camera, time, or both.

    Raises:
        UserError: it cannot be read as one, names an id twice, or has a time that is none.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        columns, rows = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"a CSV file in UTF-8 is required as --table. {path} cannot be read: {error}") from error
    if "id" not in columns or not set(_COLUMNS) & set(columns):
        raise UserError(f"{path} needs the columns id and camera, time, or both in its first line. It has {list(columns)}")
    places: dict[str, int] = {}
    for place, (line, row) in enumerate(rows):
        if not row["id"] or row["id"] in places:
            wrong = f"names {row['id']} a second time: remove one of them" if row["id"] else "has no id: give one"
            raise UserError(f"{path}, line {line}, {wrong}")
        places[row["id"]] = place
    cameras, texts = ([(row.get(name) or "").strip() for _, row in rows] for name in _COLUMNS)
    return Table(path, places, Facts(cameras, *parse_times(texts, str(path))))


def parse_times(texts: Sequence[str], where: str) -> tuple[Float[np.ndarray, " n"], str | None]:
    """Times in seconds and how they were written: all numbers, or all dates. A date without a zone is UTC. "" is unknown.

    Raises:
        UserError: one is neither, or they are mixed.
    """
    parsed = [_parse(text, where) for text in texts]
    kinds = {kind for _, kind in parsed if kind}
    if len(kinds) > 1:
        one, other = (next(text for text, (_, of) in zip(texts, parsed, strict=True) if of == kind) for kind in sorted(kinds))
        raise UserError(f"times must be all dates or all numbers. {where} has {one!r} and {other!r}")
    return np.array([time for time, _ in parsed], np.float64), kinds.pop() if kinds else None


def _parse(text: str, where: str) -> tuple[float, str | None]:
    if not text:
        return math.nan, None
    if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text, re.IGNORECASE):
        try:
            return float(text), NUMBER
        except ValueError:
            pass
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"a time must be a number or a date such as 2026-05-31T14:00:00. {where} has {text!r}") from None
    time = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not _FIRST <= time < _END:
        raise UserError(f"a date from the year 1 to 9999 in UTC is required. {where} has {text!r}")
    return time, DATE


def in_words(time: float, kind: str | None) -> str:
    """A time as people write it, or ""."""
    if math.isnan(time):
        return ""
    if kind == DATE:
        return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return f"{time:.15g}"

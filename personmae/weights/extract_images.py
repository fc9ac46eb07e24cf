"""The images of which features are wanted, by number: all of a source, those on a list, or boxes in the frames of a video.

Nothing is decoded before it is asked for. A part of the images can be pickled and sent to another process.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import xxhash

from personmae import images
from personmae.data.containers import ImageEntry
from personmae.data.files import patiently
from personmae.data.sources import Source, open_source, summary
from personmae.errors import UserError
from personmae.images import BadImage, Pixels
from personmae.system.files import lines as text_lines
from personmae.system.retry import LOST

LIST_SUFFIX: Final = ".txt"
_DIGITS = re.compile(r"(\d+)\D*$")
_MOT = "FRAME,TRACK,X,Y,WIDTH,HEIGHT"


class Images(Protocol):
    """Images by number. ``columns`` are numbers that go beside each id, such as the frame and the track of a box."""

    @property
    def location(self) -> str: ...
    @property
    def ids(self) -> list[str]: ...
    @property
    def columns(self) -> dict[str, list[int]]: ...
    @property
    def passed_over(self) -> str: ...
    def digest(self) -> str: ...
    def part(self, numbers: Sequence[int]) -> "Images": ...
    def pixels(self, number: int) -> Pixels: ...
    def close(self) -> None: ...


def open_images(
    location: str,
    *,
    boxes: Path | None = None,
    column: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Images:
    """The images at a folder, bucket, container or list, or with ``boxes`` the boxes of a tracker in a folder of frames.

    A list is a text file of paths, one a line, absolute or below its own folder. Boxes are lines of the MOT format.

    Raises:
        UserError: there are none, or the list or the boxes cannot be read.
    """
    if location.lower().endswith(LIST_SUFFIX) and Path(location).is_file():
        if boxes:
            raise UserError(f"--boxes needs a folder of frames. {location} is a list: give the folder")
        if column:
            raise UserError(f"--column is of MDS shards and parquet files. {location} is a list: leave it out")
        return _listed(Path(location))
    source = open_source(location, column)
    entries = source.images(log)
    whole = SourceImages(location, source, entries)
    return _boxed(whole, boxes) if boxes else whole


@dataclass(frozen=True)
class SourceImages:
    """All images of a source. An id is the image's name in it."""

    location: str
    source: Source
    entries: list[ImageEntry]

    @property
    def ids(self) -> list[str]:
        return [entry.key for entry in self.entries]

    @property
    def columns(self) -> dict[str, list[int]]:
        return {}

    @property
    def passed_over(self) -> str:
        return summary(self.source.passed_over)

    def digest(self) -> str:
        return _digest(f"{entry.key}\0{entry.num_bytes}" for entry in self.entries)

    def part(self, numbers: Sequence[int]) -> "SourceImages":
        return replace(self, entries=[self.entries[number] for number in numbers])

    def pixels(self, number: int) -> Pixels:
        """An upright image.

        Raises:
            BadImage: it cannot be read or decoded.
            UserError: the source has gone, or fails in a way that leaving the image out would hide.
        """
        entry = self.entries[number]
        try:
            return images.decode(patiently(lambda: self.source.read(entry))).pixels
        except LOST as error:
            if not self.source.exists():
                raise UserError(f"{self.location} has gone while it was read. Put it back and run this again") from error
            raise _unread(error) from error
        except OSError as error:
            raise _failing(f"{entry.key} of {self.location}", error) from error

    def close(self) -> None:
        """Close what reading has opened. It is opened again when it is asked."""
        self.source.__exit__()


@dataclass(frozen=True)
class ListedImages:
    """The files of a list. An id is the line as it stands there."""

    location: str
    names: list[str]
    sizes: list[int]

    @property
    def ids(self) -> list[str]:
        return self.names

    @property
    def columns(self) -> dict[str, list[int]]:
        return {}

    @property
    def passed_over(self) -> str:
        return ""

    def digest(self) -> str:
        return _digest(f"{name}\0{size}" for name, size in zip(self.names, self.sizes, strict=True))

    def part(self, numbers: Sequence[int]) -> "ListedImages":
        names, sizes = ([values[number] for number in numbers] for values in (self.names, self.sizes))
        return replace(self, names=names, sizes=sizes)

    def pixels(self, number: int) -> Pixels:
        """As of ``SourceImages``."""
        path = Path(self.location).parent / self.names[number]
        try:
            return images.decode(patiently(path.read_bytes)).pixels
        except LOST as error:
            raise _unread(error) from error
        except OSError as error:
            raise _failing(str(path), error) from error

    def close(self) -> None:
        """Nothing stays open."""


class Box(NamedTuple):
    """A track's box in a frame: the frame's number and its place in the source, the track, and sides in pixels."""

    frame: int
    place: int
    track: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class BoxedImages:
    """The boxes of a tracker, cut out of frames. An id is FRAME:TRACK, with the frame's name."""

    frames: SourceImages
    boxes: list[Box]

    @property
    def location(self) -> str:
        return self.frames.location

    @property
    def ids(self) -> list[str]:
        return [f"{self.frames.entries[box.place].key}:{box.track}" for box in self.boxes]

    @property
    def columns(self) -> dict[str, list[int]]:
        return {"frame": [box.frame for box in self.boxes], "track": [box.track for box in self.boxes]}

    @property
    def passed_over(self) -> str:
        return self.frames.passed_over

    def digest(self) -> str:
        return _digest([self.frames.digest(), *map(repr, self.boxes)])

    def part(self, numbers: Sequence[int]) -> "BoxedImages":
        """Some boxes with the frames that they are in."""
        boxes = [self.boxes[number] for number in numbers]
        places = sorted({box.place for box in boxes})
        new = {place: number for number, place in enumerate(places)}
        frames = replace(self.frames, entries=[self.frames.entries[place] for place in places])
        return replace(self, frames=frames, boxes=[box._replace(place=new[box.place]) for box in boxes])

    def pixels(self, number: int) -> Pixels:
        """What a box shows of its frame.

        Raises:
            BadImage: the frame cannot be read, or the box is outside of it.
        """
        box = self.boxes[number]
        frame = self.frames.pixels(box.place)
        top, left = (max(0, round(edge)) for edge in (box.y, box.x))
        crop = frame[top : max(0, round(box.y + box.height)), left : max(0, round(box.x + box.width))]
        if not crop.size:
            high, wide = frame.shape[:2]
            raise BadImage(f"its box is outside of the frame, {high} pixels high and {wide} wide", "outside of its frame")
        return np.ascontiguousarray(crop)

    def close(self) -> None:
        """As of its frames."""
        self.frames.close()


def _listed(path: Path) -> ListedImages:
    """The files that a list names. Those that are not there are left for the reading, which counts them."""
    try:
        lines = [line.strip() for line in text_lines(path, "utf-8-sig")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a list of paths in UTF-8 is required. {path} cannot be read: {error}") from error
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"a list of paths, one a line, is required. {path} is empty")
    files = [path.parent / name for name in names]
    if not any(file.is_file() for file in files):
        raise UserError(f"the files of {path} must be absolute or below {path.parent}. None is there, such as {names[0]}")
    return ListedImages(str(path), names, [file.stat().st_size if file.is_file() else -1 for file in files])


def _boxed(frames: SourceImages, path: Path) -> BoxedImages:
    """The boxes of a file in the MOT format, in the order of frames and tracks."""
    places = _places(frames)
    boxes = [_box(line, number, path, places) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not boxes:
        raise UserError(f"lines of {_MOT} are required. {path} is empty")
    return BoxedImages(frames, sorted(boxes))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a text file with lines of {_MOT} is required. {path} cannot be read: {error}") from error


def _places(frames: SourceImages) -> dict[int, int]:
    """The place of each frame by the last number in its name."""
    places: dict[int, int] = {}
    for place, key in enumerate(frames.ids):
        match = _DIGITS.search(Path(key).stem)
        if not match:
            raise UserError(f"frames named by number are required, such as 000001.jpg. {frames.location} has {key}: rename it")
        if int(match[1]) in places:
            other = frames.entries[places[int(match[1])]].key
            raise UserError(f"frames of one video are required. {key} and {other} have one number: give their own folders")
        places[int(match[1])] = place
    return places


def _box(line: str, number: int, path: Path, places: dict[int, int]) -> Box:
    where = f"{path}, line {number},"
    try:
        frame, track, *sides = (float(text) for text in re.split(r"[,\s]+", line.strip())[:6])
        x, y, width, height = sides
    except ValueError:
        raise UserError(f"{where} must begin with {_MOT}, set apart by commas. Got {line.strip()[:60]!r}") from None
    if int(frame) not in places:
        raise UserError(
            f"{where} is of frame {int(frame)}, which is not among the {len(places):,} frames. Give the video's own"
        )
    return Box(int(frame), places[int(frame)], int(track), x, y, width, height)


def _digest(lines: Iterable[str]) -> str:
    found = xxhash.xxh3_128()
    for line in lines:
        found.update(f"{line}\n".encode())
    return found.hexdigest()


def _unread(error: OSError) -> BadImage:
    return BadImage(f"it cannot be read: {error.strerror or error}", "cannot be read")


def _failing(what: str, error: OSError) -> UserError:
    return UserError(f"{what} cannot be read: {error.strerror or error}. Fix that and run the same command to continue")

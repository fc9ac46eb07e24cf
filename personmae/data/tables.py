"""Tables with a column of images, and the MDS shards of others, also compressed. ``parquet`` has the other kind.

A table is listed from its index alone: the number of images in each block, and their average size. An image is named after
its place, since any other name would need its row. Uncompressed MDS shards with a column ``key``, as ours have, keep those
names, which are read in passing. Blocks (a shard, or some rows of a row group) are read whole, and a few are kept.
"""

import bisect
import functools
import hashlib
import io
import itertools
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np
import xxhash

from personmae.data import mds
from personmae.data.blocks import Recent
from personmae.data.containers import Container, ImageEntry
from personmae.data.files import Files, key_of, patiently
from personmae.errors import UserError
from personmae.system import mosaic

_PREFERRED = ("image", "jpeg", "jpg", "img", "png", "webp", "picture")
_MDS_ENCODINGS = ("bytes", "jpeg", "png", "pil")
_MOST_BLOCKS = 3  # of a process
_LONGEST_KEY = 1 << 16  # bytes; longer ones are damage
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
Images = Sequence[bytes | None]


class Block(NamedTuple):
    """A part of a table that is read whole."""

    prefix: str  # of its images' names
    first: int  # the row of the table with which it begins
    num_rows: int
    num_bytes: int  # of an image, on average
    named_from: int  # the number in the name of its first image
    group: int = 0  # of a parquet file, the row group
    start: int = 0  # its row there


class Table(Container):
    """A container whose images are rows."""

    def __init__(self, files: Files, name: str, prefix: str, column: str | None):
        super().__init__(files, name, prefix)
        self._wanted = column

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The blocks, found once."""
        return self.find_blocks()

    @abstractmethod
    def find_blocks(self) -> list[Block]:
        """All blocks in order. None where the table has no images.

        Raises:
            UserError: it is damaged, or has several columns of images and none was chosen.
        """

    @abstractmethod
    def version(self, number: int) -> Hashable:
        """A value that changes with the content of a block."""

    @abstractmethod
    def load(self, number: int) -> Images:
        """The images of a block. None for a row without one."""

    def names(self) -> list[str] | None:
        """The rows' own names, all different. None where rows are named by their places."""
        return None

    def images(self, passed_over: Counter[str]) -> list[ImageEntry]:
        blocks = self.blocks
        names = self.names() if blocks else None
        self.close()
        if not blocks:
            passed_over[f"{self.name.rpartition('.')[2]} files without a column of images (name it with --column)"] += 1
        return [
            ImageEntry(
                f"{self.prefix}{names[block.first + row]}" if names else f"{block.prefix}{block.named_from + row:08}",
                block.num_bytes,
                block.first + row,
                self.name,
                exact=False,
            )
            for block in blocks
            for row in range(block.num_rows)
        ]

    def read(self, image: ImageEntry) -> bytes:
        number = bisect.bisect_right(self.blocks, image.offset, key=lambda block: block.first) - 1
        version = (self.location, self._wanted, number, self.version(number))
        contents = _recent.get(version, lambda: self.load(number))
        content = contents[image.offset - self.blocks[number].first]
        if content is None:
            raise FileNotFoundError("its row has no bytes")
        return content

    def choose(self, columns: list[str]) -> str | None:
        """The column to read, of those that may hold images. None where there is none.

        Raises:
            UserError: several may, and none has a known name.
        """
        if self._wanted is not None:
            return self._wanted if self._wanted in columns else None
        named = [name for name in _PREFERRED if name in columns]
        if len(columns) > 1 and not named:
            raise UserError(f"{self.location} may have images in {', '.join(columns)}. Choose one with --column")
        return next(iter(named or columns), None)


_recent = Recent[Images](_MOST_BLOCKS)


# --- MDS ---


@final
class Mds(Table):
    """The shards of an MDS index. A name is that of the column ``key``, or ``SHARD/ROW``."""

    @functools.cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The shards of the index. None where the file is no MDS index."""
        try:
            entries = json.loads(patiently(lambda: self.files.read(self.name)))["shards"]
            return entries if all(entry["format"] == "mds" for entry in entries) else []
        except (ValueError, KeyError, TypeError):
            return []
        except OSError as error:
            raise UserError(f"{self.location} cannot be read: {error.strerror or error}. Repair that and try again") from error

    @property
    def members(self) -> list[set[str]]:
        """For each shard the files that it may be in."""
        return [{self._name(data["basename"]) for data in _data_of(entry)} for entry in self.entries]

    def _name(self, basename: str) -> str:
        return f"{self.name[: -len(mds.INDEX)]}{basename}"

    def find_blocks(self) -> list[Block]:
        try:
            if not self.entries or self._column is None:
                return []
            rows = [0, *itertools.accumulate(entry["samples"] for entry in self.entries)]
            return [
                Block(
                    key_of(f"{self.prefix}{entry['raw_data']['basename'].removesuffix('.mds')}/"),
                    first,
                    entry["samples"],
                    max(1, entry["raw_data"]["bytes"] // max(1, entry["samples"]) - 8),
                    named_from=0,
                )
                for entry, first in zip(self.entries, rows, strict=False)
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"a whole MDS index is required. {self.location} is not one: {error!r}. Write it again") from error

    def names(self) -> list[str] | None:
        if any(entry.get("compression") or ("key", "str") not in _columns(entry) for entry in self.entries):
            return None
        found = list[str]()
        for entry in self.entries:
            found += self._keys(entry)
            self.num_listed = len(found)
        return found if all(found) and len(found) == len(set(found)) else None

    def _keys(self, entry: dict[str, Any]) -> list[str]:
        """The column ``key`` of a shard, with little else of it read. Empty texts where the shard is damaged.

        Raises:
            UserError: it cannot be read.
        """
        shard, name = mds.shard_of(entry), self._name(entry["raw_data"]["basename"])
        try:
            with patiently(lambda: self.files.open(name)) as file:
                offsets = np.frombuffer(file.read(4 * (shard.samples + 2)).ljust(4 * (shard.samples + 2), b"\0"), np.uint32)
                return [_key_at(file, int(start), shard) for start in offsets[1:-1]]
        except OSError as error:
            raise UserError(f"{self.files.location}/{name} cannot be read: {error.strerror or error}. Repair that") from error

    @functools.cached_property
    def _column(self) -> str | None:
        first = self.entries[0]
        encodings = dict(zip(first["column_names"], first["column_encodings"], strict=True))
        return self.choose([name for name, encoding in encodings.items() if encoding in _MDS_ENCODINGS])

    def version(self, number: int) -> Hashable:
        return json.dumps(self.entries[number], sort_keys=True)

    def load(self, number: int) -> Images:
        entry = self.entries[number]
        shard = mds.shard_of(entry)
        column = shard.columns.index(str(self._column))
        content = self._content(entry)
        offsets = np.frombuffer(content, np.uint32, shard.samples + 1, 4).astype(np.int64)
        bounds = mds.column_bounds(content, offsets[:-1], shard)[:, column : column + 2].tolist()
        decode = _png if entry["column_encodings"][column] == "pil" else bytes
        return [decode(content[start:end]) for start, end in bounds]

    def _content(self, entry: dict[str, Any]) -> bytes:
        """A shard's bytes, decompressed.

        Raises:
            OSError: it cannot be read, or does not have the size and hashes of the index.
        """
        for data in _data_of(entry):
            name = self._name(data["basename"])
            try:
                content = self.files.read(name)
            except FileNotFoundError:
                continue
            if len(content) != data["bytes"] or not _has_hashes(content, data["hashes"]):
                raise OSError(f"{name} does not have the size and hash that {self.location} gives")
            if data is entry["raw_data"]:
                return content
            return mosaic.load("streaming.base.compression").decompress(entry["compression"], content)
        raise FileNotFoundError(f"{entry['raw_data']['basename']} is no longer there")


def _columns(entry: dict[str, Any]) -> set[tuple[str, str]]:
    """The columns of a shard with their encodings."""
    return set(zip(entry["column_names"], entry["column_encodings"], strict=True))


def _key_at(file: BinaryIO, start: int, shard: mds.Shard) -> str:
    """The key of the sample that begins at a byte."""
    file.seek(start)
    num_own = shard.column_sizes.count(None)
    own = iter(np.frombuffer(file.read(4 * num_own).ljust(4 * num_own, b"\0"), np.uint32).tolist())
    sizes = [next(own) if size is None else size for size in shard.column_sizes]
    place = shard.columns.index("key")
    file.seek(start + 4 * num_own + sum(sizes[:place]))
    return file.read(min(sizes[place], _LONGEST_KEY)).decode("utf-8", "backslashreplace")


def _data_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of an index for a shard's files: the compressed one, if any, and the other."""
    return [data for data in (entry.get("zip_data"), entry["raw_data"]) if data]


def _has_hashes(content: bytes, hashes: dict[str, str]) -> bool:
    known = {name: getattr(xxhash, name) for name in hashes if name in xxhash.algorithms_available}
    known |= {name: functools.partial(hashlib.new, name) for name in hashes if name in hashlib.algorithms_available}
    return all(make(content).hexdigest() == hashes[name] for name, make in known.items())


def _png(content: bytes) -> bytes:
    """The PNG of an image that was stored as its pixels."""
    image = mosaic.load("streaming.base.format.mds.encodings").mds_decode("pil", content)
    encoded = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(encoded, format="PNG")
    return encoded.getvalue()

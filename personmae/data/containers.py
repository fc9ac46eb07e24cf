"""Files that hold many images: uncompressed tars and LMDBs. ``tables`` has those that are tables."""

import os
import re
import tarfile
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, final

import lmdb

from personmae import images
from personmae.data.blocks import Recent
from personmae.data.files import Files, bytes_of, key_of, name_of, text_of
from personmae.errors import UserError

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_COMPRESSED_MARKS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_IMAGE_MARKS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM")
_LMDB_METADATA = {b"__len__", b"__keys__", b"__meta__", b"keys", b"keys.pkl", b"len", b"length", b"num-samples"}
_TINY = 512  # bytes; an LMDB keeps a value of this size beside its key, so that looking at it costs nothing
_BLOCK = 1 << 20
_MOST_BLOCKS = 3  # of a tar


class ImageEntry(NamedTuple):
    """One image of a source: its name, its size, and where it is."""

    key: str
    num_bytes: int
    offset: int = 0  # in a tar the byte at which it begins, in a table its row
    container: str = ""  # the file that holds it; empty where it is a file itself
    exact: bool = True  # False where the size is the average of a table's images


class Container(ABC):
    """One such file. ``read`` may be called by several threads."""

    num_listed = 0  # images that ``images`` has found so far

    def __init__(self, files: Files, name: str, prefix: str):
        self.files, self.name = files, name
        self.prefix = prefix  # what its images' names begin with

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        return f"{self.files.location}/{self.name}"

    @abstractmethod
    def images(self, passed_over: Counter[str]) -> list[ImageEntry]:
        """All images in an order that stays the same. Everything else is counted by kind in ``passed_over``.

        Raises:
            UserError: it is damaged, or not what its name says.
        """

    @abstractmethod
    def read(self, image: ImageEntry) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError: it cannot be read. One of ``retry.LOST`` if this one is not to be had.
        """

    def close(self) -> None:
        """Close what ``read`` has opened. It opens it again when it is asked."""
        return


def kind_of(name: str) -> str | None:
    """The kind of file by its name, or None for an image."""
    lower = name.lower()
    if lower.endswith(COMPRESSED_TARS):
        return "compressed tars (decompress them)"
    if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return "hidden files"
    if lower.endswith(images.SUFFIXES):
        return None
    return key_of(os.path.splitext(lower)[1]) or "without a suffix"


def compressed(location: str) -> UserError:
    """The refusal of a compressed tar."""
    return UserError(f"an uncompressed tar is required, to read images by their place in it. Decompress {location} first")


@final
class Tar(Container):
    """The image members of a tar (WebDataset's too), or of several that were written one behind another."""

    def __init__(self, files: Files, name: str, prefix: str):
        super().__init__(files, name, prefix)
        self._recent = Recent[bytes](_MOST_BLOCKS)

    def images(self, passed_over: Counter[str]) -> list[ImageEntry]:
        found: dict[str, ImageEntry] = {}
        try:
            with self.files.open(self.name) as file:
                if file.read(6).startswith(_COMPRESSED_MARKS):
                    raise compressed(self.location)
                for member in _members(file):
                    self._add(member, found, passed_over)
                    self.num_listed = len(found)
        except tarfile.TarError as error:
            raise UserError(f"a whole tar is required. {self.location} is not one: {error}. Write or copy it again") from error
        except OSError as error:
            raise UserError(f"{self.location} cannot be read: {error.strerror or error}. Repair that and try again") from error
        return list(found.values())

    def _add(self, member: tarfile.TarInfo, found: dict[str, ImageEntry], passed_over: Counter[str]) -> None:
        """Add an image. Of members with one name the last counts, as it does for tar."""
        name = member.name.removeprefix("./")
        key = key_of(self.prefix + name)
        if member.isdir():
            return
        if kind := kind_of(name):
            passed_over[kind] += 1
            return
        where = member.size, member.offset_data
        if member.islnk():  # the same file under another name
            original = found.get(key_of(self.prefix + member.linkname.removeprefix("./")))
            where = (original.num_bytes, original.offset) if original else None
        elif not member.isreg() or member.issparse():
            where = None
        if where is None:
            passed_over["links and sparse members of tars"] += 1
            return
        passed_over["tar members replaced by a later one"] += key in found
        found[key] = ImageEntry(key, *where, container=self.name)

    def read(self, image: ImageEntry) -> bytes:
        start, end, size = image.offset, image.offset + image.num_bytes, self.files.block_bytes
        if not size or image.num_bytes > size:
            return self.files.read(self.name, start, image.num_bytes)
        first, last = start // size, max(start, end - 1) // size
        content = b"".join(self._block(number) for number in range(first, last + 1))
        return content[start - first * size : end - first * size]

    def _block(self, number: int) -> bytes:
        size = self.files.block_bytes
        return self._recent.get(number, lambda: self.files.read(self.name, number * size, size))

    def close(self) -> None:
        self._recent = Recent(_MOST_BLOCKS)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, and of those that follow its end: ``cat a.tar b.tar`` is common.

    Raises:
        tarfile.TarError: what follows a member is neither another nor an end.
    """
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                # It keeps all that it has read: gigabytes for millions of images.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - unknown to typeshed alone
                yield member
            end = archive.offset  # where tarfile has stopped, be it at the end or at damage
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"what follows byte {end:,} is neither a member nor the end")
        start = _behind_zeros(file, end + tarfile.BLOCKSIZE)


def _behind_zeros(file: BinaryIO, start: int) -> int | None:
    """The first block from ``start`` on that is not all zeros, or None."""
    while block := file.read(_BLOCK):
        if rest := block.lstrip(b"\0"):
            return start + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(block)
    return None


@final
class Lmdb(Container):
    """An LMDB of text key -> image file, as LUPerson and LUPerson-NL have it.

    The database itself is walked. The pickled list of keys next to it is not read. Labels, counts and other small
    entries are passed over.
    """

    def __init__(self, files: Files, name: str, prefix: str):
        super().__init__(files, name, prefix)
        self._database: lmdb.Environment | None = None
        self._opening = threading.Lock()

    def images(self, passed_over: Counter[str]) -> list[ImageEntry]:
        found = []
        try:
            with self._opened().begin(buffers=True) as transaction:  # buffers: a value's length without its pages
                for key, value in transaction.cursor():
                    if _is_image(bytes(key), value):
                        found.append(ImageEntry(key_of(self.prefix + text_of(bytes(key))), len(value), container=self.name))
                    else:
                        passed_over[f"LMDB entries {_pattern(bytes(key))}"] += 1
                    self.num_listed = len(found)
        except lmdb.Error as error:
            raise UserError(f"an LMDB is required. {self.location} cannot be read as one: {error}") from error
        finally:
            self.close()
        return found

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _opened(self) -> lmdb.Environment:
        with self._opening:
            self._database = self._database or self._open()
            return self._database

    def _open(self) -> lmdb.Environment:
        path = self.files.path(self.name)
        try:
            database = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise UserError(f"an LMDB is required. {path} cannot be opened as one: {error}") from error
        needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
        if path.stat().st_size < needed:  # to touch what is not there would end the process with a bus error
            database.close()
            raise UserError(f"{path} must have at least {needed:,} bytes and has {path.stat().st_size:,}. Copy it again")
        return database

    def read(self, image: ImageEntry) -> bytes:
        try:
            with self._opened().begin() as transaction:
                value = transaction.get(bytes_of(name_of(image.key).removeprefix(self.prefix)))
        except lmdb.Error as error:
            raise OSError(str(error)) from error
        if value is None:
            raise FileNotFoundError("it is no longer in the database")
        return value


def _is_image(key: bytes, value: memoryview) -> bool:
    """Whether an entry may be an image. Only labels and small values are looked at."""
    if key in _LMDB_METADATA:
        return False
    if len(value) >= _TINY and not key.startswith(b"label"):
        return True
    return bytes(value[:4]).startswith(_IMAGE_MARKS)


def _pattern(key: bytes) -> str:
    return re.sub(r"\d+", "N", key_of(text_of(key)))

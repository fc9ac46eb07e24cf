r"""The files in a directory or below a bucket's prefix: listed with their sizes, then read whole, in part, or as open files.

Names are text in every locale: bytes that are not UTF-8 are kept as Python's ``surrogateescape`` keeps them.
``key_of`` writes such a name in plain UTF-8, with ``\xNN`` for each such byte, and ``name_of`` reverses it.
"""

import io
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, final

from personmae.errors import UserError
from personmae.system import retry, storage

_AHEAD = 1 << 20  # bytes that are fetched at once while an object is read piece by piece
_MOST_AHEAD = 8  # times as much, for what is read in order
_PAUSES = (0.1, 1.0, 5.0)
_Result = TypeVar("_Result")


class File(NamedTuple):
    """A file's path below the root, and its size in bytes (-1 of a link that leads nowhere)."""

    name: str
    num_bytes: int


class Files(ABC):
    """The files below a root. They can be pickled, and may be used by several threads."""

    block_bytes: int = 0  # how much to read at once of a file whose pieces are wanted in order; 0 for each by itself
    location: str  # of the root
    only: str | None  # the single file that counts, or None

    @abstractmethod
    def files(self, passed_over: Counter[str]) -> list[File]:
        """All files, sorted by name. Hidden ones and the like are counted in ``passed_over`` instead.

        Raises:
            UserError: they cannot be listed.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Whether the root, or the file that counts, is still there."""

    @abstractmethod
    def read(self, name: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """The bytes of a file, or ``num_bytes`` of them from ``offset`` on.

        Raises:
            OSError: they cannot be read. One of ``retry.LOST`` if this file is not to be had.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """An open file that can seek. Its reads may raise ``OSError``."""

    def path(self, name: str) -> Path:
        """The path of a file on this machine.

        Raises:
            UserError: it is not on this machine.
        """
        raise UserError(f"an LMDB is read on a disk only. Copy {self.location}/{name} to a directory first")


def key_of(name: str) -> str:
    r"""A file's name as valid UTF-8, by which ``name_of`` finds it: ``caf\xe9.jpg`` where a byte is none.

    A UTF-8 name stays unchanged, unless it looks like such a key itself: its backslash becomes ``\x5c``.
    """
    name = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", name)
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_of(key: str) -> str:
    """The name that has a key."""
    if "\\x" not in key:
        return key
    escaped = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), key.encode())
    return escaped.decode("utf-8", "surrogateescape")


def text_of(name: bytes) -> str:
    """A name's bytes as text."""
    return name.decode("utf-8", "surrogateescape")


def bytes_of(name: str) -> bytes:
    """The bytes of a name, whatever the locale."""
    return name.encode("utf-8", "surrogateescape")


def patiently(call: Callable[[], _Result]) -> _Result:
    """The result of ``call``. A disk or a network that fails is asked again for six seconds.

    Raises:
        OSError: it still fails, or one of ``retry.LOST``.
    """
    return retry.retry(call, retry.Patience(lambda: iter(_PAUSES)), retry.disk_reason)


# --- a directory ---


@final
class LocalFiles(Files):
    """The files below a directory, links followed. ``only`` is the single one of them that counts."""

    def __init__(self, root: Path, only: str | None = None):
        self.location, self._root, self.only = str(root), root, only

    def files(self, passed_over: Counter[str]) -> list[File]:
        if self.only is not None:
            return [File(self.only, self.path(self.only).stat().st_size)]
        return sorted(self._below(b"", frozenset(), passed_over))

    def _below(self, below: bytes, around: frozenset[bytes], passed_over: Counter[str]) -> Iterator[File]:
        """The files below a folder. ``around`` are the folders in which this one is being walked."""
        folder = os.path.join(os.fsencode(self._root), below)
        real = os.path.realpath(folder)
        if real in around:
            passed_over["links to a folder above"] += 1
            return
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(
                f"all folders below {self._root} must be readable. {os.fsdecode(folder)} is not: {error.strerror}. Fix it"
            ) from error
        for entry in entries:
            path = os.path.join(below, entry.name)
            if entry.name.startswith(b"."):
                passed_over["hidden folders" if entry.is_dir() else "hidden files"] += 1
            elif entry.is_dir():
                yield from self._below(path, around | {real}, passed_over)
            elif entry.is_file():
                yield File(text_of(path), entry.stat().st_size)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                yield File(text_of(path), -1)
            else:
                passed_over["devices, pipes and sockets"] += 1

    def exists(self) -> bool:
        return self.path(self.only or "").exists()

    def path(self, name: str) -> Path:
        return self._root / os.fsdecode(bytes_of(name))

    def read(self, name: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        if num_bytes is None:
            return self.path(name).read_bytes()
        with self.path(name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), num_bytes, offset)

    def open(self, name: str) -> BinaryIO:
        return self.path(name).open("rb")


# --- a bucket ---


@final
class BucketFiles(Files):
    """The objects below ``s3://bucket/prefix``, or the ``single`` one that has this very key."""

    block_bytes = 1 << 23  # a request costs as much as a megabyte or more

    def __init__(self, root: str, *, single: bool = False):
        self.location, self.only = root.rstrip("/"), None
        self._bucket, self._prefix = storage.split_s3(root)
        if single:
            folder, slash, self.only = self._prefix.rstrip("/").rpartition("/")
            self._prefix, self.location = f"{folder}{slash}", self.location[: -len(self.only) - 1]

    def files(self, passed_over: Counter[str]) -> list[File]:
        found = sorted(self._listed())
        if self.only is not None:
            return [file for file in found if file.name == self.only]
        hidden = {name: re.search(r"(?:^|/)\.[^/]*(/)?", name) for name, _ in found}
        folders = {name[: hit.end()] for name, hit in hidden.items() if hit and hit[1]}
        passed_over["hidden folders"] += len(folders)
        passed_over["hidden files"] += sum(1 for hit in hidden.values() if hit and not hit[1])
        return [file for file in found if not hidden[file.name]]

    def exists(self) -> bool:
        first = next(self._listed(), None)  # of keys that begin alike the shortest comes first
        return first is not None and self.only in (None, first.name)

    def _listed(self) -> Iterator[File]:
        prefix = self._prefix + (self.only or "")
        with storage.explained(self.location, "listing"):
            pages = storage.shared_client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # what some clients write for a folder
                        yield File(item["Key"].removeprefix(self._prefix), item["Size"])

    def read(self, name: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        asked = {} if num_bytes is None else {"Range": f"bytes={offset}-{offset + num_bytes - 1}"}
        if num_bytes == 0:
            return b""
        with self._failing_as_a_disk(name):
            return storage.shared_client().get_object(Bucket=self._bucket, Key=self._prefix + name, **asked)["Body"].read()

    def open(self, name: str) -> BinaryIO:
        with self._failing_as_a_disk(name):
            size = storage.shared_client().head_object(Bucket=self._bucket, Key=self._prefix + name)["ContentLength"]
        return _OpenObject(self, name, size)  # type: ignore[return-value]

    @contextmanager
    def _failing_as_a_disk(self, name: str) -> Iterator[None]:
        """What may pass is raised as an ``OSError``, an object that is not there as ``FileNotFoundError``.

        Raises:
            UserError: it is refused for another reason.
        """
        try:
            yield
        except Exception as error:
            response: dict[str, Any] = getattr(error, "response", {})
            if response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                raise FileNotFoundError("it is no longer in the bucket") from error
            reason = retry.passing_reason(error)
            if reason == "expired":
                storage.renew_credentials()
            if reason:
                raise OSError(f"{error} ({reason})") from error
            with storage.explained(f"{self.location}/{name}", "reading"):
                raise


class _OpenObject(io.RawIOBase):
    """An object that is read piece by piece, a block ahead at a time."""

    def __init__(self, files: BucketFiles, name: str, num_bytes: int):
        self._files, self._name, self._num_bytes = files, name, num_bytes
        self._at, self._start, self._block = 0, 0, b""
        self._ahead = _AHEAD

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._num_bytes - self._at))
        if not wanted:
            return 0
        if not self._start <= self._at <= self._at + wanted <= self._start + len(self._block):
            follows = self._start <= self._at < self._start + len(self._block) + self._ahead  # pieces in order
            self._ahead = min(2 * self._ahead, _MOST_AHEAD * _AHEAD) if follows else _AHEAD
            ahead = min(max(wanted, self._ahead), self._num_bytes - self._at)
            self._block, self._start = patiently(lambda: self._files.read(self._name, self._at, ahead)), self._at
        first = self._at - self._start
        piece = self._block[first : first + wanted]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

"""Where pictures come from: a folder tree, an LMDB or uncompressed tars, and which of their pictures are wanted.

A source lists all its pictures once, quickly and always in the same order, and then gives the bytes of any of them in any
process. Whether those bytes are a picture is for ``shards`` to say.
"""

import io
import os
import pickle
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import lmdb
import numpy as np
import xxhash

from personmae.errors import UserError

_SUFFIXES = (".jpg", ".jpeg")
_LMDB_SUFFIXES = (".mdb", ".lmdb")
_LMDB_METADATA = {b"__len__", b"__keys__", b"__meta__", b"keys", b"keys.pkl", b"len", b"length", b"num-samples"}
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_COMPRESSED_MARKS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


class Picture(NamedTuple):
    """One entry of a source: its name, its size in bytes and, in a tar, where it begins."""

    key: str
    num_bytes: int
    offset: int = 0


class Source(ABC):
    """A source of pictures. It can be pickled while it is not open; ``read`` may be called by several threads."""

    path: Path

    @abstractmethod
    def pictures(self) -> list[Picture]:
        """All pictures in an order that stays the same; no two have one key, and none is read.

        Raises:
            UserError: the source cannot be read.
        """

    @abstractmethod
    def __enter__(self) -> Self:
        """Open what ``read`` needs."""

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Close it again."""

    @abstractmethod
    def read(self, picture: Picture) -> bytes:
        """The bytes of a picture of an open source.

        Raises:
            OSError: this one cannot be read.
        """


def open_source(path: Path) -> Source:
    """The source that ``path`` is, by what is there.

    Raises:
        UserError: nothing is there, or something that is none of the three, or a compressed tar.
    """
    if path.name.lower().endswith(_COMPRESSED_SUFFIXES) and path.is_file():
        raise _compressed(path)
    if (path.is_file() and path.suffix.lower() in _LMDB_SUFFIXES) or (path / "data.mdb").is_file():
        return LmdbSource(path)
    if path.is_file() and path.suffix.lower() == ".tar":
        return TarSource(path, [path])
    if not path.is_dir():
        what = "is a file of another kind" if path.exists() else "is not there"
        raise UserError(f"a folder of .jpg files, an LMDB or a .tar is required; {path} {what}")
    files = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    tars = [path / name for name in files if name.lower().endswith(".tar")]
    compressed = [path / name for name in files if name.lower().endswith(_COMPRESSED_SUFFIXES)]
    if (tars or compressed) and next(_keys_below(path), None) is None:
        if compressed:
            raise _compressed(compressed[0])
        return TarSource(path, tars)
    return FolderSource(path)


def _compressed(path: Path) -> UserError:
    return UserError(f"an uncompressed tar is required, to read pictures by their place in it; decompress {path} first")


@final
class FolderSource(Source):
    """All .jpg and .jpeg files below a folder, at any depth and through links, sorted; the key is the path below the folder."""

    def __init__(self, path: Path):
        self.path = path

    def pictures(self) -> list[Picture]:
        found = [Picture(key, self._num_bytes(key)) for key in sorted(_keys_below(self.path))]
        if not found:
            raise UserError(
                f"a folder of .jpg files is required; {self.path} holds none (other formats must be converted first)"
            )
        return found

    def _num_bytes(self, key: str) -> int:
        try:
            return os.stat(f"{self.path}/{key}").st_size
        except OSError:  # a dangling link; reading it will say so
            return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, picture: Picture) -> bytes:
        return (self.path / picture.key).read_bytes()


def _keys_below(root: Path, below: str = "", around: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of the .jpg files below a folder, links followed; ``around`` are the folders in which this one is being walked."""
    folder = root / below
    real = os.path.realpath(folder)
    if real in around:  # a link back to where it came from
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"all folders below {root} must be readable; {folder} is not: {error.strerror}; mend it") from error
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _keys_below(root, path, around | {real})
        elif entry.name.lower().endswith(_SUFFIXES):
            yield path


@final
class LmdbSource(Source):
    """An LMDB of text key -> JPEG bytes, as LUPerson and LUPerson-NL are kept.

    The database itself is walked; the pickled list of keys that lies beside it is not read. Keys that are known to hold
    something else than a picture are left out.
    """

    def __init__(self, path: Path):
        self.path = path
        self._database: lmdb.Environment | None = None

    def pictures(self) -> list[Picture]:
        try:
            with self, self._opened().begin(buffers=True) as transaction:  # buffers: a value's length without its pages
                entries = ((bytes(key), len(value)) for key, value in transaction.cursor())
                found = [Picture(_text(key), size) for key, size in entries if key not in _LMDB_METADATA]
        except lmdb.Error as error:
            raise UserError(f"an LMDB is required; {self.path} cannot be read as one: {error}") from error
        if not found:
            raise UserError(f"an LMDB of JPEG files is required; {self.path} is empty")
        return found

    def __enter__(self) -> Self:
        self._database = self._open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _opened(self) -> lmdb.Environment:
        assert self._database is not None
        return self._database

    def _open(self) -> lmdb.Environment:
        try:
            database = lmdb.open(str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise UserError(f"an LMDB is required; {self.path} cannot be opened as one: {error}") from error
        file = self.path / "data.mdb" if self.path.is_dir() else self.path
        needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
        if file.stat().st_size < needed:  # to touch what is not there would end the process with a bus error
            database.close()
            raise UserError(f"{file} must have at least {needed:,} bytes and has {file.stat().st_size:,}; copy it again")
        return database

    def read(self, picture: Picture) -> bytes:
        try:
            with self._opened().begin() as transaction:
                value = transaction.get(picture.key.encode("utf-8", "surrogateescape"))
        except lmdb.Error as error:
            raise OSError(str(error)) from error
        if value is None:
            raise FileNotFoundError("it is no longer in the database")
        return value


def _text(key: bytes) -> str:
    """A key as text; what is not UTF-8 survives, to be named among the rejects."""
    return key.decode("utf-8", "surrogateescape")


@final
class TarSource(Source):
    """The .jpg and .jpeg members of uncompressed tars (WebDataset's too), one after another.

    The key is ``<tar's stem>/<member's name>``.
    """

    def __init__(self, path: Path, tars: list[Path]):
        self.path = path
        self._tars = {tar.stem: tar for tar in tars}
        if len(self._tars) != len(tars):
            raise UserError(f"the tars of {path} must have different names without their suffixes; rename one")

    def pictures(self) -> list[Picture]:
        found = [picture for stem, tar in self._tars.items() for picture in self._members(stem, tar)]
        if not found:
            raise UserError(f"a tar with .jpg members is required; {self.path} holds none")
        return found

    def _members(self, stem: str, tar: Path) -> list[Picture]:
        with tar.open("rb") as file:
            if file.read(6).startswith(_COMPRESSED_MARKS):
                raise _compressed(tar)
        try:
            with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
                members = [m for m in archive if m.isreg() and m.name.lower().endswith(_SUFFIXES)]
                file.seek(archive.offset)  # where tarfile has stopped, be it at the end or at damage
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"what follows byte {archive.offset:,} is neither a member nor the end")
        except tarfile.TarError as error:
            raise UserError(f"a whole tar is required; {tar} is not one: {error}; write or copy it again") from error
        keys = ((f"{stem}/{member.name.removeprefix('./')}", member) for member in members)
        # of members with one name the last counts, as it does for tar
        return list({key: Picture(key, member.size, member.offset_data) for key, member in keys}.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, picture: Picture) -> bytes:
        with self._tars[picture.key.partition("/")[0]].open("rb", buffering=0) as file:
            return os.pread(file.fileno(), picture.num_bytes, picture.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which pictures of a source are wanted: those on a list, the first share of the list, a random share of those.

    ``first`` and ``fraction`` lie in (0, 1]. The random share is exactly ``round(fraction * n)`` of n pictures; a smaller
    one is contained in a larger one of the same seed (PersonMAE, arXiv 2311.04496, Figure 4, trains on such shares).
    """

    list_file: Path | None = None
    trust_pickle: bool = False  # read a list that is a pickle
    first: float = 1.0
    fraction: float = 1.0
    seed: int = 0

    def of(self, pictures: list[Picture]) -> list[Picture]:
        """The wanted pictures, in the order given.

        Raises:
            UserError: a share out of range or empty, or the list cannot be read or names an unknown picture.
        """
        for name, share in (("first", self.first), ("fraction", self.fraction)):
            if not 0 < share <= 1:
                raise UserError(f"--{name} must be above 0 and at most 1, got {share}")
        if self.list_file is not None:
            names = read_list(self.list_file, trust_pickle=self.trust_pickle)
            pictures = listed(pictures, names[: round(self.first * len(names))], self.list_file)
        elif self.first != 1:
            raise UserError(f"--first {self.first} is a share of a list; name one with --list, or use --fraction")
        if self.fraction < 1:
            pictures = random_share(pictures, self.fraction, self.seed)
        if not pictures:
            raise UserError("at least one picture must be left to write, but the shares asked for leave none; raise them")
        return pictures


def random_share(pictures: list[Picture], fraction: float, seed: int) -> list[Picture]:
    """The pictures whose keys have the smallest hashes; who they are does not depend on the order."""
    encoded = (picture.key.encode("utf-8", "surrogateescape") for picture in pictures)
    hashes = np.fromiter((xxhash.xxh64_intdigest(key, seed % 2**64) for key in encoded), np.uint64, len(pictures))
    kept = np.argsort(hashes, kind="stable")[: round(fraction * len(pictures))]
    return [pictures[i] for i in np.sort(kept)]


def read_list(path: Path, *, trust_pickle: bool = False) -> list[str]:
    """The names in a text file, one a line, or in a pickle of plain lists; each name once.

    Raises:
        UserError: there is no such file, it is a pickle and not trusted, or it holds something else than names.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"a list of names is required; {path} cannot be read: {error.strerror}") from error
    if path.suffix.lower() in (".pkl", ".pickle") or content.startswith(b"\x80"):
        if not trust_pickle:
            raise UserError(f"a list of names, one a line, is required; {path} is a pickle: add --trust-pickle-list to read it")
        names = _unpickled(content, path)
    else:
        names = [line.strip() for line in content.decode("utf-8-sig", "surrogateescape").split("\n") if line.strip()]
    if not names:
        raise UserError(f"a list of names is required; {path} is empty")
    return list(dict.fromkeys(names))


def _unpickled(content: bytes, path: Path) -> list[str]:
    try:
        names = _PlainUnpickler(io.BytesIO(content)).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise UserError(f"a pickle of a plain list of names is required; {path} is not one: {error}") from error
    names = names.get("keys") if isinstance(names, dict) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"a pickled list of names, or a dict with one under 'keys', is required; {path} holds something else")
    return names


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, text and numbers; nothing that is looked up by name, so nothing that could run."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def listed(pictures: list[Picture], names: list[str], list_file: Path) -> list[Picture]:
    """The pictures that ``names`` name: by key, or by its last part or without .jpg where that is unambiguous.

    Raises:
        UserError: a name stands for no picture or for several.
    """
    by_key = {picture.key: place for place, picture in enumerate(pictures)}
    short = _short_names(pictures) if any(name not in by_key for name in names) else {}
    places = [by_key.get(name, by_key.get(_bare(name), short.get(name, short.get(_bare(name))))) for name in names]
    for wrong, what in ((None, "no picture of the source"), (_SEVERAL, "several pictures of the source")):
        unclear = [name for name, place in zip(names, places, strict=True) if place == wrong]
        if unclear:
            raise UserError(
                f"every name in {list_file} must be a picture's; {len(unclear):,} of {len(names):,} stand for {what}, the "
                f"first is {unclear[0]!r}; write names like {pictures[0].key!r}"
            )
    return [pictures[place] for place in sorted({place for place in places if place is not None})]


_SEVERAL = -1


def _short_names(pictures: list[Picture]) -> dict[str, int]:
    short: dict[str, int] = {}
    for place, picture in enumerate(pictures):
        last = picture.key.rpartition("/")[2]
        for name in {last, _bare(last), _bare(picture.key)}:
            short[name] = place if short.get(name, place) == place else _SEVERAL
    return short


def _bare(name: str) -> str:
    return name[: name.rindex(".")] if name.lower().endswith(_SUFFIXES) else name

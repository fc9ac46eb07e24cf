"""Sources of images: everything below a folder or a bucket's prefix, whatever holds it.

These are image files, uncompressed tars, LMDBs (LUPerson), MDS shards written by others, and parquet files, in any mix.
A source lists all its images once, quickly and always in the same order. Then it gives the bytes of any of them in any
process. It counts what it passes over. ``shards`` decides whether the bytes are an image.
"""

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, final

from personmae import images
from personmae.data import mds
from personmae.data.containers import COMPRESSED_TARS, Container, ImageEntry, Lmdb, Tar, compressed, kind_of
from personmae.data.files import BucketFiles, File, Files, LocalFiles, key_of, name_of
from personmae.data.parquet import Parquet
from personmae.data.tables import Mds
from personmae.errors import UserError
from personmae.monitor.progress import repeated
from personmae.system import storage

_LMDB_SUFFIXES = (".mdb", ".lmdb")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_SINGLE = (".tar", *_LMDB_SUFFIXES, *_PARQUET_SUFFIXES)
_NUM_LISTERS = 8  # threads that look into tars and the like
_MOST_KINDS = 8  # that are listed one by one
_WANTED = f"images ({', '.join(images.SUFFIXES)}), an LMDB, tars, MDS shards or parquet files"


@final
class Source:
    """All images below a location. It can be pickled, and ``read`` may be called by several threads.

    ``column`` is the one to read of MDS shards and parquet files, where that is not plain. After ``images``,
    ``passed_over`` has the number of files and entries that are none of its images, by kind.
    """

    def __init__(self, files: Files, column: str | None = None):
        self._files, self._column = files, column
        self.location = f"{files.location}/{files.only}" if files.only else files.location
        self.passed_over: Counter[str] = Counter()
        self._containers: dict[str, Container] = {}
        self._opening = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._files, "column": self._column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def exists(self) -> bool:
        """Whether it is still there."""
        return self._files.exists()

    def images(self, log: Callable[[str], None] = lambda line: None) -> list[ImageEntry]:
        """All images in an order that stays the same. No two have one key, and none is read.

        ``log`` gets a line at once, and one every ten seconds while it lasts.

        Raises:
            UserError: the source cannot be read, or holds none.
        """
        self.passed_over = Counter()
        containers: list[Container] = []

        def so_far() -> str:
            done = sum(container.num_listed for container in containers)
            return f"listing {self.location}" + (
                f": {done:,} images so far in {len(containers):,} tars or the like" if done else ""
            )

        with repeated(log, so_far):
            return self._images(containers)

    def _images(self, containers: list[Container]) -> list[ImageEntry]:
        """As ``images``. Containers are added to a list before they are read."""
        files = self._files.files(self.passed_over)
        parts = self._parts(files)
        containers += [part for part in parts if isinstance(part, Container)]
        if self._column and not any(isinstance(container, Mds | Parquet) for container in containers):
            raise UserError(f"--column is of MDS shards and parquet files. {self.location} has none: leave it out")
        with ThreadPoolExecutor(_NUM_LISTERS) as threads:
            listings = threads.map(_listing, containers)
            found = list(itertools.chain.from_iterable(self._merged(parts, listings)))
        if not found:
            tars = [file.name for file in files if file.name.lower().endswith(COMPRESSED_TARS)]
            if tars:
                raise compressed(f"{self.location}/{tars[0]}")
            others = summary(self.passed_over)
            raise UserError(f"{_WANTED} are required. {self.location} holds none{others and f' next to {others}'}")
        if containers:
            _require_different_keys(found)
        return found

    def _parts(self, files: list[File]) -> list[File | Container]:
        """The files that are images, and the containers, in order. Others are counted."""
        owned = self._owned_by_tables(files)
        parts: list[File | Container] = []
        for file in files:
            if container := self._container(file.name):
                parts.append(container)
            elif file.name in owned:
                continue
            elif kind := kind_of(file.name):
                self.passed_over[kind if file.num_bytes >= 0 else "links that lead nowhere"] += 1
            else:
                parts.append(file)
        return parts

    def _owned_by_tables(self, files: list[File]) -> set[str]:
        """The files that belong to an MDS index or to an LMDB. Of indices that share shards the uppermost counts.

        Raises:
            UserError: a shard of an index is not there.
        """
        names, owned = {file.name for file in files}, set[str]()
        indices = [name for name in names if name.endswith(mds.INDEX) and os.path.basename(name) == mds.INDEX]
        for name in sorted(indices, key=lambda name: (name.count("/"), name)):
            index = Mds(self._files, name, _folder(name), self._column)
            if all(shard & owned for shard in index.members):  # no index of shards, or one below another
                if index.members:
                    owned.add(name)
                continue
            if missing := [min(shard) for shard in index.members if not shard & names]:
                raise UserError(f"all shards of {index.location} are required. {missing[0]} is not there. Copy it again")
            owned.update(*index.members)
            self._containers[name] = index
        for name in names:
            if name.lower().endswith(_LMDB_SUFFIXES) and os.path.basename(name) != "lock.mdb":
                owned |= {f"{_folder(name)}lock.mdb", f"{name}-lock"}
        return owned

    def _container(self, name: str) -> Container | None:
        """The container that a file is, or None. The indices that count were chosen before."""
        if name in self._containers:
            return self._containers[name]
        lower = name.lower()
        if not lower.endswith(_SINGLE) or os.path.basename(lower) == "lock.mdb":
            return None
        prefix = f"{os.path.splitext(name)[0]}/"
        if lower.endswith(".tar"):
            made: Container = Tar(self._files, name, prefix)
        elif lower.endswith(_PARQUET_SUFFIXES):
            made = Parquet(self._files, name, prefix, self._column)
        else:
            whole = os.path.basename(name) == "data.mdb" or name == self._files.only
            made = Lmdb(self._files, name, _folder(name) if whole else prefix)
        return self._containers.setdefault(name, made)

    def _merged(
        self, parts: list[File | Container], listings: Iterator[tuple[list[ImageEntry], Counter[str]]]
    ) -> Iterator[list[ImageEntry]]:
        for part in parts:
            if isinstance(part, File):
                yield [ImageEntry(key_of(part.name), max(0, part.num_bytes))]
            else:
                images, passed_over = next(listings)
                self.passed_over += passed_over
                yield images

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._opening:
            for container in self._containers.values():
                container.close()

    def read(self, image: ImageEntry) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError: this one cannot be read. One of ``retry.LOST`` if it is not to be had.
        """
        if not image.container:
            return self._files.read(name_of(image.key))
        with self._opening:
            container = self._containers.get(image.container) or self._reopened(image.container)
        return container.read(image)

    def _reopened(self, name: str) -> Container:
        if os.path.basename(name) == mds.INDEX:
            return self._containers.setdefault(name, Mds(self._files, name, _folder(name), self._column))
        container = self._container(name)
        assert container is not None
        return container


def _listing(container: Container) -> tuple[list[ImageEntry], Counter[str]]:
    passed_over: Counter[str] = Counter()
    return container.images(passed_over), passed_over


def _folder(name: str) -> str:
    """The folder of a file with a slash, or nothing at the top."""
    return name[: name.rfind("/") + 1]


def _require_different_keys(images: list[ImageEntry]) -> None:
    """Raise a ``UserError`` where two have one key, as of ``a.tar`` with b.jpg and a/b.jpg."""
    seen: dict[str, str] = {}
    for image in images:
        if image.key in seen:
            places = " and ".join(sorted({seen[image.key] or "a file", image.container or "a file"}))
            raise UserError(f"all images must have different names. {image.key} is in {places}. Rename one")
        seen[image.key] = image.container


def summary(passed_over: Counter[str]) -> str:
    """What was passed over, in words: ``12 .txt, 3 .mat``."""
    kinds = sorted(((count, kind) for kind, count in passed_over.items() if count), key=lambda each: (-each[0], each[1]))
    shown = [f"{count:,} {kind}" for count, kind in kinds[:_MOST_KINDS]]
    if rest := kinds[_MOST_KINDS:]:
        shown.append(f"{sum(count for count, _ in rest):,} of {len(rest)} other kinds")
    return ", ".join(shown)


def open_source(location: str | Path, column: str | None = None) -> Source:
    """The source at a directory, a file or ``s3://bucket/prefix``.

    Raises:
        UserError: nothing is there, or it is a file of another kind, or a store that cannot be listed.
    """
    place = str(location)
    if not storage.is_remote(place):
        return Source(_local_files(Path(location)), column)
    if not storage.is_s3(place):
        raise UserError(
            f"a directory or an s3:// location is required to read images from. {place} is in a store that cannot be listed: "
            "copy it, or give its S3-compatible address by S3_ENDPOINT_URL"
        )
    if storage.split_s3(place)[1] and (single := BucketFiles(place, single=True)).exists():
        _require_single(str(single.only), place)
        return Source(single, column)
    return Source(BucketFiles(place), column)


def _local_files(path: Path) -> LocalFiles:
    if path.is_dir():
        return LocalFiles(path)
    if not path.is_file():
        raise UserError(f"{_WANTED} are required. {path} is not there")
    _require_single(path.name, str(path))
    return LocalFiles(path.parent, path.name)


def _require_single(name: str, location: str) -> None:
    """Raise a ``UserError`` for a single file that can hold no images."""
    if name.lower().endswith(COMPRESSED_TARS):
        raise compressed(location)
    if not name.lower().endswith((*_SINGLE, *images.SUFFIXES)):
        raise UserError(f"{_WANTED} are required. {location} is a file of another kind")

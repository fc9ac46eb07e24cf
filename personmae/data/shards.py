"""MDS shards: writing them from a folder of JPEGs, verifying and describing them.

A sample is {jpeg: bytes as they were, key: path below the source, height, width}. mosaicml-streaming writes the shards and
the index, so ``streaming.StreamingDataset`` opens them too.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from personmae.data import storage
from personmae.data.stream import ShardSet
from personmae.errors import UserError

COLUMNS = {"jpeg": "bytes", "key": "str", "height": "uint16", "width": "uint16"}
HASHES = ["xxh64"]
SHARD_BYTES = 1 << 26
_SUFFIXES = {".jpg", ".jpeg"}
Progress = Callable[[int, int], None]


def find_pictures(source: Path) -> list[Path]:
    """All .jpg and .jpeg files below a folder, sorted by path.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    if not source.is_dir():
        raise UserError(f"a folder of .jpg files is required; {source} is not a folder")
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(source, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise UserError(f"a folder of .jpg files is required; {source} holds none (other formats must be converted first)")
    return sorted(found)


def jpeg_size(jpeg: bytes | memoryview) -> tuple[int, int]:
    """(height, width) from a JPEG's header.

    Raises:
        ValueError: the bytes are not a JPEG, or it is cut off.
    """
    jpeg = bytes(jpeg)
    if jpeg[:2] != b"\xff\xd8":
        raise ValueError(f"it begins with {jpeg[:8]!r}, which is not how a JPEG begins")
    if b"\xff\xd9" not in jpeg[-1024:]:
        raise ValueError("its end-of-image mark is missing: it is cut off")
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
        return image.height, image.width


def write(source: Path, destination: str, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None) -> int:
    """Write a folder's pictures as shards to a directory or ``s3://bucket/prefix``; returns how many.

    The index is written last and marks the data set as complete. A directory is built beside its final name and renamed;
    what was uploaded before an error is deleted again.

    Raises:
        UserError: the source holds no pictures or an unreadable one, or the destination is taken or cannot be written.
    """
    pictures = find_pictures(source)
    check_destination(destination)
    check_pictures(pictures)
    if storage.is_remote(destination):
        return _write_remote(pictures, source, destination, shard_bytes, progress)
    target = Path(destination)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_samples(pictures, source, str(partial), shard_bytes, progress)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return len(pictures)


def check_destination(destination: str) -> None:
    """Raise a UserError unless the destination can be reached and is empty."""
    if not storage.is_remote(destination) and not Path(destination).exists():
        return
    present = storage.list_sizes(destination)
    if present:
        name = sorted(present)[0]
        raise UserError(f"an empty destination is required; {destination} already holds {name}: delete it or choose another")


def check_pictures(pictures: list[Path]) -> None:
    """Raise a UserError naming the first file that is not a whole JPEG; nothing has been written by then."""

    def complaint(path: Path) -> str | None:
        try:
            jpeg_size(path.read_bytes())
        except (ValueError, OSError) as error:
            return f"{path} must be a JPEG file, but {error}"
        return None

    with ThreadPoolExecutor() as pool:
        bad = [text for text in pool.map(complaint, pictures, chunksize=64) if text]
    if bad:
        more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; remove or replace it, then run this again")


def _write_remote(pictures: list[Path], source: Path, destination: str, shard_bytes: int, progress: Progress | None) -> int:
    with tempfile.TemporaryDirectory(prefix="personmae-shards-") as local:
        try:
            with storage.explained(destination, "writing to"):
                _write_samples(pictures, source, (local, destination), shard_bytes, progress)
        except BaseException:
            written = storage.list_sizes(destination) or {}
            storage.delete(destination, list(written))
            raise
    return len(pictures)


def _write_samples(
    pictures: list[Path], source: Path, out: str | tuple[str, str], shard_bytes: int, progress: Progress | None
) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=out, columns=COLUMNS, hashes=HASHES, size_limit=shard_bytes, progress_bar=False) as writer:
        for done, path in enumerate(pictures, start=1):
            jpeg = path.read_bytes()
            height, width = jpeg_size(jpeg)
            key = path.relative_to(source).as_posix()
            writer.write({"jpeg": jpeg, "key": key, "height": np.uint16(height), "width": np.uint16(width)})
            if progress:
                progress(done, len(pictures))


def verify(root: str, *, cache_dir: Path, progress: Progress | None = None) -> int:
    """Read every sample back: shard sizes and hashes, JPEG headers, recorded sizes; returns the number of samples.

    Raises:
        UserError: something does not agree; the shard and sample are named.
    """
    done = 0
    with ShardSet(root, cache_dir) as shards:
        for index, shard in enumerate(shards.shards):
            shards.check_hash(index)
            for position in range(shard.samples):
                sample = shards.sample(index, position)
                try:
                    size = jpeg_size(sample["jpeg"])
                except (ValueError, OSError) as error:
                    raise UserError(f"sample {position} of {root}/{shard.name} is not a whole JPEG: {error}") from error
                recorded = tuple(
                    int(np.frombuffer(sample[side], np.uint16)[0]) for side in ("height", "width") if side in sample
                )
                if recorded and size != recorded:
                    raise UserError(f"sample {position} of {root}/{shard.name} is {size}, its record says {recorded}")
                done += 1
            if progress:
                progress(done, len(shards))
    return done


@dataclass(slots=True)
class Stats:
    """What a data set holds; heights are those of the pictures, in pixels."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    heights: dict[str, int] = field(default_factory=dict)


def describe(root: str, *, cache_dir: Path) -> Stats:
    """Counts, bytes and a histogram of picture heights in octaves of half a step."""
    with ShardSet(root, cache_dir) as shards:
        heights = np.fromiter(_heights(shards), np.int64)
        edges = np.unique(np.round(2.0 ** np.arange(4, 13, 0.5)).astype(int))
        counts, _ = np.histogram(heights, edges)
        histogram = {f"{a}-{b - 1} px": int(n) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True) if n}
        return Stats(len(shards.shards), len(shards), sum(shard.num_bytes for shard in shards.shards), histogram)


def _heights(shards: ShardSet) -> Iterator[int]:
    for index, shard in enumerate(shards.shards):
        for position in range(shard.samples):
            sample = shards.sample(index, position)
            yield int(np.frombuffer(sample["height"], np.uint16)[0]) if "height" in sample else jpeg_size(sample["jpeg"])[0]

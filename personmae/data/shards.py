"""MDS shards: write one from checked images, verify a set of them, and describe it.

A sample is {jpeg: a JPEG, key: its name in the source, height, width}. The sizes are those of the upright image. A JPEG that
the fast decoder takes is kept byte for byte. Everything else that ``images`` can read is encoded as JPEG.
mosaicml-streaming writes the shards, so ``streaming.StreamingDataset`` opens them too.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from personmae import dist, images
from personmae.data.containers import ImageEntry
from personmae.data.files import patiently
from personmae.data.mds import INDEX
from personmae.data.shard_set import ShardSet
from personmae.data.sources import Source
from personmae.errors import UserError
from personmae.images import BadImage
from personmae.system import mosaic
from personmae.system.retry import LOST

COLUMNS = {"jpeg": "bytes", "key": "str", "height": "uint16", "width": "uint16"}
HASHES = ["xxh64"]
SHARD_BYTES = 1 << 26
_NUM_READERS = 4  # threads of a process; they hide the latency of a slow file system
_CHUNK = 32
_CACHE_BYTES = 1 << 28  # of a set that is read once, from end to end
Progress = Callable[[int, int], None]
Record = dict[str, Any]  # {"shard": its index entry or None, "rejects": [{"key", "reason", "kind"}]}


def header_bytes(size_limit: int) -> int:
    """Bytes of a shard without samples: their number, the end of the last, and what ``MDSWriter`` notes of itself."""
    names = sorted(COLUMNS)
    config = {
        "column_encodings": [COLUMNS[name] for name in names],
        "column_names": names,
        "column_sizes": [2 if COLUMNS[name] == "uint16" else None for name in names],
        "compression": None,
        "format": "mds",
        "hashes": HASHES,
        "size_limit": size_limit,
        "version": 2,
    }
    return 4 + 4 + len(json.dumps(config))


def sample_bytes(key: str, num_bytes: int) -> int:
    """Bytes of a sample: where it begins, the lengths of its two texts, its two sides, and the texts themselves."""
    return 4 + 2 * 4 + 2 * 2 + len(key.encode()) + num_bytes


def shard_name(number: int) -> str:
    return f"shard.{number:05}.mds"


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to write."""

    number: int
    source: Source
    images: list[ImageEntry]
    shard_bytes: int
    max_side: int | None
    staging: Path

    @property
    def folder(self) -> Path:
        """Where its file is put."""
        return self.staging / f"{self.number:05}"


def write_shard(task: Task) -> Record:
    """Read and check a shard's images, and write those that are whole into the task's folder."""
    chunks = [task.images[start : start + _CHUNK] for start in range(0, len(task.images), _CHUNK)]
    with task.source, ThreadPoolExecutor(_NUM_READERS) as threads:
        read = threads.map(lambda chunk: [_sample(task, image) for image in chunk], chunks)
        samples = list(itertools.chain.from_iterable(read))
    whole = [sample for sample in samples if "reason" not in sample]
    rejects = [sample for sample in samples if "reason" in sample]
    return {"shard": _write_mds(task, whole) if whole else None, "rejects": rejects}


def _sample(task: Task, image: ImageEntry) -> dict[str, Any]:
    """A sample, or {"key", "reason", "kind"} where the image cannot be used."""
    try:
        content = _read(task.source, image)
        num_bytes = image.num_bytes if image.exact else len(content)
        jpeg, height, width = checked(content, num_bytes, task.max_side)
    except UserError:  # which is a ValueError too
        raise
    except LOST as error:
        if not task.source.exists():
            raise UserError(f"{task.source.location} has gone while it was read. Put it back and run this again") from error
        reason, kind = f"it cannot be read: {error.strerror or error}", "cannot be read"
    except BadImage as error:
        reason, kind = str(error), error.kind
    else:
        return {"jpeg": jpeg, "key": image.key, "height": np.uint16(height), "width": np.uint16(width)}
    return {"key": image.key, "reason": reason, "kind": kind}


def _read(source: Source, image: ImageEntry) -> bytes:
    """The bytes of an image. A disk or a network that fails is asked again before the import stops.

    Raises:
        OSError: one of ``LOST``: this image cannot be read.
        UserError: reading fails in another way, so that leaving the image out would be wrong.
    """
    try:
        return patiently(lambda: source.read(image))
    except LOST:
        raise
    except OSError as error:
        what = error.strerror or error
        raise UserError(
            f"{image.key} of {source.location} cannot be read: {what}. Fix that and run the same command to continue"
        ) from error


def checked(data: bytes, num_bytes: int, max_side: int | None = None) -> tuple[bytes, int, int]:
    """An image that was decoded to its end, as JPEG, with its upright height and width.

    A JPEG that the fast decoder takes is kept byte for byte, its EXIF orientation with it. Another image is encoded as JPEG,
    and so is one that is shrunk because its longer side exceeds ``max_side``.

    Raises:
        BadImage: it does not have ``num_bytes``, is not an image, ends too early or is too large.
    """
    if len(data) != num_bytes and data:
        change = f"it has {len(data):,} bytes and had {num_bytes:,} when the source was listed"
        raise BadImage(change, "changed since the source was listed")
    pixels, fast = images.decode(data)
    height, width = pixels.shape[:2]
    if max_side is not None and max(height, width) > max_side:
        scale = max_side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        small = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA)
        return images.encode(small.astype(np.uint8, copy=False)), height, width
    return (data if fast else images.encode(pixels)), height, width


def _write_mds(task: Task, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Write one file and return its index entry."""
    num_bytes = sum(sample_bytes(sample["key"], len(sample["jpeg"])) for sample in samples)
    limit = task.shard_bytes
    if header_bytes(limit) + num_bytes > limit:  # one large image; the writer would begin another file for it
        limit = num_bytes + 1024
    writer_type = mosaic.load("streaming.base.format.mds.writer").MDSWriter
    with writer_type(out=str(task.folder), columns=COLUMNS, hashes=HASHES, size_limit=limit) as writer:
        for sample in samples:
            writer.write(sample)
    index = task.folder / INDEX
    (entry,) = json.loads(index.read_text(encoding="utf-8"))["shards"]
    index.unlink()
    name = shard_name(task.number)
    (task.folder / entry["raw_data"]["basename"]).rename(task.folder / name)
    entry["raw_data"]["basename"] = name
    return entry


# --- reading back ---


def verify(root: str, *, cache_dir: Path, keep: bool = False, progress: Progress | None = None) -> int:
    """Check shard sizes and hashes, and that every image is whole and has its recorded size. Returns the number of samples.

    Fetched shards stay in ``cache_dir`` where they are to be kept.

    Raises:
        UserError: something does not agree. The shard and sample are named.
    """
    done = 0
    limit = None if keep else _CACHE_BYTES
    with ShardSet(root, cache_dir, cache_limit_bytes=limit) as shards, ThreadPoolExecutor(dist.usable_cores()) as threads:
        for index, shard in enumerate(shards.shards):
            opened = shards.open(index)
            samples = (opened.sample(position) for position in range(shard.samples))
            for position, complaint in enumerate(threads.map(_complaint, samples)):
                if complaint:
                    raise UserError(f"sample {position} of {root}/{shard.name} {complaint}")
            done += shard.samples
            if progress:
                progress(done, len(shards))
    return done


def _complaint(sample: dict[str, memoryview]) -> str | None:
    try:
        decoded = images.decode(bytes(sample["jpeg"]))
    except BadImage as error:
        return f"is not a whole JPEG: {error}"
    if not decoded.fast:
        return "is not a JPEG that the decoder of training takes without a complaint"
    size = decoded.pixels.shape[:2]
    recorded = tuple(int(np.frombuffer(sample[side], np.uint16)[0]) for side in ("height", "width") if side in sample)
    # Sets that were written before images were turned have the sizes as stored.
    if not recorded or recorded == size or (recorded == size[::-1] and images.orientation(sample["jpeg"]) != images.AS_STORED):
        return None
    return f"is {size}, its record says {recorded}"


@dataclass(slots=True)
class Stats:
    """What a data set holds. Heights are those of the images, in pixels."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    heights: dict[str, int] = field(default_factory=dict)


def describe(root: str, *, cache_dir: Path, keep: bool = False, progress: Progress | None = None) -> Stats:
    """Counts, bytes and a histogram of image heights in half-octaves. Fetched shards stay where they are to be kept."""
    with ShardSet(root, cache_dir, cache_limit_bytes=None if keep else _CACHE_BYTES) as shards:
        heights = np.fromiter(_heights(shards, progress or (lambda done, total: None)), np.int64)
        edges = np.unique(np.round(2.0 ** np.arange(0, 16.5, 0.5)).astype(int))
        counts, _ = np.histogram(heights, edges)
        histogram = {f"{a}-{b - 1} px": int(n) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True) if n}
        return Stats(len(shards.shards), len(shards), sum(shard.num_bytes for shard in shards.shards), histogram)


def _heights(shards: ShardSet, progress: Progress) -> Iterator[int]:
    done = 0
    for index, shard in enumerate(shards.shards):
        opened = shards.open(index)
        yield from (images.upright_size(opened.jpeg(position))[0] for position in range(shard.samples))
        done += shard.samples
        progress(done, len(shards))

"""The plan of an import: which images go into which shard, and which host writes which shards."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from personmae.data.containers import ImageEntry
from personmae.data.selection import Selection
from personmae.data.shards import header_bytes, sample_bytes
from personmae.data.sources import Source, summary
from personmae.monitor.progress import counted

_FORMAT_VERSION = 2  # one more with each rule of what a shard holds: sizes are upright since 2


@dataclass(frozen=True, slots=True)
class Part:
    """This host among the ``count`` hosts of an import. ``number`` counts from 1, and its shards are consecutive."""

    number: int = 1
    count: int = 1

    def of(self, num_shards: int) -> range:
        """The numbers of its shards."""
        return range(num_shards * (self.number - 1) // self.count, num_shards * self.number // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Part()


@dataclass(frozen=True)
class ImportPlan:
    """Which images make which shard, and all else that decides what the result is."""

    source: Source
    images: list[ImageEntry]
    starts: list[int]  # place of each shard's first image
    shard_bytes: int
    max_side: int | None
    max_rejects: float = 1.0  # share that may be left out; not part of what is compared, as it decides of the end alone

    def of_shard(self, number: int) -> list[ImageEntry]:
        """The images of a shard."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.images)
        return self.images[self.starts[number] : end]

    def __str__(self) -> str:
        others = summary(self.source.passed_over)
        line = f"{self.source.location}: {counted(len(self.images), 'image')} for {counted(len(self.starts), 'shard')}"
        return f"{line}. Passed over: {others}" if others else line

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What must agree before an unfinished import continues."""
        digest = xxhash.xxh3_128()
        for image in self.images:
            digest.update(f"{image.key}\0{image.num_bytes}\n".encode())
        return {
            "format_version": _FORMAT_VERSION,
            "shard_bytes": self.shard_bytes,
            "max_side": self.max_side,
            "num_images": len(self.images),
            "num_shards": len(self.starts),
            "images": digest.hexdigest(),
        }

    @functools.cached_property
    def digest(self) -> str:
        """A number for the record, which each shard's record has too."""
        return xxhash.xxh64_hexdigest(json.dumps(self.record))


def make_plan(
    source: Source,
    selection: Selection,
    shard_bytes: int,
    max_side: int | None,
    log: Callable[[str], None] = lambda line: None,
) -> ImportPlan:
    """List the source and cut the wanted images into shards as streaming's writer would: full, in order."""
    images = selection.of(source.images(log))
    empty = header_bytes(shard_bytes)
    starts, size = [0], empty
    for place, image in enumerate(images):
        num_bytes = sample_bytes(image.key, image.num_bytes)
        if size + num_bytes > shard_bytes and place > starts[-1]:
            starts.append(place)
            size = empty
        size += num_bytes
    return ImportPlan(source, images, starts, shard_bytes, max_side)

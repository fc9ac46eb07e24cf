"""Where a gallery's rows come from: a file of features, or images whose features are computed first.

Nothing is held that grows with a feature's length: files of features are read in blocks.
"""

import collections
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from jaxtyping import Float, UInt8

from personmae import dist
from personmae.errors import UserError
from personmae.gallery import facts
from personmae.gallery.facts import Facts, Table
from personmae.gallery.segment import PIECE_ROWS
from personmae.images import BadImage
from personmae.system import files
from personmae.weights.extract_images import Images
from personmae.weights.feature_file import ABOUT, ids_beside

THUMBNAIL: Final = (128, 96)  # (height, width) in pixels that a thumbnail fits into
_QUALITY: Final = 85
_NPY, _PARQUET = ".npy", ".parquet"


@dataclass(frozen=True)
class Source:
    """Rows on their way in: ids, what is known of them, features by blocks, and images where there are some.

    ``model`` has the digest of what computed the features, where that is known, and its place.
    """

    path: Path
    ids: list[str]
    facts: Facts
    dim: int
    model: dict[str, Any] | None
    images: "Pictures | None" = None

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "n D"]]]:
        """All features in fp32, brought to length one.

        Raises:
            UserError: one has no length, or is not finite.
        """
        place = 0
        for features in _npy_blocks(self.path) if self.path.suffix.lower() == _NPY else _parquet_blocks(self.path, self.dim):
            rows = slice(place, place + len(features))
            yield rows, _of_length_one(features, self.ids[rows], self.path)
            place = rows.stop


class Pictures:
    """Images by id, for thumbnails."""

    def __init__(self, images: Images):
        self._images = images
        self._numbers = {name: number for number, name in enumerate(images.ids)}

    def require_some(self, ids: list[str]) -> None:
        """Raise a UserError where no id is the name of an image."""
        if not any(name in self._numbers for name in ids):
            raise UserError(
                f"images with the ids of the features are required. {self._images.location} has none of them, such as {ids[0]}"
            )

    def thumbnails(self, ids: list[str]) -> list[bytes]:
        """A small JPEG of each image, or nothing where it is not there or cannot be read."""
        cv2.setNumThreads(1)
        with ThreadPoolExecutor(dist.usable_cores()) as pool:
            return list(pool.map(self._thumbnail, ids))

    def _thumbnail(self, name: str) -> bytes:
        if (number := self._numbers.get(name)) is None:
            return b""
        try:
            return thumbnail(self._images.pixels(number))
        except BadImage:
            return b""


def thumbnail(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A JPEG of an image, shrunk to fit into ``THUMBNAIL`` with its own shape."""
    scale = min(1.0, *(most / side for most, side in zip(THUMBNAIL, pixels.shape, strict=False)))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    small = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small, np.uint8), quality=_QUALITY)


def is_features(location: str) -> bool:
    """Whether a location is a file of features rather than of images."""
    path = Path(location)
    if path.suffix.lower() == _NPY:
        return True
    if path.suffix.lower() != _PARQUET or not path.is_file():
        return False
    try:
        return "feature" in pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        return False


def open_features(path: Path, *, table: Table | None = None) -> Source:
    """The rows of a file that ``personmae extract`` wrote, or of any .npy with a list of ids beside it.

    What ``table`` has of them comes before what their names or the file's columns have.

    Raises:
        UserError: it cannot be read, or an id is in it twice, empty or with a line break.
    """
    try:
        found = _open_npy(path) if path.suffix.lower() == _NPY else _open_parquet(path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"a file of 'personmae extract' is required. {path} cannot be read as one: {error}") from error
    if not found.ids or not found.dim:
        raise UserError(f"a file with at least one feature is required. {path} has none")
    require_different(found.ids, str(path))
    if odd := [name for name in found.ids if not name or "\n" in name]:
        raise UserError(f"ids may not be empty or hold a line break. {path} has {odd[0]!r}: rename it")
    return replace(found, facts=table.over(found.ids, found.facts)) if table else found


def _open_npy(path: Path) -> Source:
    features = np.load(path, mmap_mode="r")
    if features.ndim != 2 or features.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"an array of floats with two axes is required. {path} has {features.dtype} of shape {features.shape}")
    listed = ids_beside(path)
    if not listed.is_file():
        raise UserError(f"a list of ids, one a line, is required beside {path}. There is no {listed}")
    ids = files.lines(listed)
    if len(ids) != len(features):
        raise UserError(f"as many ids as features are required. {listed} has {len(ids):,} and {path} has {len(features):,}")
    return Source(path, ids, facts.of_names(ids), features.shape[1], None)


def _open_parquet(path: Path) -> Source:
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    about = json.loads((schema.metadata or {}).get(ABOUT, b"{}"))
    names = [name for name in ("id", "camera", "time", "frame") if name in schema.names]
    columns = {name: values.to_pylist() for name, values in zip(names, file.read(names).columns, strict=True)}
    ids = [str(name) for name in columns["id"]]
    known = facts.of_columns(columns.get("camera"), columns.get("time") or columns.get("frame"), ids, str(path))
    model = {"place": None, "digest": about["model"]} if "model" in about else None
    kind = schema.field("feature").type
    first = next(file.iter_batches(1, columns=["feature"]), None)
    dim = kind.list_size if pa.types.is_fixed_size_list(kind) else len(first["feature"][0]) if first else 0
    return Source(path, ids, known, dim, model)


def _npy_blocks(path: Path) -> Iterator[np.ndarray]:
    features = np.load(path, mmap_mode="r")
    for start in range(0, len(features), PIECE_ROWS):
        yield np.array(features[start : start + PIECE_ROWS], np.float32)


def _parquet_blocks(path: Path, dim: int) -> Iterator[np.ndarray]:
    for batch in pq.ParquetFile(path).iter_batches(PIECE_ROWS, columns=["feature"]):
        flat = batch["feature"].flatten().to_numpy(zero_copy_only=False)
        if len(flat) != len(batch) * dim:
            raise UserError(f"features of one length are required. {path} has others than {dim} numbers")
        yield np.array(flat.reshape(-1, dim), np.float32)


def _of_length_one(features: Float[np.ndarray, "n D"], ids: list[str], path: Path) -> Float[np.ndarray, "n D"]:
    lengths = np.linalg.norm(features, axis=1)
    bad = ~np.isfinite(lengths) | (lengths == 0)
    if bad.any():
        raise UserError(
            f"features must be finite and not all zero. {path} has {int(bad.sum()):,} others among {len(ids):,}, such as "
            f"{ids[int(bad.argmax())]}: extract them again"
        )
    return features / lengths[:, None]


def require_different(ids: list[str], where: str) -> None:
    """Raise a UserError where an id is there twice."""
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in collections.Counter(ids).items() if count > 1)
        raise UserError(f"each id may be there once. {where} has {twice} more than once: leave out all but one")

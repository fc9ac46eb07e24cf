"""Features that follow from their ids, files of them, and galleries built from those."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from personmae.gallery import edit
from personmae.gallery.catalog import Gallery, open_gallery

DIM = 16
PEOPLE = 12


def named(count: int, prefix: str = "a") -> list[str]:
    """Ids with cameras 1 to 3 in them."""
    return [f"{prefix}{number:04}_c{number % 3 + 1}s1.jpg" for number in range(count)]


def feature(name: str) -> Float[np.ndarray, " D"]:
    """The feature of an id, of length one: one of a few people, and noise."""
    seed = zlib.crc32(name.encode())
    person = np.random.default_rng(seed % PEOPLE).standard_normal(DIM)
    drawn = person + 0.5 * np.random.default_rng(seed).standard_normal(DIM)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def write(path: Path, ids: Sequence[str], scale: float = 1.0) -> Path:
    """A file of the ids' features, which need not have length one."""
    np.save(path, scale * np.stack([feature(name) for name in ids]))
    path.with_name(f"{path.stem}.ids.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    return path


def inputs(folder: Path, ids: Sequence[str], **options: Any) -> edit.Inputs:
    return edit.Inputs(str(write(folder / f"{ids[0]}.npy", ids)), **options)


def build(folder: Path, ids: Sequence[str], **options: Any) -> Path:
    """A gallery of ids in ``folder``/gallery."""
    edit.build(inputs(folder, ids), folder / "gallery", **options)
    return folder / "gallery"


def ids_of(gallery: Gallery) -> list[str]:
    return gallery.rows["id"].to_pylist()


def require_whole(where: Path, ids: Sequence[str]) -> None:
    """The gallery has these ids in this order, each with its own feature, camera and a key of its own."""
    gallery = open_gallery(where)
    assert ids_of(gallery) == list(ids)
    assert len(gallery) == len(ids)
    if ids:
        expected = np.stack([feature(name) for name in ids])
        np.testing.assert_allclose(gallery.features(np.arange(len(ids))), expected, atol=1e-3)
        assert gallery.rows["camera"].to_pylist() == [name.partition("_c")[2][0] for name in ids]
        assert (np.diff(gallery.rows["key"].to_numpy()) > 0).all()

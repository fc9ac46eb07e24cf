"""The selection of images from a source: lists of names, and random shares."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from personmae import images
from personmae.data.containers import ImageEntry
from personmae.data.files import key_of
from personmae.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which images of a source are wanted: those on a list, the first share of the list, a random share of those.

    ``first`` and ``fraction`` lie in (0, 1]. The random share is exactly ``round(fraction * n)`` of n images. A smaller
    one is contained in a larger one of the same seed (PersonMAE, arXiv 2311.04496, Figure 4, trains on such shares).
    """

    list_file: Path | None = None
    trust_pickle: bool = False  # read a list that is a pickle
    first: float = 1.0
    fraction: float = 1.0
    seed: int = 0

    def of(self, images: list[ImageEntry]) -> list[ImageEntry]:
        """The wanted images, in the order given.

        Raises:
            UserError: a share out of range or empty, or the list cannot be read or names an unknown image.
        """
        for name, share in (("first", self.first), ("fraction", self.fraction)):
            if not 0 < share <= 1:
                raise UserError(f"--{name} must be above 0 and at most 1, got {share}")
        if self.list_file is not None:
            names = read_list(self.list_file, trust_pickle=self.trust_pickle)
            images = listed(images, names[: round(self.first * len(names))], self.list_file)
        elif self.first != 1:
            raise UserError(f"--first {self.first} is a share of a list. Name one with --list, or use --fraction")
        if self.fraction < 1:
            images = random_share(images, self.fraction, self.seed)
        if not images:
            raise UserError("at least one image must be left to write, but the shares asked for leave none. Raise them")
        return images


def random_share(images: list[ImageEntry], fraction: float, seed: int) -> list[ImageEntry]:
    """The images whose keys have the smallest hashes, independent of their order."""
    encoded = (image.key.encode() for image in images)
    hashes = np.fromiter((xxhash.xxh64_intdigest(key, seed % 2**64) for key in encoded), np.uint64, len(images))
    kept = np.argsort(hashes, kind="stable")[: round(fraction * len(images))]
    return [images[i] for i in np.sort(kept)]


def read_list(path: Path, *, trust_pickle: bool = False) -> list[str]:
    """The names in a text file, one a line, or in a pickle of plain lists. Each name once.

    Raises:
        UserError: there is no such file, it is a pickle and not trusted, or it holds something else than names.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"a list of names is required. {path} cannot be read: {error.strerror}") from error
    if path.suffix.lower() in (".pkl", ".pickle") or content.startswith(b"\x80"):
        if not trust_pickle:
            raise UserError(f"a list of names, one a line, is required. {path} is a pickle: add --trust-pickle-list to read it")
        names = _unpickled(content, path)
    else:
        names = [line.strip() for line in content.decode("utf-8-sig", "surrogateescape").split("\n") if line.strip()]
    if not names:
        raise UserError(f"a list of names is required. {path} is empty")
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
        raise UserError(f"a pickle of a plain list of names is required. {path} is not one: {error}") from error
    names = names.get("keys") if isinstance(names, dict) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"a pickled list of names, or a dict with one under 'keys', is required. {path} holds something else")
    return names


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle lists, dicts, text and numbers only. Nothing is looked up by name, so no code can run."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def listed(images: list[ImageEntry], names: list[str], list_file: Path) -> list[ImageEntry]:
    """The images that ``names`` name: by key, or by its last part or without .jpg where that is unambiguous.

    Raises:
        UserError: a name means no image or several.
    """
    by_key = {image.key: place for place, image in enumerate(images)}
    short = _short_names(images) if any(name not in by_key for name in names) else {}

    def place_of(name: str) -> int | None:
        """A key as it is printed, a name whose bytes are not UTF-8, or either without its suffix."""
        spellings = [each for key in (name, key_of(name)) for each in (key, _bare(key))]
        tried = (known.get(each) for known in (by_key, short) for each in spellings)
        return next((place for place in tried if place is not None), None)

    places = [place_of(name) for name in names]
    for wrong, what in ((None, "no image of the source"), (_SEVERAL, "several images of the source")):
        unclear = [name for name, place in zip(names, places, strict=True) if place == wrong]
        if unclear:
            raise UserError(
                f"every name in {list_file} must be an image's. {len(unclear):,} of {len(names):,} mean {what}, the "
                f"first is {unclear[0]!r}. Write names like {images[0].key!r}"
            )
    return [images[place] for place in sorted({place for place in places if place is not None})]


_SEVERAL = -1


def _short_names(images: list[ImageEntry]) -> dict[str, int]:
    short: dict[str, int] = {}
    for place, image in enumerate(images):
        last = image.key.rpartition("/")[2]
        for name in {last, _bare(last), _bare(image.key)}:
            short[name] = place if short.get(name, place) == place else _SEVERAL
    return short


def _bare(name: str) -> str:
    return name[: name.rindex(".")] if name.lower().endswith(images.SUFFIXES) else name

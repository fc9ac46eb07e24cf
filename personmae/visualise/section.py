"""What a section of the page is made from and made of.

A section is drawn by a function of a ``Subject``. It returns a ``Part``, or raises the error whose sentence stands in its
place. ``images.py`` has one for each of the first three names of ``TITLES``, called so: ``attention(subject) -> Part``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup

from personmae.errors import Unavailable, UserError
from personmae.images import BadImage
from personmae.report.places import printable
from personmae.weights.encoder import Encoder

TITLES: Final = {  # of the sections by their names on the command line, in the order of the page
    "reconstructions": "What it reconstructs",
    "attention": "Where it looks",
    "correspondence": "Which patches match",
    "ranks": "Who it finds",
    "map": "Where people lie",
    "errors": "Where it errs",
}


class NotHere(UserError):  # noqa: N818 - not an error
    """Such a section cannot be drawn of this run. Nothing is wrong, and the message says why."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture: a title, a caption below it, what it shows in words for those who do not see it, and RGB pixels.

    ``html`` is what the page has in place of the pixels: the same as text or vectors, which takes the page's colours. It
    needs a name for screen readers of its own.
    """

    title: str
    caption: str
    alt: str
    pixels: UInt8[np.ndarray, "H W 3"]
    html: Markup = field(default_factory=Markup)


class Part(NamedTuple):
    """The content of a section: what a reader must know before the pictures, and the pictures."""

    note: str
    drawings: Sequence[Drawing]


class Shown(NamedTuple):
    """An image to look at: its name, below the root of its data, and upright RGB pixels of its own size."""

    name: str
    pixels: UInt8[np.ndarray, "H W 3"]


class Pair(NamedTuple):
    """Two images to be compared, and whether they show the same person."""

    first: Shown
    second: Shown
    same: bool


@dataclass(frozen=True, slots=True)
class Subject:
    """What the pictures are of.

    ``where`` is the run, checkpoint, folder or file as it was named. ``encoder`` is its model with the preprocessing of its
    weights. ``images`` were not chosen by their result. ``pairs`` are queries with what they find, right and wrong. Without a
    benchmark there are no pairs, and the images are of the run's own shards where it has some.
    """

    where: str
    encoder: Encoder
    images: Sequence[Shown]
    pairs: Sequence[Pair]
    seed: int


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page, or why it is missing. ``lost``: something that it needs is gone."""

    name: str
    part: Part | None = None
    missing: str = ""
    lost: bool = False

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def drawings(self) -> Sequence[Drawing]:
        return self.part.drawings if self.part else ()


def capital(sentence: str) -> str:
    """A sentence as it begins: with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def attempt(name: str, draw: Callable[[], Part]) -> Section:
    """The section that ``draw`` gives, or the sentence of the error that a missing piece gives."""
    try:
        return Section(name, draw())
    except NotHere as reason:
        return Section(name, missing=printable(reason))
    except (UserError, Unavailable, BadImage, OSError) as error:
        return Section(name, missing=printable(error), lost=True)

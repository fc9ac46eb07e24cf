"""Rank lists of one model: the best queries, the worst, some drawn by chance, and the most confused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Int
from markupsafe import Markup

from personmae.report import figures
from personmae.report.figures import Row
from personmae.visualise import ink, search
from personmae.visualise.search import Search
from personmae.visualise.section import Drawing, Part

THUMBNAIL: Final = (160, 80)  # (height, width) of an image
NOTE: Final = """First the query, then the ten nearest gallery images. Green: the same person, seen by another camera. Red and
crossed: another person. Images of the query's own person from its own camera do not count. The best and the worst are the ends
of the list by AP, and no query stands for all of them: the random ones do so best. The closest wrong image
has its score, a cosine of at most 1."""


class Choice(NamedTuple):
    """A kind of queries: a title, how they were chosen, and which they are."""

    title: str
    how: str
    queries: Int[np.ndarray, " q"]


def draw(found: Search, count: int, seed: int) -> Part:
    """A drawing for each kind of queries."""
    return Part(NOTE, [_draw(found, choice) for choice in choose(found, count, seed)])


def choose(found: Search, count: int, seed: int) -> list[Choice]:
    return [
        Choice("Best", "The highest AP. Equal ones are in the order of the benchmark.", search.best(found, count)),
        Choice("Worst", "The lowest AP. Equal ones are in the order of the benchmark.", search.worst(found, count)),
        Choice("Random", f"Drawn by chance, with seed {seed}.", search.drawn(found, count, seed)),
        Choice("Most confused", "The highest scores of another person, of all queries.", search.most_confused(found, count)),
    ]


def _draw(found: Search, choice: Choice) -> Drawing:
    nearest = found.nearest(choice.queries)
    rows = [_row(found, query, near) for query, near in zip(choice.queries.tolist(), nearest, strict=True)]
    words = [_words(found, query, near) for query, near in zip(choice.queries.tolist(), nearest, strict=True)]
    framed = [[figures.framed(image, correct) for image, correct in row] for row in rows]
    right = ", ".join(f"{sum(bool(ok) for _, ok in row)} of {len(row) - 1}" for row in rows)
    return Drawing(
        f"{choice.title} queries",
        choice.how,
        f"Rank lists of the {choice.title.lower()} queries. Right among the nearest: {right}",
        ink.sheet_of_rows(list(zip(words, framed, strict=True))),
        Markup("").join(_html(choice.title, w, row) for w, row in zip(words, rows, strict=True)),
    )


def _row(found: Search, query: int, near: Sequence[int]) -> Row:
    image = figures.read_thumbnail(Path(found.sample(query).path), THUMBNAIL)
    others = [(figures.read_thumbnail(Path(found.found(n).path), THUMBNAIL), found.is_match(query, n)) for n in near]
    return [(image, None), *others]


def _words(found: Search, query: int, near: Sequence[int]) -> str:
    right = sum(found.is_match(query, number) for number in near)
    wrong = f", closest wrong at {found.wrong_score[query]:.3f}" if np.isfinite(found.wrong_score[query]) else ""
    return f"AP {100 * found.ap[query]:.1f} %, {right} of {len(near)} right{wrong}"


def _html(kind: str, words: str, row: Row) -> Markup:
    """A row as the report has it: each image with its own words for screen readers."""
    images = Markup("").join(
        Markup('<img src="{}" width="80" height="160" alt="{}">').format(
            ink.data_uri(figures.framed(image, correct), photograph=True), _alt(rank, correct)
        )
        for rank, (image, correct) in enumerate(row)
    )
    return Markup(
        '<figure class="query" aria-label="{} query: {}"><figcaption>{}</figcaption><div class="list">{}</div></figure>'
    ).format(kind, words, words, images)


def _alt(rank: int, correct: bool | None) -> str:
    if correct is None:
        return "The query"
    return f"Rank {rank}: {'the same person' if correct else 'another person'}"

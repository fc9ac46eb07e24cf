"""Who looks like this: queries of a gallery by images, by ids, or by several images of one person.

Filters say which rows may be found. Re-ranking looks at the neighbours of the best ones and orders these again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.errors import UserError
from personmae.gallery import approximate, exact, facts
from personmae.gallery.catalog import Gallery
from personmae.gallery.exact import Found
from personmae.reid.rerank import k_reciprocal
from personmae.weights.encoder import Encoder
from personmae.weights.extract import digest
from personmae.weights.pixels import ImageLike

TOP: Final = 10
RERANK_K1: Final = 20  # neighbours that re-ranking looks at, as in the literature
Log = Callable[[str], None]


@dataclass(frozen=True)
class Query:
    """Who is searched for: names to print, a feature of length one (D,), and the rows that it is made of.

    ``cameras`` are those that saw the query, where they are known.
    """

    names: tuple[str, ...]
    feature: Float[Tensor, " D"]
    rows: tuple[int, ...] = ()
    cameras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Filters:
    """Which rows may be found: of these cameras, from ``since`` to ``until`` in seconds, and with at least this cosine.

    ``other_cameras`` leaves out the cameras that saw the query itself. A row without a time is not found where one is asked
    for.
    """

    cameras: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None
    other_cameras: bool = False
    min_score: float | None = None


@dataclass(frozen=True)
class Hit:
    """A row that was found. ``score`` is the cosine, and ``reranked`` minus the distance of re-ranking."""

    rank: int
    row: int
    id: str
    score: float
    camera: str
    time: float
    reranked: float | None = None


@dataclass(frozen=True)
class Answer:
    """What was found for each query, and how it was searched in words."""

    queries: list[Query]
    hits: list[list[Hit]]
    how: str


# --- queries ---


def by_ids(gallery: Gallery, ids: Sequence[str], *, each: bool = False) -> list[Query]:
    """A query of all these rows together as one person, or one of each.

    Raises:
        UserError: an id is not in the gallery.
    """
    rows = gallery.rows_of(ids)
    if (rows < 0).any():
        raise UserError(f"ids of the gallery are required. {ids[int((rows < 0).argmax())]} is not in {gallery.folder}")
    found = gallery.rows.take(rows)["camera"].to_pylist()
    return together(list(ids), torch.from_numpy(gallery.features(rows)), rows.tolist(), found, each=each)


def by_images(gallery: Gallery, encoder: Encoder, images: Sequence[ImageLike], *, each: bool = False) -> list[Query]:
    """A query of all these images together as one person, or one of each.

    Raises:
        UserError: an image cannot be read, or the gallery's features are another model's.
    """
    require_model(gallery, encoder)
    names = [str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else "image" for image in images]
    return together(names, encoder.features(images), [-1] * len(names), list(map(facts.camera_of, names)), each=each)


def require_model(gallery: Gallery, encoder: Encoder) -> None:
    """Raise a UserError unless features of a model can be compared with the gallery's."""
    known, source = gallery.manifest.model, encoder.config["source"]
    if encoder.config["dim"] != gallery.manifest.dim:
        raise UserError(f"a model with {gallery.manifest.dim} numbers is required. {source} has {encoder.config['dim']}")
    if known and known["digest"] and digest(encoder) != known["digest"]:
        built = known["place"] or "the one that 'personmae extract' had"
        raise UserError(f"the model that the gallery was built with is required. {source} is another: use {built}")


def together(
    names: list[str], features: Float[Tensor, "n D"], rows: list[int], cameras: list[str], *, each: bool = False
) -> list[Query]:
    """Queries of features of length one: the mean of all, brought to length one, or each alone."""
    if each:
        known = zip(names, features, rows, cameras, strict=True)
        return [Query((n,), f, (r,) if r >= 0 else (), (c,) if c else ()) for n, f, r, c in known]
    mean = F.normalize(features.mean(dim=0), dim=0)
    return [Query(tuple(names), mean, tuple(r for r in rows if r >= 0), tuple(sorted({c for c in cameras if c})))]


def joined(queries: Sequence[Query]) -> Query:
    """One query of several, as ``together`` has it."""
    weights = torch.tensor([float(len(query.names)) for query in queries])
    mean = F.normalize((torch.stack([query.feature for query in queries]) * weights[:, None]).sum(dim=0), dim=0)
    names, rows, cameras = (tuple(x for q in queries for x in getattr(q, name)) for name in ("names", "rows", "cameras"))
    return Query(names, mean, rows, tuple(sorted(set(cameras))))


# --- search ---


def search(
    gallery: Gallery,
    queries: Sequence[Query],
    *,
    top: int = TOP,
    filters: Filters | None = None,
    rerank: int | None = None,
    only_exact: bool = False,
    log: Log = lambda line: None,
) -> Answer:
    """The ``top`` rows for each query, 0 for all of them. A query's own rows are not found.

    ``rerank`` orders so many of the best by k-reciprocal re-ranking first. A large gallery with an index is searched by FAISS,
    unless there is a filter or ``only_exact``.

    Raises:
        UserError: the gallery is empty, or an option is out of range or does not go with it.
    """
    filters = filters or Filters()
    require_sound(gallery, filters, top, rerank)
    _require_cameras(queries, filters)
    wanted = min(max(top or len(gallery), rerank or 0), len(gallery))
    features = torch.stack([query.feature for query in queries])
    index = (
        None
        if only_exact or filters != Filters(min_score=filters.min_score) or wanted >= len(gallery)
        else _index(gallery, log)
    )
    if index is None:
        found, how = (
            exact.search(
                gallery, features, wanted, allowed=_allowed(gallery, filters), hidden=_hidden(gallery, queries, filters)
            ),
            "exact",
        )
    else:
        found, how = _approximate(gallery, index, queries, features, wanted), in_words(gallery)
    lines = [_line(*pair, filters) for pair in zip(found.scores.tolist(), found.rows.tolist(), strict=True)]
    if rerank:
        how += f", the best {rerank} re-ranked"
        lines = [_reranked(gallery, query, line, rerank) for query, line in zip(queries, lines, strict=True)]
    return Answer(list(queries), [_hits(gallery, line[: top or None]) for line in lines], how)


def in_words(gallery: Gallery) -> str:
    """How a gallery's index searches, and how much it finds of what the exact search does."""
    index = gallery.manifest.index
    if index is None:
        return "exact"
    return (
        f"faiss {index['kind']}, {index['num_probes']} of {index['num_lists']} lists, recall@{approximate.K} "
        f"{index['recall']:.3f} of the exact search on {index['sample']} images"
    )


def require_sound(gallery: Gallery, filters: Filters, top: int = TOP, rerank: int | None = None) -> None:
    """Raise a UserError where an option is out of range or does not go with a gallery, whatever is searched for."""
    if not len(gallery):
        raise UserError(f"a gallery with an image is required. {gallery.folder} is empty: add some")
    if top < 0:
        raise UserError(f"--top must be at least 1, or 0 for all. Got {top}")
    if rerank is not None and rerank < 2:
        raise UserError(f"--rerank must be at least 2 images. Got {rerank}")
    if filters.min_score is not None and not -1 <= filters.min_score <= 1:
        raise UserError(f"--min-score must be a cosine, from -1 to 1. Got {filters.min_score:g}")
    _require_times(gallery, filters.since, filters.until)
    known = set(gallery.rows["camera"].unique().to_pylist()) if filters.cameras else set()
    if unknown_cameras := [name for name in filters.cameras if name not in known]:
        there = ", ".join(sorted(filter(None, known))) or "none"
        raise UserError(f"cameras of the gallery are required. It has no {unknown_cameras[0]!r}. Known are {there}")


def _require_times(gallery: Gallery, since: float | None, until: float | None) -> None:
    kind = gallery.manifest.times
    if (since is not None or until is not None) and kind is None:
        raise UserError(f"times are required for --since and --until. {gallery.folder} has none: build it with --table")
    if since is not None and until is not None and since > until:
        one, other = (facts.in_words(time, kind) for time in (since, until))
        raise UserError(f"--since must not be later than --until. Got {one} and {other}: exchange them")


def _require_cameras(queries: Sequence[Query], filters: Filters) -> None:
    """Raise a UserError where there is no query, or its own cameras are to be left out and are not known."""
    if not queries:
        raise UserError("something to search for is required: give images, or ids with --id")
    if filters.other_cameras and (unknown := next((query for query in queries if not query.cameras), None)):
        raise UserError(f"--other-cameras needs the camera of each query. That of {unknown.names[0]} is not known")


def _allowed(gallery: Gallery, filters: Filters) -> Bool[np.ndarray, " N"] | None:
    """Rows that any query may find. None for all of them."""
    allowed = np.ones(len(gallery), bool)
    if filters.cameras:
        allowed &= np.isin(_cameras(gallery), filters.cameras)
    times = gallery.rows["time"].to_numpy()
    if filters.since is not None:
        allowed &= times >= filters.since  # NaN is not
    if filters.until is not None:
        allowed &= times <= filters.until
    return None if allowed.all() else allowed


def _cameras(gallery: Gallery) -> np.ndarray:
    return np.array(gallery.rows["camera"].to_pylist(), dtype=str)


def _hidden(gallery: Gallery, queries: Sequence[Query], filters: Filters) -> exact.Hidden:
    """What a query may not find: its own rows, and perhaps its own cameras."""
    cameras = _cameras(gallery) if filters.other_cameras else None

    def hidden(some: slice, rows: Int[np.ndarray, " n"]) -> Bool[Tensor, "Q n"] | None:
        mine = queries[some]
        masks = [np.isin(rows, query.rows) for query in mine] if any(query.rows for query in mine) else None
        if cameras is not None:
            same = [np.isin(cameras[rows], query.cameras) for query in mine]
            masks = same if masks is None else [a | b for a, b in zip(masks, same, strict=True)]
        return None if masks is None else torch.from_numpy(np.stack(masks))

    return hidden


def _index(gallery: Gallery, log: Log) -> Any:
    """The index of a gallery, if it has one and it can be used."""
    if gallery.manifest.index is None:
        return None
    if not approximate.is_there():
        log("faiss is not installed, so the search is exact: pip install 'personmae[gallery]'")
        return None
    try:
        index = approximate.read(gallery.folder / gallery.manifest.index["file"])
    except FileNotFoundError:  # a writer has just replaced it: this state of the gallery can be searched without
        return None
    return index if gallery.is_current() else None  # a gallery built in its place has an index of the same name


def _approximate(gallery: Gallery, index: Any, queries: Sequence[Query], features: Float[Tensor, "Q D"], wanted: int) -> Found:
    most_own = max(len(query.rows) for query in queries)
    probes = gallery.manifest.index["num_probes"] if gallery.manifest.index else 1
    found = approximate.search(index, gallery, features, wanted + most_own, num_probes=probes)
    own = torch.stack(
        [torch.isin(line, torch.tensor(q.rows, dtype=torch.int64)) for line, q in zip(found.rows, queries, strict=True)]
    )
    scores = found.scores.masked_fill(own, -torch.inf).sort(dim=1, descending=True, stable=True)
    rows = found.rows.gather(1, scores.indices).masked_fill(scores.values == -torch.inf, -1)
    return Found(scores.values[:, :wanted], rows[:, :wanted])


def _line(scores: list[float], rows: list[int], filters: Filters) -> list[tuple[int, float, float | None]]:
    """(row, score, nothing) of what was found."""
    least = -math.inf if filters.min_score is None else filters.min_score
    return [(row, score, None) for score, row in zip(scores, rows, strict=True) if row >= 0 and score >= least]


def _reranked(
    gallery: Gallery, query: Query, line: list[tuple[int, float, float | None]], most: int
) -> list[tuple[int, float, float | None]]:
    """The best ``most`` of a line in the order of re-ranking, and the others behind them."""
    head, tail = line[:most], line[most:]
    if len(head) < 2:
        return line
    rows = np.array([row for row, *_ in head])
    features = torch.from_numpy(gallery.features(rows))
    similarity = k_reciprocal(query.feature[None], features, k1=min(RERANK_K1, len(head)))(np.array([0]))[0]
    order = similarity.sort(descending=True, stable=True)
    return [
        (*head[place][:2], value) for value, place in zip(order.values.tolist(), order.indices.tolist(), strict=True)
    ] + tail


def _hits(gallery: Gallery, line: list[tuple[int, float, float | None]]) -> list[Hit]:
    rows = [row for row, *_ in line]
    known = gallery.rows.select(["id", "camera", "time"]).take(rows).to_pylist() if rows else []
    return [
        Hit(rank, row, found["id"], score, found["camera"], found["time"], value)
        for rank, ((row, score, value), found) in enumerate(zip(line, known, strict=True), 1)
    ]

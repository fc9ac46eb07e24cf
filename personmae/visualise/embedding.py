"""A map of features: t-SNE of the images of a few people, by person and by camera."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from personmae.reid.datasets import DISTRACTOR_PID, JUNK_PID, Benchmark, Sample
from personmae.reid.features import timed
from personmae.report import charts, figures
from personmae.visualise import ink
from personmae.visualise.search import Search
from personmae.visualise.section import Drawing, NotHere, Part

NUM_PEOPLE: Final = 20
MOST_IMAGES: Final = 60  # of one person
FEWEST: Final = 8  # points, below which a map says nothing
SHEET: Final = (900, 1200)  # (height, width) of the map with images
THUMBNAIL: Final = (72, 36)
_NOTE: Final = """t-SNE lays {points} images of {people} people out on a plane, those with the most images of {all}.
Neighbours in the features are mostly neighbours here. Nothing else has a meaning: not the distance of two groups, not how large
or dense one is, not up, down, left or right. Another seed gives another map, and groups may look apart that are not. The map is
no score. In the features themselves, {person} of these images have one of the same person as their nearest, and {camera} one of
the same camera. By chance that would be {by_person} and {by_camera}."""


class Points(NamedTuple):
    """Images on the map: their samples, features of length one, and which are queries."""

    samples: Sequence[Sample]
    vectors: Float[Tensor, "n F"]
    queries: Bool[np.ndarray, " n"]


def draw(found: Search, seed: int, log: Callable[[str], None]) -> Part:
    """The map by person, by camera, and with the images at their places.

    Raises:
        NotHere: there are too few images.
        UserError: an image cannot be read.
    """
    points = choose(found)
    if len(points.samples) < FEWEST:
        raise NotHere(f"a map needs at least {FEWEST} images of people with an identity, and there are {len(points.samples)}")
    with timed(log, f"laying {len(points.samples):,} images out by t-SNE"):
        places = lay_out(points.vectors.numpy(), seed)
    people = [str(sample.pid) for sample in points.samples]
    cameras = [str(sample.camid) if sample.camid >= 0 else "unknown" for sample in points.samples]
    return Part(
        _note(found, points, people, cameras),
        [
            _scatter("By person", "person", places, people, points.queries),
            _scatter("By camera", "camera", places, cameras, points.queries),
            _with_images(places, points.samples, people),
        ],
    )


def choose(found: Search) -> Points:
    """All images of the people with the most of them, at most ``MOST_IMAGES`` each, queries among them."""
    samples, counts = [*found.benchmark.query, *found.benchmark.gallery], count_people(found.benchmark)
    people = sorted(counts, key=lambda pid: (-counts[pid], pid))[:NUM_PEOPLE]
    numbers = np.concatenate([np.empty(0, np.int64), *(_spread(samples, pid) for pid in sorted(people))])
    vectors = F.normalize(found.vectors[torch.from_numpy(numbers)].float(), dim=1)
    return Points([samples[number] for number in numbers], vectors, numbers < len(found.benchmark.query))


def count_people(benchmark: Benchmark) -> Counter[int]:
    """Images of each person. Distractors and junk are nobody."""
    nobody = {JUNK_PID} | ({DISTRACTOR_PID} if benchmark.distractors else set())
    return Counter(sample.pid for sample in (*benchmark.query, *benchmark.gallery) if sample.pid not in nobody)


def _spread(samples: Sequence[Sample], pid: int) -> Int[np.ndarray, " n"]:
    """The images of one person by number, or as many as there is room for, evenly spread."""
    own = np.array([number for number, sample in enumerate(samples) if sample.pid == pid])
    return own[np.linspace(0, len(own) - 1, min(len(own), MOST_IMAGES)).astype(np.int64)]


def lay_out(vectors: Float[np.ndarray, "n F"], seed: int) -> Float[np.ndarray, "n 2"]:
    """Places in 0 ... 1 by t-SNE (van der Maaten and Hinton 2008). One thread, so that a seed gives one map."""
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    with threadpool_limits(1):
        places = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(vectors)
    low, high = places.min(axis=0), places.max(axis=0)
    return ((places - low) / np.maximum(high - low, 1e-12)).astype(np.float64)


def share_alike(vectors: Float[Tensor, "n F"], groups: Sequence[str]) -> tuple[float, float]:
    """The share of images whose nearest other image is of the same group, and what it would be by chance."""
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-torch.inf)
    names = np.array(groups)
    alike = float((names[similarity.argmax(dim=1).numpy()] == names).mean())
    counts = np.array(list(Counter(groups).values()))
    return alike, float((counts * (counts - 1)).sum() / (len(names) * (len(names) - 1)))


def _note(found: Search, points: Points, people: Sequence[str], cameras: Sequence[str]) -> str:
    person, by_person = share_alike(points.vectors, people)
    camera, by_camera = share_alike(points.vectors, cameras)
    return _NOTE.format(
        points=f"{len(people):,}",
        people=len(set(people)),
        all=f"{len(count_people(found.benchmark)):,}",
        **{name: f"{100 * share:.1f} %" for name, share in (("person", person), ("camera", camera))},
        **{name: f"{100 * share:.1f} %" for name, share in (("by_person", by_person), ("by_camera", by_camera))},
    )


def _scatter(title: str, what: str, places: Float[np.ndarray, "n 2"], groups: Sequence[str], queries: np.ndarray) -> Drawing:
    num_groups = len(set(groups))
    alt = f"Map {title.lower()}: {len(groups):,} points, with a colour and a shape for each of {num_groups} {what}s"

    def figure(colours: Mapping[str, str]) -> Figure:
        return ink.scatter(places, groups, queries, colours, legend=what)

    pixels, svg = ink.to_pixels(lambda: figure(ink.COLOURS)), ink.to_svg(lambda: figure(charts.STAND_INS), alt)
    return Drawing(title, f"A colour and a shape for each {what}. Queries have an edge.", alt, pixels, svg)


def _with_images(places: Float[np.ndarray, "n 2"], samples: Sequence[Sample], people: Sequence[str]) -> Drawing:
    colour = {name: charts.LIGHT[number % len(charts.LIGHT)] for number, name in enumerate(dict.fromkeys(people))}
    images = [figures.read_thumbnail(Path(sample.path), THUMBNAIL) for sample in samples]
    placed = ink.place_images(places, images, [colour[name] for name in people], size=SHEET)
    alt = f"The map with {len(placed):,} small images of people at their places"
    return Drawing(
        "With its images",
        f"The same map with {len(placed):,} of its images at their places. Those that would cover another are left out. Frames "
        "have the colours of people, which repeat after five.",
        alt,
        ink.sheet_of(placed, SHEET),
        ink.html_of(placed, SHEET, alt),
    )

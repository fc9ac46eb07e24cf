"""A search over a whole benchmark by one model, as ``personmae evaluate`` makes it, and the queries that are looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from personmae import dist
from personmae.reid import ranking, retrieval
from personmae.reid.datasets import Benchmark, Sample
from personmae.weights.encoder import Encoder

TOP_K: Final = 10
_POOLED: Final = {  # what a frozen encoder's feature is, in words
    "cls": "class token",
    "mean": "mean of patch tokens",
    "cls_mean": "class token and mean of patch tokens",
    "rows": "rows of patch tokens",
}


@dataclass(frozen=True, slots=True)
class Search:
    """What a model finds on a benchmark.

    ``vectors`` are the features of all queries and then all gallery images. ``record`` is what ``retrieval.rank_all`` returns.
    ``ap`` is NaN for a query without a match. ``wrong_score`` and ``wrong`` are the closest image of another person.
    """

    benchmark: Benchmark
    vectors: Float[Tensor, "N F"]
    record: dict[str, Any]
    labels: ranking.Labels
    similarity: ranking.Similarity
    ap: Float[np.ndarray, " Q"]
    wrong_score: Float[np.ndarray, " Q"]
    wrong: Int[np.ndarray, " Q"]

    @property
    def valid(self) -> Int[np.ndarray, " V"]:
        """The queries that have a match, by number."""
        return np.flatnonzero(np.isfinite(self.ap))

    def nearest(self, queries: Int[np.ndarray, " q"], top_k: int = TOP_K) -> list[list[int]]:
        """Gallery images by number, from near to far, for each query. The protocol's removed ones are not among them."""
        rows = ranking.rank_lists(self.similarity, self.labels, queries=queries, top_k=top_k).tolist()
        return [[number for number in row if number >= 0] for row in rows]

    def is_match(self, query: int, found: int) -> bool:
        return bool(self.labels.gallery_pids[found] == self.labels.query_pids[query])

    def sample(self, query: int) -> Sample:
        return self.benchmark.query[query]

    def found(self, number: int) -> Sample:
        return self.benchmark.gallery[number]


def search(
    benchmark: Benchmark, encoder: Encoder, *, per_camera: retrieval.PerCamera | None, log: Callable[[str], None]
) -> Search:
    """Compute the features of a benchmark and rank its gallery for every query.

    Features are whitened per camera where the run itself was evaluated so, unless ``per_camera`` says what is done.

    Raises:
        UserError: an image cannot be read, a feature is not finite, or no query can be scored.
    """
    features, device = _features(encoder, per_camera, log), encoder.device
    img_size: tuple[int, int] = encoder.config["size"]
    vectors = retrieval.extract_all(benchmark, features, img_size=img_size, num_threads=dist.usable_cores(), log=log)
    log(f"ranking {len(benchmark.query):,} x {len(benchmark.gallery):,} ...")
    record = retrieval.rank_all(benchmark, vectors.to(device))
    query, gallery = vectors.to(device).tensor_split([len(benchmark.query)])
    similarity, labels = ranking.cosine(query, gallery), retrieval.labels_of(benchmark)
    scores, wrong = ranking.closest_wrong(similarity, labels)
    ap = np.array([np.nan if value is None else value for value in record["query_ap"]])
    return Search(benchmark, vectors, record, labels, similarity, ap, scores.numpy(), wrong.numpy())


def _features(encoder: Encoder, per_camera: retrieval.PerCamera | None, log: Callable[[str], None]) -> retrieval.Features:
    """What turns images into features, as the run of the encoder was evaluated."""
    features = retrieval.model_features(
        encoder.model.network,
        mean=encoder.config["mean"],
        std=encoder.config["std"],
        device=torch.device(encoder.device),
        log=log,
    )
    if per_camera is None and (whitening := encoder.stored.about.get("whiten")):
        return retrieval.for_each_camera(features, "whiten", **whitening)
    return retrieval.for_each_camera(features, per_camera) if per_camera else features


def in_words(encoder: Encoder, per_camera: retrieval.PerCamera | None) -> str:
    """What the features are."""
    config = encoder.config
    kind = (
        f"those of its {config['feature']} head"
        if config["kind"] == "reid"
        else f"the frozen encoder's {_POOLED.get(config['feature'], config['feature'])}"
    )
    whitened = "whiten" if per_camera is None and encoder.stored.about.get("whiten") else per_camera or "none"
    changed = {"none": "", "standardise": ", standardised per camera", "whiten": ", whitened per camera"}[whitened]
    return f"features of {config['dim']:,} numbers, {kind}{changed}"


# --- which queries are looked at -------------------------------------------------------------------------------------


def best(found: Search, count: int) -> Int[np.ndarray, " q"]:
    """Queries with the highest AP. Equal ones keep their order in the benchmark."""
    return found.valid[np.argsort(-found.ap[found.valid], kind="stable")][:count]


def worst(found: Search, count: int) -> Int[np.ndarray, " q"]:
    """Queries with the lowest AP. Equal ones keep their order in the benchmark."""
    return found.valid[np.argsort(found.ap[found.valid], kind="stable")][:count]


def drawn(found: Search, count: int, seed: int) -> Int[np.ndarray, " q"]:
    """Queries drawn by chance, the same for a seed, in the order of the benchmark."""
    chosen = np.random.default_rng(seed).choice(found.valid, min(count, len(found.valid)), replace=False)
    return np.sort(chosen)


def most_confused(found: Search, count: int) -> Int[np.ndarray, " q"]:
    """Queries whose closest wrong match is the closest of all."""
    return found.valid[np.argsort(-found.wrong_score[found.valid], kind="stable")][:count]

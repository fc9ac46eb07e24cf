"""Search on a benchmark: features of query and gallery to the record that tables and rank lists are made from."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personmae import dist
from personmae.errors import UserError
from personmae.reid import ranking
from personmae.reid.datasets import Benchmark, Sample, pids_and_camids
from personmae.reid.features import colour_histogram, extract
from personmae.reid.heads import ReIDModel
from personmae.reid.rerank import alpha_query_expansion, k_reciprocal
from personmae.reid.transforms import ImageSet

NUM_RANK_LISTS, TOP_K = 12, 10
RERANKINGS = {"none": ranking.cosine, "aqe": alpha_query_expansion, "k_reciprocal": k_reciprocal}
Features = Callable[[ImageSet, np.ndarray], Tensor]  # (images, camids) to (N, F), L2-normalised


def measure(
    benchmark: Benchmark,
    features: Features,
    *,
    img_size: tuple[int, int],
    num_threads: int,
    device: torch.device | str = "cpu",
    rerank: str = "none",
) -> dict[str, Any] | None:
    """Rank the gallery for every query, same camera removed; returns scores in [0, 1], counts, and some rank lists.

    Called by all ranks together: they share the extraction, the first one ranks, on ``device``, and the others get None.
    Query and gallery are one set for ``features``, so that a per-camera normalisation sees both.

    Raises:
        UserError: ``rerank`` is not one of ``RERANKINGS``, an image cannot be read, or no query can be scored.
    """
    if rerank not in RERANKINGS:
        raise UserError(f"rerank must be one of {', '.join(RERANKINGS)}; got {rerank!r}")
    start = time.monotonic()
    samples = [*benchmark.query, *benchmark.gallery]
    with ThreadPoolExecutor(num_threads) as pool:
        images = ImageSet([sample.path for sample in samples], img_size, pool=pool)
        vectors = features(images, pids_and_camids(samples)[1])
    if not dist.is_first():
        return None
    query, gallery = vectors.to(device).tensor_split([len(benchmark.query)])
    similarity = RERANKINGS[rerank](query, gallery)
    labels = _labels(benchmark)
    result = ranking.evaluate(similarity, labels)
    chosen = np.linspace(0, len(query) - 1, min(NUM_RANK_LISTS, len(query))).astype(int)
    lists = ranking.rank_lists(similarity, labels, queries=chosen, top_k=TOP_K)
    return {
        "benchmark": benchmark.name,
        "root": str(benchmark.root),
        "mAP": result.mAP,
        **{f"rank{k}": result.rank(k) for k in (1, 5, 10)},
        "mINP": result.mINP,
        "mAP_trapezoid": result.mAP_trapezoid,
        "rerank": rerank,
        "num_queries": result.num_queries,
        "num_valid": result.num_valid,
        "num_gallery": len(gallery),
        "seconds": time.monotonic() - start,
        "rank_lists": [
            _rank_list(benchmark.query[i], [benchmark.gallery[j] for j in row if j >= 0])
            for i, row in zip(chosen.tolist(), lists.tolist(), strict=True)
        ],
    }


def _labels(benchmark: Benchmark) -> ranking.Labels:
    """A query that lies in the gallery too is known by its path."""
    places = {sample.path: place for place, sample in enumerate(benchmark.gallery)}
    own_index = np.array([places.get(sample.path, -1) for sample in benchmark.query])
    return ranking.Labels(*pids_and_camids(benchmark.query), *pids_and_camids(benchmark.gallery), own_index)


def _rank_list(query: Sample, found: list[Sample]) -> dict[str, Any]:
    return {"query": query.path, "gallery": [s.path for s in found], "correct": [s.pid == query.pid for s in found]}


def model_features(
    model: ReIDModel, *, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, batch_size: int = 256
) -> Features:
    """Features of a model, with the preprocessing that belongs to its weights."""

    def features(images: ImageSet, _: np.ndarray) -> Tensor:
        return extract(model, images, batch_size=batch_size, device=device, mean=mean, std=std)

    return features


def histogram_features(images: ImageSet, camids: np.ndarray) -> Tensor:
    """Colour alone, each camera's own cast taken out: the baseline a model has to beat."""
    return colour_histogram(images, camids, normalise_per_camera=True)


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write ``result.json`` and ``rank_lists.json`` into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    lists = {"root": record["root"], "entries": record["rank_lists"]}
    (out / "rank_lists.json").write_text(json.dumps(lists, indent=1))
    result = {name: value for name, value in record.items() if name != "rank_lists"}
    (out / "result.json").write_text(json.dumps(result, indent=1))


def has_record(run_dir: str | Path, run_hash: str) -> bool:
    """Whether a run has its result.

    Raises:
        UserError: it has one, but of another configuration or encoder.
    """
    result_file = Path(run_dir) / "result.json"
    if not result_file.is_file():
        return False
    if json.loads(result_file.read_text()).get("run_hash") != run_hash:
        raise UserError(
            f"{result_file} comes from another configuration or another encoder; delete {run_dir}, use another run_dir, or "
            "give checkpoint.resume=none"
        )
    return True


def table_row(record: dict[str, Any]) -> str:
    """One line of a results table, in per cent."""
    scores = "  ".join(f"{name} {100 * record[name]:5.1f}" for name in ("mAP", "rank1", "rank5", "rank10", "mINP"))
    return f"{record['name']:<24} {record['benchmark']:<14} {scores}"

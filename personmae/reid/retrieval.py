"""Search on a benchmark: from features of query and gallery to the record behind tables and rank lists."""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from personmae import dist
from personmae.errors import Stopped, UserError
from personmae.reid import breakdown, datasets, ranking
from personmae.reid.datasets import Benchmark, Sample, pids_and_camids
from personmae.reid.features import Extractor, colour_histogram, extract, require_finite, thumbnail, timed
from personmae.reid.rerank import alpha_query_expansion, k_reciprocal
from personmae.reid.rows import standardise_per_camera, whiten_per_camera
from personmae.reid.transforms import ImageSet
from personmae.system import files

NUM_RANK_LISTS, TOP_K = 12, 10
RERANKINGS = {"none": ranking.cosine, "aqe": alpha_query_expansion, "k_reciprocal": k_reciprocal}
Features = Callable[[ImageSet, np.ndarray], Tensor]  # (images, camids) to (N, F)
PerCamera = Literal["none", "standardise", "whiten"]
BASELINES: Final[dict[str, tuple[Callable[[ImageSet], Tensor], ...]]] = {  # without any training
    "histogram": (colour_histogram,),
    "thumbnail": (thumbnail,),
    "thumbnail+histogram": (thumbnail, colour_histogram),
}


def measure(
    benchmark: Benchmark,
    features: Features,
    *,
    img_size: tuple[int, int],
    num_threads: int,
    device: torch.device | str = "cpu",
    rerank: str = "none",
    log: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Rank the gallery for every query, same camera removed. Returns scores in [0, 1], counts, and some rank lists.

    Called by all ranks together: they share the extraction, the first one ranks, on ``device``, and the others get None.
    Query and gallery are one set for ``features``, so that a per-camera normalisation sees both. Long work
    is logged, and ``stopped`` is asked before each block of queries.

    Raises:
        UserError: ``rerank`` is not one of ``RERANKINGS``, an image cannot be read, or no query can be scored.
        Stopped: ``stopped`` was true on the first rank.
    """
    if rerank not in RERANKINGS:
        raise UserError(f"rerank must be one of {', '.join(RERANKINGS)}. Got {rerank!r}")
    start = time.monotonic()
    vectors = extract_all(benchmark, features, img_size=img_size, num_threads=num_threads, log=log)

    def rank() -> dict[str, Any]:
        with timed(log, f"ranking {len(benchmark.query):,} x {len(benchmark.gallery):,}"):
            found = rank_all(benchmark, vectors.to(device), rerank=rerank, stopped=stopped)
        return found | {"seconds": time.monotonic() - start}

    return dist.on_first_rank(rank)


def extract_all(
    benchmark: Benchmark,
    features: Features,
    *,
    img_size: tuple[int, int],
    num_threads: int,
    log: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """The features (N, F) of all queries and then all gallery images, by all ranks together.

    Raises:
        UserError: an image cannot be read.
    """
    samples = [*benchmark.query, *benchmark.gallery]
    with ThreadPoolExecutor(num_threads) as pool, timed(log, f"extracting {len(samples):,} images"):
        images = ImageSet([sample.path for sample in samples], img_size, pool=pool, cache_bytes=0)  # each is read once
        return features(images, pids_and_camids(samples)[1])


def rank_all(
    benchmark: Benchmark, vectors: Tensor, *, rerank: str = "none", stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """The record of ``measure`` but for its duration, out of the features (N, F) of all queries and then all gallery images.

    Raises:
        UserError: a feature is not finite, or no query can be scored.
        Stopped: ``stopped`` was true.
    """
    query, gallery = vectors.tensor_split([len(benchmark.query)])
    compared = RERANKINGS[rerank](query, gallery)

    def similarity(queries: np.ndarray) -> Tensor:
        if stopped():
            raise Stopped("while the gallery was ranked")
        return compared(queries)

    labels = labels_of(benchmark)
    hits = ranking.find_hits(similarity, labels)
    result = ranking.score(hits, len(query))
    chosen = np.linspace(0, len(query) - 1, min(NUM_RANK_LISTS, len(query))).astype(int)
    lists = ranking.rank_lists(similarity, labels, queries=chosen, top_k=TOP_K)
    return {
        "benchmark": benchmark.name,
        "root": str(benchmark.root),
        **datasets.record(benchmark),
        "mAP": result.mAP,
        **{f"rank{k}": result.rank(k) for k in (1, 5, 10)},
        "mINP": result.mINP,
        "mAP_trapezoid": result.mAP_trapezoid,
        "cmc": list(result.cmc),
        "rerank": rerank,
        "num_queries": result.num_queries,
        "num_valid": result.num_valid,
        "num_gallery": len(gallery),
        "camera_pairs": breakdown.to_record(breakdown.by_camera_pair(hits, labels)),
        "rank_lists": [
            _rank_list(benchmark.query[i], [benchmark.gallery[j] for j in row if j >= 0])
            for i, row in zip(chosen.tolist(), lists.tolist(), strict=True)
        ],
        "query_ap": [None if ap is None else round(ap, 6) for ap in result.ap],
    }


def labels_of(benchmark: Benchmark) -> ranking.Labels:
    """Who is seen by which camera. A query that is in the gallery too is found by its path."""
    places = {sample.path: place for place, sample in enumerate(benchmark.gallery)}
    own_index = np.array([places.get(sample.path, -1) for sample in benchmark.query])
    return ranking.Labels(*pids_and_camids(benchmark.query), *pids_and_camids(benchmark.gallery), own_index)


def _rank_list(query: Sample, found: list[Sample]) -> dict[str, Any]:
    return {"query": query.path, "gallery": [s.path for s in found], "correct": [s.pid == query.pid for s in found]}


def model_features(
    model: Extractor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    batch_size: int = 256,
    stopped: Callable[[], bool] = lambda: False,
    trained_steps: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Features:
    """Features of a model, with the preprocessing that belongs to its weights. Progress is logged.

    ``trained_steps`` is of a model that is in training: there Diverged is raised where a feature is not finite.
    """

    def features(images: ImageSet, _: np.ndarray) -> Tensor:
        found = extract(model, images, batch_size=batch_size, device=device, mean=mean, std=std, stopped=stopped, log=log)
        if trained_steps is not None:
            require_finite(found, trained_steps)
        return found

    return features


def baseline_features(name: str, how: PerCamera = "standardise") -> Features:
    """One of ``BASELINES``, each camera's own colours taken out. Of two parts each has half of the cosine."""

    def features(images: ImageSet, camids: np.ndarray) -> Tensor:
        return torch.cat([per_camera(part(images), camids, how) for part in BASELINES[name]], dim=1)

    return features


def for_each_camera(features: Features, how: PerCamera, **whitening: Any) -> Features:
    """Features of query and gallery together, brought by ``per_camera`` to what all cameras have alike."""
    return lambda images, camids: per_camera(features(images, camids), camids, how, **whitening)


def per_camera(features: Tensor, camids: np.ndarray, how: PerCamera, *, dim: int = 64, shrinkage: float = 0.3) -> Tensor:
    """Features (N, F) of length one: unchanged, standardised or whitened within each camera, without any label."""
    if how == "whiten":
        return whiten_per_camera(features, camids, dim=dim, shrinkage=shrinkage)
    return F.normalize(standardise_per_camera(features, camids) if how == "standardise" else features, dim=1)


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write ``rank_lists.json``, ``queries.json`` (AP by query) and then ``result.json``, each whole or not at all.

    The root is written as an absolute path, and images below it relative to it: a report may be made in another folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    root = os.path.abspath(record["root"])
    lists = {"root": root, "entries": [_below(root, entry) for entry in record["rank_lists"]]}
    record = record | {"root": root}
    queries = {"benchmark_digest": record.get("benchmark_digest"), "ap": record["query_ap"]}
    result = {name: value for name, value in record.items() if name not in ("rank_lists", "query_ap")}
    for name, content in (("rank_lists.json", lists), ("queries.json", queries), ("result.json", result)):
        files.replace(out / name, files.to_json(content, indent=1))


def _below(root: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A rank list with paths relative to the root, or absolute where an image is elsewhere."""

    def below(path: str) -> str:
        path = os.path.abspath(path)
        return os.path.relpath(path, root) if os.path.commonpath([path, root]) == root else path

    return entry | {"query": below(entry["query"]), "gallery": [below(path) for path in entry["gallery"]]}


def read_record(run_dir: str | Path) -> dict[str, Any] | None:
    """The result of a run, if it has one that can be read."""
    try:
        record = json.loads((Path(run_dir) / "result.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def require_same(where: str | Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise a UserError that names what differs unless what lies at ``where`` is of the run with the resume key ``ours``."""
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if not differing:
        return
    changes = [f"{key}={theirs.get(key)} (now {ours[key]})" for key in differing if not key.startswith("data.")][:4]
    if "data.digest" in differing and "data.digest" in theirs:
        changes.append(_data_change(ours, theirs))
    raise UserError(
        f"{where} belongs to a run with other settings or data: {', '.join(changes)}. Use the same, another run_dir, or "
        "checkpoint.resume=none"
    )


def _data_change(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    before, now = ([found[f"data.{name}"] for name in ("num_images", "num_ids")] for found in (theirs, ours))
    if before == now:
        return f"{now[0]:,} training images of {now[1]:,} ids, as now, but with other names, ids or cameras"
    change = "{:,} training images of {:,} ids (now {:,} of {:,})".format(*before, *now)
    needs_head = "head.kind" in ours and before[1] != now[1]
    return change + (f", so its head has {before[1]:,} classes and {now[1]:,} are required" if needs_head else "")


def table_row(record: dict[str, Any]) -> str:
    """One line of a results table, in per cent. Its end names data that is not a published benchmark."""
    scores = "  ".join(f"{name} {100 * record[name]:5.1f}" for name in ("mAP", "rank1", "rank5", "rank10", "mINP"))
    title = record.get("benchmark_title", "")
    suffix = "" if title in datasets.TITLES.values() else f"  {title}"
    return f"{record['name']:<24} {record['benchmark']:<14} {scores}{suffix}".rstrip()

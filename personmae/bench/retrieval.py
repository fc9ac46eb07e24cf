"""``personmae bench retrieval``: the cost of evaluating retrieval, next to its matrix product alone and to two baselines."""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.monitor import environment, progress
from personmae.reid.ranking import BLOCK_SIZE, Labels, cosine, evaluate
from personmae.system import files, signals

OURS = "evaluate"
PRODUCT = "matrix product alone"
BASELINE = "argsort, loops over queries and ranks"  # as torchreid and fast-reid score
BASELINE_VECTORS = "argsort, loop over queries"  # as the TransReID family scores
WAYS = (PRODUCT, OURS, BASELINE_VECTORS, BASELINE)
NOISE = 3.5  # of an image, per number of its feature, where people have 1
CHUNK = 512  # rows of features drawn at a time


@dataclass(frozen=True, slots=True)
class RetrievalBench:
    """What to measure, on features of drawn people. The baselines score the first ``baseline_queries`` only."""

    num_query: int
    num_gallery: int
    num_pids: int
    num_cameras: int = 6
    dim: int = 2048
    rounds: int = 3
    baseline_queries: int | None = None  # all of them


PRESETS = {
    "market": RetrievalBench(3_368, 15_913, num_pids=750),
    # For all queries the baselines would hold a distance and a place in the order for 958 million pairs.
    "msmt17": RetrievalBench(11_659, 82_161, num_pids=3_060, num_cameras=15, baseline_queries=500),
}


@dataclass
class Measured:
    """Median seconds over the rounds for all queries, the largest peak of memory, and the mAP of the measured queries."""

    seconds: float
    peak_bytes: int
    num_queries: int  # measured; fewer than all are scaled
    mAP: float | None = None  # noqa: N815 - the field's name


def run_retrieval(bench: RetrievalBench, out: Path | None = None) -> dict[str, Any]:
    """Measure every way in a process of its own, in turn, print a table, and write the record to ``out``.

    Raises:
        UserError: a number does not fit the others.
    """
    baseline_queries = bench.num_query if bench.baseline_queries is None else bench.baseline_queries
    if not 0 < baseline_queries <= bench.num_query:
        raise UserError(f"baseline_queries must be in 1 ... num_query = {bench.num_query}. Got {baseline_queries}")
    counts = {name: bench.num_query if name in (OURS, PRODUCT) else baseline_queries for name in WAYS}
    rounds: dict[str, list[tuple[float, int, float | None]]] = {name: [] for name in WAYS}
    for number in range(1, bench.rounds + 1):
        for name in WAYS:
            progress.log_to_stderr(f"bench retrieval: round {number} of {bench.rounds}, {name} ...")
            rounds[name].append(_in_own_process(name, bench, counts[name]))
    found = {}
    for name, results in rounds.items():
        seconds, peaks, scores = zip(*results, strict=True)
        scale = bench.num_query / counts[name]
        found[name] = Measured(scale * statistics.median(seconds), max(peaks), counts[name], scores[0])
    ours = found[OURS].seconds
    record = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": asdict(bench),
        "feature_bytes": 4 * bench.dim * (bench.num_query + bench.num_gallery),
        "measured": {name: asdict(values) for name, values in found.items()},
        "ratios": {name: values.seconds / ours for name, values in found.items() if name != OURS},
    }
    _print(bench, found, record)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, files.to_json(record, indent=1) + "\n")
    return record


def _in_own_process(name: str, bench: RetrievalBench, num_queries: int) -> tuple[float, int, float | None]:
    """Measure in a new process, since only then its peak of memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signals.end_quietly) as pool:
        return pool.submit(measure, name, bench, num_queries).result()


def measure(name: str, bench: RetrievalBench, num_queries: int) -> tuple[float, int, float | None]:
    """Seconds and mAP of one way on the first ``num_queries``, and this process's peak of memory in bytes."""
    query, gallery, labels = draw(bench)
    query = query[:num_queries].clone()
    labels = replace(labels, query_pids=labels.query_pids[:num_queries], query_camids=labels.query_camids[:num_queries])
    _ = query[:8] @ gallery[:64].T  # starts the threads
    start, score = time.perf_counter(), None
    if name == PRODUCT:
        for rows in query.split(BLOCK_SIZE):
            _ = rows @ gallery.T
    elif name == OURS:
        score = evaluate(cosine(query, gallery), labels).mAP
    else:
        score = baseline(query, gallery, labels, vectors=name == BASELINE_VECTORS)
    return time.perf_counter() - start, _peak_bytes(), score


def draw(bench: RetrievalBench) -> tuple[torch.Tensor, torch.Tensor, Labels]:
    """Features (Q, F) and (G, F) of length one, around a centre for each person, and labels. They are the same every time."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    people = torch.randn(bench.num_pids, bench.dim, generator=generator)
    features, columns = [], []
    for count in (bench.num_query, bench.num_gallery):
        pids, camids = rng.integers(0, bench.num_pids, count), rng.integers(0, bench.num_cameras, count)
        drawn = torch.empty(count, bench.dim)
        for rows, of in zip(drawn.split(CHUNK), torch.from_numpy(pids).split(CHUNK), strict=True):
            noise = NOISE * torch.randn(len(rows), bench.dim, generator=generator)
            rows.copy_(F.normalize(people[of] + noise, dim=1))
        features.append(drawn)
        columns += [pids, camids]
    return features[0], features[1], Labels(*columns)


def baseline(query: torch.Tensor, gallery: torch.Tensor, labels: Labels, *, vectors: bool) -> float:
    """mAP from all distances, their order, and a loop over queries. Without ``vectors``, over the places of each too."""
    distances = 1 - (query @ gallery.T).numpy()
    order = np.argsort(distances, axis=1)
    hits = (labels.gallery_pids[order] == labels.query_pids[:, None]).astype(np.int32)
    scores, curves = [], []
    for row, hit, pid, camid in zip(order, hits, labels.query_pids, labels.query_camids, strict=True):
        right = hit[(labels.gallery_pids[row] != pid) | (labels.gallery_camids[row] != camid)]
        if not right.any():
            continue
        found = right.cumsum()
        curves.append(np.minimum(found, 1)[:50])
        if vectors:
            precision = found / np.arange(1, len(found) + 1)
        else:
            precision = np.asarray([count / (place + 1.0) for place, count in enumerate(found)])
        scores.append((precision * right).sum() / right.sum())
    _ = np.asarray(curves).mean(axis=0)  # CMC, which every way gives
    return float(np.mean(scores))


def _peak_bytes() -> int:
    """Largest resident memory of this process since its start. ``getrusage`` would include its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _print(bench: RetrievalBench, found: dict[str, Measured], record: dict[str, Any]) -> None:
    cores, features = record["hardware"]["cores"], record["feature_bytes"] / 1e9
    title = f"{bench.num_query:,} queries, {bench.num_gallery:,} in the gallery, {features:.2f} GB of features, {cores} cores"
    table = Table("way", "seconds", "beside evaluate", "peak GB", "queries measured", "their mAP", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in found.items():
        ratio = f"{values.seconds / found[OURS].seconds:.2f}"
        score = "" if values.mAP is None else f"{values.mAP:.4f}"
        table.add_row(name, f"{values.seconds:.2f}", ratio, f"{values.peak_bytes / 1e9:.2f}", f"{values.num_queries:,}", score)
    Console().print(table)

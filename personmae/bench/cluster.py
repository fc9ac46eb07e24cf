"""``personmae bench cluster``: time and memory of computing pseudo-labels, next to a dense baseline with the same labels."""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
from personmae.reid.cluster import pseudo_labels
from personmae.reid.cluster_quality import ClusterQuality, quality
from personmae.system import files, signals

OURS = "pseudo_labels"
BASELINE = "dense N x N"  # matrices, filled image by image, as cluster-contrast and its ports compute it
K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4
NOISE = 2.1  # length of an image's scatter where a person's centre has length 1: most are found, some images are outliers
CHUNK = 512  # rows of features drawn at a time
_FRESH_PEAK = "5"  # what makes Linux forget a process's peak of memory


@dataclass(frozen=True, slots=True)
class ClusterBench:
    """What to measure, on features of drawn people. The baseline needs 12 bytes per pair of images."""

    num_images: int
    num_pids: int
    dim: int = 384
    rounds: int = 3
    baseline: bool = True


PRESETS = {
    "market": ClusterBench(12_936, num_pids=751),
    "large": ClusterBench(100_000, num_pids=5_800, rounds=1, baseline=False),
}


@dataclass
class Measured:
    """Median seconds over the rounds, and the largest memory: of the process, and its growth during the clustering."""

    seconds: float
    peak_bytes: int
    more_bytes: int
    quality: ClusterQuality


def run_cluster(bench: ClusterBench, out: Path | None = None) -> dict[str, Any]:
    """Measure each way in a process of its own, in turn, print a table, and write the record to ``out``.

    Raises:
        UserError: there are fewer images than people.
    """
    if not 0 < bench.num_pids <= bench.num_images:
        raise UserError(f"num_pids must be in 1 ... num_images = {bench.num_images}. Got {bench.num_pids}")
    ways = (OURS, BASELINE) if bench.baseline else (OURS,)
    rounds: dict[str, list[tuple[float, int, int, np.ndarray]]] = {name: [] for name in ways}
    for number in range(1, bench.rounds + 1):
        for name in ways:
            progress.log_to_stderr(f"bench cluster: round {number} of {bench.rounds}, {name} ...")
            rounds[name].append(_in_own_process(name, bench))
    pids, found, labels = draw(bench)[1], {}, {}
    for name, results in rounds.items():
        seconds, peaks, more, kept = zip(*results, strict=True)
        labels[name] = kept[0]
        found[name] = Measured(statistics.median(seconds), max(peaks), max(more), quality(kept[0], pids))
    record = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": asdict(bench),
        "feature_bytes": 4 * bench.dim * bench.num_images,
        "measured": {name: asdict(values) for name, values in found.items()},
    }
    if bench.baseline:
        record["speed_ratio"] = found[BASELINE].seconds / found[OURS].seconds
        record["memory_ratio"] = found[BASELINE].more_bytes / found[OURS].more_bytes
        record["different_labels"] = int((labels[OURS] != labels[BASELINE]).sum())
    _print(bench, found, record)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, files.to_json(record, indent=1) + "\n")
    return record


def _in_own_process(name: str, bench: ClusterBench) -> tuple[float, int, int, np.ndarray]:
    """Measure in a new process, since only then its peak of memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signals.end_quietly) as pool:
        return pool.submit(measure, name, bench).result()


def measure(name: str, bench: ClusterBench) -> tuple[float, int, int, np.ndarray]:
    """Seconds of one way, this process's peak of memory, what of it was not there before (bytes both), and the labels."""
    way = {OURS: pseudo_labels, BASELINE: baseline}[name]
    features, _ = draw(bench)
    way(features[:200], k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)  # loads libraries and starts the threads
    Path("/proc/self/clear_refs").write_text(_FRESH_PEAK, encoding="utf-8")
    before, start = _status("VmRSS"), time.perf_counter()
    labels = way(features, k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
    seconds, peak = time.perf_counter() - start, _status("VmHWM")
    return seconds, peak, peak - before, labels


def draw(bench: ClusterBench) -> tuple[torch.Tensor, np.ndarray]:
    """Features (N, F) of length one, scattered around a centre for each person, and pids (N,). They are the same every time."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(bench.num_pids, bench.dim, generator=generator), dim=1)
    pids = torch.randint(bench.num_pids, (bench.num_images,), generator=generator)
    features = torch.empty(bench.num_images, bench.dim)
    for rows, of in zip(features.split(CHUNK), pids.split(CHUNK), strict=True):
        scatter = torch.randn(len(rows), bench.dim, generator=generator) * (NOISE / bench.dim**0.5)
        rows.copy_(F.normalize(centres[of] + scatter, dim=1))
    return features, pids.numpy()


def baseline(features: torch.Tensor, *, k1: int, k2: int, eps: float, min_samples: int) -> np.ndarray:
    """Labels as the field computes them, with neighbours by brute force."""
    from sklearn.cluster import DBSCAN

    distances = _dense_distances(features, k1, k2)
    found = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed", n_jobs=-1).fit_predict(distances)
    names = {-1: -1}  # numbered by the first member, as ours
    return np.array([names.setdefault(label, len(names) - 1) for label in found.tolist()])


def _dense_distances(features: torch.Tensor, k1: int, k2: int) -> np.ndarray:
    """Jaccard distances (N, N) in fp32: sets, weights, means and sums image by image."""
    num_images = len(features)
    nearest = torch.cat([(rows @ features.T).topk(k1).indices for rows in features.split(CHUNK)]).numpy()
    encoding = np.zeros((num_images, num_images), np.float32)
    whole, half = (_reciprocal_sets(nearest[:, :k]) for k in (k1, round(k1 / 2) + 1))
    for i, members in enumerate(whole):
        expanded = [half[j] for j in members if len(np.intersect1d(half[j], members)) > 2 / 3 * len(half[j])]
        columns = torch.from_numpy(np.unique(np.concatenate([members, *expanded])))
        encoding[i, columns] = (2 * features[i] @ features[columns].T - 2).softmax(dim=0)
    if k2 > 1:
        mean = np.zeros_like(encoding)
        for i in range(num_images):
            mean[i] = encoding[nearest[i, :k2]].mean(axis=0)
        encoding = mean
        del mean
    having = [np.flatnonzero(encoding[:, column]) for column in range(num_images)]
    distances = np.zeros_like(encoding)
    for i in range(num_images):
        sums = np.zeros(num_images, np.float32)
        for column in np.flatnonzero(encoding[i]):
            sums[having[column]] += np.minimum(encoding[i, column], encoding[having[column], column])
        distances[i] = 1 - sums / (2 - sums)
    return np.maximum(distances, 0, out=distances)


def _reciprocal_sets(nearest: np.ndarray) -> list[np.ndarray]:
    return [row[(nearest[row] == i).any(axis=1)] for i, row in enumerate(nearest)]


def _status(name: str) -> int:
    """A number of bytes that Linux keeps of this process."""
    return 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").partition(f"{name}:")[2].split()[0])


def _print(bench: ClusterBench, found: dict[str, Measured], record: dict[str, Any]) -> None:
    cores, features = record["hardware"]["cores"], record["feature_bytes"] / 1e6
    title = f"{bench.num_images:,} images, {features:,.0f} MB of features, {cores} cores"
    table = Table("way", "seconds", "MB more", "MB in all", "clusters", "outliers", "AMI", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in found.items():
        scores = values.quality
        counts = (
            f"{scores.num_clusters:,}",
            f"{scores.num_outliers:,}",
            "" if scores.ami_people is None else f"{scores.ami_people:.4f}",
        )
        sizes = (f"{values.more_bytes / 1e6:,.0f}", f"{values.peak_bytes / 1e6:,.0f}")
        table.add_row(name, f"{values.seconds:.2f}", *sizes, *counts)
    console = Console()
    console.print(table)
    if bench.baseline:
        console.print(
            f"{record['speed_ratio']:.1f} times as fast, {record['memory_ratio']:.1f} times less memory. "
            f"{record['different_labels']:,} labels differ"
        )

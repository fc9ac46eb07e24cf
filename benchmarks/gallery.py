"""A gallery of drawn features: time to build and to search, memory, and what FAISS finds of the exact search.

    python benchmarks/gallery.py                                   # 1,000,000 features of 768 numbers, on 2 idle CPU cores
    python benchmarks/gallery.py --rows 20000 --folder runs/bench_gallery_small --out runs/bench_gallery_small/gallery.json

It needs 11 GB of disk for a million and ``personmae[gallery]``. Each part is in the record as soon as it is measured, so the
same command goes on after a kill. Features are drawn around a centre for each person, 20 images of each. Each part that counts
memory has a process of its own. The exact search and its matrix product alone take turns in one process.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personmae.checkpoint import portable
from personmae.gallery import approximate, edit, exact
from personmae.gallery.catalog import Gallery, open_gallery
from personmae.monitor import environment, progress
from personmae.system import files

RESULTS = Path(__file__).resolve().parent / "results" / "gallery.json"
CHUNK = 10_000  # rows drawn at a time
IMAGES_OF_A_PERSON = 20
NOISE = 1.0  # of an image, per number of its feature, where people have 1
CHECKED = 50  # queries whose exact result is compared with a sort of all similarities
SINGLE = 20  # searches of one query


def main() -> None:
    """Measure what the record does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_gallery"), help="features and galleries")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {name: vars(args)[name] for name in ("rows", "dim", "queries", "rounds")}
    parts: dict[str, Callable[[Path, dict[str, int]], dict[str, Any]]] = {
        "draw": draw,
        "build_exact": build_exact,
        "build_faiss": build_faiss,
        "search": search_both,
    }
    for name, measure in parts.items():
        record = _read(args.out, settings)
        if name not in record["measured"]:
            progress.log_to_stderr(f"gallery: {name} ...")
            args.folder.mkdir(parents=True, exist_ok=True)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                record["measured"][name] = pool.submit(measure, args.folder, settings).result()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            files.replace(args.out, files.to_json(record, indent=1) + "\n")
    print(json.dumps(_read(args.out, settings)["measured"], indent=1))


def _read(out: Path, settings: dict[str, int]) -> dict[str, Any]:
    """The record of the same settings and commit so far."""
    made = {
        "commit": environment.git_commit(),
        "hardware": environment.describe_hardware(),
        "versions": portable.versions(),
        "settings": settings,
        "measured": {},
    }
    if not out.exists():
        return made
    found = json.loads(out.read_bytes())
    commits = {str(record["commit"]).rstrip("+") for record in (found, made)}  # the record itself is a change
    return found if found["settings"] == settings and len(commits) == 1 else made


class Peak:
    """Largest anonymous memory of this process while it is open. Mapped files are not in it: the system may drop them."""

    def __enter__(self) -> "Peak":
        self.num_bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            self.num_bytes = max(self.num_bytes, 1024 * int(status.partition("RssAnon:")[2].split()[0]))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


# --- features ---


def draw(folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    """Features of the gallery, a chunk of rows at a time, and their ids."""
    began, path = time.perf_counter(), folder / "features.npy"
    shape = settings["rows"], settings["dim"]
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, settings["rows"], CHUNK):
        people = np.arange(start, min(start + CHUNK, settings["rows"])) // IMAGES_OF_A_PERSON
        array[start : start + CHUNK] = _drawn(people, settings["dim"], seed=start)
    array.flush()
    ids = "".join(f"{row:08}_c{row % 6 + 1}.jpg\n" for row in range(settings["rows"]))
    (folder / "features.ids.txt").write_text(ids, encoding="utf-8")
    return {"seconds": time.perf_counter() - began, "feature_bytes": path.stat().st_size}


def _drawn(people: np.ndarray, dim: int, seed: int) -> np.ndarray:
    """Images of people, of length one. A person is the same in every call."""
    numbers, which = np.unique(people, return_inverse=True)
    centres = np.stack([np.random.default_rng([1, int(number)]).standard_normal(dim, np.float32) for number in numbers])
    noise = np.random.default_rng([2, seed]).standard_normal((len(people), dim), np.float32)
    images = centres[which] + NOISE * noise
    return images / np.linalg.norm(images, axis=1, keepdims=True)


def drawn_queries(settings: dict[str, int]) -> torch.Tensor:
    """Other images of people who are in the gallery."""
    last = (settings["rows"] - 1) // IMAGES_OF_A_PERSON
    people = np.linspace(0, last, settings["queries"]).astype(np.int64)
    return torch.from_numpy(_drawn(people, settings["dim"], seed=settings["rows"] + 1))


# --- building ---


def build_exact(folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    """A gallery without an index."""
    return _build(folder, folder / "exact", "exact")


def build_faiss(folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    """A gallery with one. Its seconds hold those of the exact one, and of measuring the recall."""
    return _build(folder, folder / "faiss", "faiss")


def _build(folder: Path, out: Path, index: edit.IndexKind) -> dict[str, Any]:
    for path in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)
    with Peak() as peak:
        began = time.perf_counter()
        edit.build(edit.Inputs(str(folder / "features.npy")), out, index=index)
        seconds = time.perf_counter() - began
    gallery = open_gallery(out)
    sizes = {path.relative_to(out).parts[0]: 0 for path in out.rglob("*") if path.is_file()}
    for path in out.rglob("*"):
        if path.is_file():
            sizes[path.relative_to(out).parts[0]] += path.stat().st_size
    return {
        "seconds": seconds,
        "peak_anonymous_bytes": peak.num_bytes,
        "disk_bytes": sum(sizes.values()),
        "index_bytes": sum(size for name, size in sizes.items() if name.startswith("index-")),
        "index": gallery.manifest.index,
    }


# --- searching ---


def search_both(folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    """Exact search, its product alone and FAISS in turn, and what each finds."""
    queries = drawn_queries(settings)
    gallery, indexed = open_gallery(folder / "exact"), open_gallery(folder / "faiss")
    assert indexed.manifest.index
    probes = indexed.manifest.index["num_probes"]
    index = approximate.read(indexed.folder / indexed.manifest.index["file"])
    ways: dict[str, Callable[[], Any]] = {
        "product": lambda: product(gallery, queries),
        "exact": lambda: exact.search(gallery, queries, approximate.K),
        "faiss": lambda: approximate.search(index, indexed, queries, approximate.K, num_probes=probes),
    }
    for way in ways.values():  # once, so that threads run and files are in memory as far as it reaches
        way()
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    for number in range(settings["rounds"]):
        for name, way in ways.items():
            progress.log_to_stderr(f"gallery: round {number + 1} of {settings['rounds']}, {name} ...")
            with Peak() as peak:
                rounds[name].append(_seconds(way))
            peaks[name] = max(peaks[name], peak.num_bytes)
    medians = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    return {
        "seconds": rounds,
        "median_seconds": medians,
        "exact_beside_product": medians["exact"] / medians["product"],
        "peak_anonymous_bytes": peaks,
        "one_query_seconds": _one_query(gallery, indexed, index, queries, probes),
        "recall": _recalls(gallery, indexed, index, queries, probes),
        "num_probes": probes,
        "threads": torch.get_num_threads(),
    }


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def product(gallery: Gallery, queries: torch.Tensor) -> None:
    """All similarities, block by block as the exact search computes them, and nothing with them."""
    for part in queries.split(1024):
        for _, features in gallery.blocks(exact.block_rows(len(part))):
            _ = part @ torch.from_numpy(features).float().T


def _one_query(gallery: Gallery, indexed: Gallery, index: Any, queries: torch.Tensor, probes: int) -> dict[str, float]:
    """Median seconds of a search for one query, of an open gallery."""
    some = [queries[number : number + 1] for number in range(min(SINGLE, len(queries)))]
    return {
        "exact": statistics.median(_seconds(lambda q=q: exact.search(gallery, q, approximate.K)) for q in some),
        "faiss": statistics.median(
            _seconds(lambda q=q: approximate.search(index, indexed, q, approximate.K, num_probes=probes)) for q in some
        ),
    }


def _recalls(gallery: Gallery, indexed: Gallery, index: Any, queries: torch.Tensor, probes: int) -> dict[str, float]:
    """Recall@10 of the exact search beside a sort of all similarities, and of FAISS beside the exact search."""
    k = approximate.K
    found = _sets(exact.search(gallery, queries, k))
    features = gallery.features(np.arange(len(gallery)))
    best = (queries[:CHECKED] @ torch.from_numpy(features).T).sort(dim=1, descending=True, stable=True).indices[:, :k]
    approximately = _sets(approximate.search(index, indexed, queries, k, num_probes=probes))
    return {
        "exact": approximate.recall_of(found[:CHECKED], [set(rows) for rows in best.tolist()]),
        "faiss": approximate.recall_of(approximately, found),
    }


def _sets(found: exact.Found) -> list[set[int]]:
    return [set(rows) for rows in found.rows.tolist()]


if __name__ == "__main__":
    main()

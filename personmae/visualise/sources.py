"""Where the images of a page come from: the benchmark that a run recorded or that is given, or a pre-training's own shards."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from personmae import config, images
from personmae.checkpoint import portable
from personmae.errors import UserError
from personmae.reid import retrieval
from personmae.reid.datasets import Benchmark, Sample, load_benchmark
from personmae.reid.transforms import decode_image
from personmae.report import figures, runs
from personmae.report.places import Lost, Place
from personmae.synthetic.benchmarks import read_mark
from personmae.visualise import search
from personmae.visualise.search import Search
from personmae.visualise.section import Pair, Shown
from personmae.weights.encoder import Encoder

_WANTED = "give --benchmark NAME --data ROOT"


def run_of(encoder: Encoder) -> Path | None:
    """The run directory that the weights are of. None where they are not a checkpoint of a run."""
    checkpoint = Path(encoder.config["source"])
    return checkpoint.parent.parent if (checkpoint / portable.STATE).is_file() else None


def recorded(where: str, encoder: Encoder) -> dict[str, Any] | None:
    """The result of the run, where the weights are the newest of one that has a result."""
    run = run_of(encoder)
    return retrieval.read_record(run) if run and Path(where).resolve() == run.resolve() else None


def find_benchmark(where: str, encoder: Encoder, name: str | None, root: str | None) -> tuple[Benchmark | None, str]:
    """The benchmark that is given, or that the run was trained for, or None and the reason.

    Raises:
        UserError: it cannot be read, or is not where the run saw it.
    """
    if name and root:
        return load_benchmark(name, root, splits=("query", "gallery")), ""
    run = run_of(encoder)
    state = portable.read_state(Path(encoder.config["source"])) if run else {}
    if run is None or "benchmark" not in state:
        return None, f"{where} names no benchmark: {_WANTED}"
    try:
        found = _place(run).find(state["root"])
    except Lost as lost:
        raise UserError(f"{state['benchmark']} is needed by {run} and is not at {state['root']}: {_WANTED}") from lost
    return load_benchmark(state["benchmark"], found, splits=("query", "gallery")), ""


def _place(run: Path) -> Place:
    return runs.read_run(run).place if (run / "config.yaml").is_file() else Place(run)


def to_look_at(encoder: Encoder, looked: Search | Benchmark | None, count: int, seed: int) -> list[Shown]:
    """Images that were not chosen by their result: queries drawn by chance, or those of a pre-training's own shards.

    Raises:
        UserError: an image cannot be read.
    """
    if isinstance(looked, Search):
        return [_shown(looked.sample(query), looked.benchmark) for query in search.drawn(looked, count, seed).tolist()]
    if looked:
        drawn = np.random.default_rng(seed).permutation(len(looked.query))[:count]
        return [_shown(looked.query[query], looked) for query in sorted(drawn.tolist())]
    try:
        return _of_shards(run, count) if (run := run_of(encoder)) else []
    except Lost:  # the section of reconstructions needs them too, and says so
        return []


def to_compare(found: Search, count: int, seed: int) -> list[Pair]:
    """The queries of ``to_look_at``, each with the best right answer and with the best wrong one.

    Raises:
        UserError: an image cannot be read.
    """
    return [pair for query in search.drawn(found, count, seed).tolist() for pair in _pairs(found, query)]


def _pairs(found: Search, query: int) -> list[Pair]:
    first = _shown(found.sample(query), found.benchmark)
    near = found.nearest(np.array([query]), top_k=len(found.benchmark.gallery))[0]
    right = next(number for number in near if found.is_match(query, number))
    pairs = [Pair(first, _shown(found.found(right), found.benchmark), same=True)]
    if (wrong := int(found.wrong[query])) >= 0:
        pairs.append(Pair(first, _shown(found.found(wrong), found.benchmark), same=False))
    return pairs


def _shown(sample: Sample, benchmark: Benchmark) -> Shown:
    return Shown(os.path.relpath(sample.path, benchmark.root), decode_image(sample.path))


def _of_shards(run: Path, count: int) -> list[Shown]:
    """Images spread over the first shard that a pre-training run was trained on. Empty where it was no pre-training."""
    settings = _pretraining(run)
    if settings is None:
        return []
    with figures.open_shards(settings, run) as shards:
        ids = np.linspace(0, shards.sizes[0] - 1, min(count, shards.sizes[0])).astype(np.int64)
        return [Shown(f"image {number}", images.decode(bytes(shards.jpeg(int(number)))).pixels) for number in ids]


def are_drawn(encoder: Encoder) -> bool:
    """Whether the shards that a pre-training run was trained on are marked as drawn people. False where that is not known."""
    run = run_of(encoder)
    try:
        settings = _pretraining(run) if run else None
    except Lost:
        return False
    return settings is not None and read_mark(settings.data.shards) is not None


def _pretraining(run: Path) -> config.Pretrain | None:
    """The settings of a pre-training run, with its data where it is now. None where it was none."""
    folder = runs.read_run(run) if (run / "config.yaml").is_file() else None
    return runs.pretraining_of(folder) if folder and isinstance(folder.settings, config.Pretrain) else None

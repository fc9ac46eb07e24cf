"""A benchmark in memory: three splits of samples, their counts and oddities, and digests that distinguish two of them.

``personmae.reid.datasets`` knows the layouts on disk.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int

from personmae.errors import UserError
from personmae.reid.samples import SPLITS, UNKNOWN_CAMID, Sample

JUNK_PID: Final = -1  # a bad detection: neither a match nor a mistake
DISTRACTOR_PID: Final = 0  # people without an identity, in Market-1501: wrong answers for every query
SYNTHETIC_MARK: Final = "synthetic.json"  # 'personmae synth' writes it into each set and beside all of them
OWN: Final = ("folder", "csv")  # data sets of the user's own, whose identities have names
Counts = Mapping[str, tuple[int, int]]  # split to (images, identities)
TITLES: Final = {
    "market1501": "Market-1501",
    "occluded_duke": "Occluded-Duke",
    "dukemtmc": "DukeMTMC-reID",
    "cuhk03_np_detected": "CUHK03-NP (detected)",
    "cuhk03_np_labeled": "CUHK03-NP (labeled)",
    "msmt17": "MSMT17",
    "msmt17_v1": "MSMT17_V1",
    "msmt17_v2": "MSMT17_V2",
}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The three splits of one benchmark, in the order of file names or lists.

    ``num_junk`` gallery files were left out. ``distractors`` says whether pid 0 stands for people without an identity.
    Otherwise 0 is an identity like any other. ``published`` is empty for a data set of the user's own. ``synthetic`` says
    whether the people are drawn, and ``one_numbering`` whether a pid is the same person in all splits.
    """

    name: str
    root: str
    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    num_junk: int = 0
    distractors: bool = False
    published: Counts = field(default_factory=dict)
    remark: str = ""
    synthetic: bool = False
    one_numbering: bool = True


@dataclass(frozen=True, slots=True)
class Description:
    """What was found: a printable table, whether it is the published benchmark, and the difference in words."""

    table: str
    published: bool
    note: str


def is_synthetic(root: str | Path) -> bool:
    """Whether a set is marked as drawn: by a file in it, or by one next to it that counts its images.

    A mark next to it that counts other folders does not count, since a real benchmark may be next to drawn ones.
    """
    root = Path(root).resolve()
    if (root / SYNTHETIC_MARK).is_file():
        return True
    try:
        counts = json.loads((root.parent / SYNTHETIC_MARK).read_bytes())["counts"]
        return any(name.startswith(f"{root.name}/") for name in counts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def train_labels(samples: Sequence[Sample]) -> Int[np.ndarray, " N"]:
    """Class labels 0 ... n - 1 of the samples. Classes follow the ascending order of pids, so they are stable."""
    return np.unique(pids_and_camids(samples)[0], return_inverse=True)[1].astype(np.int64)


def resume_key(benchmark: Benchmark) -> dict[str, int | str]:
    """The part of a run's resume key about its data: counts of training images and a digest, by dotted key.

    The digest is over the images' paths below the root, classes and cameras.
    """
    labels = train_labels(benchmark.train)
    lines = [
        f"{os.path.relpath(sample.path, benchmark.root)}\t{label}\t{sample.camid}\n"
        for sample, label in zip(benchmark.train, labels.tolist(), strict=True)
    ]
    digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:12]
    return {"data.num_images": len(lines), "data.num_ids": int(labels.max()) + 1, "data.digest": digest}


def digest(benchmark: Benchmark) -> str:
    """A digest of a test set: names below the root, bytes, ids and cameras of all queries and gallery images.

    Neither the place of the set matters, nor the name of its layout, nor whether its training images were read. So people who
    have names are numbered here by those of query and gallery alone.

    Raises:
        UserError: an image is gone.
    """
    pids = sorted({sample.pid for sample in (*benchmark.query, *benchmark.gallery)})
    return _digest(benchmark, {pid: place for place, pid in enumerate(pids)} if benchmark.name in OWN else {})


def earlier_digest(benchmark: Benchmark) -> str:
    """What ``digest`` was once: people who have names had numbers that depended on those of the training images.

    Raises:
        UserError: an image is gone.
    """
    return _digest(benchmark, {})


def _digest(benchmark: Benchmark, numbers: Mapping[int, int]) -> str:
    """``numbers`` replace pids."""
    lines = []
    for split in ("query", "gallery"):
        for sample in getattr(benchmark, split):
            try:
                num_bytes = os.stat(sample.path).st_size
            except OSError as error:
                raise UserError(f"cannot read {sample.path}: {error.strerror}. Check the data set") from error
            name = os.path.relpath(sample.path, benchmark.root)
            lines.append(f"{split}\t{name}\t{num_bytes}\t{numbers.get(sample.pid, sample.pid)}\t{sample.camid}\n")
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def record(benchmark: Benchmark) -> dict[str, Any]:
    """The part of a result about its data: the digest, whether people are drawn, images and identities by split, and a title.

    Raises:
        UserError: an image is gone.
    """
    return {
        "benchmark_digest": digest(benchmark),
        "benchmark_title": title(benchmark),
        "synthetic": benchmark.synthetic,
        "counts": {split: list(found) for split, found in count(benchmark).items() if found[0]},
        **({"shared_people": len(shared)} if (shared := shared_people(benchmark)) else {}),
    }


def title(benchmark: Benchmark) -> str:
    """What a table calls the data: a published benchmark by its name, everything else by what it is."""
    layout = TITLES.get(benchmark.name)
    if layout and not benchmark.synthetic and not _differences(count(benchmark), benchmark.published):
        return layout
    what = f"{layout} layout" if layout else "own data"
    no_identity = {DISTRACTOR_PID} if benchmark.distractors else set()
    num_ids = len({sample.pid for sample in (*benchmark.query, *benchmark.gallery)} - no_identity)
    return f"{'synthetic people, ' if benchmark.synthetic else ''}{what}, {num_ids:,} identities"


def pids_and_camids(samples: Sequence[Sample]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The two label columns of the samples."""
    pids = np.fromiter((sample.pid for sample in samples), dtype=np.int64, count=len(samples))
    camids = np.fromiter((sample.camid for sample in samples), dtype=np.int64, count=len(samples))
    return pids, camids


def count(benchmark: Benchmark) -> dict[str, tuple[int, int]]:
    """Images and identities of each split. Distractors are images without an identity."""
    no_identity = {DISTRACTOR_PID} if benchmark.distractors else set()
    splits = {split: getattr(benchmark, split) for split in SPLITS}
    return {split: (len(found), len({s.pid for s in found} - no_identity)) for split, found in splits.items()}


def describe(benchmark: Benchmark) -> Description:
    """Images, identities and cameras of each split, what is odd about them, and a comparison with the published numbers."""
    counts, published = count(benchmark), benchmark.published
    rows = [f"{'split':<8} {'images':>7} {'ids':>6} {'cameras':>7}"]
    for split, (num_images, num_ids) in counts.items():
        if not num_images:  # it was not asked for
            continue
        camids = {sample.camid for sample in getattr(benchmark, split)}
        cameras = "unknown" if UNKNOWN_CAMID in camids else len(camids)
        rows.append(f"{split:<8} {num_images:>7,} {num_ids:>6,} {cameras:>7}")
    differences = _differences(counts, published)
    if benchmark.synthetic:
        found = [title(benchmark)]
    elif not published:
        found = ["a data set of your own, with no published counts"]
    else:
        found = [title(benchmark), *differences] if differences else ["the counts are the published ones"]
    note = joined(*found, benchmark.remark)
    is_published = bool(published) and not differences and not benchmark.synthetic
    return Description("\n".join([*rows, *_oddities(benchmark)]), is_published, f"{benchmark.name}: {note}")


def _differences(counts: Counts, published: Counts) -> list[str]:
    """How the splits that were read differ from the published ones, in words."""
    lines = []
    for split, found in counts.items():
        wanted = published.get(split, found)
        if found[0] and found != wanted:
            lines.append("{} has {:,} images of {:,} ids, published {:,} images of {:,} ids".format(split, *found, *wanted))
    return lines


def joined(*remarks: str) -> str:
    return "; ".join(filter(None, remarks))


def _oddities(benchmark: Benchmark) -> list[str]:
    lines = []
    if benchmark.distractors:
        distractors = sum(sample.pid == DISTRACTOR_PID for sample in benchmark.gallery)
        lines.append(f"gallery: {distractors:,} distractors among the images, {benchmark.num_junk:,} junk files left out")
    if unmatched := len(benchmark.query) - len(matched_queries(benchmark)):
        lines.append(f"query: {unmatched:,} images have no match in the gallery and are left out of the scores")
    single = sum(images == 1 for images in Counter(sample.pid for sample in benchmark.train).values())
    if single:
        lines.append(f"train: {single:,} ids have one image, which a batch repeats")
    return lines + _warnings(benchmark)


def shared_people(benchmark: Benchmark) -> list[tuple[Sample, Sample]]:
    """A training image and a query or gallery image of every person who is in both. None where splits number their own."""
    if not benchmark.one_numbering:
        return []
    tested = {sample.pid: sample for sample in (*benchmark.gallery, *benchmark.query)}
    trained = {sample.pid: sample for sample in benchmark.train}
    return [(trained[pid], tested[pid]) for pid in sorted(trained.keys() & tested.keys())]


def _warnings(benchmark: Benchmark) -> list[str]:
    """Warnings about anything that makes a result less meaningful than it seems."""
    lines, advice = [], "give each to one of them, or the scores say little of people who were never seen"
    if shared := shared_people(benchmark):
        trained, tested = shared[0]
        people = "1 person is" if len(shared) == 1 else f"{len(shared):,} people are"
        lines.append(f"warning: {people} in train and in query or gallery (first: {trained.path} and {tested.path}); {advice}")
    tested = {sample.path for sample in (*benchmark.query, *benchmark.gallery)}
    if both := sorted(tested & {sample.path for sample in benchmark.train}):
        images = "1 image is" if len(both) == 1 else f"{len(both):,} images are"
        lines.append(f"warning: {images} in train and in query or gallery (first: {both[0]}); {advice}")
    return lines


def matched_queries(benchmark: Benchmark) -> list[Sample]:
    """Queries with a gallery image of the same pid that is not removed. An unknown camera removes nothing."""
    cameras: dict[int, set[int]] = {}
    for sample in benchmark.gallery:
        cameras.setdefault(sample.pid, set()).add(sample.camid)
    left = {(s.pid, s.camid): cameras.get(s.pid, set()) - ({s.camid} - {UNKNOWN_CAMID}) for s in benchmark.query}
    return [sample for sample in benchmark.query if left[sample.pid, sample.camid]]

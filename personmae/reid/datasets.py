"""ReID benchmarks as they lie on disk: lists of (path, pid, camid), checked before anything is trained.

Nothing here decodes an image, and nothing is downloaded. Synthetic benchmarks use the same layouts, so counts that
differ from the published ones are reported, not refused.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Int

from personmae.errors import UserError

JUNK_PID: Final = -1  # a bad detection: neither a match nor a mistake
DISTRACTOR_PID: Final = 0  # people without an identity: wrong answers for every query
FOLDERS: Final = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
LITTER: Final = ("Thumbs.db",)  # lies in the official Market-1501 folders


@dataclass(frozen=True, slots=True)
class Sample:
    """One image; ``camid`` is the camera's number in the file name, from 1."""

    path: str
    pid: int
    camid: int


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The three splits of one benchmark, each in file name order; ``num_junk`` gallery files were left out."""

    name: str
    root: str
    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    num_junk: int = 0


@dataclass(frozen=True, slots=True)
class Description:
    """What was found: a printable table, whether it is the published benchmark, and the difference in words."""

    table: str
    published: bool
    note: str


@dataclass(frozen=True, slots=True)
class Layout:
    """File names of a benchmark, the folder its archive unpacks to, and (images, identities) as published."""

    pattern: re.Pattern[str]
    example: str
    folder: str
    published: dict[str, tuple[int, int]]


LAYOUTS: Final = {
    "market1501": Layout(
        pattern=re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+\.jpg"),
        example="0002_c1s1_000451_03.jpg",
        folder="Market-1501-v15.09.15",
        # 19,732 gallery files, of which 3,819 are junk; identities are counted without the distractors.
        published={"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 750)},
    ),
    "occluded_duke": Layout(
        pattern=re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)_f\d+\.jpg"),
        example="0001_c2_f0046182.jpg",
        folder="Occluded_Duke",
        published={"train": (15_618, 702), "query": (2_210, 519), "gallery": (17_661, 1_110)},
    ),
}


def market1501(root: str | Path) -> Benchmark:
    """Market-1501 from ``root`` or ``root/Market-1501-v15.09.15``.

    Pid -1 is dropped; pid 0000 stays in the gallery, as a negative for every query.

    Raises:
        UserError: a split is missing or empty, a file name does not fit, or nothing can be trained or evaluated.
    """
    return _load("market1501", root)


def occluded_duke(root: str | Path) -> Benchmark:
    """Occluded-DukeMTMC from ``root`` or ``root/Occluded_Duke``; rules and errors are those of ``market1501``."""
    return _load("occluded_duke", root)


LOADERS: Final[dict[str, Callable[[str | Path], Benchmark]]] = {
    "market1501": market1501,
    "occluded_duke": occluded_duke,
}


def load_benchmark(name: str, root: str | Path) -> Benchmark:
    """The benchmark called ``name``.

    Raises:
        UserError: there is no such benchmark, or its loader refuses what lies at ``root``.
    """
    if name not in LOADERS:
        raise UserError(f"there is no benchmark {name!r}; choose one of {', '.join(LOADERS)}")
    return LOADERS[name](root)


def train_labels(samples: Sequence[Sample]) -> Int[np.ndarray, " N"]:
    """Class labels 0 ... n - 1 of the samples; classes follow the ascending order of pids, so they are stable."""
    return np.unique(pids_and_camids(samples)[0], return_inverse=True)[1].astype(np.int64)


def pids_and_camids(samples: Sequence[Sample]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The two label columns of the samples."""
    pids = np.fromiter((sample.pid for sample in samples), dtype=np.int64, count=len(samples))
    camids = np.fromiter((sample.camid for sample in samples), dtype=np.int64, count=len(samples))
    return pids, camids


def describe(benchmark: Benchmark) -> Description:
    """Images, identities and cameras of each split, compared with the published numbers."""
    published = LAYOUTS[benchmark.name].published
    rows, differences = [f"{'split':<8} {'images':>7} {'ids':>6} {'cameras':>7}"], []
    for split in FOLDERS:
        pids, camids = pids_and_camids(getattr(benchmark, split))
        counts = (len(pids), len(np.unique(pids[pids > DISTRACTOR_PID])))
        rows.append(f"{split:<8} {counts[0]:>7,} {counts[1]:>6,} {len(np.unique(camids)):>7}")
        if counts != published[split]:
            wanted = "{:,} images of {:,} ids".format(*published[split])
            differences.append("{} has {:,} images of {:,} ids, published {}".format(split, *counts, wanted))
    distractors = sum(sample.pid == DISTRACTOR_PID for sample in benchmark.gallery)
    rows.append(f"gallery: {distractors:,} distractors among the images, {benchmark.num_junk:,} junk files left out")
    note = "; ".join(differences) or "the counts are the published ones"
    return Description(table="\n".join(rows), published=not differences, note=f"{benchmark.name}: {note}")


def _load(name: str, root: str | Path) -> Benchmark:
    layout = LAYOUTS[name]
    folder = _find_root(name, Path(root), layout)
    files = {split: _read_split(folder / subfolder, layout) for split, subfolder in FOLDERS.items()}
    kept = {split: tuple(s for s in samples if s.pid != JUNK_PID) for split, samples in files.items()}
    benchmark = Benchmark(
        name=name,
        root=str(folder),
        train=kept["train"],
        query=kept["query"],
        gallery=kept["gallery"],
        num_junk=len(files["gallery"]) - len(kept["gallery"]),
    )
    _check_usable(benchmark)
    return benchmark


def _find_root(name: str, root: Path, layout: Layout) -> Path:
    for folder in (root, root / layout.folder):
        if any((folder / subfolder).is_dir() for subfolder in FOLDERS.values()):
            return folder
    problem = "does not exist" if not root.is_dir() else "has none of them"
    wanted = ", ".join(f"{subfolder}/" for subfolder in FOLDERS.values())
    raise UserError(f"{name} is expected in {root} or {root / layout.folder} as {wanted}; {root} {problem}")


def _read_split(folder: Path, layout: Layout) -> list[Sample]:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; expected a folder of images named like {layout.example}")
    names = sorted(p.name for p in folder.iterdir() if p.name not in LITTER and not p.name.startswith("."))
    if not names:
        raise UserError(f"{folder} is empty; expected images named like {layout.example}")
    samples = []
    for name in names:
        match = layout.pattern.fullmatch(name)
        if match is None:
            raise UserError(f"{folder / name} is not named like {layout.example}; remove it or rename it")
        samples.append(Sample(path=str(folder / name), pid=int(match["pid"]), camid=int(match["camid"])))
    return samples


def _check_usable(benchmark: Benchmark) -> None:
    for sample in (*benchmark.train, *benchmark.query):
        if sample.pid == DISTRACTOR_PID:
            raise UserError(f"{sample.path} has pid 0, which marks distractors and belongs in the gallery alone")
    if not benchmark.train:
        raise UserError(f"{benchmark.root}/{FOLDERS['train']} has no identity to train on; every file has pid -1")
    cameras: dict[int, set[int]] = {}
    for sample in benchmark.gallery:
        cameras.setdefault(sample.pid, set()).add(sample.camid)
    if not any(cameras.get(sample.pid, set()) - {sample.camid} for sample in benchmark.query):
        raise UserError(
            f"no query of {benchmark.root} has a gallery image of the same pid from another camera, "
            "so nothing can be evaluated; check the pids and the camera numbers in the file names"
        )

"""``personmae doctor --data``: the ReID benchmarks in a folder, their mistakes, and statistics of their crops.

Every image is decoded by the reader that training uses. Nothing less finds an image that is cut short.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from personmae.errors import UserError
from personmae.images import SUFFIXES
from personmae.inspect import crop_statistics
from personmae.inspect.crop_statistics import Crops
from personmae.reid.datasets import FOLDERS, LAYOUTS, RELAID, VERSIONS, Benchmark, describe, load_benchmark, pids_and_camids
from personmae.reid.samples import SPLITS, UNKNOWN_CAMID, match_name
from personmae.reid.transforms import decode_image

DEPTH = 2  # folders below the given one that are looked into
NUM_THREADS = 8  # they wait for the disk about as long as they compute
TOLD_EVERY = 10_000  # images


@dataclass(frozen=True, slots=True)
class Finding:
    """One benchmark, or why the folder that looks like one cannot be used."""

    name: str
    root: Path
    benchmark: Benchmark | None
    problem: str = ""


def run(root: Path) -> None:
    """Print every benchmark at ``root`` or below: its counts next to the published ones, unreadable images, and statistics.

    For a folder of crops without a benchmark only the statistics are printed.

    Raises:
        UserError: there is neither, or one cannot be used. Everything else is printed first.
    """
    problems = []
    findings = find(root)
    if not findings:
        paths = crops_below(root)
        print(f"{len(paths):,} images below {root}, no benchmark", flush=True)
        print_statistics(crop_statistics.read_crops(paths))
    for found in findings:
        print(f"{found.name} at {found.root}")
        if found.benchmark is None:
            print(f"  cannot be used: {found.problem}")
            problems.append(found.problem)
            continue
        described = describe(found.benchmark)
        print(*(f"  {line}" for line in [*described.table.splitlines(), described.note]), sep="\n", flush=True)
        bad = unreadable(found.benchmark)
        print(f"  {len(bad):,} files do not open as images" if bad else "  every file opens as an image")
        if pairs := repeated(found.benchmark):
            first = " and ".join(pairs[0])
            print(f"  warning: {len(pairs):,} training images are in query or gallery too, byte for byte (first: {first})")
        if bad:
            some = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            problems.append(f"{len(bad):,} files of {found.root} are not images ({some}). Replace them or remove them")
        elif found.benchmark.train:
            pids, camids = pids_and_camids(found.benchmark.train)
            known = camids if (camids != UNKNOWN_CAMID).all() else None
            paths = [sample.path for sample in found.benchmark.train]
            print_statistics(crop_statistics.read_crops(paths, pids, known))
    if problems:
        more = f"; and {len(problems) - 1} more, see above" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}")


def print_statistics(crops: Crops) -> None:
    """Print the statistics of crops, next to those that the configurations were tuned on."""
    print(f"  what {len(crops.images):,} training crops look like (shares, pixels in [0, 1], mAP in %):", flush=True)
    print(*(f"  {line}" for line in crop_statistics.table({"these": crop_statistics.statistics(crops)}).splitlines()), sep="\n")


def find(root: Path) -> list[Finding]:
    """The benchmarks at ``root``, or otherwise up to two folders below it.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserError(f"a folder of benchmarks or of crops is required. {root} {problem}")
    return list(_below(root, DEPTH))


def crops_below(root: Path) -> list[Path]:
    """All images below a folder.

    Raises:
        UserError: there are none.
    """
    if paths := sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
        return paths
    raise UserError(
        f"there is no image below {root}, and no benchmark up to {DEPTH} folders below it. Known are Market-1501's folders "
        f"({', '.join(FOLDERS.values())}), MSMT17's lists, SPLIT/IDENTITY/*.jpg and SPLIT.csv for {', '.join(SPLITS)}"
    )


def unreadable(benchmark: Benchmark) -> list[str]:
    """The images that do not decode to their end."""
    paths = sorted({sample.path for split in SPLITS for sample in getattr(benchmark, split)})
    bad = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for done, (path, opens) in enumerate(zip(paths, pool.map(_opens, paths), strict=True), 1):
            bad += [] if opens else [path]
            if done % TOLD_EVERY == 0 or (done == 1 and len(paths) > TOLD_EVERY):
                print(f"  decoding images: {done:,} of {len(paths):,}", flush=True)
    return bad


def repeated(benchmark: Benchmark) -> list[tuple[str, str]]:
    """Training images with the bytes of a query or gallery image, each with the first such one."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for sample in (*benchmark.query, *benchmark.gallery):
        by_size[os.path.getsize(sample.path)].append(sample.path)
    alike = [(sample.path, os.path.getsize(sample.path)) for sample in benchmark.train]
    alike = [(path, size) for path, size in alike if size in by_size]
    sizes = {size for _, size in alike}
    tested = {_digest(path): path for size in sizes for path in reversed(by_size[size])}
    found = ((path, tested.get(_digest(path))) for path, _ in alike)
    return [(path, other) for path, other in found if other]


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _below(folder: Path, depth: int) -> Iterator[Finding]:
    names = _candidates(folder)
    if names:
        yield _best(folder, names)
    elif depth:
        for below in sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")):
            yield from _below(Path(below), depth - 1)


def _candidates(folder: Path) -> list[str]:
    """Benchmarks that a folder may hold, by its contents."""
    boxes = [folder / name for name in FOLDERS.values() if name.startswith("bounding_box") and (folder / name).is_dir()]
    if boxes:
        layouts = LAYOUTS | {"msmt17": RELAID}
        first = min((name for box in boxes for name in os.listdir(box) if name.lower().endswith(SUFFIXES)), default="")
        exact = [name for name, layout in layouts.items() if layout.pattern.fullmatch(first)]
        alike = [name for name, layout in layouts.items() if match_name(first, layout.pattern, layout.example)]
        return exact or alike or ["market1501"]
    lists = any((folder / f"list_{part}.txt").is_file() for part in ("train", "query", "gallery"))
    if lists or any((folder / train).is_dir() and (folder / test).is_dir() for _, train, test in VERSIONS.values()):
        return ["msmt17"]
    if sum((folder / f"{split}.csv").is_file() for split in SPLITS) > 1:
        return ["csv"]
    return ["folder"] if sum((folder / split).is_dir() for split in SPLITS) > 1 else []


def _best(folder: Path, names: Sequence[str]) -> Finding:
    """Of names that fit alike, the one most like the folder's name that is not refused (as by another one's counts)."""
    tried = []
    for name in sorted(names, key=lambda name: SequenceMatcher(None, folder.name.lower(), name).ratio(), reverse=True):
        try:
            benchmark = load_benchmark(name, folder)
            tried.append(Finding(benchmark.name, folder, benchmark))
        except UserError as error:
            tried.append(Finding(name, folder, None, str(error)))
    return next((found for found in tried if found.benchmark), tried[0])


def _opens(path: str) -> bool:
    try:
        decode_image(path)
    except UserError:
        return False
    return True

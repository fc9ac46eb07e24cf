"""ReID benchmarks on disk: lists of (path, pid, camid), checked before anything is trained.

Nothing here decodes an image, and nothing is downloaded. Synthetic benchmarks use the same layouts. They carry a mark and
are called synthetic. Counts that differ from the published ones are reported. A folder that is known to be another
benchmark or version is refused.
"""

import difflib
import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from personmae.errors import UserError, is_passing
from personmae.reid.benchmark import (
    DISTRACTOR_PID,
    JUNK_PID,
    OWN,
    SYNTHETIC_MARK,
    TITLES,
    Benchmark,
    Counts,
    Description,
    count,
    describe,
    digest,
    earlier_digest,
    is_synthetic,
    joined,
    matched_queries,
    pids_and_camids,
    record,
    resume_key,
    title,
    train_labels,
)
from personmae.reid.samples import (
    SPLITS,
    UNKNOWN_CAMID,
    PassedOver,
    Sample,
    count_unlisted,
    find_images,
    read_folders,
    read_lists,
    read_names,
    read_tables,
    summary,
)

__all__ = [  # what is known of a benchmark once it is read is offered here too
    "DISTRACTOR_PID",
    "JUNK_PID",
    "SYNTHETIC_MARK",
    "TITLES",
    "Benchmark",
    "Counts",
    "Description",
    "Sample",
    "count",
    "describe",
    "digest",
    "is_synthetic",
    "load_benchmark",
    "pids_and_camids",
    "record",
    "renewed_digest",
    "resume_key",
    "title",
    "train_labels",
]

FOLDERS: Final = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


@dataclass(frozen=True, slots=True)
class Layout:
    """File names of a benchmark in Market-1501's folders, and the folders that its archive unpacks to."""

    pattern: re.Pattern[str]
    example: str
    folders: tuple[str, ...]
    distractors: bool = False


_DUKE: Final = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)_f\d+\.jpg")
_CUHK03: Final = re.compile(r"(?P<pid>\d+)_c(?P<camid>\d+)_\d+\.png")
LAYOUTS: Final = {
    "market1501": Layout(
        pattern=re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+\.jpg"),
        example="0002_c1s1_000451_03.jpg",
        folders=("Market-1501-v15.09.15",),
        distractors=True,
    ),
    "occluded_duke": Layout(_DUKE, "0001_c2_f0046182.jpg", ("Occluded_Duke",), distractors=True),
    "dukemtmc": Layout(_DUKE, "0001_c2_f0046182.jpg", ("DukeMTMC-reID",), distractors=True),
    "cuhk03_np_detected": Layout(_CUHK03, "0001_c1_1.png", ("detected", "cuhk03-np/detected")),
    "cuhk03_np_labeled": Layout(_CUHK03, "0001_c1_1.png", ("labeled", "cuhk03-np/labeled")),
}
# MSMT17 in Market-1501's folders, with either the names of its own archive or those that ECN (arXiv 1904.01990) gave it.
RELAID: Final = Layout(re.compile(r"(?P<pid>\d+)_(?:c|\d+_)(?P<camid>\d+)_\w+\.jpg"), "0000_c14_0030.jpg", ("MSMT17",))
VERSIONS: Final = {"msmt17_v1": ("MSMT17_V1", "train", "test"), "msmt17_v2": ("MSMT17_V2", "mask_train_v2", "mask_test_v2")}
NAMES: Final = (*LAYOUTS, "msmt17", *VERSIONS, *OWN)
_MSMT17: Final = {"train": (32_621, 1_041), "query": (11_659, 3_060), "gallery": (82_161, 3_060)}
WITHOUT_VAL: Final = _MSMT17 | {"train": (30_248, 1_041)}
PUBLISHED: Final[dict[str, Counts]] = {
    # 19,732 gallery files, of which 3,819 are junk; identities are counted without the distractors.
    "market1501": {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 750)},
    "occluded_duke": {"train": (15_618, 702), "query": (2_210, 519), "gallery": (17_661, 1_110)},
    "dukemtmc": {"train": (16_522, 702), "query": (2_228, 702), "gallery": (17_661, 1_110)},
    "cuhk03_np_detected": {"train": (7_365, 767), "query": (1_400, 700), "gallery": (5_332, 700)},
    "cuhk03_np_labeled": {"train": (7_368, 767), "query": (1_400, 700), "gallery": (5_328, 700)},
    **dict.fromkeys(("msmt17", *VERSIONS), _MSMT17),  # both versions are the same images, with other faces
}


def load_benchmark(name: str, root: str | Path, *, train_on_val: bool = True, splits: Sequence[str] = SPLITS) -> Benchmark:
    """The benchmark called ``name``, from ``root`` or from the folder of its archive in ``root``.

    Market-1501's pid -1 is dropped. Its pid 0000 stays in the gallery, as a negative for every query. "msmt17" takes
    either version and the benchmark is named after it. "msmt17_v1" takes no other. MSMT17's list_val belongs to training
    (as TransReID and PASS have it) unless ``train_on_val`` is false. "folder" and "csv" are data sets of the user's own.
    Only ``splits`` are read, the others are empty: an evaluation needs no training images.

    Raises:
        UserError: there is no such benchmark or folder, a part of it is missing or does not fit, it is another benchmark or
            version, or nothing can be trained or evaluated.
    """
    root = Path(root)
    _require_known(name)
    _require_folder(name, root)
    if not train_on_val and not name.startswith("msmt17"):
        raise UserError(f"train_on_val=false is for MSMT17, which has a list_val.txt. {name} has none: leave it out")
    if name in LAYOUTS:
        benchmark = _in_market_folders(name, _find_root(name, root, LAYOUTS[name]), LAYOUTS[name], splits)
    elif name == "msmt17" or name in VERSIONS:
        benchmark = _msmt17(name, root, train_on_val, splits)
    else:
        found, remark = read_folders(root, splits) if name == "folder" else read_tables(root, splits)
        train, query, gallery = (tuple(found.get(split, ())) for split in SPLITS)
        benchmark = Benchmark(name, str(root), train, query, gallery, remark=remark)
    _check_usable(benchmark)
    return replace(benchmark, synthetic=is_synthetic(benchmark.root))


def _require_known(name: str) -> None:
    """Raise a UserError with the nearest name unless there is a benchmark called ``name``."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no benchmark {name!r}. The nearest is {near!r}, of {', '.join(NAMES)}")


def _require_folder(name: str, root: Path) -> None:
    """Raise a UserError that says what is expected there unless ``root`` is a folder that can be listed."""
    try:
        os.scandir(root).close()
    except OSError as error:
        if is_passing(error):
            raise
        problems = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is a file"}
        problem = problems.get(error.errno or 0, f"cannot be read: {error.strerror}")
        raise UserError(f"benchmark {name} is expected in a directory as {_parts(name)}, but {root} {problem}") from error


def _parts(name: str) -> str:
    """What a benchmark's folder holds, in words."""
    if name in LAYOUTS:
        return ", ".join(f"{subfolder}/" for subfolder in FOLDERS.values())
    if name in OWN:
        return ", ".join(f"{split}/IDENTITY/*.jpg" if name == "folder" else f"{split}.csv" for split in SPLITS)
    _, train, test = VERSIONS.get(name, VERSIONS["msmt17_v1"])
    return f"{train}/, {test}/ and list_{{train,val,query,gallery}}.txt"


def renewed_digest(recorded: str, name: str | None, root: str | Path) -> str:
    """The digest of a data set whose ``recorded`` one may be earlier. Data that are gone or have changed keep what is recorded.

    An earlier one was recorded where training images were read with the test set.
    """
    if name not in OWN:
        return recorded
    try:
        benchmark = load_benchmark(name, root)
        return digest(benchmark) if earlier_digest(benchmark) == recorded else recorded
    except (UserError, OSError):
        return recorded


def _in_market_folders(name: str, folder: Path, layout: Layout, splits: Sequence[str]) -> Benchmark:
    passed_over = PassedOver()
    files = {split: read_names(folder / FOLDERS[split], layout.pattern, layout.example, passed_over) for split in splits}
    kept = {split: tuple(s for s in files.get(split, ()) if s.pid != JUNK_PID) for split in SPLITS}
    if "train" in files and not kept["train"]:
        raise UserError(f"{folder / FOLDERS['train']} has no identity to train on. Every file has pid -1")
    return Benchmark(
        name=name,
        root=str(folder),
        train=kept["train"],
        query=kept["query"],
        gallery=kept["gallery"],
        num_junk=len(files["gallery"]) - len(kept["gallery"]),
        distractors=layout.distractors,
        published=PUBLISHED[name],
        remark=summary(passed_over),
    )


def _find_root(name: str, root: Path, layout: Layout) -> Path:
    for folder in (root, *(root / below for below in layout.folders)):
        if any((folder / subfolder).is_dir() for subfolder in FOLDERS.values()):
            return folder
    raise UserError(
        f"{name} is expected in {root} or {root / layout.folders[0]} as {_parts(name)}, but {root} has none of them"
    )


def _msmt17(name: str, root: Path, train_on_val: bool, splits: Sequence[str]) -> Benchmark:
    """MSMT17 by its own lists. The names of its folders show its version."""
    folders = (root, *(root / below for below in ("MSMT17_V1", "MSMT17_V2", "MSMT17")))
    found = [
        (version, folder)
        for version, (_, *parts) in VERSIONS.items()
        for folder in folders
        if any((folder / part).is_dir() for part in parts)
    ]
    if not found:
        return _relaid_msmt17(name, root, folders, train_on_val, splits)
    wanted = [pair for pair in found if pair[0] == name] if name in VERSIONS else found
    if not wanted:
        version, folder = found[0]
        raise UserError(
            f"{name} is required, and {folder} holds {version} ({VERSIONS[version][1]}/), whose results are not comparable. "
            f"Get {VERSIONS[name][0]}, or set benchmark={version}"
        )
    if len({version for version, _ in wanted}) > 1:
        raise UserError(f"{root} holds both versions of MSMT17. Set benchmark to one of {', '.join(VERSIONS)}")
    version, folder = wanted[0]
    claimed = next((other for other, (folder_name, *_) in VERSIONS.items() if folder.name.upper() == folder_name), version)
    if claimed != version:
        raise UserError(f"{folder} is called {claimed} and holds {version} ({VERSIONS[version][1]}/). Name it what it is")
    _, train, test = VERSIONS[version]
    lists = {part: folder / f"list_{part}.txt" for part in ("train", "val", "query", "gallery")}
    trained = [lists["train"], *([lists["val"]] if train_on_val else [])]
    samples, passed_over = {split: list[Sample]() for split in SPLITS}, PassedOver()
    if "train" in splits:
        present = find_images(folder / train, passed_over)
        samples["train"] = read_lists(trained, folder / train, present)
        known = [lists[part] for part in ("train", "val") if lists[part].is_file()]  # list_val is not always needed
        count_unlisted(known, present, passed_over)
    present = find_images(folder / test, passed_over)
    for split in ("query", "gallery"):
        samples[split] = read_lists([lists[split]], folder / test, present)
    count_unlisted([lists["query"], lists["gallery"]], present, passed_over)
    return Benchmark(
        name=version,
        root=str(folder),
        train=tuple(samples["train"]),
        query=tuple(samples["query"]),
        gallery=tuple(samples["gallery"]),
        published=PUBLISHED[version] if train_on_val else WITHOUT_VAL,
        remark=joined("" if train_on_val else "list_val is left out of training", summary(passed_over)),
        one_numbering=False,  # each part counts its people from 0
    )


def _relaid_msmt17(name: str, root: Path, folders: Sequence[Path], train_on_val: bool, splits: Sequence[str]) -> Benchmark:
    """MSMT17 in Market-1501's folders, which show neither its version nor its list_val."""
    relaid = next((folder for folder in folders if (folder / FOLDERS[splits[0]]).is_dir()), None)
    if name in VERSIONS or relaid is None:
        folder_name, *_ = VERSIONS.get(name, VERSIONS["msmt17_v1"])
        came = (
            f"{relaid / FOLDERS['train']} does not show its version: set benchmark=msmt17" if relaid else "they are not there"
        )
        raise UserError(f"{name} is expected in {root} or {root / folder_name} as {_parts(name)}, but {came}")
    if not train_on_val:
        raise UserError(f"train_on_val=false needs list_train.txt and list_val.txt, which {relaid} does not have")
    remark = "this layout does not show whether it is V1 or V2, whose results cannot be compared"
    found = _in_market_folders(name, relaid, RELAID, splits)
    return replace(found, remark=joined(remark, found.remark), one_numbering=False)


def _check_usable(benchmark: Benchmark) -> None:
    own = PUBLISHED.get(benchmark.name)
    counts = {split: found for split, found in count(benchmark).items() if found[0]}
    for other, published in PUBLISHED.items():
        if own and counts == {split: published[split] for split in counts} != {split: own[split] for split in counts}:
            raise UserError(f"{benchmark.root} holds {other}, by its counts, and not {benchmark.name}. Set benchmark={other}")
    for sample in (*benchmark.train, *benchmark.query):
        if benchmark.distractors and sample.pid == DISTRACTOR_PID:
            raise UserError(f"{sample.path} has pid 0, which marks distractors and belongs in the gallery alone")
    queries = {sample.path: sample for sample in benchmark.query}
    for sample in benchmark.gallery:
        if sample.path in queries and (sample != queries[sample.path] or sample.camid == UNKNOWN_CAMID):
            raise UserError(
                f"{sample.path} is in query and in gallery, where it would match itself. "
                "Remove it from the gallery, or give both the same pid and camid, so that it is removed"
            )
    if not matched_queries(benchmark):
        removed = "" if benchmark.query[0].camid == UNKNOWN_CAMID else " from another camera"
        raise UserError(
            f"no query of {benchmark.root} has a gallery image of the same pid{removed}, "
            "so nothing can be evaluated. Check the pids and the camera numbers in the file names"
        )

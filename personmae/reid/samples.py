"""Images with their identities, read from file names, lists, folders and tables.

No image is decoded here, and no benchmark's rules are known. A misfit is named, and files that are passed over are counted
by kind. Nothing is skipped silently.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from personmae.errors import UserError
from personmae.images import SUFFIXES

UNKNOWN_CAMID: Final = -1
SPLITS: Final = ("train", "query", "gallery")
LITTER: Final = ("Thumbs.db", "desktop.ini")  # the first lies in the official Market-1501 folders
CAMERA: Final = re.compile(r"_c(\d+)")
LISTED: Final = re.compile(r"(?P<folder>\d+)/(?P<pid>\d+)_\d+_(?P<camid>\d+)_\w+\.jpg")  # of MSMT17
LISTED_EXAMPLE: Final = "0000/0000_000_01_0303morning_0008_0.jpg"
Row = tuple[str, str, int]  # path, identity as the user writes it, camid
PassedOver = Counter[str]  # how many entries of each kind a reader has left out


@dataclass(frozen=True, slots=True)
class Sample:
    """One image. ``camid`` is the camera's number, or -1 where it is not known."""

    path: str
    pid: int
    camid: int


def summary(passed_over: PassedOver) -> str:
    """What was passed over, in words, or an empty text."""
    return f"passed over: {', '.join(f'{count:,} {kind}' for kind, count in passed_over.items())}" if passed_over else ""


def match_name(name: str, pattern: re.Pattern[str], example: str) -> re.Match[str] | None:
    """The match of a name with a pattern that is for names like ``example``, whichever suffix of an image it has."""
    stem, suffix = os.path.splitext(name)
    return pattern.fullmatch(stem + os.path.splitext(example)[1] if suffix.lower() in SUFFIXES else name)


def read_names(folder: Path, pattern: re.Pattern[str], example: str, passed_over: PassedOver) -> list[Sample]:
    """The images of one folder in file name order. The groups ``pid`` and ``camid`` of ``pattern`` label them.

    A benchmark that was converted to another format has the same names with another suffix.

    Raises:
        UserError: the folder is missing or empty, or a file is not named by the pattern.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. Expected a folder of images named like {example}")
    samples = []
    for name in _names(folder, passed_over):
        match = match_name(name, pattern, example)
        if match is None:
            raise UserError(f"{folder / name} is not named like {example}. Remove it or rename it")
        samples.append(Sample(path=str(folder / name), pid=int(match["pid"]), camid=int(match["camid"])))
    if not samples:
        raise UserError(f"{folder} is empty. Expected images named like {example}")
    return samples


def find_images(folder: Path, passed_over: PassedOver) -> set[str]:
    """IDENTITY/NAME of all images below a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. It comes with the archive of the lists next to it")
    found = {
        f"{pid}/{name}"
        for pid in _names(folder, passed_over)
        if (folder / pid).is_dir()
        for name in _names(folder / pid, passed_over)
    }
    others = {name for name in found if not name.lower().endswith(SUFFIXES)}
    _count(passed_over, "files of another kind", len(others))
    return found - others


def count_unlisted(files: Sequence[Path], present: set[str], passed_over: PassedOver) -> None:
    """Count the images that none of the lists names."""
    listed = {name for file in files for _, name, _ in _listed(file)}
    _count(passed_over, "images on no list", len(present - listed))


def read_lists(files: Sequence[Path], folder: Path, present: set[str]) -> list[Sample]:
    """The images below ``folder`` that MSMT17's lists name, in their order. A line is "PID/PID_INDEX_CAMERA_... PID".

    Raises:
        UserError: a list is missing, a line does not fit, its pid is not that of the folder and of the name, or an image is
            not ``present`` or is named twice.
    """
    samples: dict[str, Sample] = {}
    absent, misnamed = [], []
    for file in files:
        for number, name, pid in _listed(file):
            match = match_name(name, LISTED, LISTED_EXAMPLE)
            if match is None or not pid.isdecimal():
                raise UserError(f"{file}, line {number}, must look like '{LISTED_EXAMPLE} 0'. Got '{name} {pid}'")
            if name in samples:
                raise UserError(f"{file}, line {number}, names {name} a second time. Take the lists of MSMT17's archive")
            samples[name] = Sample(path=str(folder / name), pid=int(pid), camid=int(match["camid"]))
            if not int(pid) == int(match["pid"]) == int(match["folder"]):
                misnamed.append(f"{file}, line {number}: '{name} {pid}'")
            if name not in present:
                absent.append(name)
    lists = " and ".join(file.name for file in files)
    if misnamed:
        raise UserError(
            f"{len(misnamed):,} of {len(samples):,} lines of {lists} give a pid that is not that of the folder and of the file "
            f"name (first: {misnamed[0]}). The lists belong to other images: take those of the archive"
        )
    if absent:
        raise UserError(
            f"{len(absent):,} of {len(samples):,} images of {lists} are not in {folder} (first: {absent[0]}). "
            "Unpack the archive again"
        )
    return list(samples.values())


def read_folders(root: Path, splits: Sequence[str] = SPLITS) -> tuple[dict[str, list[Sample]], str]:
    """``root/SPLIT/IDENTITY/*.jpg`` by split, with a remark. A camera is the N of _cN where every file name has one.

    Where a name of the training images alone has none, query and gallery keep theirs: their scores must not depend on
    whether the training images were read.

    Raises:
        UserError: a split is missing or empty, or something other than identity folders of images is there.
    """
    rows: dict[str, list[Row]] = {}
    passed_over = PassedOver()
    for name in _names(root, passed_over):
        if name not in SPLITS and ((root / name).is_dir() or name.lower().endswith(SUFFIXES)):
            _count(passed_over, f"folders or images beside {', '.join(SPLITS)}")
    without: dict[str, Path] = {}  # the first image of a split whose name has no camera
    for split in splits:
        rows[split] = []
        for path in _images_of(root, split, passed_over):
            match = CAMERA.search(path.stem)
            if not match:
                without.setdefault(split, path)
            rows[split].append((str(path), path.parent.name, int(match[1]) if match else UNKNOWN_CAMID))
    tested = next((path for split, path in without.items() if split != "train"), None)
    for split in rows if tested else without:
        rows[split] = [(path, pid, UNKNOWN_CAMID) for path, pid, _ in rows[split]]
    path, of_split = (tested, "") if tested else (without.get("train"), " of train")
    remark = f"no camera{of_split} is known, as {path} has no _cN in its name" if path else ""
    return _numbered(rows), "; ".join(filter(None, [remark, summary(passed_over)]))


def read_tables(root: Path, splits: Sequence[str] = SPLITS) -> tuple[dict[str, list[Sample]], str]:
    """``root/SPLIT.csv`` by split, with a remark. Columns are path (absolute or below ``root``), pid and perhaps camid.

    Raises:
        UserError: a table is missing, empty or has other columns, a cell is empty, or an image is absent or named twice.
    """
    rows = {split: list(_table(root / f"{split}.csv", root)) for split in splits}
    cameras = {split: any(camid != UNKNOWN_CAMID for *_, camid in found) for split, found in rows.items()}
    if cameras["query"] != cameras["gallery"]:
        named, unnamed = sorted(("query", "gallery"), key=lambda split: not cameras[split])
        raise UserError(f"{root / named}.csv has a column camid and {unnamed}.csv has none. Give it to both or to neither")
    return _numbered(rows), "" if cameras["query"] else "no camera is known, as query.csv has no column camid"


def _names(folder: Path, passed_over: PassedOver) -> list[str]:
    """Names in a folder, sorted, without hidden ones and the litter of file managers, which are counted."""
    names = os.listdir(folder)
    hidden, litter = (sum(name.startswith(".") for name in names), sum(name in LITTER for name in names))
    _count(passed_over, "hidden files", hidden)
    _count(passed_over, " or ".join(LITTER), litter)
    return sorted(name for name in names if name not in LITTER and not name.startswith("."))


def _count(passed_over: PassedOver, kind: str, number: int = 1) -> None:
    if number:
        passed_over[kind] += number


def _listed(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, name, pid) of every line of a list."""
    lists = ", ".join(f"list_{part}.txt" for part in ("train", "val", "query", "gallery"))
    if not file.is_file():
        raise UserError(f"{file} is missing. MSMT17 comes with {lists}: take them from its archive")
    lines = [(number, line.split()) for number, line in enumerate(_text(file).splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty. Take it from the archive of MSMT17")
    yield from ((number, " ".join(words[:-1]), words[-1]) for number, words in lines)


def _images_of(root: Path, split: str, passed_over: PassedOver) -> Iterator[Path]:
    wanted = f"{root / split}/IDENTITY/*.jpg"
    if not (root / split).is_dir():
        raise UserError(f"{root / split} is missing. Expected {wanted} for each of {', '.join(SPLITS)}")
    empty = True
    for pid in _names(root / split, passed_over):
        folder = root / split / pid
        if not folder.is_dir():
            raise UserError(f"{folder} is not the folder of an identity. Expected {wanted}")
        for name in _names(folder, passed_over):
            if not name.lower().endswith(SUFFIXES) or (folder / name).is_dir():
                raise UserError(f"{folder / name} is not one of {', '.join(SUFFIXES)}. Remove it")
            empty = False
            yield folder / name
    if empty:
        raise UserError(f"{root / split} is empty. Expected {wanted}")


def _table(file: Path, root: Path) -> Iterator[Row]:
    if not file.is_file():
        wanted = ", ".join(f"{split}.csv" for split in SPLITS)
        raise UserError(f"{file} is missing. {wanted} are required, with the columns path, pid and perhaps camid")
    reader = csv.DictReader(io.StringIO(_text(file)))
    columns = reader.fieldnames or []
    if not {"path", "pid"} <= set(columns):
        raise UserError(f"{file} needs the columns path and pid in its first line, set apart by commas. It has {columns}")
    first_seen: dict[str, int] = {}
    for cells in reader:
        where = f"{file}, line {reader.line_num},"
        if None in cells or any(not (cells[column] or "").strip() for column in {"path", "pid", "camid"} & set(columns)):
            raise UserError(f"{where} must fill path, pid and camid, and no more cells than {columns}. Got {cells}")
        path, pid, camid = (cells.get(column, "").strip() for column in ("path", "pid", "camid"))
        path = os.path.normpath(root / path)
        if camid and not (camid.isascii() and camid.isdecimal()):
            raise UserError(f"{where} must have a whole number from 0 as camid, got {camid!r}. Leave the column out if unknown")
        if path in first_seen:
            raise UserError(f"{where} names {path} a second time, after line {first_seen[path]}. Remove one of them")
        if not os.path.isfile(path):
            raise UserError(f"{where} names {path}, which does not exist. A path is absolute or below {root}")
        first_seen[path] = reader.line_num
        yield path, pid, int(camid) if camid else UNKNOWN_CAMID
    if not first_seen:
        raise UserError(f"{file} has no row. It needs at least one image")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets write a mark at the beginning
    except UnicodeDecodeError as error:
        raise UserError(f"{file} must be a text file in UTF-8: {error}") from None


def _numbered(rows: dict[str, list[Row]]) -> dict[str, list[Sample]]:
    """Give identities the numbers of their sorted names, the same in every split."""
    names = sorted({name for found in rows.values() for _, name, _ in found})
    pids = {name: pid for pid, name in enumerate(names)}
    return {split: [Sample(path, pids[name], camid) for path, name, camid in found] for split, found in rows.items()}

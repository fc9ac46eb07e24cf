"""``personmae synth OUT``: write procedural pedestrians, in place of ReID data that cannot be shipped.

The output is an unlabelled pool and two benchmarks with a visible domain gap. ``market1501`` has summer clothes, outdoor
scenes and 128 x 64 pixels. ``occluded_duke`` has winter clothes, darker scenes, native sizes, and every query occluded.
Every image is a pure function of the seed, its split, its person and its number. So the number of processes changes
nothing. The other modules of this package define the people and the scenes.
"""

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from personmae.data.import_workers import workers
from personmae.errors import Unavailable, UserError
from personmae.synthetic.contact_sheet import contact_sheet
from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import Shot, SynthSettings, plan
from personmae.system import storage
from personmae.weights.staging import partial_folder

FORMAT_VERSION = 2
COMPLETION_MARK = "synthetic.json"
CHUNK_IMAGES = 250


def write_synthetic(
    out: Path,
    settings: SynthSettings,
    *,
    num_processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Draw everything into ``out`` and return the number of images per folder.

    ``out`` appears complete or not at all: the work is done in ``out.partial`` next to it and renamed. A failure or a stop
    deletes that, and the next run deletes what a kill has left. If ``out`` is
    there with the same settings, nothing is done. ``progress(done, total)`` counts images. Next to the images
    are ``contact_sheet.png``, ``occluded_duke/query_occlusion.json`` (file name -> share hidden) and, written last,
    the completion mark ``synthetic.json``. Each benchmark has a copy of it, by which its readers know that people are drawn.

    Raises:
        UserError: ``out`` was written with other settings, holds something else, or cannot be written.
    """
    if num_processes < 1:
        raise UserError(f"--processes must be at least 1, got {num_processes}. Use 1 to draw in this process")
    out = out.resolve()
    counts = finished_counts(out, settings)
    if counts is not None:
        return counts
    shots = plan(settings)
    with partial_folder(out, keep=False) as partial_out:
        _draw(partial_out, settings, shots, num_processes, progress)
        counts = _write_records(partial_out, settings, shots)
        partial_out.rename(out)
    return counts


def _draw(
    out: Path, settings: SynthSettings, shots: list[Shot], num_processes: int, progress: Callable[[int, int], None]
) -> None:
    """Draw all images and the contact sheet."""
    for folder in sorted({str(Path(shot.path).parent) for shot in shots}):
        (out / folder).mkdir(parents=True)
    with _one_opencv_thread():
        done = 0
        with closing(_draw_all(out, settings, shots, num_processes)) as chunks:
            for written in chunks:
                done += written
                progress(done, len(shots))
        _, sheet = cv2.imencode(".png", contact_sheet(settings, shots))
    (out / "contact_sheet.png").write_bytes(sheet.tobytes())


def _write_records(out: Path, settings: SynthSettings, shots: list[Shot]) -> dict[str, int]:
    """Write what is known of the images, the completion mark last. Returns the number of images per folder."""
    hidden = {Path(shot.path).name: shot.occlusion for shot in shots if shot.path.startswith("occluded_duke/query/")}
    (out / "occluded_duke" / "query_occlusion.json").write_text(json.dumps(hidden, indent=0) + "\n", encoding="utf-8")
    counts = _count(shots)
    record = {"format_version": FORMAT_VERSION, "settings": asdict(settings), "counts": counts}
    for benchmark in sorted({Path(folder).parent.name for folder in counts} - {""}):  # it may be copied alone
        _write_mark(out / benchmark, record)
    _write_mark(out, record)
    return counts


def _write_mark(folder: Path, record: dict[str, Any]) -> None:
    (folder / COMPLETION_MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pass_mark_on(source: str, destination: str) -> bool:
    """Copy the mark of drawn people into shards made from them, for reports. Returns whether there is a mark.

    Both are directories or locations in an object store. A mark next to the source counts where it names the source.
    """
    mark = _find_mark(source if storage.is_remote(source) else str(Path(source).resolve()))
    if mark is None:
        return False
    if storage.is_remote(destination):
        storage.write(destination, COMPLETION_MARK, mark)
    else:
        (Path(destination) / COMPLETION_MARK).write_bytes(mark)
    return True


def _find_mark(source: str) -> bytes | None:
    parent, _, name = source.rstrip("/").rpartition("/")
    own = read_mark(source)
    beside = read_mark(parent) if own is None and not parent.endswith("/") else None
    try:
        named = beside and any(folder.split("/")[0] == name for folder in json.loads(beside)["counts"])
    except (ValueError, KeyError, TypeError):
        named = False
    return beside if named else own


def read_mark(folder: str) -> bytes | None:
    """The mark in a folder. Stores refuse files next to the images that one may read, and missing files."""
    try:
        return storage.read(folder, COMPLETION_MARK)
    except UserError as error:
        if storage.is_denied(error):
            return None
        raise


def finished_counts(out: Path, settings: SynthSettings) -> dict[str, int] | None:
    """The counts of a complete ``out`` with these settings, or None where nothing is there yet."""
    mark = out / COMPLETION_MARK
    if not mark.is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        if out.exists() and not out.is_dir():
            raise UserError(f"a directory to create is required. {out} is a file: choose another place")
        if out.exists():
            raise UserError(f"{out} must be absent or empty, but it holds something else. Choose another directory")
        return None
    try:
        record = json.loads(mark.read_text(encoding="utf-8"))
        found, counts = (record["format_version"], dict(record["settings"])), dict(record["counts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{mark} must be the record of a finished run, but it cannot be read ({error}). Delete {out}"
        ) from error
    if found != (FORMAT_VERSION, asdict(settings)):
        raise UserError(_differences(out, *found, settings))
    return counts


def _differences(out: Path, version: int, found: dict[str, Any], settings: SynthSettings) -> str:
    """What was asked for and what is there, in words."""
    has, wanted = {"format_version": version, **found}, {"format_version": FORMAT_VERSION, **asdict(settings)}
    other = [name for name in wanted if has.get(name) != wanted[name]]
    asked, there = (", ".join(f"{name} {side.get(name)}" for name in other) for side in (wanted, has))
    return f"{out} must have {asked}. It was drawn with {there}: choose another directory or delete it"


def _count(shots: Iterable[Shot]) -> dict[str, int]:
    folders = ("pool" if shot.split == "pool" else str(Path(shot.path).parent) for shot in shots)
    return dict(Counter(folders))


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _draw_all(out: Path, settings: SynthSettings, shots: list[Shot], num_processes: int) -> Generator[int, None, None]:
    """Draw in chunks, and yield the number of images of each finished chunk."""
    draw = partial(_draw_chunk, out, settings)
    chunks = [shots[start : start + CHUNK_IMAGES] for start in range(0, len(shots), CHUNK_IMAGES)]
    if num_processes == 1:
        yield from map(draw, chunks)
        return
    with workers(num_processes, preload=__name__) as pool:
        try:
            yield from pool.map(draw, chunks)
        except BrokenProcessPool as error:
            what = "a worker process was killed, usually for lack of memory"
            raise Unavailable(f"{what}. Run the same command again, with fewer --processes") from error


def _draw_chunk(out: Path, settings: SynthSettings, shots: list[Shot]) -> int:
    with _one_opencv_thread():
        for shot in shots:
            image, quality = draw_shot(settings, shot)
            _, jpeg = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))
            (out / shot.path).write_bytes(jpeg.tobytes())
    return len(shots)

"""A gallery on disk: what is valid, who may write, and what becomes of a writer that was killed.

``gallery.json`` names the segments that are valid and is replaced whole. So a reader finds the gallery before a change or
after it. A writer holds ``.lock``. The next one deletes what a killed writer left, and writes the line that it owed to
``audit.jsonl``.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from personmae.errors import Unavailable, UserError
from personmae.gallery.segment import sync
from personmae.system import files

MANIFEST, AUDIT, LOCK, SEGMENTS = "gallery.json", "audit.jsonl", ".lock", "segments"
INCOMING: Final = ".incoming-"  # folders of features on their way in
FORMAT: Final = 1
_WAIT_SECONDS: Final = 600.0
Log = Callable[[str], None]


@dataclass(frozen=True)
class Manifest:
    """What a gallery is made of at one time.

    ``segments`` are (name, number of rows) in the gallery's order. ``next_key`` is the number of the next row. ``times`` is
    "date" or "number" where times are known. ``model`` has the place and the digest of what computed the features. ``index``
    describes a FAISS index. ``last`` is the audit line of the change that led here.
    """

    dim: int
    dtype: str
    generation: int = 0
    next_key: int = 0
    segments: list[tuple[str, int]] = field(default_factory=list)
    times: str | None = None
    model: dict[str, Any] | None = None
    index: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.segments)

    def next_segment(self, number: int) -> str:
        """A name that no segment has had, for each number of the change that comes next."""
        return f"{self.generation + 1:06}-{number:04}"


def read_manifest(gallery: Path) -> Manifest:
    """What is valid in a gallery now.

    Raises:
        UserError: it is no gallery, or of a later version.
    """
    path = gallery / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        if found["format"] > FORMAT:
            raise UserError(
                f"galleries of format {FORMAT} or less can be read. {gallery} has {found['format']}: update personmae"
            )
        return replace(Manifest(**found), segments=[(str(name), int(rows)) for name, rows in found["segments"]])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"a folder that 'personmae gallery build' made is required. {gallery} has no {MANIFEST}: "
            "build one, or give its place"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}): build the gallery again") from error


@contextlib.contextmanager
def writing(gallery: Path, log: Log = lambda line: None, *, wait_seconds: float = _WAIT_SECONDS) -> Iterator[None]:
    """Hold a gallery as its only writer. Readers go on. What a killed writer left is put in order first, and so is a failure.

    Raises:
        UserError: it is no gallery.
        Unavailable: another process went on writing for ``wait_seconds``.
    """
    read_manifest(gallery)
    with (gallery / LOCK).open("ab") as file:
        _wait_for(file.fileno(), gallery, log, wait_seconds)
        settle(gallery)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # then the next writer does it
                settle(gallery)
            raise


def _wait_for(file: int, gallery: Path, log: Log, wait_seconds: float) -> None:
    deadline, logged = time.monotonic() + wait_seconds, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"another process has been writing {gallery} for {wait_seconds:g} s. Run this again when it has ended"
                ) from None
            if not logged:
                log(f"waiting for another process that writes {gallery}")
            logged = True
            time.sleep(0.05)


def commit(gallery: Path, manifest: Manifest) -> None:
    """Make a manifest the valid one, delete all that it does not name, and write its audit line. The writer's lock is held.

    Raises:
        OSError: it could not be written, or something could not be deleted.
    """
    write_manifest(gallery, manifest)
    settle(gallery)


def write_manifest(gallery: Path, manifest: Manifest) -> None:
    """Replace the manifest whole."""
    for folder in (gallery / SEGMENTS, gallery):
        if folder.is_dir():
            sync(folder)
    files.replace(gallery / MANIFEST, files.to_json(asdict(manifest), indent=1))
    sync(gallery)


def settle(gallery: Path) -> None:
    """Delete what the manifest does not name. Then the change that led to it has its audit line, once."""
    manifest = read_manifest(gallery)
    _sweep(gallery, manifest)
    path = gallery / AUDIT
    files.cut_lines(path, lambda line: True)
    lines = files.whole_lines(path)
    if manifest.last and (not lines or json.loads(lines[-1]) != manifest.last):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(manifest.last) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _sweep(gallery: Path, manifest: Manifest) -> None:
    valid = {name for name, _ in manifest.segments}
    for path in (gallery / SEGMENTS).glob("*"):
        if path.name not in valid:
            shutil.rmtree(path)
    for path in gallery.glob(".partial-*"):  # of a writer that was killed while it replaced a file
        path.unlink()
    for path in gallery.glob("index-*"):
        if manifest.index is None or path.name != manifest.index["file"]:
            path.unlink()
    for path in gallery.glob(f"{INCOMING}*"):
        _delete_if_left(path)


@contextlib.contextmanager
def incoming(gallery: Path) -> Iterator[Path]:
    """A folder of this process's own inside a gallery. Writers delete it once this process has gone."""
    folder, number = _held_folder(gallery)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(number)


def _held_folder(gallery: Path) -> tuple[Path, int]:
    """A new incoming folder, and the descriptor that holds its lock."""
    while True:
        folder = gallery / f"{INCOMING}{os.getpid()}-{time.monotonic_ns()}"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # a writer took it for left before it was held
            number = os.open(folder, os.O_RDONLY)
            fcntl.flock(number, fcntl.LOCK_EX)
            if folder.exists():
                return folder, number
            os.close(number)


def _delete_if_left(folder: Path) -> None:
    """Delete an incoming folder unless its process is at work."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its process has just ended
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(number)


# --- the audit ---


def audit_line(action: str, **known: Any) -> dict[str, Any]:
    """What is written of a change: what, when, and by which account."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"action": action, "time": now, "uid": os.getuid(), "host": socket.gethostname(), **known}


def hash_id(name: str) -> str:
    """An id as the audit has it: an id may itself be personal."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def removed_ids(gallery: Path) -> set[str]:
    """Hashes of all ids that were ever removed."""
    lines: Iterable[dict[str, Any]] = map(json.loads, files.whole_lines(gallery / AUDIT))
    return {name for line in lines if line["action"] == "remove" for name in line["ids_sha256"]}

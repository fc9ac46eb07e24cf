"""The state of an import on this host: its directory, its locks, and what is not in place yet."""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from personmae.data.import_plan import WHOLE, Part
from personmae.data.mds import INDEX
from personmae.errors import UserError
from personmae.system import storage

PLAN = "import.json"  # there from the first moment of an import to its last
DONE = "imported.json"  # the plan of a complete import, by which the same command knows that nothing is left to do
STAGING = "staging-"


def standing(destination: str) -> tuple[str, set[str]]:
    """Where the files of an import are now, and which are there. Those of a directory are in DEST.partial until the end.

    Raises:
        UserError: something else is there.
    """
    if storage.is_remote(destination):
        listed = storage.list_sizes(destination)
        root, names = destination, set(listed or ())
        if listed is None:
            names = {name for name in (PLAN, INDEX, DONE) if storage.read(destination, name) is not None}
    else:
        root, names = destination, set(_entries(destination))
        if not names:
            root = f"{Path(destination)}.partial"
            names = {name for name in _entries(root) if not name.startswith(STAGING)}
    if names and PLAN not in names and not {INDEX, DONE} <= names:
        name = min(names)
        raise UserError(f"an empty destination is required. {root} already holds {name}: delete it or choose another")
    return root, names


def _entries(directory: str) -> list[str]:
    return os.listdir(directory) if Path(directory).exists() else []


def _home(destination: str) -> Path:
    """The directory of an import on this machine's disk. Of a remote one it has a name by which the next run finds it."""
    if not storage.is_remote(destination):
        home = Path(standing(destination)[0])
        home.mkdir(parents=True, exist_ok=True)
        return home
    home = Path(tempfile.gettempdir()) / f"personmae-import-{os.getuid()}-{xxhash.xxh64_hexdigest(destination)}"
    home.mkdir(mode=0o700, exist_ok=True)
    return home


@dataclass(slots=True)
class Lock:
    """A held lock on an import's directory: alone for a whole import, shared by its parts."""

    home: Path
    descriptor: int
    alone: bool

    def take_alone(self) -> bool:
        """Hold the lock alone from now on. False where another part is at work, which will get here too."""
        self.alone = self.alone or _flock(self.descriptor, fcntl.LOCK_EX)
        return self.alone


@contextmanager
def locked(destination: str, part: Part) -> Iterator[Lock]:
    """One import at a time, and each part once on a host. The locks go with the process."""
    whole, taken = part == WHOLE, f"another process is writing {destination}. Wait until it has ended, or stop it"
    while True:
        home = _home(destination)
        descriptor = os.open(home, os.O_RDONLY)
        if not _flock(descriptor, fcntl.LOCK_EX if whole else fcntl.LOCK_SH):
            os.close(descriptor)
            raise UserError(taken)
        if home.exists() and os.path.samestat(os.fstat(descriptor), home.stat()):
            break
        os.close(descriptor)  # it was finished or removed meanwhile
    lock, own = Lock(home, descriptor, whole), -1
    try:
        if not whole:
            own = os.open(_part_folder(home, part), os.O_RDONLY)
            if not _flock(own, fcntl.LOCK_EX):
                raise UserError(f"part {part}: {taken}")
        yield lock
    finally:
        if own >= 0:
            os.close(own)
        if storage.is_remote(destination) and lock.take_alone():
            shutil.rmtree(home, ignore_errors=True)
        os.close(descriptor)


def _flock(descriptor: int, kind: int) -> bool:
    """Whether the lock was free. On a network file system without locks for directories it always is."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _part_folder(home: Path, part: Part) -> Path:
    """The directory for what a part of this host has not put in place yet."""
    folder = home / f"{STAGING}{socket.gethostname()}-{part.number}-of-{part.count}"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def open_staging(home: Path, part: Part) -> Iterator[Path]:
    """A new directory for files that are not in place yet. Remains of an earlier one are removed."""
    within = home if part == WHOLE else _part_folder(home, part)
    for left in within.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=within))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if within != home:
            with suppress(OSError):
                within.rmdir()

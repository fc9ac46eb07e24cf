"""Importing pictures as shards, from ``sources`` to a directory or an object store.

An import is planned from names and sizes alone: which pictures make which shard. Each shard is then written on its own by some
process, put in place, and only then recorded (``import-00007.json``), so that whenever the import is killed the same command
finds what is finished and ends with the same bytes. ``index.json`` is written last and marks the data set as complete.

Several hosts can share an import: each makes the same plan and writes a part of its shards. Whichever finds all of them
recorded writes the index. Two that do so at once write the same bytes.
"""

import fcntl
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import xxhash

from personmae.data import rejects, storage
from personmae.data.containers import Picture
from personmae.data.mds import INDEX
from personmae.data.rejects import REJECTS
from personmae.data.selection import Selection
from personmae.data.shards import SHARD_BYTES, Progress, Record, Task, header_bytes, sample_bytes, shard_name, write_shard
from personmae.data.sources import Source, open_source, told
from personmae.errors import Stopped, UserError

PLAN = "import.json"  # there from the first moment of an import to its last
DONE = "imported.json"  # the plan of a complete import, by which the same command knows that nothing is left to do
_FORMAT_VERSION = 1
_STAGING = "staging-"
_NUM_KEEPERS = 4  # shards on their way to the destination, besides those that are being written


@dataclass(frozen=True, slots=True)
class Part:
    """Which of ``count`` hosts this is that share an import; ``number`` counts from 1. Its shards lie side by side."""

    number: int = 1
    count: int = 1

    def of(self, num_shards: int) -> range:
        """The numbers of its shards."""
        return range(num_shards * (self.number - 1) // self.count, num_shards * self.number // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an import ended."""

    num_pictures: int  # in the data set, or in the shards of this part
    passed_over: str = ""  # what the source holds besides images, in words
    num_missing: int = 0  # shards that other parts have still to write
    finished: bool = True  # False where another part writes the index
    was_complete: bool = False  # there was nothing left to do


def write(source: str | Path, destination: str, **options: Any) -> int:
    """As ``carry_out``; returns how many pictures were written."""
    return carry_out(source, destination, **options).num_pictures


def carry_out(
    source: str | Path,
    destination: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    max_side: int | None = None,
    column: str | None = None,
    selection: Selection | None = None,
    max_rejects: float = 1.0,
    part: Part = WHOLE,
    num_processes: int = 1,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Outcome:
    """Write a source's pictures as shards to a directory or ``s3://bucket/prefix``.

    A picture that cannot be decoded is left out and listed in ``rejects.jsonl``. One whose longer side exceeds ``max_side``
    pixels is shrunk to it and encoded again; all others are kept byte for byte. No file exceeds ``shard_bytes``, unless a
    single picture does or encoding again has made pictures larger. ``progress(done, total)`` counts pictures, ``announce``
    gets a line about the plan. ``column`` is the one to read of tables.

    Where more than the share ``max_rejects`` is left out, the index is not written, and the same call with a larger share
    has nothing else left to do.

    A directory is built as ``DEST.partial`` and renamed. The same call after an interruption goes on where it was.
    With a ``part`` only its shards are written, and the index by the one that finds all of them there.

    Raises:
        UserError: an option is out of range, the source holds no readable picture, the destination is taken, holds an
            unfinished import with other options, or cannot be written.
        Stopped: Ctrl-C, SIGTERM or the loss of a process ended it; what is finished stays.
        TooManyRejects: more than ``max_rejects`` was left out; what is finished stays.
    """
    if not 0 < shard_bytes < 2**32:
        raise UserError(f"a shard must have from 1 byte to below 4096 MiB, the format's bound; got {shard_bytes:,} bytes")
    if num_processes < 1:
        raise UserError(f"--processes must be at least 1, got {num_processes}; use 1 to work in this process")
    if max_side is not None and max_side < 1:
        raise UserError(f"--max-side must be at least 1 pixel, got {max_side}")
    rejects.check_share(max_rejects)
    if not 1 <= part.number <= part.count:
        raise UserError(f"--part takes I/N with I from 1 to N, got {part}")
    destination = destination.rstrip("/") if storage.is_remote(destination) else _resolved(destination)
    try:
        with _sigterm_as_interrupt():
            _standing(destination)  # listing a source may take minutes
            plan = make_plan(open_source(source, column), selection or Selection(), shard_bytes, max_side)
            plan = replace(plan, max_rejects=max_rejects)
            (announce or (lambda line: None))(str(plan))
            outcome = _import(plan, destination, part, num_processes, progress or (lambda done, total: None))
            return replace(outcome, passed_over=told(plan.source.passed_over))
    except KeyboardInterrupt:
        raise Stopped("interrupted; what is finished is kept: run the same command again to go on from there") from None
    except BrokenProcessPool as error:
        raise Stopped(
            "a worker process was killed, for lack of memory as a rule; run the same command again, with fewer --processes"
        ) from error


def _resolved(destination: str) -> str:
    """The directory that a path leads to, which must be one that can be renamed into place at the end."""
    if not destination or re.match(r"[a-z0-9]+:", destination):
        raise UserError(f"a directory or a location like s3://bucket/prefix is required; got {destination!r}")
    path = Path(destination).resolve()
    if path.is_mount():
        raise UserError(f"a directory that can be replaced is required; {path} is a mount point: name a folder in it")
    return str(path)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- the plan ---


@dataclass(frozen=True)
class Plan:
    """Which pictures make which shard, and all else that decides what the result is."""

    source: Source
    pictures: list[Picture]
    starts: list[int]  # place of each shard's first picture
    shard_bytes: int
    max_side: int | None
    max_rejects: float = 1.0  # share that may be left out; not part of what is compared, as it decides of the end alone

    def of_shard(self, number: int) -> list[Picture]:
        """The pictures of a shard."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.pictures)
        return self.pictures[self.starts[number] : end]

    def __str__(self) -> str:
        others = told(self.source.passed_over)
        line = f"{self.source.location}: {len(self.pictures):,} images for {len(self.starts):,} shards"
        return f"{line}; passed over: {others}" if others else line

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What is compared before an unfinished import goes on."""
        digest = xxhash.xxh3_128()
        for picture in self.pictures:
            digest.update(f"{picture.key}\0{picture.num_bytes}\n".encode())
        return {
            "format_version": _FORMAT_VERSION,
            "shard_bytes": self.shard_bytes,
            "max_side": self.max_side,
            "num_pictures": len(self.pictures),
            "num_shards": len(self.starts),
            "pictures": digest.hexdigest(),
        }

    @functools.cached_property
    def digest(self) -> str:
        """A number for the record, which each shard's record has too."""
        return xxhash.xxh64_hexdigest(json.dumps(self.record))


def make_plan(source: Source, selection: Selection, shard_bytes: int, max_side: int | None) -> Plan:
    """List the source and cut the wanted pictures into shards as streaming's writer would: full, in order."""
    pictures = selection.of(source.pictures())
    empty = header_bytes(shard_bytes)
    starts, size = [0], empty
    for place, picture in enumerate(pictures):
        num_bytes = sample_bytes(picture.key, picture.num_bytes)
        if size + num_bytes > shard_bytes and place > starts[-1]:
            starts.append(place)
            size = empty
        size += num_bytes
    return Plan(source, pictures, starts, shard_bytes, max_side)


# --- the import ---


def _import(plan: Plan, destination: str, part: Part, num_processes: int, progress: Progress) -> Outcome:
    """Carry out a plan, or a part or the rest of it."""
    if complete := _already_complete(plan, destination):
        return complete
    with _locked(destination, part) as lock:
        root, names = _standing(destination)
        try:
            with _staging(lock.home, part) as staging:
                _begin(plan, root, PLAN in names, staging)
                if INDEX not in names:
                    records = _records(plan, root) if PLAN in names else {}
                    _fill(plan, part, records, root, staging, num_processes, progress)
                    records = _records(plan, root) if part != WHOLE else records
                    missing = len(plan.starts) - len(records)
                    if missing or not lock.take_alone():
                        return _already_complete(plan, destination) or _unfinished(plan, part, records, missing)
                    _write_index(plan, [records[number] for number in sorted(records)], root, staging)
            return Outcome(_conclude(plan, root, destination))
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and (complete := _already_complete(plan, destination)):
                return complete  # another host has finished it in this moment
            finished = any(Path(root).glob("import-*.json")) or (Path(root) / INDEX).exists()
            if root != destination and part == WHOLE and not finished:
                shutil.rmtree(root, ignore_errors=True)
            raise


def _already_complete(plan: Plan, destination: str) -> Outcome | None:
    """The outcome where this very import has been finished before; None where something is left to do.

    Raises:
        UserError: another import has been finished there.
    """
    root, names = _standing(destination)
    if PLAN in names or INDEX not in names:
        return None
    done = json.loads(storage.read(root, DONE) or b"{}")
    if differing := [name for name, value in plan.record.items() if done.get(name) != value]:
        what = "other images" if differing == ["pictures"] else " and ".join(name for name in differing if name != "pictures")
        raise UserError(
            f"an empty destination is required; {destination} already holds a complete import with other {what}: delete it or "
            "choose another"
        )
    return Outcome(_num_samples(root), was_complete=True)


def _num_samples(root: str) -> int:
    return sum(shard["samples"] for shard in json.loads(storage.read(root, INDEX) or b"")["shards"])


def _unfinished(plan: Plan, part: Part, records: dict[int, Record], missing: int) -> Outcome:
    own = [records[number]["shard"] for number in part.of(len(plan.starts)) if number in records]
    written = sum(shard["samples"] for shard in own if shard)
    return Outcome(written, num_missing=missing, finished=False)


def _standing(destination: str) -> tuple[str, set[str]]:
    """Where an import's files are to be found now, and which are there: a directory's stand in DEST.partial until the end.

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
            names = {name for name in _entries(root) if not name.startswith(_STAGING)}
    if names and PLAN not in names and not {INDEX, DONE} <= names:
        name = min(names)
        raise UserError(f"an empty destination is required; {root} already holds {name}: delete it or choose another")
    return root, names


def _entries(directory: str) -> list[str]:
    return os.listdir(directory) if Path(directory).exists() else []


def _home(destination: str) -> Path:
    """The directory of an import on this machine's disk. Of a remote one it has a name by which the next run finds it."""
    if not storage.is_remote(destination):
        home = Path(_standing(destination)[0])
        home.mkdir(parents=True, exist_ok=True)
        return home
    home = Path(tempfile.gettempdir()) / f"personmae-import-{os.getuid()}-{xxhash.xxh64_hexdigest(destination)}"
    home.mkdir(mode=0o700, exist_ok=True)
    return home


@dataclass(slots=True)
class _Lock:
    """A held lock on an import's directory: alone for a whole import, shared by its parts."""

    home: Path
    descriptor: int
    alone: bool

    def take_alone(self) -> bool:
        """Hold it alone from now on; False where another part is at work, which will come here too."""
        self.alone = self.alone or _flock(self.descriptor, fcntl.LOCK_EX)
        return self.alone


@contextmanager
def _locked(destination: str, part: Part) -> Iterator[_Lock]:
    """One import at a time, and each part once on a host; the locks go with the process."""
    whole, taken = part == WHOLE, f"another process is writing {destination}; wait until it has ended, or stop it"
    while True:
        home = _home(destination)
        descriptor = os.open(home, os.O_RDONLY)
        if not _flock(descriptor, fcntl.LOCK_EX if whole else fcntl.LOCK_SH):
            os.close(descriptor)
            raise UserError(taken)
        if home.exists() and os.path.samestat(os.fstat(descriptor), home.stat()):
            break
        os.close(descriptor)  # it was finished or removed meanwhile
    lock, own = _Lock(home, descriptor, whole), -1
    try:
        if not whole:
            own = os.open(_own_staging(home, part), os.O_RDONLY)
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
    """Whether a lock could be had at once; where a network file system has none for directories it always can."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _own_staging(home: Path, part: Part) -> Path:
    """The directory for what a part of this host has not put in place yet."""
    folder = home / f"{_STAGING}{socket.gethostname()}-{part.number}-of-{part.count}"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def _staging(home: Path, part: Part) -> Iterator[Path]:
    """A new directory for what is not in place yet; what a kill left of an earlier one is removed."""
    within = home if part == WHOLE else _own_staging(home, part)
    for left in within.glob(f"{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=within))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if within != home:
            with suppress(OSError):
                within.rmdir()


def _begin(plan: Plan, root: str, begun: bool, staging: Path) -> None:
    """Record the plan, or compare it with the one that was begun."""
    if not begun:
        _put_text(root, PLAN, json.dumps(plan.record), staging)
    there = json.loads(storage.read(root, PLAN) or b"{}")  # other parts may have begun at the same time
    for name, value in plan.record.items():
        if there.get(name) != value:
            what = "other pictures" if name == "pictures" else f"{name}={there.get(name)} instead of {value}"
            raise UserError(
                f"{root} holds an unfinished import with {what}; finish it with the source and options it was begun with, "
                f"or delete {root}"
            )


def _records(plan: Plan, root: str) -> dict[int, Record]:
    """The records of finished shards by number; of a store that cannot list, each possible one is asked for."""
    sizes = storage.list_sizes(root)

    def record(number: int) -> Record | None:
        if sizes is not None and _record_name(number) not in sizes:
            return None
        content = storage.read(root, _record_name(number))
        found = json.loads(content) if content else None
        if found and found.get("plan", plan.digest) != plan.digest:
            return None
        if found and found["shard"] and sizes is not None:
            raw = found["shard"]["raw_data"]
            return found if sizes.get(raw["basename"]) == raw["bytes"] else None  # a power cut may lose the older of two files
        return found

    with ThreadPoolExecutor(16) as threads:
        found = threads.map(record, range(len(plan.starts)))
        return {number: one for number, one in enumerate(found) if one is not None}


def _fill(
    plan: Plan,
    part: Part,
    records: dict[int, Record],
    root: str,
    staging: Path,
    num_processes: int,
    progress: Progress,
) -> None:
    """Write all shards of a part that have no record yet and add theirs."""
    sizes = {number: len(plan.of_shard(number)) for number in part.of(len(plan.starts))}
    missing = [number for number in sizes if number not in records]
    done, total = sum(size for number, size in sizes.items() if number in records), sum(sizes.values())
    progress(done, total)
    num_processes = min(num_processes, max(1, len(missing)))
    keepers = ThreadPoolExecutor(num_processes + _NUM_KEEPERS, initializer=_leave_interrupts_to_main)
    with keepers, _workers(num_processes) as workers:

        def make(number: int) -> tuple[int, Record]:
            task = Task(number, plan.source, plan.of_shard(number), plan.shard_bytes, plan.max_side, staging)
            record = {**workers.submit(write_shard, task).result(), "plan": plan.digest}
            if record["shard"]:
                _put(root, shard_name(number), task.folder / shard_name(number))
                task.folder.rmdir()
            _put_text(root, _record_name(number), json.dumps(record), staging)
            return number, record

        for future in as_completed([keepers.submit(make, number) for number in missing]):
            number, records[number] = future.result()
            done += sizes[number]
            progress(done, total)


def _write_index(plan: Plan, records: list[Record], root: str, staging: Path) -> None:
    """Write the list of rejects and, after it, the index. A shard without a readable picture is not in it."""
    shards = [record["shard"] for record in records if record["shard"]]
    left_out = [reject for record in records for reject in record["rejects"]]
    if not shards:
        storage.delete(root, [*(_record_name(number) for number in range(len(plan.starts))), PLAN])
        raise UserError(
            f"pictures that can be decoded are required; all {len(left_out):,} of {plan.source.location} were rejected: "
            f"{rejects.summary(left_out)}"
        )
    if left_out:
        _put_text(root, REJECTS, "".join(f"{json.dumps(reject)}\n" for reject in left_out), staging)
        rejects.check(left_out, len(plan.pictures), plan.max_rejects, root)
    _put_text(root, DONE, json.dumps(plan.record), staging)
    _put_text(root, INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True), staging)


def _conclude(plan: Plan, root: str, destination: str) -> int:
    """Remove the records of a complete import and give it its name; the plan goes last, for a kill may come between."""
    num_samples = _num_samples(root)
    storage.delete(root, [_record_name(number) for number in range(len(plan.starts))])
    if not storage.is_remote(root):
        for left in Path(root).glob(f"{_STAGING}*"):  # of other hosts, which have nothing left to put in place
            shutil.rmtree(left, ignore_errors=True)
    if root != destination:
        Path(root).rename(destination)
    storage.delete(destination, [PLAN])  # stores that cannot delete keep it and the records, to no harm
    return num_samples


def _record_name(number: int) -> str:
    return f"import-{number:05}.json"


def _put_text(root: str, name: str, text: str, staging: Path) -> None:
    path = staging / name
    path.write_text(text, encoding="utf-8")
    _put(root, name, path)


def _put(root: str, name: str, path: Path) -> None:
    """Move a file to ``root/name``, where it appears whole or not at all."""
    if storage.is_remote(root):
        storage.upload(root, name, path)
        path.unlink()
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.rename(Path(root) / name)


# --- worker processes ---


@contextmanager
def _workers(num_processes: int) -> Iterator[Executor]:
    """Processes that write shards, or one thread of this one; they end when this process does, whatever ends it."""
    if num_processes == 1:
        thread = ThreadPoolExecutor(1)
        try:
            yield thread
        finally:
            thread.shutdown(cancel_futures=True)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["personmae.data.importer", "streaming"])  # seconds of imports, once for all
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_processes, context, initializer=_become_worker, initargs=(watched,))
    try:
        yield pool
        pool.shutdown()
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


def _become_worker(watched: Connection) -> None:
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    """End this process when the other end of a pipe is closed, be it by a kill."""
    watched.poll(None)
    os._exit(1)


def _leave_interrupts_to_main() -> None:
    """Block Ctrl-C in this thread and in the processes it starts: those would each show a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

"""Importing pictures as shards, from ``sources`` to a directory or an object store.

An import is planned from names and sizes alone: which pictures make which shard. Each shard is then written on its own by some
process, put in place, and only then recorded (``import-00007.json``), so that whenever the import is killed the same command
finds what is finished and ends with the same bytes. ``index.json`` is written last and marks the data set as complete.
"""

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
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
from personmae.data.mds import INDEX
from personmae.data.rejects import REJECTS
from personmae.data.shards import SHARD_BYTES, Progress, Record, Task, header_bytes, sample_bytes, shard_name, write_shard
from personmae.data.sources import Picture, Selection, Source, open_source
from personmae.errors import Stopped, UserError

PLAN = "import.json"  # there from the first moment of an import to its last
_FORMAT_VERSION = 1
_STAGING = "staging-"
_NUM_KEEPERS = 4  # shards on their way to the destination, besides those that are being written


def write(
    source: Path,
    destination: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    max_side: int | None = None,
    selection: Selection | None = None,
    max_rejects: float = 1.0,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> int:
    """Write a source's pictures as shards to a directory or ``s3://bucket/prefix``; returns how many were written.

    A picture that cannot be decoded is left out and listed in ``rejects.jsonl``. One whose longer side exceeds ``max_side``
    pixels is shrunk to it and encoded again; all others are kept byte for byte. No file exceeds ``shard_bytes``, unless a
    single picture does or encoding again has made pictures larger. ``progress(done, total)`` counts pictures.

    Where more than the share ``max_rejects`` is left out, the index is not written, and the same call with a larger share
    has nothing else left to do.

    A directory is built as ``DEST.partial`` and renamed. The same call after an interruption goes on where it was.

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
    destination = destination.rstrip("/") if storage.is_remote(destination) else _resolved(destination)
    try:
        with _sigterm_as_interrupt():
            _standing(destination)  # listing a source may take minutes
            plan = make_plan(open_source(source), selection or Selection(), shard_bytes, max_side)
            plan = replace(plan, max_rejects=max_rejects)
            return _import(plan, destination, num_processes, progress or (lambda done, total: None))
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


@dataclass(frozen=True, slots=True)
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

    def record(self) -> dict[str, Any]:
        """What is compared before an unfinished import goes on."""
        digest = xxhash.xxh3_128()
        for picture in self.pictures:
            digest.update(f"{picture.key}\0{picture.num_bytes}\n".encode("utf-8", "surrogateescape"))
        return {
            "format_version": _FORMAT_VERSION,
            "shard_bytes": self.shard_bytes,
            "max_side": self.max_side,
            "num_pictures": len(self.pictures),
            "num_shards": len(self.starts),
            "pictures": digest.hexdigest(),
        }


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


def _import(plan: Plan, destination: str, num_processes: int, progress: Progress) -> int:
    """Carry out a plan, or the rest of it; returns the number of pictures written."""
    home = _home(destination)
    with _locked(home, destination):
        root, names = _standing(destination)
        try:
            with _staging(home) as staging:
                _begin(plan, root, PLAN in names, staging)
                if INDEX not in names:
                    records = _records(plan, root) if PLAN in names else {}
                    _fill(plan, records, root, staging, num_processes, progress)
                    _write_index(plan, [records[number] for number in sorted(records)], root, staging)
            return _conclude(plan, root, destination)
        except BaseException:
            if root != destination and not any(Path(root).glob("import-*.json")) and not (Path(root) / INDEX).exists():
                shutil.rmtree(root, ignore_errors=True)  # nothing in it is finished
            raise


def _standing(destination: str) -> tuple[str, set[str]]:
    """Where an import's files are to be found now, and which are there: a directory's stand in DEST.partial until the end.

    Raises:
        UserError: something else is there.
    """
    if storage.is_remote(destination):
        listed = storage.list_sizes(destination)
        root, names = destination, set(listed or ())
        if listed is None:
            names = {name for name in (PLAN, INDEX) if storage.read(destination, name) is not None}
    else:
        root, names = destination, set(_entries(destination))
        if not names:
            root = f"{Path(destination)}.partial"
            names = {name for name in _entries(root) if not name.startswith(_STAGING)}
    if names and PLAN not in names:
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


@contextmanager
def _locked(home: Path, destination: str) -> Iterator[None]:
    """One import at a time; the lock goes with the process."""
    descriptor = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {destination}; wait until it has ended, or stop it") from error
        except OSError:  # some network file systems have no locks for directories
            pass
        yield
    finally:
        os.close(descriptor)
        if storage.is_remote(destination):
            with suppress(OSError):
                home.rmdir()


@contextmanager
def _staging(home: Path) -> Iterator[Path]:
    """A new directory for what is not in place yet; what a kill left of an earlier one is removed."""
    for left in home.glob(f"{_STAGING}*"):
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _begin(plan: Plan, root: str, begun: bool, staging: Path) -> None:
    """Record the plan, or compare it with the one that was begun."""
    record = plan.record()
    if not begun:
        _put_text(root, PLAN, json.dumps(record), staging)
        return
    there = json.loads(storage.read(root, PLAN) or b"{}")
    for name, value in record.items():
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
        if found and found["shard"] and sizes is not None:
            raw = found["shard"]["raw_data"]
            return found if sizes.get(raw["basename"]) == raw["bytes"] else None  # a power cut may lose the older of two files
        return found

    with ThreadPoolExecutor(16) as threads:
        found = threads.map(record, range(len(plan.starts)))
        return {number: one for number, one in enumerate(found) if one is not None}


def _fill(plan: Plan, records: dict[int, Record], root: str, staging: Path, num_processes: int, progress: Progress) -> None:
    """Write all shards that have no record yet and add theirs."""
    missing = [number for number in range(len(plan.starts)) if number not in records]
    done = sum(len(plan.of_shard(number)) for number in records)
    progress(done, len(plan.pictures))
    num_processes = min(num_processes, max(1, len(missing)))
    keepers = ThreadPoolExecutor(num_processes + _NUM_KEEPERS, initializer=_leave_interrupts_to_main)
    with keepers, _workers(num_processes) as workers:

        def make(number: int) -> tuple[int, Record]:
            task = Task(number, plan.source, plan.of_shard(number), plan.shard_bytes, plan.max_side, staging)
            record = workers.submit(write_shard, task).result()
            if record["shard"]:
                _put(root, shard_name(number), task.folder / shard_name(number))
                task.folder.rmdir()
            _put_text(root, _record_name(number), json.dumps(record), staging)
            return number, record

        for future in as_completed([keepers.submit(make, number) for number in missing]):
            number, records[number] = future.result()
            done += len(plan.of_shard(number))
            progress(done, len(plan.pictures))


def _write_index(plan: Plan, records: list[Record], root: str, staging: Path) -> None:
    """Write the list of rejects and, after it, the index. A shard without a readable picture is not in it."""
    shards = [record["shard"] for record in records if record["shard"]]
    left_out = [reject for record in records for reject in record["rejects"]]
    if not shards:
        storage.delete(root, [*(_record_name(number) for number in range(len(plan.starts))), PLAN])
        raise UserError(
            f"pictures that can be decoded are required; all {len(left_out):,} of {plan.source.path} were rejected: "
            f"{rejects.summary(left_out)}"
        )
    if left_out:
        _put_text(root, REJECTS, "".join(f"{json.dumps(reject)}\n" for reject in left_out), staging)
        rejects.check(left_out, len(plan.pictures), plan.max_rejects, root)
    _put_text(root, INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True), staging)


def _conclude(plan: Plan, root: str, destination: str) -> int:
    """Remove the records of a complete import and give it its name; the plan goes last, for a kill may come between."""
    index = json.loads(storage.read(root, INDEX) or b"")
    storage.delete(root, [_record_name(number) for number in range(len(plan.starts))])
    if root != destination:
        Path(root).rename(destination)
    storage.delete(destination, [PLAN])  # stores that cannot delete keep it and the records, to no harm
    return sum(shard["samples"] for shard in index["shards"])


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

"""Import images as shards, from ``sources`` to a directory or an object store.

An import is planned from names and sizes alone: which images go into which shard. Each shard is written by one process, put
in place, and only then recorded in ``import-00007.json``. So after a kill at any moment the same command finds what is
finished and ends with the same bytes. ``index.json`` is written last and marks the data set as complete.

Several hosts can share an import. Each makes the same plan and writes a part of the shards. A host that finds all of them
recorded writes the index. Two hosts that do so at once write the same bytes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from personmae.data import rejects
from personmae.data.import_home import DONE, PLAN, STAGING, locked, open_staging, standing
from personmae.data.import_plan import WHOLE, ImportPlan, Part, make_plan
from personmae.data.import_workers import kept_when_stopped, leave_interrupts_to_main, workers
from personmae.data.mds import INDEX
from personmae.data.rejects import REJECTS
from personmae.data.selection import Selection
from personmae.data.shards import SHARD_BYTES, Progress, Record, Task, shard_name, write_shard
from personmae.data.sources import open_source, summary
from personmae.errors import UserError
from personmae.system import storage

_NUM_KEEPERS = 4  # shards on their way to the destination, besides those that are being written


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an import ended."""

    num_images: int  # in the data set, or in the shards of this part
    passed_over: str = ""  # what the source holds besides images, in words
    num_missing: int = 0  # shards that other parts have still to write
    finished: bool = True  # False where another part writes the index
    was_complete: bool = False  # there was nothing left to do


def write(source: str | Path, destination: str, **options: Any) -> int:
    """As ``carry_out``, but return the number of images written."""
    return carry_out(source, destination, **options).num_images


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
    log: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Write a source's images as shards to a directory or ``s3://bucket/prefix``.

    An image that cannot be decoded is left out and listed in ``rejects.jsonl``. One whose longer side exceeds ``max_side``
    pixels is shrunk to it and encoded again. All others are kept byte for byte. No file exceeds ``shard_bytes``, unless a
    single image does or encoding again has made images larger. ``progress(done, total)`` counts images, ``log``
    gets lines about the listing and the plan. ``column`` is the one to read of tables.

    Where more than the share ``max_rejects`` is left out, the index is not written, and the same call with a larger share
    has nothing else left to do.

    A directory is built as ``DEST.partial`` and renamed. The same call after an interruption continues it.
    With a ``part`` only its shards are written, and the index by the one that finds all of them there.

    Raises:
        UserError: an option is out of range, the source holds no readable image, the destination is taken, holds an
            unfinished import with other options, or cannot be written.
        Stopped: Ctrl-C, SIGTERM or the loss of a process ended it. What is finished stays.
        TooManyRejects: more than ``max_rejects`` was left out. What is finished stays.
    """
    if not 0 < shard_bytes < 2**32:
        raise UserError(f"a shard must have from 1 byte to below 4096 MiB, the format's bound. Got {shard_bytes:,} bytes")
    if num_processes < 1:
        raise UserError(f"--processes must be at least 1, got {num_processes}. Use 1 to work in this process")
    if max_side is not None and max_side < 1:
        raise UserError(f"--max-side must be at least 1 pixel, got {max_side}")
    rejects.check_share(max_rejects)
    if not 1 <= part.number <= part.count:
        raise UserError(f"--part takes I/N with I from 1 to N, got {part}")
    destination = destination.rstrip("/") if storage.is_remote(destination) else _resolved(destination)
    with kept_when_stopped():
        standing(destination)  # listing a source may take minutes
        plan = make_plan(open_source(source, column), selection or Selection(), shard_bytes, max_side, log)
        plan = replace(plan, max_rejects=max_rejects)
        log(str(plan))
        outcome = _import(plan, destination, part, num_processes, progress or (lambda done, total: None))
        return replace(outcome, passed_over=summary(plan.source.passed_over))


def _resolved(destination: str) -> str:
    """The directory that a path leads to, which must be one that can be renamed into place at the end."""
    if not destination or re.match(r"[a-z0-9]+:", destination):
        raise UserError(f"a directory or a location like s3://bucket/prefix is required. Got {destination!r}")
    path = Path(destination).resolve()
    if path.is_mount():
        raise UserError(f"a directory that can be replaced is required. {path} is a mount point: name a folder in it")
    return str(path)


def _import(plan: ImportPlan, destination: str, part: Part, num_processes: int, progress: Progress) -> Outcome:
    """Carry out a plan, or a part or the rest of it."""
    if complete := _already_complete(plan, destination):
        return complete
    with locked(destination, part) as lock:
        root, names = standing(destination)
        try:
            with open_staging(lock.home, part) as staging:
                _begin(plan, root, PLAN in names, staging)
                if INDEX not in names:
                    records = _records(plan, root) if PLAN in names else {}
                    _fill(plan, part, records, root, staging, num_processes, progress)
                    records = _records(plan, root) if part != WHOLE else records
                    missing = len(plan.starts) - len(records)
                    if missing or not lock.take_alone():
                        return _ended_elsewhere(plan, destination) or _unfinished(plan, part, records, missing)
                    _write_index(plan, [records[number] for number in sorted(records)], root, staging)
            return Outcome(_conclude(plan, root, destination))
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and (complete := _already_complete(plan, destination)):
                return complete  # another host has finished it in this moment
            finished = any(Path(root).glob("import-*.json")) or (Path(root) / INDEX).exists()
            if root != destination and part == WHOLE and not finished:
                shutil.rmtree(root, ignore_errors=True)
            raise


def _already_complete(plan: ImportPlan, destination: str) -> Outcome | None:
    """The outcome if this same import was finished before. None where something is left to do.

    Raises:
        UserError: another import has been finished there.
    """
    root, names = standing(destination)
    if PLAN in names or INDEX not in names:
        return None
    done = json.loads(storage.read(root, DONE) or b"{}")
    if done and done.get("format_version") != plan.record["format_version"]:
        raise UserError(
            f"an empty destination is required. {destination} already holds a complete import by another version: choose "
            "another, or use it as it is with --if-missing"
        )
    if differing := [name for name, value in plan.record.items() if done.get(name) != value]:
        what = "other images" if differing == ["images"] else " and ".join(name for name in differing if name != "images")
        raise UserError(
            f"an empty destination is required. {destination} already holds a complete import with other {what}: delete it or "
            "choose another"
        )
    return Outcome(_num_samples(root), was_complete=True)


def _ended_elsewhere(plan: ImportPlan, destination: str) -> Outcome | None:
    """As ``_already_complete``, also while another host with our plan removes the records, which takes minutes in a store."""
    root, names = standing(destination)
    if {PLAN, INDEX} <= names:
        return Outcome(_num_samples(root), was_complete=True)
    return _already_complete(plan, destination)


def _num_samples(root: str) -> int:
    return sum(shard["samples"] for shard in json.loads(storage.read(root, INDEX) or b"")["shards"])


def _unfinished(plan: ImportPlan, part: Part, records: dict[int, Record], missing: int) -> Outcome:
    own = [records[number]["shard"] for number in part.of(len(plan.starts)) if number in records]
    written = sum(shard["samples"] for shard in own if shard)
    return Outcome(written, num_missing=missing, finished=False)


def _begin(plan: ImportPlan, root: str, begun: bool, staging: Path) -> None:
    """Record the plan, or compare it with the one that was begun."""
    if not begun:
        _put_text(root, PLAN, json.dumps(plan.record), staging)
    recorded = storage.read(root, PLAN)  # other parts may have begun at the same time
    if recorded is None:
        raise FileNotFoundError(f"{PLAN} of {root} has gone: another host has finished the import, or somebody deleted it")
    there = json.loads(recorded)
    if there.get("format_version") != plan.record["format_version"]:
        raise UserError(
            f"{root} holds an unfinished import by another version, whose rules for images differ. Delete it and start again "
            "with an empty destination"
        )
    for name, value in plan.record.items():
        if there.get(name) != value:
            what = "other images" if name == "images" else f"{name}={there.get(name)} instead of {value}"
            raise UserError(
                f"{root} holds an unfinished import with {what}. Finish it with the source and options of its start, "
                f"or delete {root}"
            )


def _records(plan: ImportPlan, root: str) -> dict[int, Record]:
    """The records of finished shards by number. Where a store cannot list, each possible record is requested."""
    sizes = storage.list_sizes(root)

    def record(number: int) -> Record | None:
        if sizes is not None and _record_name(number) not in sizes:
            return None
        content = storage.read(root, _record_name(number))
        found = json.loads(content) if content else None
        if found and found.get("plan") != plan.digest:
            return None
        if found and found["shard"] and sizes is not None:
            raw = found["shard"]["raw_data"]
            return found if sizes.get(raw["basename"]) == raw["bytes"] else None  # a power cut may lose the older of two files
        return found

    with ThreadPoolExecutor(16) as threads:
        found = threads.map(record, range(len(plan.starts)))
        return {number: one for number, one in enumerate(found) if one is not None}


def _fill(
    plan: ImportPlan,
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
    keepers = ThreadPoolExecutor(num_processes + _NUM_KEEPERS, initializer=leave_interrupts_to_main)
    with keepers, workers(num_processes) as pool:

        def make(number: int) -> tuple[int, Record]:
            task = Task(number, plan.source, plan.of_shard(number), plan.shard_bytes, plan.max_side, staging)
            record = {**pool.submit(write_shard, task).result(), "plan": plan.digest}
            if record["shard"]:
                _put(root, shard_name(number), task.folder / shard_name(number))
                task.folder.rmdir()
            _put_text(root, _record_name(number), json.dumps(record), staging)
            return number, record

        for future in as_completed([keepers.submit(make, number) for number in missing]):
            number, records[number] = future.result()
            done += sizes[number]
            progress(done, total)


def _write_index(plan: ImportPlan, records: list[Record], root: str, staging: Path) -> None:
    """Write the list of rejects and, after it, the index. A shard without a readable image is not in it."""
    shards = [record["shard"] for record in records if record["shard"]]
    left_out = [reject for record in records for reject in record["rejects"]]
    if not shards:
        storage.delete(root, [_record_name(number) for number in range(len(plan.starts))])
        storage.delete(root, [PLAN])  # after them, as in _conclude
        raise UserError(
            f"images that can be decoded are required. All {len(left_out):,} of {plan.source.location} were rejected: "
            f"{rejects.summary(left_out)}"
        )
    if left_out:
        _put_text(root, REJECTS, "".join(f"{json.dumps(reject)}\n" for reject in left_out), staging)
        rejects.check(left_out, len(plan.images), plan.max_rejects, root)
    _put_text(root, DONE, json.dumps(plan.record), staging)
    _put_text(root, INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True), staging)


def _conclude(plan: ImportPlan, root: str, destination: str) -> int:
    """Remove the records of a complete import and give it its name. The plan goes last, for a kill may come between."""
    num_samples = _num_samples(root)
    storage.delete(root, [_record_name(number) for number in range(len(plan.starts))])
    if not storage.is_remote(root):
        for left in Path(root).glob(f"{STAGING}*"):  # of other hosts, which have nothing left to put in place
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

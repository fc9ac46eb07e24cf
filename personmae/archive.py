"""Checkpoints in an object store, and which checkpoint a run resumes: the newest whole one here or there, for all ranks alike.

``STORE/step-00012000/`` holds the files of the local folder. Every file is written whole or not at all there, and
``manifest.json`` comes last: it is what makes the others a checkpoint. ``STORE/LATEST`` serves where a store cannot list.
"""

import fcntl
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from personmae import checkpoint, dist
from personmae.checkpoint import LATEST, MANIFEST
from personmae.data import storage
from personmae.errors import RankError, UserError
from personmae.snapshot import Fingerprint

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 30.0
RETRY_SECONDS = 120.0  # for which a run that starts waits for a store that is away
_NUM_FETCHES = 2  # of a file whose hash is wrong: the connection may have spoiled it
_jitter = random.Random()
_Result = TypeVar("_Result")


class Damaged(Exception):  # noqa: N818 - told as a fault, never shown
    """What the store holds is not a whole checkpoint; the message says why."""


def steps(store: str) -> list[int]:
    """Steps of the folders in a store, whole or not, ascending; of a store that cannot list, the one of ``LATEST``."""
    names = storage.list_folders(store)
    if names is None:
        names = [(storage.read(store, LATEST) or b"").decode("ascii", "replace").strip()]
    return sorted(step for name in names if (step := checkpoint.step_of(name)) is not None)


def send(store: str, path: Path, step: int, sent: set[str]) -> None:
    """Copy a local checkpoint to a store: files, manifest, ``LATEST``; ``sent`` remembers files for another try."""
    root, manifest = f"{store}/{checkpoint.name_of(step)}", (path / MANIFEST).read_bytes()
    theirs = storage.read(root, MANIFEST)
    if theirs != manifest:
        if theirs is not None:  # of a line that was given up; it is no checkpoint while its files change
            storage.delete(root, [MANIFEST])
        for name in checkpoint.parse_manifest(manifest)[0].keys() - sent:
            storage.upload(root, name, path / name)
            sent.add(name)
        storage.write(root, MANIFEST, manifest)
    storage.write(store, LATEST, checkpoint.name_of(step).encode())


def delete(store: str, step: int) -> None:
    """Delete a checkpoint of a store, first what makes it one; nothing happens where a store cannot list."""
    root = f"{store}/{checkpoint.name_of(step)}"
    if names := storage.list_sizes(root):
        storage.delete(root, sorted(names, key=lambda name: name != MANIFEST))


def fetch(store: str, step: int, directory: Path, digest: str | None = None) -> Path:
    """Copy a checkpoint of a store into a directory, each file checked, the whole renamed; returns its folder.

    Raises:
        Damaged: the store's is not whole, or not the one that ``digest`` stands for.
        UserError: the store cannot be read.
    """
    root, final = f"{store}/{checkpoint.name_of(step)}", directory / checkpoint.name_of(step)
    if (manifest := patiently(lambda: storage.read(root, MANIFEST))) is None:
        raise Damaged(f"it has no {MANIFEST}")
    files, fault = checkpoint.parse_manifest(manifest)
    if fault:
        raise Damaged(fault)
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / MANIFEST).write_bytes(manifest)
        if digest not in (None, checkpoint.digest(partial)):
            raise Damaged("it is not the one that the first host has")
        for name, expected in files.items():
            _fetch_file(root, partial / name, expected)
        checkpoint.put_in_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def newest(run_dir: str | Path, store: str | None = None) -> Path | None:
    """The newest whole checkpoint of a run directory and its store, on this host: it is fetched if need be.

    Raises:
        UserError: the store cannot be read.
    """
    return next(_whole_ones(run_dir, store), None)


def newest_for_all(run_dir: str | Path, store: str | None = None) -> Path | None:
    """``newest``, decided by the first rank; hosts that do not have it fetch it, and if one cannot, all take the next.

    One rank of each host checks every hash. The first must hold the run's lock, for it may rename what a kill has left.

    Raises:
        UserError: the store cannot be read, or a host sees neither the run directory of the first nor a store.
    """
    whole = _whole_ones(run_dir, store) if dist.is_first() else iter(())
    while offer := _offer(whole):
        path, trouble = None, None
        try:
            path = _take(run_dir, store, *offer)
        except (Damaged, UserError) as error:
            trouble = error
        if dist.any_rank(isinstance(trouble, UserError)):
            raise (trouble if isinstance(trouble, UserError) else UserError(f"another host cannot read {offer[0]}: see there"))
        if not dist.any_rank(trouble is not None):
            return path
        if trouble:
            checkpoint.tell_passed_over(offer[0], f"on this host, {trouble}")
    return None


def _whole_ones(run_dir: str | Path, store: str | None) -> Iterator[Path]:
    """Whole checkpoints on this host, newest first, of equal ones the local; what is passed over is told."""
    places: list[tuple[int, Path | None]] = [(checkpoint.step_of(path.name) or 0, path) for path in checkpoint.folders(run_dir)]
    if store:
        places += [(step, None) for step in patiently(lambda: steps(store))]
    last = None
    for step, path in sorted(places, key=lambda place: (place[0], place[1] is not None), reverse=True):
        if step == last:
            continue
        try:
            found = _checked(path) if path else fetch(store or "", step, checkpoint.folder(run_dir))
        except Damaged as fault:
            checkpoint.tell_passed_over(path or f"{store}/{checkpoint.name_of(step)}", str(fault))
            continue
        last = step
        yield found


def _checked(path: Path) -> Path:
    if fault := checkpoint.find_fault(path):
        raise Damaged(fault)
    return path


def _offer(whole: Iterator[Path]) -> tuple[Path, str] | None:
    """Folder and digest of the first rank's next checkpoint, on all ranks; its error is raised on all."""
    told = {}
    if dist.is_first():
        try:
            if path := next(whole, None):
                path = checkpoint.settle(path)  # now, while no rank reads it yet
                told = {"path": str(path), "digest": checkpoint.digest(path)}
        except UserError as error:
            told = {"error": str(error)}
    told = json.loads(dist.from_first_rank(json.dumps(told)))
    if "error" in told:
        raise UserError(told["error"])
    return (Path(told["path"]), told["digest"]) if told else None


def _take(run_dir: str | Path, store: str | None, offered: Path, digest: str) -> Path:
    """The checkpoint that the first rank offers, on this host; ``RUN/fetched`` holds one that had to be fetched."""
    if dist.is_first() or _has(offered, digest):
        return offered
    if not store:
        raise RankError(f"run_dir must lie on storage that all hosts share; this one does not see {offered}")
    directory = Path(run_dir) / "fetched"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # one rank of a host fetches for all
        step = checkpoint.step_of(offered.name) or 0
        found = directory / checkpoint.name_of(step)
        if not _has(found, digest):
            for path in directory.glob("*step-*"):
                shutil.rmtree(path)
            try:
                fetch(store, step, directory, digest)
            except UserError as error:
                raise RankError(str(error)) from error
    return found


def _has(path: Path, digest: str) -> bool:
    """Whether a folder is the checkpoint of this digest; one rank of a host checks its files, and its word counts for all."""
    if not (path / MANIFEST).is_file() or checkpoint.digest(path) != digest:
        return False
    return os.environ.get("LOCAL_RANK", "0") != "0" or not checkpoint.find_fault(path)


def _fetch_file(root: str, path: Path, expected: Fingerprint) -> None:
    """Fetch a file, going on where a connection broke; a wrong hash is given a second chance.

    Raises:
        Damaged: it is not there, or not what the manifest says.
    """
    wait, fault = waiting(RETRY_SECONDS), None
    for _ in range(_NUM_FETCHES):
        with path.open("wb") as file:
            try:
                patiently(
                    lambda: _fetch_rest(file, root, path.name, expected),
                    lambda error, delay: passing_reason(error) != "hash" and wait(error, delay),
                )
            except UserError as error:
                if _says_missing(error.__cause__):
                    raise Damaged(f"{path.name} is missing") from error
                if passing_reason(error) != "hash":
                    raise
        if not (fault := checkpoint.find_file_fault(path, expected)):
            return
    raise Damaged(fault)


def _fetch_rest(file: BinaryIO, root: str, name: str, expected: Fingerprint) -> None:
    if not expected["bytes"] or file.tell() < expected["bytes"]:
        with storage.explained(f"{root}/{name}", "reading"):
            storage.fetch_into(file, root, name, lambda: None)


def _says_missing(error: BaseException | None) -> bool:
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return isinstance(error, FileNotFoundError) or code in ("NoSuchKey", "404")


# --- trying again ---


def patiently(call: Callable[[], _Result], wait: Callable[[Exception, float], bool] | None = None) -> _Result:
    """The result of ``call``, tried again while its errors may pass and ``wait(error, seconds)`` has waited."""
    wait = wait or waiting(RETRY_SECONDS)
    for tries in itertools.count():
        try:
            return call()
        except Exception as error:  # each store's client has errors of its own; none is kept back
            reason = passing_reason(error)
            if reason == "expired":
                storage.renew_credentials()
            # with jitter, so that many hosts do not come back at once
            delay = min(FIRST_DELAY_SECONDS * 2**tries, MAX_DELAY_SECONDS) * _jitter.uniform(0.5, 1.0)
            if not reason or not wait(error, delay):
                raise
    raise AssertionError("the count has no end")


def waiting(seconds: float) -> Callable[[Exception, float], bool]:
    """Waits for at most so long in all, and says so once."""
    deadline, told = time.monotonic() + seconds, False

    def wait(error: Exception, delay: float) -> bool:
        nonlocal told
        if time.monotonic() + delay > deadline:
            return False
        if not told:
            print(f"checkpoint: {error}; trying again for {seconds:.0f} s", flush=True)
        told = True
        time.sleep(delay)
        return True

    return wait


def passing_reason(error: BaseException | None) -> str | None:
    """Why trying again may help, from an error or one that it was raised from."""
    while error:
        if reason := storage.passing_reason(error):
            return reason
        error = error.__cause__ or error.__context__
    return None

"""Checkpoints in an object store: sent, fetched, deleted, moved out of the way. Which one a run resumes is in resume_point.py.

``STORE/step-00012000/`` holds the files of the local folder. Every file is written whole or not at all there, and
``manifest.json`` comes last: it is what makes the others a checkpoint. ``STORE/LATEST`` serves where a store cannot list.
With each go the records of its run (``RECORDS``) as they are then, so that a run on an empty disk has its whole curves.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from personmae.checkpoint import commit, portable
from personmae.checkpoint.commit import PASSED_OVER
from personmae.checkpoint.host_copy import Fingerprint
from personmae.checkpoint.portable import LATEST, MANIFEST, Fault
from personmae.errors import Unavailable, UserError
from personmae.system import files, retry, storage
from personmae.system.retry import Patience, passing_reason

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 30.0
RETRY_SECONDS = 120.0  # for which a run that starts waits for a store that is away
RECORDS = ("metrics.jsonl", "clusters.jsonl", "run.json", "config.yaml")  # of a run directory. No manifest lists them
_NUM_FETCHES = 2  # of a file whose hash is wrong: the connection may have spoiled it
_logged = set[Path]()  # records that could not be copied
_Result = TypeVar("_Result")


class Damaged(Exception):  # noqa: N818 - logged as a fault, never shown
    """What the store holds is not a whole checkpoint. The fault says why."""

    def __init__(self, fault: Fault | str):
        super().__init__(str(fault))
        self.fault = fault if isinstance(fault, Fault) else Fault(fault)


# --- what a store holds ---


def steps(location: str) -> list[int]:
    """Steps of the folders in a store, whole or not, ascending. Of a store that cannot list, the one of ``LATEST``.

    Raises:
        UserError: the store cannot be read, or its ``LATEST`` names no checkpoint.
    """
    names = storage.list_folders(location)
    if names is None:
        if (latest := storage.read(location, LATEST)) is None:
            return []
        names = [latest.decode("ascii", "replace").strip()]
        if portable.step_of(names[0]) is None:
            raise UserError(
                f"{location}/{LATEST} must name a checkpoint like step-00001000 and has {names[0]!r}. Fix it, or start anew "
                "with another checkpoint.upload_to"
            )
    return sorted(step for name in names if (step := portable.step_of(name)) is not None)


def send(location: str, path: Path, step: int, sent: set[str], *, anew: bool = False) -> None:
    """Copy a local checkpoint to a store: files, manifest, ``LATEST``. ``sent`` remembers files for another try.

    Another checkpoint of that step is moved to ``PASSED_OVER`` first. With ``anew`` also one with the same manifest, which a
    run that saves the step once more has passed over. Moments that were deleted here are left out.

    Raises:
        UserError: the store refused, or has another checkpoint of that step and cannot move it.
    """
    root, manifest = f"{location}/{portable.name_of(step)}", (path / MANIFEST).read_bytes()
    theirs = storage.read(root, MANIFEST)
    if theirs != manifest or (anew and not sent):
        if theirs is not None:
            set_aside(location, step)
        for name in portable.parse_manifest(manifest)[0].keys() - sent:
            if (path / name).exists() or not portable.is_moments(name):
                storage.upload(root, name, path / name)
            sent.add(name)
        _send_records(root, path.parent.parent)
        storage.write(root, MANIFEST, manifest)
    storage.write(location, LATEST, portable.name_of(step).encode())


def _send_records(root: str, run_dir: Path) -> None:
    """Copy the records that a run directory has. Of a file that is being written, the whole lines.

    What cannot be read or is refused is logged and left out: it must keep no checkpoint from its store.
    """
    for name in RECORDS:
        with _best_effort(run_dir / name):
            if (run_dir / name).is_file():
                content = (run_dir / name).read_bytes()
                storage.write(root, name, _whole(content) if name.endswith(".jsonl") else content)


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def bring_records(location: str, step: int, run_dir: Path) -> None:
    """Write the records that lie with a checkpoint of a store where a run directory has none, or fewer lines.

    One that cannot be brought is logged: the run goes on without it.

    Raises:
        UserError: the store cannot be reached at present.
    """
    for name in RECORDS:
        path = run_dir / name
        with _best_effort(path):
            theirs = patiently(lambda name=name: storage.read(f"{location}/{portable.name_of(step)}", name))
            ours = path.read_bytes() if path.exists() else None
            fewer = name.endswith(".jsonl") and (theirs or b"").count(b"\n") > (ours or b"").count(b"\n")
            if theirs is not None and (ours is None or fewer):
                files.replace(path, theirs)


@contextlib.contextmanager
def _best_effort(path: Path) -> Iterator[None]:
    """Log once that a record is not copied, and why. Where the store is away, what is copied with it must be tried again."""
    try:
        yield
    except (OSError, UserError) as error:
        if isinstance(error, UserError) and passing_reason(error):
            raise
        if path not in _logged:
            print(f"checkpoint: {path} is not copied with it: {error}", flush=True)
        _logged.add(path)


def delete(location: str, step: int) -> None:
    """Delete a checkpoint of a store, first what makes it one. Nothing happens where a store cannot list."""
    root = f"{location}/{portable.name_of(step)}"
    if names := storage.list_sizes(root):
        storage.delete(root, [name for name in names if name == MANIFEST])
        storage.delete(root, [name for name in names if name != MANIFEST])


def set_aside(location: str, step: int) -> str | None:
    """Move a checkpoint of a store out of the way of a run. Returns where it is now.

    What has no manifest was never a checkpoint, or is none any more: it is deleted, and None is returned.

    Raises:
        UserError: the store refused, or can neither list nor copy.
    """
    name = portable.name_of(step)
    if (held := storage.list_sizes(f"{location}/{name}")) is None:
        raise UserError(
            f"{location}/{name} is of another run or was passed over, and this store cannot move it. Move it yourself"
        )
    if MANIFEST not in held:
        delete(location, step)
        return None
    taken = storage.list_folders(f"{location}/{PASSED_OVER}") or []
    free = next(n for n in (name, *(f"{name}.{number}" for number in range(2, len(taken) + 3))) if n not in taken)
    target = f"{location}/{PASSED_OVER}/{free}"
    for file in sorted(held, key=lambda file: file == MANIFEST):
        storage.copy(f"{location}/{name}", file, target)
    delete(location, step)
    return target


def fetch(location: str, step: int, directory: Path, digest: str | None = None, *, moments: bool = True) -> Path:
    """Copy a checkpoint of a store into a directory, each file checked, the whole renamed. Returns its folder.

    Raises:
        Damaged: the store's is not whole, or not the one that ``digest`` stands for. A fault of the moments comes last.
        UserError: the store cannot be read.
    """
    root, final = f"{location}/{portable.name_of(step)}", directory / portable.name_of(step)
    if (manifest := patiently(lambda: storage.read(root, MANIFEST))) is None:
        raise Damaged(Fault(f"it has no {MANIFEST}", absent=True))
    listed, wrong = portable.parse_manifest(manifest)
    if wrong:
        raise Damaged(wrong)
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / MANIFEST).write_bytes(manifest)
        if digest not in (None, portable.digest(partial)):
            raise Damaged("it is not the one that the first host has")
        for name in sorted(listed, key=portable.is_moments):
            if moments or not portable.is_moments(name):
                _fetch_file(root, partial / name, listed[name])
        commit.put_in_place(partial, final, keep_earlier=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _fetch_file(root: str, path: Path, expected: Fingerprint) -> None:
    """Fetch a file, going on where a connection broke. A wrong hash is given a second chance.

    Raises:
        Damaged: it is not there, or not what the manifest says.
    """
    wait, fault, only_moments = waiting(RETRY_SECONDS), None, portable.is_moments(path.name)
    for _ in range(_NUM_FETCHES):
        with path.open("wb") as file:
            try:
                patiently(
                    lambda: _fetch_rest(file, root, path.name, expected),
                    lambda error: passing_reason(error) != "hash" and wait(error),
                )
            except UserError as error:
                if _says_missing(error.__cause__):
                    raise Damaged(Fault(f"{path.name} is missing", absent=True, only_moments=only_moments)) from error
                if passing_reason(error) != "hash":
                    raise
        if not (fault := portable.find_file_fault(path, expected)):
            return
    assert fault
    raise Damaged(replace(fault, only_moments=only_moments))


def _fetch_rest(file: BinaryIO, root: str, name: str, expected: Fingerprint) -> None:
    if not expected["bytes"] or file.tell() < expected["bytes"]:
        with storage.explained(f"{root}/{name}", "reading"):
            storage.fetch_into(file, root, name, lambda: None)


def _says_missing(error: BaseException | None) -> bool:
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return isinstance(error, FileNotFoundError) or code in ("NoSuchKey", "404")


# --- trying again ---


def patiently(call: Callable[[], _Result], wait: Callable[[Exception], bool] | None = None) -> _Result:
    """The result of ``call``, tried again while its errors may pass and ``wait`` has waited, else for ``RETRY_SECONDS``."""
    return retry.retry(call, waiting(RETRY_SECONDS) if wait is None else wait)


def waiting(seconds: float) -> Patience:
    """Waits for so long in all, and logs it once."""

    def log(error: Exception, tries: int, delay: float) -> None:
        if tries == 0:
            print(f"checkpoint: {error}. Trying again for {seconds:.0f} s", flush=True)

    return Patience(delays, seconds=seconds, log=log)


def delays() -> Iterator[float]:
    """Between two tries."""
    return retry.growing(FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS)


def reaching(call: Callable[[], _Result]) -> _Result:
    """The result of ``call``. Where a store cannot be reached at present, that is not the user's error.

    Raises:
        Unavailable: trying again later may help.
    """
    try:
        return call()
    except UserError as error:
        if passing_reason(error) is None:
            raise
        raise Unavailable(f"{error}. This may pass: run this again") from error

"""Results that take long are written beside their place, in ``OUT.partial``, and renamed. Nothing half-written has a name."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from personmae.errors import UserError
from personmae.system import signals


def partial_of(out: Path) -> Path:
    """The folder beside ``out`` in which it is written."""
    return out.with_name(f"{out.name}.partial")


def require_free(out: Path) -> None:
    """Raise a UserError where something is at ``out`` already."""
    if os.path.lexists(out):
        raise UserError(f"a place where nothing is yet is required. {out} exists: delete it or choose another")


@contextlib.contextmanager
def partial_folder(out: Path, *, keep: bool) -> Iterator[Path]:
    """``OUT.partial``, for this process alone until the end of the block.

    With ``keep`` what an earlier process left there stays, and stays when the block fails. Else the folder begins empty, and
    a failure deletes it. A failure before anything was begun leaves no empty folder.

    Raises:
        UserError: it cannot be made, or another process is at work in it.
    """
    folder = partial_of(out)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.callback(os.close, lock := os.open(folder, os.O_RDONLY))
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            where = f"a place that can be written to is required. {out} is none: {error.strerror} at {error.filename}"
            raise UserError(f"{where}. Choose another") from error
        _take(lock, out)
        if not keep:
            _empty(folder)
        with _deleted_if_empty(folder) if keep else deleted_when_stopped(folder):
            yield folder


@contextlib.contextmanager
def _deleted_if_empty(folder: Path) -> Iterator[None]:
    """Delete a folder where the block fails before it has put anything there."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what is kept is in it
            folder.rmdir()
        raise


@contextlib.contextmanager
def deleted_when_stopped(folder: Path) -> Iterator[None]:
    """Delete a folder where the block fails, or where a signal ends the process."""

    def delete() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with signals.undone_by(delete):
        try:
            yield
        except BaseException:
            delete()
            raise


def _take(lock: int, out: Path) -> None:
    """Lock a folder. A network file system without locks for folders grants it always."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"one process at a time writes {out}. Another is at work: wait for it or stop it") from None
    except OSError:
        pass


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def put_in_place(path: Path, target: Path) -> None:
    """Give a finished file or folder its name, after its content has reached the disk.

    Raises:
        UserError: something has appeared there meanwhile.
    """
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    require_free(target)
    path.rename(target)

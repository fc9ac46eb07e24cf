"""How a checkpoint is written, committed and deleted. What a checkpoint is, and how it is read, is in portable.py.

Only a run's own checkpoints are deleted. One that was passed over, because it is damaged or could not be read, or that
was there when a run was started anew, is moved to ``RUN/checkpoints/passed-over``: somebody may be able to mend it.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from personmae.checkpoint import portable
from personmae.checkpoint.host_copy import Fingerprint, HostCopy, Tensors, write_blocks
from personmae.checkpoint.portable import LATEST, MANIFEST, STATE
from personmae.errors import RankError
from personmae.system.files import to_json

PASSED_OVER = "passed-over"


def commit(
    run_dir: str | Path,
    step: int,
    host_copy: HostCopy,
    state: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    keep_earlier: bool = False,
) -> Path:
    """Write a checkpoint, commit it by renaming, and point ``LATEST`` at it.

    With more than one rank each calls this with the part of every kind that is its own, over a shared directory. ``barrier``
    waits for all, and the first rank commits. A rank that cannot write does not keep the others waiting. A checkpoint of the
    same step that is there is replaced, with ``keep_earlier`` moved to ``PASSED_OVER``.

    Raises:
        OSError: this rank's part cannot be written.
        RankError: another rank's part was not, or the first could not begin. Nothing is committed.
    """
    final = portable.folder(run_dir) / portable.name_of(step)
    partial = final.with_name(f".partial-{final.name}")
    try:
        failure = _begin(partial) if rank == 0 else None
        barrier()
        failure = failure or _write_part(partial, host_copy, rank, world_size)
        barrier()
        if failure:
            raise failure
        if rank == 0:
            files = _collect(partial, world_size)
            record = {"step": step} | state | {"format": portable.FORMAT}
            files[STATE] = _write_synced(partial / STATE, to_json(record, indent=1))
            _write_synced(partial / MANIFEST, json.dumps(files, indent=1))
            _sync_folder(partial)
            put_in_place(partial, final, keep_earlier=keep_earlier)
            _write_synced(final.with_name(f".{LATEST}"), final.name)
            final.with_name(f".{LATEST}").replace(final.with_name(LATEST))
            _sync_folder(final.parent)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write_alone(folder: Path, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    """Write a checkpoint that belongs to no run into a folder that is there and empty.

    Raises:
        OSError: it cannot be written.
    """
    host_copy = HostCopy()
    host_copy.take(tensors)
    files = {f"{kind}.safetensors": file.write(folder / f"{kind}.safetensors") for kind, file in host_copy.files.items()}
    files[STATE] = _write_synced(folder / STATE, to_json(state | {"format": portable.FORMAT}, indent=1))
    _write_synced(folder / MANIFEST, json.dumps(files, indent=1))
    _sync_folder(folder)


def put_in_place(partial: Path, final: Path, *, keep_earlier: bool) -> None:
    """Rename a whole folder, over an earlier one if need be. At any instant ``newest`` finds one of the two.

    With ``keep_earlier`` that one was of no use to ``newest``, and is moved out of the way instead of deleted.
    """
    old = final.with_name(f".old-{final.name}")
    if os.path.lexists(final):
        if keep_earlier:
            move_aside(final)
        else:
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
    partial.rename(final)
    _sync_folder(final.parent)
    if not keep_earlier:
        shutil.rmtree(old, ignore_errors=True)


def settle(path: Path) -> Path:
    """Give a checkpoint whose replacement was cut short its name back. Returns where it lies."""
    final = path.with_name(path.name.removeprefix(".old-"))
    if path != final:
        if os.path.lexists(final):
            move_aside(final)  # of no use, or ``newest`` would have preferred it
        path.rename(final)
    return final


# --- what is deleted, and what is not ---


def surplus(steps: Iterable[int], line: Collection[int], *, keep_last: int, keep_every: int | None = None) -> list[int]:
    """The steps to delete: of a run's ``line`` all but the last ``keep_last``, and every ``keep_every``-th of it.

    Steps beside the line were passed over or left by another run: they are not this run's to delete.
    """
    ours = sorted(step for step in steps if step in line)
    kept = {*ours[-keep_last:], *(step for step in ours if keep_every and step % keep_every == 0)}
    return [step for step in ours if step not in kept]


def delete(run_dir: str | Path, steps: Iterable[int]) -> dict[Path, OSError]:
    """Delete checkpoints, and what killed processes have left of unfinished ones. Returns what could not be, and why."""
    root = portable.folder(run_dir)
    names = [name for step in steps for name in (portable.name_of(step), f".old-{portable.name_of(step)}")]
    failures = {}
    for path in [*(root / name for name in names), *root.glob(".partial-*")]:
        try:
            _delete(path)
        except OSError as error:  # a network file system keeps what is being read
            failures[path] = error
    return failures


def _delete(path: Path) -> None:
    if path.is_symlink():  # what it points at is not this run's
        path.unlink()
    elif path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)  # no longer a checkpoint, should the deletion be cut short
        shutil.rmtree(path)


def raise_first(failures: dict[Path, OSError]) -> None:
    """Raise the first of some failures, where there is one."""
    for error in failures.values():
        raise error


def set_aside(run_dir: str | Path, steps: Iterable[int]) -> tuple[list[Path], dict[Path, OSError]]:
    """Move checkpoints out of the way of a run. Returns where they are now, and what could not be moved and why."""
    root, moved, failures = portable.folder(run_dir), [], {}
    for name in (name for step in steps for name in (portable.name_of(step), f".old-{portable.name_of(step)}")):
        try:
            if os.path.lexists(root / name):
                moved.append(move_aside(root / name))
        except OSError as error:
            failures[root / name] = error
    return moved, failures


def move_aside(path: Path) -> Path:
    """Move a checkpoint's folder to ``PASSED_OVER`` beside it, under a name that is free. Returns where it is now."""
    target = free_place(path.parent, path.name.removeprefix(".old-"))
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    return target


def free_place(root: Path, name: str) -> Path:
    """Where something of this name can lie in ``PASSED_OVER`` below the folder of a run's checkpoints."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
    return next(path for free in names if not os.path.lexists(path := root / PASSED_OVER / free))


def log_moved(places: Collection[str]) -> None:
    """Log where the things are that were set aside."""
    if places:
        print(
            f"checkpoint: kept, though this run does not go on from them: {', '.join(places)}. Delete them when nobody wants "
            "them",
            flush=True,
        )


def _begin(partial: Path) -> OSError | None:
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _write_part(partial: Path, host_copy: HostCopy, rank: int, world_size: int) -> OSError | RankError | None:
    """Write one rank's files. Of several ranks, each leaves a list of its own."""
    part = f"-{rank + 1:05d}-of-{world_size:05d}" if world_size > 1 else ""
    try:
        files = {}
        for kind, file in host_copy.files.items():
            path = partial / f"{kind}{part}.safetensors"
            files[path.name] = file.write(path)
        _write_synced(_list_of(partial, rank), json.dumps(files))
    except FileNotFoundError:
        return RankError(f"{partial} is not there: see the first rank's error. All hosts must share the storage of run_dir")
    except OSError as error:
        return error
    return None


def _collect(partial: Path, world_size: int) -> dict[str, Fingerprint]:
    """The lists of all ranks as one. They are deleted."""
    lists = [path for rank in range(world_size) if (path := _list_of(partial, rank)).is_file()]
    if len(lists) < world_size:
        raise RankError(
            f"a checkpoint needs the parts of all {world_size} ranks. {len(lists)} are in {partial}: see the other ranks' "
            "errors, and let run_dir lie on storage that all hosts share"
        )
    files = {name: entry for path in lists for name, entry in json.loads(path.read_bytes()).items()}
    for path in lists:
        path.unlink()
    return files


def _list_of(partial: Path, rank: int) -> Path:
    return partial / f".files-{rank:05d}.json"


def _write_synced(path: Path, text: str) -> Fingerprint:
    return write_blocks(path, [text.encode()])


def _sync_folder(path: Path) -> None:
    """Make names that were written or changed in a folder outlast a power failure."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

"""Where the page goes: a new folder, or in place of one that an earlier call wrote. Whole, or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from personmae.errors import UserError
from personmae.system import files
from personmae.weights.staging import partial_folder, put_in_place

PAGE, RECORD = "index.html", "visualise.json"
_FORMAT: Final = 1


def require_ours(out: Path) -> None:
    """Raise a UserError where something is at ``out`` that no earlier call wrote, or that somebody has added to."""
    if not os.path.lexists(out):
        return
    required = f"a place where nothing is yet is required, or a page of an earlier 'personmae visualise'. {out}"
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{required} is no folder: choose another")
    listed = _listed(out)
    names = sorted(os.listdir(out))
    if listed is None and names:
        raise UserError(f"{required} holds {names[0]}: choose another, or empty it")
    if other := [name for name in names if name not in {*(listed or ()), RECORD}]:
        raise UserError(f"{required} holds {other[0]} beside it: take that away, or choose another")


def _listed(out: Path) -> list[str] | None:
    """The files that an earlier call says it wrote. None where there is no such record."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return list(map(str, record["files"])) if record["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, **facts: object) -> None:
    """Write down which files are here and what they were made from. ``require_ours`` reads it."""
    names: Sequence[str] = sorted(os.listdir(folder))
    files.replace(folder / RECORD, files.to_json({"format": _FORMAT, "files": names, **facts}, indent=1) + "\n")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``out`` at the end of the block. A failure leaves ``out`` as it was.

    Raises:
        UserError: it cannot be made, another process is at work there, or ``out`` is not ours to replace.
    """
    require_ours(out)
    with partial_folder(out, keep=False) as staging:
        (folder := staging / "new").mkdir()
        yield folder
        require_ours(out)  # hours may have passed
        old = staging / "old"
        if out.exists():
            out.rename(old)
        try:
            put_in_place(folder, out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(staging)

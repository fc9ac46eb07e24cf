"""``checkpoint.resume=none``: what a place holds is set aside, so that the run begins at step 0 and nothing is lost.

Checkpoints go to ``RUN/checkpoints/passed-over`` and ``STORE/passed-over``, before the first step: a run that is started
again, or goes back to an earlier step, must never find those of another one. Records and results go along. Then
``RUN/started-anew.json`` says which start that was, for an agent starts its ranks again with the same command.
"""

import contextlib
import json
import os
import shutil
import socket
from datetime import datetime
from pathlib import Path
from typing import Literal

from personmae import dist
from personmae.checkpoint import commit, portable, remote
from personmae.system import files

MARK = "started-anew.json"
OF_A_RUN = (*remote.RECORDS, "tensorboard", "result.json", "rank_lists.json", "queries.json")


Resume = Literal["auto", "none"]


def may_be_complete(run_dir: str | Path, resume: Resume) -> bool:
    """Whether a result that lies in a run's directory is this run's own."""
    return resume == "auto" or _is_done(Path(run_dir))


def goes_on(run_dir: str | Path, *, resume: Resume, upload_to: str | None) -> bool:
    """Whether the run goes on from what is there. Where it does not, that is set aside. Called by all ranks together.

    The first must hold the run's lock.

    Raises:
        UserError: the store refused, or cannot move what it holds.
        Unavailable: the store cannot be reached at present.
        OSError: something cannot be moved.
    """
    mark = Path(run_dir) / MARK
    if resume == "auto":
        if dist.is_first():
            with contextlib.suppress(OSError):  # the option was taken away: given again, it means another start
                mark.unlink()
        return True

    def begin() -> bool:
        if _is_done(Path(run_dir)):
            print(
                f"checkpoint.resume=none: this start has begun anew before, so it goes on. Delete {mark} to begin once more",
                flush=True,
            )
            return True
        _set_aside(Path(run_dir), upload_to)
        record = {"start": _this_start(), "time": datetime.now().astimezone().isoformat(timespec="seconds")}
        files.replace(mark, files.to_json(record) + "\n")
        return False

    return bool(dist.from_first_rank(dist.on_first_rank(begin)))


def _is_done(run_dir: Path) -> bool:
    """Whether this start has set aside already what was there."""
    try:
        return (start := _this_start()) is not None and json.loads((run_dir / MARK).read_bytes())["start"] == start
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):  # changed by hand
        return False


def _this_start() -> str | None:
    """What stays the same while an agent starts ranks again, and over its own restarts where it has a name. Else None."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name and name != "none":  # torchrun's, where it was given none
        return name
    return f"{socket.gethostname()} {os.getppid()}" if "TORCHELASTIC_RESTART_COUNT" in os.environ else None


def _set_aside(run_dir: Path, upload_to: str | None) -> None:
    """Move what there is of an old run, and log it once."""
    moved, failures = commit.set_aside(run_dir, portable.local_steps(run_dir))
    places = [*map(str, moved), *(_set_store_aside(upload_to) if upload_to else ())]
    if records := _set_records_aside(run_dir):
        places.append(str(records))
    commit.log_moved(places)
    commit.raise_first(failures)


def _set_store_aside(upload_to: str) -> list[str]:
    """Move the checkpoints of a store. Returns where they are now."""
    steps = remote.reaching(lambda: remote.patiently(lambda: remote.steps(upload_to)))
    moved = [remote.reaching(lambda step=step: remote.patiently(lambda: remote.set_aside(upload_to, step))) for step in steps]
    return [place for place in moved if place]


def _set_records_aside(run_dir: Path) -> Path | None:
    """Move curves, records and results beside the checkpoints that were set aside. Returns where they are now."""
    found = [run_dir / name for name in OF_A_RUN if (run_dir / name).exists()]
    if not found:
        return None
    target = commit.free_place(portable.folder(run_dir), "records")
    target.mkdir(parents=True)
    for path in found:
        shutil.move(path, target / path.name)  # checkpoints may lie on another disk
    return target

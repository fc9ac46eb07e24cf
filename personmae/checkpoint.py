"""The portable checkpoint: tensors by parameter name in safetensors, everything else in JSON, no pickle.

``RUN/checkpoints/step-00012000/`` holds one .safetensors file per kind of tensor (or one part of it per rank, as in
``student-00001-of-00004.safetensors``), ``state.json``, and ``manifest.json`` with the size and hash of every file, written
last; the whole folder is written under another name and renamed, then ``LATEST`` points at it. Any engine at any world size
resumes it. Saving beside the step loop is in keeper.py, the object store in archive.py.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file
from torch import nn

from personmae.errors import RankError, UserError
from personmae.files import to_json
from personmae.snapshot import Fingerprint, Snapshot, Tensors, write_blocks

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "LATEST"
_FOLDER = re.compile(r"(?:\.old-)?step-(\d{8,})")
_LOST = (errno.EIO, errno.ESTALE, errno.EISDIR, getattr(errno, "EUCLEAN", errno.EIO))  # a file that will not come back
_LOCK_SECONDS = 30.0
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``tensors`` maps a kind (student, teacher, exp_avg, exp_avg_sq) to tensors by parameter name."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


def lock(run_dir: str | Path) -> IO[str]:
    """Hold a run directory for this process until the returned file is closed or the process ends.

    Raises:
        UserError: another process is running there.
        TimeoutError: it is, under an agent that starts ranks again, and did not end in time.
    """
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / ".lock").open("w", encoding="utf-8")
    restarted = "TORCHELASTIC_RUN_ID" in os.environ  # set by our agent and torchrun: the holder may be a rank that is ending
    deadline = time.monotonic() + _LOCK_SECONDS * restarted
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.close()
            held = f"a run directory belongs to one run; another process is at work in {run_dir}"
            if restarted:
                raise TimeoutError(f"{held} and has not ended within {_LOCK_SECONDS:g} s") from None  # code 1: try again
            raise UserError(f"{held}: stop it first") from None
        return file


def folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def name_of(step: int) -> str:
    """The folder's name for a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name gives; None where it is not a checkpoint's."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


# --- writing ---


def write(run_dir: str | Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write, commit by renaming, point ``LATEST`` at it, and delete all but the ``keep_last`` newest up to this step."""
    snapshot = Snapshot()
    snapshot.take(checkpoint.tensors)
    final = commit(run_dir, checkpoint.step, snapshot, checkpoint.state)
    steps = local_steps(run_dir)
    # Later steps were left by a run that fell back, or was started afresh.
    line = {step for step in steps if step <= checkpoint.step}
    delete(run_dir, surplus(steps, line, keep_last=keep_last))
    return final


def commit(
    run_dir: str | Path,
    step: int,
    snapshot: Snapshot,
    state: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> Path:
    """Write a checkpoint, commit it by renaming, and point ``LATEST`` at it.

    With more than one rank each calls this with the part of every kind that is its own, over a shared directory; ``barrier``
    waits for all, and the first rank commits. A rank that cannot write does not keep the others waiting.

    Raises:
        OSError: this rank's part cannot be written.
        RankError: another rank's part was not, or the first could not begin; nothing is committed.
    """
    final = folder(run_dir) / name_of(step)
    partial = final.with_name(f".partial-{final.name}")
    try:
        failure = _begin(partial) if rank == 0 else None
        barrier()
        failure = failure or _write_part(partial, snapshot, rank, world_size)
        barrier()
        if failure:
            raise failure
        if rank == 0:
            files = _collect(partial, world_size)
            files[STATE] = _write_synced(partial / STATE, to_json({"step": step} | state, indent=1))
            _write_synced(partial / MANIFEST, json.dumps(files, indent=1))
            _sync_folder(partial)
            put_in_place(partial, final)
            _write_synced(final.with_name(f".{LATEST}"), final.name)
            final.with_name(f".{LATEST}").replace(final.with_name(LATEST))
            _sync_folder(final.parent)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a whole folder, over an earlier one if need be; at any instant ``newest`` finds one of the two."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(path: Path) -> Path:
    """Give a checkpoint whose replacement was cut short its name back; returns where it lies."""
    final = path.with_name(path.name.removeprefix(".old-"))
    if path != final:
        shutil.rmtree(final, ignore_errors=True)  # damaged, or ``newest`` would have preferred it
        path.rename(final)
    return final


def surplus(steps: Iterable[int], line: Collection[int], *, keep_last: int, keep_every: int | None = None) -> list[int]:
    """The steps to delete: all but the last ``keep_last`` of a run's ``line``, and every ``keep_every``-th of it.

    Steps beside the line were passed over or left by another run.
    """
    steps = sorted(steps)
    ours = [step for step in steps if step in line]
    kept = {*ours[-keep_last:], *(step for step in ours if keep_every and step % keep_every == 0)}
    return [step for step in steps if step not in kept]


def delete(run_dir: str | Path, steps: Iterable[int]) -> None:
    """Delete checkpoints, and what killed processes have left behind."""
    root = folder(run_dir)
    for path in (root / name_of(step) for step in steps):
        if path.is_symlink():  # what it points at is not this run's
            path.unlink()
            continue
        (path / MANIFEST).unlink(missing_ok=True)  # no longer a checkpoint, should the deletion be cut short
        shutil.rmtree(path)
    for path in [*root.glob(".partial-*"), *root.glob(".old-*")]:
        shutil.rmtree(path)


def _begin(partial: Path) -> OSError | None:
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _write_part(partial: Path, snapshot: Snapshot, rank: int, world_size: int) -> OSError | RankError | None:
    """Write one rank's files; of several ranks, each leaves a list of its own."""
    part = f"-{rank + 1:05d}-of-{world_size:05d}" if world_size > 1 else ""
    try:
        files = {}
        for kind, file in snapshot.files.items():
            path = partial / f"{kind}{part}.safetensors"
            files[path.name] = file.write(path)
        _write_synced(_list_of(partial, rank), json.dumps(files))
    except FileNotFoundError:
        return RankError(f"{partial} is not there: see the first rank's error; all hosts must share the storage of run_dir")
    except OSError as error:
        return error
    return None


def _collect(partial: Path, world_size: int) -> dict[str, Fingerprint]:
    """The lists of all ranks as one; they are deleted."""
    lists = [path for rank in range(world_size) if (path := _list_of(partial, rank)).is_file()]
    if len(lists) < world_size:
        raise RankError(
            f"a checkpoint needs the parts of all {world_size} ranks; {len(lists)} are in {partial}: see the other ranks' "
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


# --- finding and reading ---


def local_steps(run_dir: str | Path) -> list[int]:
    """Steps of the folders below a run directory, whole or not, ascending."""
    return sorted(step for path in folder(run_dir).glob("step-*") if (step := step_of(path.name)) is not None)


def folders(run_dir: str | Path) -> list[Path]:
    """Folders that may be whole checkpoints, newest first; of two with a step, the replaced one comes second."""
    root = folder(run_dir)
    paths = [path for path in (*root.glob("step-*"), *root.glob(".old-step-*")) if step_of(path.name) is not None]
    return sorted(paths, key=lambda path: (step_of(path.name), path.name[0] != "."), reverse=True)


def newest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose files all agree with their manifest."""
    for path in folders(run_dir):
        if not (fault := find_fault(path)):
            return path
        tell_passed_over(path, fault)
    return None


def tell_passed_over(where: str | Path, fault: str) -> None:
    """Say in a line that a checkpoint is not used, and why."""
    print(f"checkpoint {where} is passed over: {fault}", flush=True)


def find_fault(path: Path) -> str | None:
    """Why a folder is not a whole checkpoint, or None."""
    try:
        content = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {MANIFEST}"
    files, fault = parse_manifest(content)
    return fault or next((fault for name, expected in files.items() if (fault := find_file_fault(path / name, expected))), None)


def parse_manifest(content: bytes) -> tuple[dict[str, Fingerprint], str | None]:
    """Size and hash of every file by name, or why that cannot be known: it may come from a network."""
    try:
        files = json.loads(content)
        plain = all(map(_is_plain, files, files.values()))
    except (ValueError, AttributeError):
        return {}, f"its {MANIFEST} is not JSON"
    if not plain or STATE not in files:
        return {}, f"its {MANIFEST} does not list files"
    for match in filter(None, map(_PART.fullmatch, (Path(name).stem for name in files))):
        for number in range(1, int(match[3]) + 1):
            if (part := f"{match[1]}-{number:05d}-of-{match[3]}.safetensors") not in files:
                return {}, f"{part} is missing"
    return files, None


def _is_plain(name: str, entry: Any) -> bool:
    """Whether a manifest's entry is a file directly below it, with a size and a hash."""
    inside = Path(name).name == name and name not in ("", ".", "..", MANIFEST)
    return inside and {key: type(value) for key, value in entry.items()} == {"bytes": int, "sha256": str}


def find_file_fault(path: Path, expected: Fingerprint) -> str | None:
    """Why a file is not what its manifest says, or None."""
    try:
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"{path.name} does not have the size and hash of its manifest"
    except (FileNotFoundError, NotADirectoryError):  # it may be deleted while it is read
        return f"{path.name} is missing"
    except OSError as error:
        if error.errno not in _LOST:
            raise
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that ``newest`` or ``locate`` returned; tensors are on the CPU.

    They are mapped from the files, so that they take memory only as they are read, and once for all ranks of a host.
    """
    state = json.loads((path / STATE).read_bytes())
    tensors: dict[str, Tensors] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.setdefault(_kind_of(file), {}).update(load_file(file))
    return Checkpoint(state["step"], tensors, state)


def read_kind(path: Path, kind: str) -> Tensors:
    """All tensors of one kind; empty where the checkpoint has none."""
    files = [file for file in sorted(path.glob("*.safetensors")) if _kind_of(file) == kind]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _kind_of(file: Path) -> str:
    match = _PART.fullmatch(file.stem)
    return match[1] if match else file.stem


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(where: str | Path) -> Path:
    """The checkpoint folder that ``where`` names: one itself, or the newest of a run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(where)
    if (path / MANIFEST).is_file():
        if fault := find_fault(path):
            raise UserError(f"checkpoint {path} is damaged: {fault}; use another one of its run")
        return path
    found = newest(path)
    if not found:
        raise UserError(f"a checkpoint or a run directory with one is required; {where} has none: train it first")
    return found


def digest(path: Path) -> str:
    """A short digest of all files of a checkpoint, from its manifest."""
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:12]


def read_encoder(where: str | Path, kind: str = "student") -> tuple[Tensors, dict[str, Any]]:
    """The encoder's weights by timm's names, and the ``model`` settings (size, img_size, mean, std) they belong to.

    Raises:
        UserError: there is no checkpoint, or ``where`` is a run directory whose training has not reached its end.
    """
    path = locate(where)
    state = json.loads((path / STATE).read_bytes())
    if path != Path(where) and state["step"] < state.get("total_steps", 0):
        raise UserError(
            f"{where} must be a finished run and is at step {state['step']} of {state['total_steps']}; run it to its end, "
            f"or name the checkpoint itself: {path}"
        )
    if not (tensors := read_kind(path, kind)):
        raise UserError(f"a pre-training checkpoint is required; {path} has no {kind} weights")
    encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    return encoder or tensors, state["model"]


def load_strictly(module: nn.Module, tensors: Tensors, where: str | Path) -> None:
    """Load weights whose names and shapes must all agree.

    Raises:
        UserError: some do not; the first few are named.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    shapes = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if missing or unknown or shapes:
        parts = {"missing": missing, "not known": unknown, "of another shape": shapes}
        told = "; ".join(f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in parts.items() if n)
        raise UserError(f"the weights of {where} must fit the model, but: {told}; use the configuration they were trained with")
    module.load_state_dict(tensors)


def versions() -> dict[str, str]:
    """Versions of what computes, for ``state.json`` and ``run.json``."""
    from importlib import metadata

    names = ("personmae", "torch", "deepspeed", "timm", "mosaicml-streaming", "numpy", "scipy", "scikit-learn")
    pictures = ("opencv-python-headless", "simplejpeg")
    return {name: metadata.version(name) for name in names + pictures}

"""The portable checkpoint: tensors by parameter name in safetensors, everything else in JSON, no pickle.

``RUN/checkpoints/step-00012000/`` holds one .safetensors file per kind of tensor, ``state.json``, and ``manifest.json`` with
the size and hash of every file, written last; the whole folder is written under another name and renamed, then ``LATEST``
points at it. Any engine at any world size resumes it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personmae import dist
from personmae.errors import RankError, UserError

_MANIFEST, _STATE, _LATEST = "manifest.json", "state.json", "LATEST"
Tensors = dict[str, Tensor]


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
    """
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"a run directory belongs to one run; another process is at work in {run_dir}: stop it first") from None
    return file


def folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def write(run_dir: str | Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write, commit by renaming, point ``LATEST`` at it, and delete all but the ``keep_last`` newest up to this step."""
    root = folder(run_dir)
    final = root / f"step-{checkpoint.step:08d}"
    partial = root / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for kind, tensors in checkpoint.tensors.items():
            _save_tensors(partial / f"{kind}.safetensors", tensors)
        _write_synced(partial / _STATE, json.dumps({"step": checkpoint.step} | checkpoint.state, indent=1))
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        _write_synced(partial / _MANIFEST, json.dumps(files, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _write_synced(root / f".{_LATEST}", final.name)
    (root / f".{_LATEST}").replace(root / _LATEST)
    steps = sorted(root.glob("step-*"))
    abandoned = [path for path in steps if path.name > final.name]  # left by a run that fell back, or was started afresh
    older = [path for path in steps if path.name <= final.name][:-keep_last]
    for path in abandoned + older:
        (path / _MANIFEST).unlink(missing_ok=True)  # no longer a checkpoint, should the deletion be cut short
        shutil.rmtree(path)
    return final


def newest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose files all agree with their manifest."""
    for path in sorted(folder(run_dir).glob("step-*"), reverse=True):
        if not (fault := find_fault(path)):
            return path
        print(f"checkpoint {path} is passed over: {fault}", flush=True)
    return None


def newest_for_all(run_dir: str | Path) -> Path | None:
    """``newest``, decided by the first rank for all.

    Raises:
        RankError: another host does not see it.
    """
    found = dist.from_first_rank(str(newest(run_dir) or "") if dist.is_first() else "")
    if not found:
        return None
    if not Path(found).is_dir():
        raise RankError(f"run_dir must lie on storage that all hosts share; this one does not see {found}")
    return Path(found)


def find_fault(path: Path) -> str | None:
    """Why a folder is not a whole checkpoint, or None."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"it has no {_MANIFEST}"
    except ValueError:
        return f"its {_MANIFEST} is not JSON"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != expected:
            return f"{name} does not have the size and hash of its manifest"
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that ``newest`` or ``locate`` returned; tensors are on the CPU."""
    state = json.loads((path / _STATE).read_bytes())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(state["step"], tensors, state)


def locate(where: str | Path) -> Path:
    """The checkpoint folder that ``where`` names: one itself, or the newest of a run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(where)
    if (path / _MANIFEST).is_file():
        if fault := find_fault(path):
            raise UserError(f"checkpoint {path} is damaged: {fault}; use another one of its run")
        return path
    found = newest(path)
    if not found:
        raise UserError(f"a checkpoint or a run directory with one is required; {where} has none: train it first")
    return found


def digest(path: Path) -> str:
    """A short digest of all files of a checkpoint, from its manifest."""
    return hashlib.sha256((path / _MANIFEST).read_bytes()).hexdigest()[:12]


def read_encoder(where: str | Path, kind: str = "student") -> tuple[Tensors, dict[str, Any]]:
    """The encoder's weights by timm's names, and the ``model`` settings (size, img_size, mean, std) they belong to.

    Raises:
        UserError: there is no checkpoint, or ``where`` is a run directory whose training has not reached its end.
    """
    path = locate(where)
    state = json.loads((path / _STATE).read_bytes())
    if path != Path(where) and state["step"] < state.get("total_steps", 0):
        raise UserError(
            f"{where} must be a finished run and is at step {state['step']} of {state['total_steps']}; run it to its end, "
            f"or name the checkpoint itself: {path}"
        )
    if not (path / f"{kind}.safetensors").is_file():
        raise UserError(f"a pre-training checkpoint is required; {path} has no {kind} weights")
    tensors = load_file(path / f"{kind}.safetensors")
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

    names = ("personmae", "torch", "deepspeed", "timm", "mosaicml-streaming", "numpy", "opencv-python-headless", "simplejpeg")
    return {name: metadata.version(name) for name in names}


def _save_tensors(path: Path, tensors: Tensors) -> None:
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except Exception as error:  # safetensors hides the operating system's error in a text of its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(28, "No space left on device", str(path)) from error
        raise


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def to_cpu(tensors: Tensors) -> Tensors:
    """A copy on the CPU that later steps do not change."""
    return {
        name: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype, copy=True)
        for name, t in tensors.items()
    }

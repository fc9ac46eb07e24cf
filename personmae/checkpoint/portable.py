"""The portable checkpoint: tensors by parameter name in safetensors, everything else in JSON, no pickle. How it is read.

``RUN/checkpoints/step-00012000/`` holds one .safetensors file per kind of tensor (or one part of it per rank, as in
``student-00001-of-00004.safetensors``), ``state.json``, and ``manifest.json`` with the size and hash of every file, written
last. The whole folder is written under another name and renamed, then ``LATEST`` points at it. Any engine at any world size
resumes it. Writing is in commit.py, saving beside the step loop in writer.py, the object store in remote.py.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from personmae import normalisation
from personmae.checkpoint.host_copy import Fingerprint, Tensors
from personmae.errors import Unavailable, UserError, is_passing
from personmae.model.positions import x_first

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "LATEST"
FORMAT = 2  # in the state of a checkpoint. What has none is of before positions were x first (``positions.py``)
RESUME_KEY = "identity"  # what must agree to resume: its name in state.json and result.json, kept for the runs there are
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # what optimizers keep: a run can go on without, weights do not need it
_FOLDER = re.compile(r"(?:\.old-)?step-(\d{8,})")
_LOST = (errno.EISDIR, getattr(errno, "EUCLEAN", errno.EISDIR))  # a file that will not come back
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``tensors`` maps a kind (student, teacher, exp_avg, exp_avg_sq) to tensors by parameter name."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a checkpoint cannot be used as it is."""

    what: str
    passing: bool = False  # reading failed, and may succeed another time
    absent: bool = False  # something is not there. What is there was not found wrong
    only_moments: bool = False  # weights and state are whole

    def __str__(self) -> str:
        return self.what

    @property
    def spares_weights(self) -> bool:
        """Whether nothing is wrong but that moments are not there: somebody has deleted them."""
        return self.only_moments and self.absent


def folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def name_of(step: int) -> str:
    """The folder's name for a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name gives. None where it is not a checkpoint's."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


# --- finding ---


def local_steps(run_dir: str | Path) -> list[int]:
    """Steps of the folders below a run directory, whole or not, also of those that were being replaced. Ascending.

    Raises:
        OSError: the folder is there and cannot be listed. That is not the same as empty.
    """
    return sorted({step for name in _names(run_dir) if (step := step_of(name)) is not None})


def folders(run_dir: str | Path) -> list[Path]:
    """Folders that may be whole checkpoints, newest first. Of two with a step, the replaced one comes second.

    Raises:
        OSError: as ``local_steps``.
    """
    paths = [folder(run_dir) / name for name in _names(run_dir) if step_of(name) is not None]
    return sorted(paths, key=lambda path: (step_of(path.name), path.name[0] != "."), reverse=True)


def _names(run_dir: str | Path) -> list[str]:
    """What lies among a run's checkpoints. Not by ``glob``, which takes a folder that cannot be listed for an empty one."""
    try:
        return os.listdir(folder(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        return []


def newest(run_dir: str | Path, *, moments: bool = True) -> Path | None:
    """The newest checkpoint of a run whose weights and state agree with their manifest. None where there is no checkpoint.

    Without ``moments`` those of the optimizer are not looked at.

    Raises:
        UserError: there are some, and all are damaged.
        Unavailable: there are some, and one of them may be readable another time.
    """
    passed: list[tuple[Path, Fault]] = []
    for path in folders(run_dir):
        fault = find_fault(path, moments=moments)
        if not fault or fault.spares_weights:
            return path
        log_passed_over(path, fault)
        passed.append((path, fault))
    if passed:
        raise none_usable(run_dir, passed, "take another run, or bring an undamaged copy back")
    return None


def log_passed_over(where: str | Path, fault: Fault | str) -> None:
    """Log in a line that a checkpoint is not used, and why."""
    print(f"checkpoint {where} is passed over: {fault}", flush=True)


def none_usable(where: str | Path, passed: Sequence[tuple[str | Path, Fault]], advice: str) -> UserError | Unavailable:
    """The error where checkpoints are there and none can be used. It names each with its fault."""
    named = "; ".join(f"{path}: {fault}" for path, fault in passed)
    message = f"{where} has {len(passed)} checkpoints that cannot be used, and none that can ({named})"
    if any(fault.passing for _, fault in passed):
        return Unavailable(f"{message}: reading may succeed another time, so run this again, or {advice}")
    return UserError(f"{message}: {advice}")


def find_fault(path: Path, *, moments: bool = True) -> Fault | None:
    """Why a folder is not a whole checkpoint, or None. A fault of its moments comes last, where they are looked at.

    Raises:
        OSError: it may not be read, which is neither damage nor passes.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        fault = unreadable(MANIFEST, error)
        return Fault(f"it has no {MANIFEST}", absent=True) if fault.absent else fault
    files, wrong = parse_manifest(content)
    if wrong:
        return Fault(wrong)
    for name in files:
        if not is_moments(name) and (fault := find_file_fault(path / name, files[name])):
            return fault
    looked_at = [name for name in files if moments and is_moments(name)]
    found = [fault for name in looked_at if (fault := find_file_fault(path / name, files[name]))]
    worst = next((fault for fault in found if not fault.absent), found[0] if found else None)
    return replace(worst, only_moments=True) if worst else None


def is_moments(name: str) -> bool:
    """Whether a checkpoint's file holds moments of the optimizer."""
    return name.endswith(".safetensors") and _kind_of(Path(name)) in MOMENTS


def unreadable(name: str, error: OSError) -> Fault:
    """What an error of the operating system says about a file. Raised again where it is not the file's."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):  # it may be deleted while it is read
        return Fault(f"{name} is missing", absent=True)
    if not is_passing(error) and error.errno not in _LOST:
        raise error
    return Fault(f"{name} cannot be read: {error.strerror}", passing=is_passing(error))


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


def find_file_fault(path: Path, expected: Fingerprint) -> Fault | None:
    """Why a file is not what its manifest says, or None."""
    try:
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return Fault(f"{path.name} does not have the size and hash of its manifest")
    except OSError as error:
        return unreadable(path.name, error)
    return None


# --- reading ---


def read(path: Path, *, moments: bool = True) -> Checkpoint:
    """Read a checkpoint that ``newest`` or ``locate`` returned. Tensors are on the CPU.

    They are mapped from the files, so that they take memory only as they are read, and once for all ranks of a host.
    """
    state = read_state(path)
    tensors: dict[str, Tensors] = {}
    for file in sorted(path.glob("*.safetensors")):
        if moments or not is_moments(file.name):
            tensors.setdefault(_kind_of(file), {}).update(load_file(file))
    return Checkpoint(state["step"], {kind: _of_today(found, state) for kind, found in tensors.items()}, state)


def _of_today(tensors: Tensors, state: dict[str, Any]) -> Tensors:
    """Tensors of a checkpoint as they are written today.

    Raises:
        UserError: it was written by a later version.
    """
    if (written := state.get("format", 1)) > FORMAT:
        raise UserError(f"checkpoints of format {FORMAT} or less can be read, this one has format {written}. Update personmae")
    return x_first(tensors, state["model"]) if written == 1 and "size" in state.get("model", {}) else tensors


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: ``step``, ``total_steps``, ``model``, the resume key and more."""
    return json.loads(_content(path / STATE))


def _content(path: Path) -> bytes:
    """A whole file. Unlike Python's, an error while it is read names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_kind(path: Path, kind: str) -> Tensors:
    """All tensors of one kind. Empty where the checkpoint has none."""
    files = [file for file in sorted(path.glob("*.safetensors")) if _kind_of(file) == kind]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return _of_today(tensors, read_state(path)) if tensors else {}


def _kind_of(file: Path) -> str:
    match = _PART.fullmatch(file.stem)
    return match[1] if match else file.stem


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(where: str | Path, *, moments: bool = True) -> Path:
    """The checkpoint folder that ``where`` names: one itself, or the newest of a run directory. Moments may be gone.

    Without ``moments`` they are not read either, which are half of all bytes.

    Raises:
        UserError: there is none, or all are damaged.
        Unavailable: one that is there cannot be read at present.
    """
    path = Path(where)
    if (path / MANIFEST).is_file():
        fault = find_fault(path, moments=moments)
        if not fault or fault.spares_weights:
            return path
        if fault.passing:
            raise Unavailable(f"checkpoint {path} cannot be used: {fault}. This may pass: run this again")
        raise UserError(f"checkpoint {path} is damaged: {fault}. Use another one of its run")
    found = newest(path, moments=moments)
    if not found:
        problem = "has none: train it first" if os.path.lexists(path) else "does not exist"
        raise UserError(f"a checkpoint or a run directory with one is required. {where} {problem}")
    return found


def run_of(path: Path) -> Path:
    """The run directory that a checkpoint lies in, or its own where it lies alone."""
    run_dir = path.parent.parent
    return run_dir if folder(run_dir) == path.parent else path


def digest(path: Path) -> str:
    """A short digest of all files of a checkpoint, from its manifest."""
    return hashlib.sha256(_content(path / MANIFEST)).hexdigest()[:12]


def unfinished(path: Path) -> str | None:
    """How far the run of a checkpoint had come then, as "step 3 of 4". None where that is its end, or is not known."""
    state = read_state(path)
    total = state.get("total_steps")
    return f"step {state['step']} of {total}" if total and state["step"] < total else None


def require_finished(where: str | Path, path: Path, otherwise: str = "") -> None:
    """Raise a UserError where ``where`` is a run whose training has not reached its end. A checkpoint may be named itself.

    ``path`` is the checkpoint that ``locate`` found there, ``otherwise`` another way out to name.
    """
    if path != Path(where) and (reached := unfinished(path)):
        raise UserError(
            f"{where} must be a finished run and is at {reached}. Run it to its end,{otherwise} or name the checkpoint itself: "
            f"{path}"
        )


def read_encoder(where: str | Path, kind: str = "student") -> tuple[Tensors, dict[str, Any]]:
    """The encoder's weights by timm's names, and the ``model`` settings (size, img_size, mean, std) they belong to.

    Raises:
        UserError: there is no checkpoint, ``where`` is a run directory whose training has not reached its end, or the
            settings are none that weights can have.
    """
    path = locate(where)
    require_finished(where, path)
    if not (tensors := read_kind(path, kind)):
        raise UserError(f"a pre-training checkpoint is required. {path} has no {kind} weights")
    settings = read_state(path)["model"]
    if "mean" in settings:
        require_normalisation(path, settings)
    return encoder_of(tensors), settings


def require_normalisation(where: str | Path, settings: dict[str, Any]) -> None:
    """Raise a UserError where the ``model`` settings of stored weights have a normalisation that cannot be one."""
    if wrong := normalisation.fault(settings.get("mean"), settings.get("std")):
        raise UserError(f"{where} cannot be used: its {wrong}. Import, export or train it again")


def encoder_of(tensors: Tensors) -> Tensors:
    """The encoder's part of a student's weights, by timm's names. All of it where it is an encoder alone."""
    return {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")} or tensors


def load_strictly(module: nn.Module, tensors: Tensors, where: str | Path, *, assign: bool = False) -> None:
    """Load weights whose names and shapes must all agree. ``assign`` takes the tensors themselves instead of their values.

    Raises:
        UserError: some do not. The first few are named.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    shapes = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if missing or unknown or shapes:
        parts = {"missing": missing, "not known": unknown, "of another shape": shapes}
        wrong = "; ".join(f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in parts.items() if n)
        raise UserError(
            f"the weights of {where} must fit the model, but: {wrong}. Use the configuration they were trained with"
        )
    module.load_state_dict(tensors, assign=assign)


def versions() -> dict[str, str]:
    """Versions of what computes, for ``state.json`` and ``run.json``."""
    from importlib import metadata

    names = ("personmae", "torch", "deepspeed", "timm", "mosaicml-streaming", "numpy", "scipy", "scikit-learn")
    images = ("opencv-python-headless", "simplejpeg")
    return {name: metadata.version(name) for name in names + images}

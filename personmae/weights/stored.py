"""Weights on disk for use: a checkpoint of a run, an exported folder, or a file of another project.

An exported folder has ``personmae.json`` and ``model.safetensors``. The first says what ``state.json`` of a checkpoint says
of its model. The second has the tensors of a ``ReIDModel`` where there is a head, else those of an encoder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from personmae.checkpoint import portable
from personmae.checkpoint.host_copy import write_blocks
from personmae.errors import UserError
from personmae.system import files

DESCRIPTION, WEIGHTS = "personmae.json", "model.safetensors"
FORMAT: Final = 1  # of an exported folder
_KEPT: Final = ("head", "num_classes", "pool", "whiten", "init", "step", "import")  # of a checkpoint's state, beside its model


@dataclass(frozen=True, slots=True)
class Stored:
    """What is needed to build a model for use.

    ``model`` are the settings that travel with the weights: size, img_size, patch_size, mean, std and more. ``tensors`` are
    those of a ``ReIDModel`` where ``head`` says what its head is, else those of an encoder. ``pool`` is how the tokens of an
    encoder are read. ``about`` is whatever else is known: init, step, num_classes, whiten, import.
    """

    where: str
    model: dict[str, Any]
    tensors: Mapping[str, Tensor]
    head: dict[str, Any] | None = None
    pool: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


def read(where: str | Path, *, unfinished: bool = False) -> Stored:
    """The weights of a run, a checkpoint or an exported folder.

    Raises:
        UserError: there are none, they are damaged, or of a run that has not reached its end without ``unfinished``.
        Unavailable: they cannot be read at present.
    """
    if (Path(where) / DESCRIPTION).is_file():
        return read_folder(Path(where))
    path = portable.locate(where, moments=False)
    if not unfinished:
        portable.require_finished(where, path, " give unfinished=True,")
    state = portable.read_state(path)
    kind = "model" if "head" in state else "student"
    tensors = portable.read_kind(path, kind)
    if not tensors:
        raise UserError(f"weights of an encoder or a ReID model are required. {path} has none: use another checkpoint")
    if kind == "model":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    else:
        tensors = portable.encoder_of(tensors)
    return _stored(str(path), state, tensors)


def read_folder(folder: Path) -> Stored:
    """The weights of an exported folder.

    Raises:
        UserError: a file of it is missing, damaged, or of a later version.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if (written := description["format"]) > FORMAT:
            raise UserError(
                f"exported folders of format {FORMAT} or less can be read. {folder} has {written}: update personmae"
            )
        return _stored(str(folder), description, load_file(folder / WEIGHTS))
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"an exported folder needs a whole {DESCRIPTION} and {WEIGHTS}. {folder} has not ({error}): export it again"
        ) from error


def write_folder(folder: Path, stored: Stored) -> None:
    """Write ``DESCRIPTION`` and ``WEIGHTS`` into a folder that is there. Tensors become fp32.

    Raises:
        OSError: a file cannot be written.
    """
    own = {name: as_fp32(tensor.detach()).contiguous() for name, tensor in stored.tensors.items()}
    described = {"format": FORMAT, "model": stored.model, **stored.about}
    described |= {"head": stored.head} if stored.head else {}
    described |= {"pool": stored.pool} if stored.pool else {}
    write_blocks(folder / WEIGHTS, [save(own)])
    files.replace(folder / DESCRIPTION, files.to_json(described, indent=1) + "\n")


def as_fp32(tensor: Tensor) -> Tensor:
    """A tensor of weights in fp32. Counters stay what they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _stored(where: str, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
    portable.require_normalisation(where, state["model"])
    about = {name: state[name] for name in _KEPT if name not in ("head", "pool") and state.get(name) is not None}
    return Stored(where, state["model"], tensors, state.get("head"), state.get("pool"), about)

"""``personmae import``: an encoder of another project as a checkpoint that everything here starts from.

What comes out is a checkpoint without a run: ``student.safetensors`` by timm's names, ``state.json`` with the settings of the
model and where the weights came from, and ``manifest.json`` with their hashes.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from personmae import normalisation
from personmae.checkpoint import commit
from personmae.errors import UserError
from personmae.weights import architecture, families, positions
from personmae.weights.families import HALF, Triple
from personmae.weights.files import read_file, unwrap
from personmae.weights.found import Found, checked, left_out
from personmae.weights.staging import deleted_when_stopped
from personmae.weights.stored import Stored, as_fp32

TIMM: Final = "timm:"  # before the name of one of timm's models
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says of the weights: size of images (H, W) and normalisation, and a file for a model of timm's."""

    img_size: Size | None = None
    mean: Triple | None = None
    std: Triple | None = None
    file: Path | None = None


def run(source: str, out: Path, options: Options, log: Callable[[str], None] = print) -> None:
    """Write the encoder of ``source`` into a new folder ``out``, and say what was found, left out and kept.

    Raises:
        UserError: ``out`` is there, or ``source`` is not an encoder that can be read.
        OSError: ``out`` cannot be written. Nothing is left of it.
    """
    if os.path.lexists(out):
        raise UserError(f"a new folder is required. {out} exists: delete it or choose another place")
    partial = out.with_name(f".partial-{out.name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()  # before gigabytes are read
    with deleted_when_stopped(partial):
        imported = read(source, options, log)
        state = {"step": 0, "model": imported.model, "pool": imported.pool, **imported.about}
        commit.write_alone(partial, {"student": dict(imported.tensors)}, state)
        partial.rename(out)
    log(f"import: {out} is written. It starts finetune, unsupervised and pretrain with {_given(imported.model, out)}")


def _given(model: Mapping[str, Any], out: Path) -> str:
    patch = f" model.patch_size={model['patch_size']}" if model["patch_size"] != 16 else ""
    return f"init={shlex.quote(str(out))} model.size={model['size']}{patch}"


def read(source: str, options: Options, log: Callable[[str], None] = lambda _: None) -> Stored:
    """The encoder of a file, or of a model of timm's, as if it had been imported.

    Raises:
        UserError: it is not an encoder that can be read.
    """
    if wrong := normalisation.fault(options.mean or HALF[0], options.std or HALF[1]):
        raise UserError(f"--{wrong}")
    if source.startswith(TIMM):
        from personmae.weights import from_timm

        found = from_timm.find(source.removeprefix(TIMM), options.file)
    elif not Path(source).is_file():
        found = "is a folder" if Path(source).is_dir() else "does not exist"
        raise UserError(f"a file of weights, or timm:NAME, is required. {source} {found}")
    elif options.file:
        raise UserError(f"--file is for a model of timm's, as in timm:NAME. {source} is a file itself: leave it out")
    else:
        found = find_in_file(Path(source), options.img_size)
    geometry = _geometry(found, options.img_size)
    mean, std = options.mean or found.family.normalisation[0], options.std or found.family.normalisation[1]
    why = "as given" if options.mean or options.std else found.family.why
    for line in (*found.lines, f"normalisation: mean {_numbers(mean)}, std {_numbers(std)}, {why}"):
        log(f"import: {line}")
    settings = {"size": found.size, "patch_size": found.patch_size, "mean": list(mean), "std": list(std)}
    settings |= geometry
    about = {"family": found.family.name, "source": source, "finetuned": found.family.finetuned}
    settings |= {"encoder": found.options} if found.options else {}
    return Stored(source, settings, found.tensors, pool=found.family.pool, about={"import": about})


def _geometry(found: Found, img_size: Size | None) -> dict[str, Any]:
    placed, patch_size = found.placed, found.patch_size
    img_size = img_size or placed.size
    if any(side < patch_size for side in img_size) or (
        placed.stride == patch_size and any(side % patch_size for side in img_size)
    ):
        raise UserError(f"--img-size must be multiples of {patch_size} pixels. Got {img_size[0]}x{img_size[1]}")
    of_positions = {"trained_size": list(placed.size)} if img_size != placed.size else {}
    overlap = {"stride": placed.stride, "trained_stride": placed.stride} if placed.stride != patch_size else {}
    return {"img_size": list(img_size)} | of_positions | overlap


def find_in_file(path: Path, img_size: Size | None = None) -> Found:
    """The encoder in a file of weights. ``img_size`` is one to think of first where positions do not say theirs.

    Raises:
        UserError: the file is damaged, or is not of an encoder that can be read.
    """
    tensors, way, beside = unwrap(read_file(path), path)
    inner, outer, prefix = families.strip(tensors)
    inner, branch = families.in_timms_names(inner, outer, prefix)
    size, patch_size, options = architecture.read(inner, str(path))
    kept = {name: as_fp32(tensor) for name, tensor in inner.items() if architecture.is_part(name)}
    placed = positions.place(kept, patch_size, size, img_size)
    tall, fixed = placed.size[0] > placed.size[1], placed.table is None
    family = families.identify(inner, prefix, way, beside, tall=tall, fixed=fixed)
    below = " > ".join([*way, *([prefix.rstrip(".")] if prefix else [])])
    first = f"{path} is {family.name}, a ViT of size {size} with patches of {patch_size} pixels"
    of_branch = ("b1.",) if branch else ()
    others = [name for name in inner if name not in kept] + [name for name in outer if not name.startswith(of_branch)]
    lines = (
        first + (f", within {below}" if below else ""),
        f"{len(kept)} of {len(tensors)} tensors are the encoder's{left_out(others)}",
        f"positions: {placed.words}",
        *([branch] if branch else []),
    )
    return checked(Found(placed.tensors, family, size, patch_size, placed, options, lines), str(path))


def _numbers(values: Triple) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"

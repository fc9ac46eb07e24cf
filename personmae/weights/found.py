"""An encoder that was found among the weights of another project, and whether all of it is there."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from personmae.errors import UserError
from personmae.model.vit import build_encoder
from personmae.weights.blank import blank
from personmae.weights.families import Family
from personmae.weights.positions import Placed


@dataclass(frozen=True, slots=True)
class Found:
    """An encoder by timm's names, its family, its options beside those of a plain one, and lines to print about it."""

    tensors: dict[str, Tensor]
    family: Family
    size: str
    patch_size: int
    placed: Placed
    options: dict[str, Any]
    lines: tuple[str, ...]


def checked(found: Found, where: str) -> Found:
    """What was found, with the grid of its table among the options.

    Raises:
        UserError: a tensor that such an encoder needs is missing or has another shape.
    """
    options = found.options | ({"table": list(found.placed.table)} if found.placed.table else {})
    with blank():
        settings = {"size": found.size, "patch_size": found.patch_size, "img_size": found.placed.size, "encoder": options}
        needed = build_encoder(settings).state_dict()
    missing = [name for name in needed if name not in found.tensors]
    other = [name for name in needed if name in found.tensors and found.tensors[name].shape != needed[name].shape]
    if missing or other:
        name = (missing or other)[0]
        wrong = (
            f"{name} is missing" if missing else f"{name} is {_shape(found.tensors[name])} instead of {_shape(needed[name])}"
        )
        fitting = len(needed) - len(missing) - len(other)
        raise UserError(f"all {len(needed)} tensors of a ViT of size {found.size} are required. {where} has {fitting}: {wrong}")
    lines = (*found.lines, f"all {len(needed)} tensors that the encoder needs are there, and all have its shapes")
    return replace(found, options=options, lines=lines)


def left_out(names: Iterable[str]) -> str:
    """What was not taken, as counts by the first part of the names."""
    counts = Counter(re.split(r"\.|_\d", name)[0] for name in names)
    return ". Left out: " + ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) if counts else ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"

"""Files of weights from elsewhere: safetensors, and torch's own where nothing in them has to be run."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from personmae.errors import UserError

# Within which names the weights of others lie. Of a teacher and its student the teacher is taken, as their own code does.
INSIDE: Final = ("teacher", "target_encoder", "state_dict", "model", "module")
_CODE: Final = re.compile(r"(?:GLOBAL|class|function|type) ([\w.]+\.[\w.]+)")
_AS_SAFETENSORS: Final = "load it where you trust it, save its tensors as .safetensors and import those"


def read_file(path: Path) -> Any:
    """What a file holds: tensors by name, perhaps within other things. Tensors are on the CPU.

    A ``.safetensors`` file cannot hold anything else. Any other is read by torch with ``weights_only``, which runs nothing.

    Raises:
        UserError: it is damaged, or code would have to be run to read it. The message says which.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:  # so that what the operating system refuses is its own error
        begin = file.read(4)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # a record of options, which runs nothing
            return torch.load(path, map_location="cpu", weights_only=True, mmap=begin == b"PK\x03\x04")
    except SafetensorError as error:
        raise UserError(f"a whole .safetensors file is required. {path} is damaged: {error}. Copy it again") from error
    except Exception as error:  # torch raises errors of a dozen kinds for damaged files
        raise UserError(_explained(path, str(error))) from error


def _explained(path: Path, said: str) -> str:
    if found := _CODE.search(said):
        return f"a file of tensors alone is required. {path} wants to run {found[1]}, which was not done: {_AS_SAFETENSORS}"
    if "eights only" in said or "nsupported" in said:
        return f"a file of tensors alone is required. {path} wants to run code, which was not done: {_AS_SAFETENSORS}"
    reason = re.split(r"\n|\. |\.$", said.strip())[0] or "it ends early"
    return f"a whole file of torch or .safetensors is required. {path} is damaged or something else ({reason}). Copy it again"


def unwrap(found: Any, path: Path) -> tuple[dict[str, Tensor], list[str], set[str]]:
    """Tensors by name, the names within which they lay, and the names beside the outermost of these.

    Raises:
        UserError: there are none.
    """
    way: list[str] = []
    beside = {str(name) for name in found} if isinstance(found, Mapping) else set()
    while isinstance(found, Mapping):
        name = next((name for name in INSIDE if isinstance(found.get(name), Mapping)), None)
        if name is None:
            break
        found, way = found[name], [*way, name]
    tensors = {str(name): t for name, t in found.items() if isinstance(t, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        held = (
            f"{', '.join(sorted(map(str, found))[:5]) or 'nothing'}"
            if isinstance(found, Mapping)
            else f"a {type(found).__name__}"
        )
        raise UserError(f"tensors by name are required. {path} holds {held}")
    return tensors, way, beside

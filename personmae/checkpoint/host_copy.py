"""A training state in host memory, laid out as the safetensors files it becomes.

The step loop waits for this copy alone. Host memory is pinned where the state lies on a GPU, and is used again by the next
copy. The files are written here, not by the safetensors library, so that hashes are of what was in memory, files reach the disk
itself, and a full disk is the operating system's error. The library reads them.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Fingerprint = dict[str, Any]  # "bytes" and "sha256"

_BLOCK = 16 << 20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class HostFile:
    """One safetensors file in memory, made for tensors of certain names, shapes and types. 16-bit floats become fp32."""

    def __init__(self, tensors: Tensors):
        self._key = _key(tensors)
        entries, self._places, end = {}, {}, 0
        for name in sorted(tensors, key=lambda name: (-_stored(tensors[name]).itemsize, name)):  # so all are aligned
            dtype, shape = _stored(tensors[name]), tensors[name].shape
            start, end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._places[name] = (start, end)
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = struct.pack("<Q", len(header)) + header
        self._data = torch.empty(end, dtype=torch.uint8, pin_memory=any(t.is_cuda for t in tensors.values()))

    def fits(self, tensors: Tensors) -> bool:
        """Whether these tensors have the names, shapes and types that this one was made for."""
        return self._key == _key(tensors)

    def fill(self, tensors: Tensors) -> None:
        """Copy the tensors. From a GPU the copy is only under way when this returns."""
        for name, (start, end) in self._places.items():
            tensor = tensors[name].detach()
            copied = self._data[start:end].view(_stored(tensor)).view(tensor.shape)
            if tensor.device.type == "cpu" and tensor.dtype == copied.dtype:
                # By one thread: torch's threads meet at a barrier per tensor, ten times as slow where others use the cores.
                copied.numpy()[...] = tensor.numpy()
            else:
                copied.copy_(tensor, non_blocking=True)

    def write(self, path: Path) -> Fingerprint:
        """Write to the disk itself, hashing on the way."""
        return write_blocks(path, self._blocks())

    def _blocks(self) -> Iterator[bytes | memoryview]:
        yield self._header
        data = self._data.numpy().data
        for start in range(0, len(data), _BLOCK):
            yield data[start : start + _BLOCK]


class HostCopy:
    """A state in host memory, by kind. The memory is kept for the next copy."""

    def __init__(self) -> None:
        self.files: dict[str, HostFile] = {}

    def take(self, tensors: Mapping[str, Tensors]) -> None:
        """Copy every kind. The originals may change as soon as this returns."""
        self.files = {kind: self._file(kind, of_kind) for kind, of_kind in tensors.items()}
        for kind, file in self.files.items():
            file.fill(tensors[kind])
        if any(t.is_cuda for of_kind in tensors.values() for t in of_kind.values()):
            torch.cuda.synchronize()

    def _file(self, kind: str, tensors: Tensors) -> HostFile:
        kept = self.files.get(kind)
        return kept if kept and kept.fits(tensors) else HostFile(tensors)


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> Fingerprint:
    """Write a file to the disk itself and return its size and hash.

    Raises:
        OSError: with the file's name, which the operating system leaves out when a disk is full.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("wb", buffering=0) as file:
            for block in blocks:
                _put(file, block)
                digest.update(block)
                size += len(block)
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _put(file: BinaryIO, block: bytes | memoryview) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def _stored(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype


def _key(tensors: Tensors) -> list[tuple[Any, ...]]:
    return [(name, t.shape, t.dtype, t.is_cuda) for name, t in tensors.items()]

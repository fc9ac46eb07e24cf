"""In which precision matrix products are computed: bf16 where the device has instructions for it, else fp32.

``train.precision: auto`` is decided here and nowhere else, by the device alone. Torch is imported only to ask a GPU.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

Name = Literal["bf16", "fp32"]
AUTO: Final = "auto"
NAMES: Final[tuple[Name, ...]] = ("bf16", "fp32")
CPUINFO: Final = Path("/proc/cpuinfo")
# "bf16" is ARM's. AVX-512 without avx512_bf16 emulates it at a fifth of fp32's speed or less.
_CPU_FLAGS: Final = {"avx512_bf16", "amx_bf16", "bf16"}
# What oneDNN may be told to stay below, and then has no bf16 products. It reads both names in either case.
_ISA_NAMES: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ISA_WITHOUT: Final = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True, slots=True)
class Native:
    """Whether a device computes bf16 products natively, and the reason in words."""

    bf16: bool
    why: str

    @property
    def best(self) -> Name:
        """The precision that is fast there."""
        return "bf16" if self.bf16 else "fp32"


@dataclass(frozen=True, slots=True)
class Precision:
    """What a run computes in, how it was chosen, and what the device has."""

    name: Name
    native: Native
    by_hand: bool = False
    kept: bool = False  # from a checkpoint of another kind of machine

    @property
    def is_slow(self) -> bool:
        """Whether the device computes its products by emulation."""
        return self.name == "bf16" and not self.native.bf16

    @property
    def dtype(self) -> Any:
        """The ``torch.dtype``."""
        return dtype_of(self.name)

    def resumed(self, saved: str | None) -> "Precision":
        """Of a run that goes on from a checkpoint computed in ``saved``: ``auto`` keeps that, on every machine."""
        if self.by_hand or saved not in NAMES or saved == self.name:
            return self
        return replace(self, name=saved, kept=True)

    def record(self) -> dict[str, Any]:
        """What a checkpoint's state keeps of it."""
        return {"precision": self.name, "precision_by_hand": self.by_hand}

    def __str__(self) -> str:
        why = self.native.why
        if self.kept:
            cost = f"{why}, and a bf16 product is many times slower" if self.is_slow else f"{why}, and bf16 products are faster"
            again = f"checkpoint.resume=none train.precision={self.native.best} starts anew"
            return f"precision {self.name} (kept from the checkpoint, though here {cost}. {again})"
        if self.by_hand:
            slow = f". Slow here: {why}, and a bf16 product is many times slower. train.precision=fp32 is faster"
            return f"precision {self.name} (as set{slow if self.is_slow else ''})"
        return f"precision {self.name} (auto: {why})"


def dtype_of(name: str) -> Any:
    """The ``torch.dtype`` of a precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def choose(wanted: str, device: str, *, share: Callable[[Precision], Precision] = lambda own: own) -> Precision:
    """The precision of a run on a ``device`` such as ``cpu`` or ``cuda:0``, from ``auto``, ``bf16`` or ``fp32``.

    ``share`` gives the first rank's choice to all, so that one machine decides.
    """
    native = native_cuda(device) if device.startswith("cuda") else native_cpu()
    if wanted == AUTO:
        return share(Precision(native.best, native))
    return Precision("bf16" if wanted == "bf16" else "fp32", native, by_hand=True)


def native_cuda(device: str) -> Native:
    """Of a GPU, as torch tells it."""
    import torch

    with torch.cuda.device(device):
        found = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name()
    return Native(found, f"{name} computes bf16 {'natively' if found else 'only by emulation'}")


def native_cpu(cpuinfo: Path = CPUINFO, environ: Mapping[str, str] = os.environ) -> Native:
    """Of the processor that ``cpuinfo`` describes, within what ``environ`` allows oneDNN.

    ATEN_CPU_CAPABILITY is not asked: it caps elementwise code, and products stay as fast.
    """
    flags = cpu_flags(cpuinfo)
    if flags is None:
        return Native(False, "this system does not tell its processor's instructions")
    if not flags & _CPU_FLAGS:
        return Native(False, "this CPU has no bf16 instructions")
    for name in _ISA_NAMES:
        if environ.get(name, "").upper() in _ISA_WITHOUT:
            return Native(False, f"{name}={environ[name]} forbids bf16 instructions")
    return Native(True, "this CPU has bf16 instructions")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str] | None:
    """Instruction sets of the first processor listed: ``flags`` of x86, ``Features`` of ARM. None where nothing tells."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and name.strip() in ("flags", "Features"):
            return frozenset(text.split())
    return None

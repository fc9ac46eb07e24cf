"""What is fused or compiled of a step, and who cuts the regions: torch's operations or the kernel."""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from personmae.errors import UserError
from personmae.model.inputs import Batch, RegionSpec, draw_batch, prepare_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher

Cutter = Literal["torch", "triton"]  # who cuts the regions: torch's operations, or the kernel of ``kernel.py``


def choose_prepare(
    model: PersonMAE, *, cutter: Cutter = "torch", compiled: bool = False, cuda_graphs: bool = False
) -> Callable[..., Batch]:
    """``prepare_batch``, or what takes its place: on a GPU it can be compiled, or leave the cutting to the kernel.

    On a CPU it goes image by image, which the compiler does not better.

    Raises:
        UserError: the kernel is asked for and there is no GPU.
    """
    device, mode = model.encoder.cls_token.device, "reduce-overhead" if cuda_graphs else None

    def faster(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, mode=mode) if compiled and device.type == "cuda" else function

    if cutter == "torch":
        return faster(prepare_batch)
    require_kernel(device)
    from personmae.model import kernel  # Triton comes with torch for GPUs alone

    draw = faster(draw_batch)

    def prepare(canvas: Tensor, size: Tensor, native_size: Tensor, keys: Tensor, spec: RegionSpec) -> Batch:
        return kernel.cut_batch(canvas, size, draw(keys, native_size, spec), spec, dtype=model.compute_dtype)

    return prepare


def require_kernel(device: torch.device) -> None:
    """Raise a ``UserError`` where the kernel cannot run: it needs a GPU, or Triton's interpreter, which is slow."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"the cutter triton needs a GPU and there is none (the device is {device}); use torch")


def compile_parts(model: PersonMAE, teacher: Teacher | None, cuda_graphs: bool = False) -> None:
    """Have student and teacher compiled, each as a whole, at their next call."""
    mode = "reduce-overhead" if cuda_graphs else None
    model.compile(mode=mode)
    if teacher:
        teacher.compile(mode=mode)

"""Compilation of a step, and the backend that crops the regions: torch's operations or the Triton kernel."""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from personmae.errors import UserError
from personmae.model.inputs import Batch, RegionSpec, draw_batch, prepare_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher

CropBackend = Literal["torch", "triton"]  # what crops the regions: torch's operations, or the kernel of ``kernel.py``


def choose_prepare(
    model: PersonMAE, *, crop_backend: CropBackend = "torch", compiled: bool = False, cuda_graphs: bool = False
) -> Callable[..., Batch]:
    """``prepare_batch`` or its replacement: on a GPU it can be compiled, or the kernel can crop the regions.

    On a CPU it works image by image, and compiling does not help.

    Raises:
        UserError: the kernel is asked for and there is no GPU.
    """
    device, mode = model.encoder.cls_token.device, "reduce-overhead" if cuda_graphs else None

    def faster(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, mode=mode) if compiled and device.type == "cuda" else function

    if crop_backend == "torch":
        return faster(prepare_batch)
    require_kernel(device)
    from personmae.model import kernel  # Triton comes with torch for GPUs alone

    draw = faster(draw_batch)

    def prepare(canvas: Tensor, size: Tensor, native_size: Tensor, keys: Tensor, spec: RegionSpec) -> Batch:
        return kernel.cut_batch(canvas, size, draw(keys, native_size, spec), spec, dtype=model.compute_dtype)

    return prepare


def require_kernel(device: torch.device) -> None:
    """Check that the kernel can run here.

    Raises:
        UserError: there is no GPU, and Triton's slow interpreter is off too.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"crop_backend=triton needs a GPU and there is none (the device is {device}): use torch")


def compile_parts(model: PersonMAE, teacher: Teacher | None, cuda_graphs: bool = False) -> None:
    """Set student and teacher up to be compiled, each as a whole, at their next call."""
    mode = "reduce-overhead" if cuda_graphs else None
    model.compile(mode=mode)
    if teacher:
        teacher.compile(mode=mode)

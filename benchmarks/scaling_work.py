"""What a step of pre-training comes to, counted from the real model: its kernels, their operations and their bytes."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from personmae.model.inputs import RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher

Values = NDArray[np.float64]
DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
GRADIENT_BYTES = 4
_PROBE_IMAGES = (2, 4)


def spec_of(img_size: tuple[int, int]) -> RegionSpec:
    """The paper's regions at another size, whose largest shift is a quarter of the height."""
    mean = (0.5, 0.5, 0.5)
    return RegionSpec(img_size, 16, mean, mean, img_size[0] // 4, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)


@dataclass(frozen=True)
class Work:
    """The K kernels of a micro-batch in order, from drawing the regions to the last gradient, and what an update touches."""

    flops: Values  # (K,) of an image
    fixed_bytes: Values  # (K,) read and written whatever the batch: parameters
    image_bytes: Values  # (K,) read and written for an image
    num_forward: int  # kernels before the backward pass
    num_params: int
    num_averaged: int  # of the teacher

    @property
    def gradient_bytes(self) -> int:
        """What ranks reduce in a step."""
        return GRADIENT_BYTES * self.num_params


@lru_cache
def count_work(size: str, img_size: tuple[int, int], precision: str) -> Work:
    """Counted without arithmetic, on fake tensors; attention is written out as on CPUs, which moves more than a fused one."""
    spec = spec_of(img_size)
    with torch.device("meta"):
        model = PersonMAE(size=size, compute_dtype=DTYPES[precision])
        teacher = Teacher(model.encoder, spec.grid, DTYPES[precision])
    few, more = (_count_kernels(model, teacher, spec, num_images) for num_images in _PROBE_IMAGES)
    assert len(few.rows) == len(more.rows), "the kernels of a step must not depend on the batch"
    per_image = (np.array(more.rows) - np.array(few.rows)) / (_PROBE_IMAGES[1] - _PROBE_IMAGES[0])
    fixed = np.array(few.rows) - per_image * _PROBE_IMAGES[0]
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model, teacher)]
    return Work(per_image[:, 0], fixed[:, 1], per_image[:, 1], few.num_forward, *sizes)


def _count_kernels(model: PersonMAE, teacher: Teacher, spec: RegionSpec, num_images: int) -> "_Kernels":
    height, width = spec.canvas_size
    native, kernels = torch.tensor([[height, width]] * num_images), _Kernels()
    with kernels:
        draws = draw_batch(torch.arange(num_images), native, spec)  # with real numbers: some of it looks at them
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in (*model.modules(), *teacher.modules()):
            _make_fake(part)
        canvas = torch.zeros(num_images, height, width, 3, dtype=torch.uint8)
        with kernels:
            batch = cut_batch(canvas, native, draws, spec)
            loss = model(batch | {"target": teacher(batch["patches_b"])})["loss"]
            kernels.num_forward = len(kernels.rows)
            loss.backward()
    return kernels


def _make_fake(part: nn.Module) -> None:
    for name, p in part.named_parameters(recurse=False):
        setattr(part, name, nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad))
    for name, buffer in part.named_buffers(recurse=False):
        setattr(part, name, torch.empty(buffer.shape))


class _Kernels(TorchDispatchMode):
    """Notes operations and bytes of each kernel that runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[float, float]] = []
        self.num_forward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view:
            flops = flop_registry.get(func.overloadpacket)
            tensors = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
            touched = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
            self.rows.append((flops(*args, **kwargs, out_val=out) if flops else 0.0, touched))
        return out

"""ONNX graphs of a model, with the normalisation that a tracker leaves to them, and their weights in fewer bits.

Trackers feed RGB in two ways: in 0 ... 1 (Ultralytics), or normalised as for ImageNet (BoxMOT). Each has a graph of its own.
The number of images is free, the image size is fixed: trackers read it from the graph. The output has length one.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from personmae.weights.encoder import Encoder

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "features"
_OPSET: Final = 18
_SMALLEST_BITS: Final = 1 << 12  # tensors of fewer numbers stay fp32


class Normalised(nn.Module):
    """The model behind a scale and a shift of each colour: from what a tracker feeds to what the model was trained on."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, scale: Sequence[float], shift: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.model(images * self.scale + self.shift)


def from_unit(encoder: Encoder) -> Normalised:
    """The model for RGB in 0 ... 1."""
    mean, std = encoder.config["mean"], encoder.config["std"]
    return Normalised(encoder.model, [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)])


def from_imagenet(encoder: Encoder) -> Normalised:
    """The model for RGB that was normalised with ImageNet's mean and deviation."""
    mean, std = encoder.config["mean"], encoder.config["std"]
    scale = [given / own for given, own in zip(IMAGENET_STD, std, strict=True)]
    shift = [(given - own) / s for given, own, s in zip(IMAGENET_MEAN, mean, std, strict=True)]
    return Normalised(encoder.model, scale, shift)


def exported_program(module: nn.Module, img_size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The graph of a module of images (N, 3, H, W) for any N of at least one."""
    example = torch.zeros(2, 3, *img_size)  # of one image the exporter would make a constant
    return torch.export.export(module.eval(), (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}})


def write(module: nn.Module, img_size: tuple[int, int], path: Path) -> None:
    """Write the ONNX file of a module of images. Weights are in it, unless they are above the format's 2 GiB."""
    with _quiet():
        program = torch.onnx.export(
            exported_program(module, img_size),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program
        program.save(str(path), external_data=False)


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX file with onnxruntime on the CPU: images (N, 3, H, W) to features (N, D)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def to_bf16(path: Path) -> None:
    """Store the large weights of a file in bf16. The graph makes fp32 of them again, so every runtime takes it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _SMALLEST_BITS:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(torch.bfloat16)
        name, stored = tensor.name, f"{tensor.name}_bf16"
        raw = values.view(torch.int16).numpy().tobytes()
        tensor.CopyFrom(helper.make_tensor(stored, TensorProto.BFLOAT16, list(values.shape), raw, raw=True))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}_to_fp32", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def to_int8(path: Path) -> None:
    """Store the weights of matrix products as int8, one scale a channel. Activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_suffix(".int8")
    shutil.copyfile(path, small)  # a full disk is an error here. The library's own copy would be cut off without a word
    small.unlink()
    with _quiet():
        quantize_dynamic(path, small, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    small.replace(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own parts, which are no news to who wants a file."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""``personmae bench counts``: operations and bytes of each stage of a step, and the least time that they take.

Operations are those of matrix products, two for a multiplication and its sum, as in ``flops.pretrain_flops``. Operations
repeated by activation checkpointing are not counted. Bytes are the least that fused kernels move. One kernel holds all
between two matrix products: a norm with the residual sum before it, GELU, the rounding of a gradient. Attention is one
kernel and stores no probabilities. Each kernel reads its operands once and writes its result once. The residual stream
and its gradient are fp32. Operands of products and their gradients have the compute type, as in ``model/vit.py``. Biases
and statistics are left out. Weights are moved once a step, however large the batch is.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from personmae import flops as operations
from personmae.bench.ceilings import Ceilings
from personmae.model.inputs import RegionSpec
from personmae.model.vit import SIZES
from personmae.monitor import environment
from personmae.system import files

_FP32 = 4  # bytes
COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
_ADAMW_BYTES = (3 + 1) * _FP32 + 3 * _FP32 + _FP32  # parameter, gradient and moments in, three of them out; the norm before
_EMA_BYTES = 3 * _FP32  # both encoders in, the teacher out
QKV, OTHERS = 1 + 3, (1 + 1) + (1 + 4) + (4 + 1)  # what a block's qkv, and its proj, fc1, fc2, take in and give out, in tokens
STAGES = (
    *("inputs", "teacher", "student forward", "student backward", "pixel decoder", "feature decoder", "losses"),
    *("optimizer", "average"),
)
MODELS = {
    "micro": (128, 64),
    "tiny": (256, 128),
    "small": (256, 128),
    "base": (256, 128),
    "large": (256, 128),
}  # the sizes at what they train on


@dataclass(frozen=True, slots=True)
class Work:
    """What a step works on, with the teacher. ``spec`` is that of the configuration."""

    size: str
    spec: RegionSpec
    precision: str = "bf16"
    decoder_depth: int = 2

    @property
    def pixel_dim(self) -> int:
        return min(512, SIZES[self.size]["embed_dim"])

    @property
    def feature_dim(self) -> int:
        return SIZES[self.size]["embed_dim"]

    @property
    def num_patches(self) -> int:
        return self.spec.grid[0] * self.spec.grid[1]

    @property
    def num_visible(self) -> int:
        return self.num_patches - round(self.spec.mask_ratio * self.num_patches)

    @property
    def patch_dim(self) -> int:
        return 3 * self.spec.patch_size**2

    @property
    def flops(self) -> float:
        """Operations of an image in a step, as runs report their share of a GPU."""
        return operations.pretrain_flops(
            num_visible=self.num_visible,
            num_patches=self.num_patches,
            patch_size=self.spec.patch_size,
            embed_dim=self.feature_dim,
            depth=SIZES[self.size]["depth"],
            decoder_depth=self.decoder_depth,
            pixel_dim=self.pixel_dim,
            feature_dim=self.feature_dim,
        )


class Stage(NamedTuple):
    """What a stage needs: operations and bytes of each image, and bytes of each step whatever its batch."""

    flops: float
    bytes: float
    step_bytes: float = 0.0

    def __add__(self, other: "Stage") -> "Stage":  # type: ignore[override]
        return Stage(self.flops + other.flops, self.bytes + other.bytes, self.step_bytes + other.step_bytes)

    def intensity(self, batch_size: int) -> float:
        """Operations for each byte moved, in a step with this number of images."""
        return batch_size * self.flops / (batch_size * self.bytes + self.step_bytes)

    def seconds(self, batch_size: int, matrix_rate: float, bandwidth: float) -> float:
        """The least time of a step with this number of images: the ceiling that it meets."""
        return max(batch_size * self.flops / matrix_rate, (batch_size * self.bytes + self.step_bytes) / bandwidth)


def count_stages(work: Work) -> dict[str, Stage]:
    """Every stage of a step, in the order of the loop."""
    encoder, dim = SIZES[work.size], SIZES[work.size]["embed_dim"]
    depth, num_patches, num_visible, patch_dim = encoder["depth"], work.num_patches, work.num_visible, work.patch_dim
    forward, backward = _encoder(num_visible, dim, depth, work)
    teacher, _ = _encoder(num_patches, dim, depth, work)
    pixel = _decoder(work, work.pixel_dim, patch_dim)
    feature = _decoder(work, work.feature_dim, dim)
    params, of_encoder = count_params(work)
    target = Stage(0, 2 * _FP32 * num_patches * dim)  # the teacher's last norm: the stream in, the target out
    return dict(
        zip(
            STAGES,
            (
                _inputs(work),
                teacher + target,
                forward,
                backward,
                pixel,
                feature,
                _losses(work),
                Stage(0, 0, _ADAMW_BYTES * params),
                Stage(0, 0, _EMA_BYTES * of_encoder),
            ),
            strict=True,
        )
    )


def count_params(work: Work) -> tuple[int, int]:
    """Parameters that are trained, and those of them that the teacher averages."""
    encoder = SIZES[work.size]
    of_encoder = _encoder_params(encoder["embed_dim"], encoder["depth"], work.patch_dim)
    widths = _decoder_widths(work)
    return of_encoder + sum(_decoder_params(encoder["embed_dim"], *each, work.decoder_depth) for each in widths), of_encoder


@dataclass(frozen=True, slots=True)
class CountBench:
    """What to count: each size at its ``img_size``, in a step of ``batch_size`` images."""

    sizes: dict[str, tuple[int, int]] = field(default_factory=lambda: dict(MODELS))
    batch_size: int = 256
    precision: str = "bf16"


def run_counts(bench: CountBench, ceilings: Ceilings | None = None, out: Path | None = None) -> dict[str, Any]:
    """Count, print a table for each size, with ``ceilings`` also the least time, and write the record to ``out``."""
    record: dict[str, Any] = {"commit": environment.git_commit(), "hardware": environment.describe_hardware()}
    record |= {"settings": asdict(bench), "ceilings": ceilings and asdict(ceilings), "counted": {}}
    for size, img_size in bench.sizes.items():
        work = Work(size, spec_at(img_size), bench.precision)
        stages = count_stages(work)
        rates = (ceilings.matrix_rate[bench.precision], ceilings.bandwidth) if ceilings else None
        rows = {
            name: {
                **stage._asdict(),
                "intensity": stage.intensity(bench.batch_size),
                "least_seconds": stage.seconds(bench.batch_size, *rates) if rates else None,
            }
            for name, stage in stages.items()
        }
        record["counted"][size] = {"img_size": img_size, "flops_per_image": work.flops, "stages": rows}
        _print(bench, size, img_size, stages, rates)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, files.to_json(record, indent=1) + "\n")
    return record


def _print(
    bench: CountBench, size: str, img_size: tuple[int, int], stages: dict[str, Stage], rates: tuple[float, float] | None
) -> None:
    title = f"{size} at {img_size[0]}x{img_size[1]}, {bench.precision}, a step of {bench.batch_size} images"
    columns = ["GFLOP/image", "MB/image", "MB/step", "FLOP/byte"] + ["least ms"] * (rates is not None)
    table = Table("stage", *columns, title=title)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    whole = Stage(0, 0)
    for stage in stages.values():
        whole += stage
    least = {name: 1000 * stage.seconds(bench.batch_size, *rates) for name, stage in stages.items()} if rates else {}
    for name, stage in {**stages, "a step": whole}.items():
        numbers = [stage.flops / 1e9, stage.bytes / 1e6, stage.step_bytes / 1e6, stage.intensity(bench.batch_size)]
        numbers += [least.get(name, sum(least.values()))] if rates else []
        table.add_row(name, *(f"{number:,.{3 if number < 10 else 1}f}" if number else "" for number in numbers))
    console = Console()
    console.print(table)
    if rates:
        console.print(f"at most {1000 * bench.batch_size / sum(least.values()):,.0f} images/s")


def spec_at(img_size: tuple[int, int]) -> RegionSpec:
    """The paper's regions and masks for images of (height, width) pixels. The shift keeps its share of the image."""
    half = (0.5, 0.5, 0.5)
    return RegionSpec(img_size, 16, half, half, img_size[0] // 4, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)


def _inputs(work: Work) -> Stage:
    """A cubic resize with at least four taps of rows and four of columns, and the target of Eq. (5).

    It reads a whole canvas and writes the patches of both regions. The plain form multiplies by dense
    matrices, whose zeros are not counted here.
    """
    spec = work.spec
    canvas_h, canvas_w = spec.canvas_size
    height, width = spec.img_size[0] + spec.max_shift, spec.img_size[1] + spec.max_shift // 2
    flops = 2 * 4 * 3 * (canvas_h * width + height * width)
    patches = COMPUTE_BYTES[work.precision] * (work.num_visible + work.num_patches) * work.patch_dim
    return Stage(flops, 3 * canvas_h * canvas_w + patches + _FP32 * work.num_patches * work.patch_dim)


def _encoder(num_patches: int, dim: int, depth: int, work: Work) -> tuple[Stage, Stage]:
    """An encoder that sees some patches: forward, with its last norm, and backward, which asks no gradient of the patches."""
    act, patch_dim, tokens = COMPUTE_BYTES[work.precision], work.patch_dim, 1 + num_patches
    embed = 2.0 * num_patches * patch_dim * dim
    embed_bytes = num_patches * (act * (patch_dim + dim) + (act + _FP32) * dim)  # the product; with positions, to the stream
    norm = (_FP32 + act) * tokens * dim
    forward, backward = _blocks(tokens, dim, depth, act)
    weights = depth * 12 * dim**2 + patch_dim * dim
    first = Stage(embed, embed_bytes + norm, _weight_bytes(work)[0] * weights)
    # The last norm's backward; the first product's reads its input and what comes back, which was rounded before.
    back = norm + _FP32 * tokens * dim + num_patches * ((_FP32 + act) * dim + act * (dim + patch_dim))
    return first + forward, Stage(embed, back, _weight_bytes(work)[1] * weights) + backward


def _decoder(work: Work, dim: int, out_dim: int) -> Stage:
    """A decoder, forward and backward."""
    act, encoder_dim, num_patches = COMPUTE_BYTES[work.precision], SIZES[work.size]["embed_dim"], work.num_patches
    visible = 1 + work.num_visible
    tokens = visible + num_patches
    linear = 2.0 * visible * encoder_dim * dim + 2.0 * num_patches * dim * out_dim
    forward, backward = _blocks(tokens, dim, work.decoder_depth, act, num_out=num_patches)
    into = act * visible * (encoder_dim + dim) + act * visible * dim + _FP32 * tokens * dim  # the product; the stream, written
    norm = (_FP32 + act) * num_patches * dim
    head = act * num_patches * (dim + out_dim)
    back = 2 * head + norm + _FP32 * tokens * dim + (_FP32 + act) * visible * dim + 2 * act * visible * (encoder_dim + dim)
    weights = 12 * work.decoder_depth * dim**2 + dim * (encoder_dim + out_dim)
    mine = Stage(3 * linear, into + norm + head + back, sum(_weight_bytes(work)) * weights)
    return mine + forward + backward


def _blocks(tokens: int, dim: int, depth: int, act: int, num_out: int | None = None) -> tuple[Stage, Stage]:
    """Transformer blocks, forward and backward, without their weights. ``act`` is the bytes of a number of the compute type.

    A token is ``dim`` numbers wide. The code below counts tokens: incoming ones for a norm, qkv and the reads of attention, and
    outgoing ones for the rest. With ``num_out`` the last block puts out only that many.
    """
    came = depth * tokens * dim
    went = came - (0 if num_out is None else (tokens - num_out) * dim)
    norm = 2 * _FP32 + 2 * act  # the stream and a branch in, their sum and the normalised operand out
    forward = came * (norm + act * (QKV + 3)) + went * (norm + act * (1 + OTHERS + (4 + 4)))  # attention's result, GELU
    norm = 3 * _FP32 + 2 * act  # the operand's gradient, the stream and its gradient in; that one out, also rounded
    # A linear layer's backward is two products: both read the gradient, one the weight, one the input.
    back = came * (norm + act * (2 * QKV + 3 + 3)) + went * (norm + act * (1 + 1 + 2 * OTHERS + (4 + 4 + 4)))
    flops = operations.transformer_flops(tokens, dim, depth, num_out=num_out)
    return Stage(flops, forward), Stage(2 * flops, back)


def _weight_bytes(work: Work) -> tuple[int, int]:
    """Bytes for each weight of a product in a step: forward and backward.

    In bf16 it is rounded and read, then read again, and its gradient is written and widened.
    """
    if work.precision == "fp32":
        return _FP32, 2 * _FP32
    return (_FP32 + 2) + 2, 2 + 2 + (2 + _FP32)


def _losses(work: Work) -> Stage:
    """Both losses: predictions and targets in, once forward and once backward, where gradients go out."""
    act, numbers = COMPUTE_BYTES[work.precision], work.num_patches * (work.patch_dim + SIZES[work.size]["embed_dim"])
    return Stage(0, numbers * (2 * (act + _FP32) + act))


def _encoder_params(dim: int, depth: int, patch_dim: int) -> int:
    return patch_dim * dim + 2 * dim + _block_params(dim, depth) + 2 * dim  # patches with bias, class token, norm


def _decoder_params(encoder_dim: int, dim: int, out_dim: int, depth: int) -> int:
    return encoder_dim * dim + 2 * dim + _block_params(dim, depth) + 2 * dim + dim * out_dim + out_dim


def _block_params(dim: int, depth: int) -> int:
    return depth * (12 * dim**2 + 13 * dim)


def _decoder_widths(work: Work) -> tuple[tuple[int, int], tuple[int, int]]:
    return (work.pixel_dim, work.patch_dim), (work.feature_dim, SIZES[work.size]["embed_dim"])

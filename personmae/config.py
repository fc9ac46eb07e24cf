"""Typed configuration: YAML files with ``_base_``, then ``section.key=value`` overrides, read into frozen models.

A default is overridden by ``_base_``, that by the file, and that by the command line. Only programs read these models.
Everything below the programs takes plain arguments. All sizes are global: values per rank follow from the world size.

The keys of ``pretrain`` are here. ``keys/downstream.py`` has those of fine-tuning and unsupervised training,
``keys/sections.py`` has the sections that all share, and ``keys/config_file.py`` reads and writes the files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from personmae.errors import OtherProgram, UserError
from personmae.keys.config_file import Tree, config_hash, dump_yaml, flatten, override, read, validate
from personmae.keys.downstream import (
    RANDOM,
    BenchmarkName,
    Cluster,
    Finetune,
    Memory,
    Unsupervised,
    completed_resume_key,
    with_normalisation,
)
from personmae.keys.mistakes import unknown_keys
from personmae.keys.sections import Checkpoint, Fraction, Metrics, Model, Precision, Range, Section, Size, Triple
from personmae.keys.values import Place
from personmae.system import locations

__all__ = [
    "PROGRAMS",
    "RANDOM",
    "BenchmarkName",
    "Checkpoint",
    "Cluster",
    "Finetune",
    "Fraction",
    "Memory",
    "Metrics",
    "Model",
    "OtherProgram",
    "Place",
    "Pretrain",
    "Range",
    "Section",
    "Size",
    "Triple",
    "Unsupervised",
    "completed_resume_key",
    "config_hash",
    "dump_yaml",
    "flatten",
    "load",
    "program_of",
    "with_normalisation",
]


class Decoders(Section):
    depth: int = Field(default=2, gt=0, description="ViT blocks in each decoder")
    pixel_dim: int | None = Field(default=None, gt=0, multiple_of=64, description="width; default min(512, embed_dim)")
    feature_dim: int | None = Field(default=None, gt=0, multiple_of=64, description="width; default embed_dim")
    visible_positions: bool = Field(
        default=False, description="visible tokens get their position again, as in MAE; in the paper mask tokens alone have one"
    )


class Regions(Section):
    max_shift: int = Field(
        default=64, ge=0, description="m of Eq. (1), in pixels of the height; the width shifts by half of it"
    )
    crop_scale: Range = Field(default=(0.8, 1.0), description="area of the global crop, as a share of the image")
    crop_ratio: Range = Field(default=(0.375, 0.667), description="width / height of the global crop")
    flip_prob: Fraction = Field(default=0.5, description="chance of a horizontal flip")

    @model_validator(mode="after")
    def _in_order(self) -> "Regions":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high or (name == "crop_scale" and high > 1):
                raise ValueError(f"{name}={[low, high]} must be [smallest, largest], a scale at most 1")
        return self


class Mask(Section):
    kind: Literal["block", "random", "person"] = Field(
        default="block",
        description="how the hidden patches are drawn; person: blocks that hide the same share of the middle columns each time",
    )
    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of RegionA's patches that is hidden; r of Eq. (3)")
    block_ratio: Fraction | None = Field(
        default=None,
        description="share of the patches that blocks may hide, the rest of ratio is random; default all; not for random",
    )
    min_block: int = Field(default=4, gt=0, description="smallest block, in patches")

    @model_validator(mode="after")
    def _blocks_are_part_of_it(self) -> "Mask":
        if self.block_ratio is not None and self.block_ratio > self.ratio:
            raise ValueError(f"block_ratio={self.block_ratio} must be at most ratio={self.ratio}; lower it or leave it out")
        return self


class Loss(Section):
    feature_weight: float = Field(default=1.0, ge=0, description="lambda of Eq. (8); 0 leaves the feature decoder out")
    beta: float = Field(default=2.0, gt=0, description="beta of the smooth-L1 of Eq. (7)")
    identity_weight: float = Field(
        default=0.0, ge=0, description="of a loss on the class tokens of both regions, beyond the paper; 0 for none"
    )
    identity_dim: int = Field(default=256, gt=0, description="width of the embeddings that it compares")
    identity_group: int = Field(
        default=64, gt=1, description="neighbouring images whose spread it looks at; a divisor of the micro-batch"
    )


class Target(Section):
    features: Literal["layer_norm", "raw", "position_centred", "image_centred"] = Field(
        default="layer_norm",
        description="what of the teacher's tokens is predicted: normalised, as they are, normalised less the mean at their "
        "position, or less the mean of their image too",
    )
    reduction: Literal["mean", "sum"] = Field(default="mean", description="over the channels of Eq. (7), which has no 1 / D")


class Teacher(Section):
    momentum: tuple[Fraction, Fraction] = Field(default=(0.999, 0.9999), description="gamma of Eq. (6): start and end")
    ramp_fraction: Fraction = Field(default=0.2, description="share of the run over which gamma rises linearly")
    horizon_scaling: bool = Field(
        default=False, description="keep (1 - gamma) * steps as in the paper's 204,100 steps, for much shorter runs"
    )


class Optim(Section):
    base_lr: float = Field(default=1.5e-4, gt=0, description="lr = base_lr * global_batch_size / 256")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate; overrides base_lr")
    min_lr: float = Field(default=1e-5, ge=0, description="where the cosine schedule ends")
    weight_decay: float = Field(default=0.05, ge=0, description="of AdamW; biases and norms have none")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="of AdamW")
    warmup_fraction: Fraction = Field(default=0.2, description="share of the run with a linear warm-up")
    max_norm: float | None = Field(default=None, gt=0, description="gradient clipping; none in the paper's family")


class Train(Section):
    global_batch_size: int = Field(default=2048, gt=0, description="images per optimizer step over all ranks")
    max_micro_batch_size: int = Field(default=256, gt=0, description="most images per rank and forward pass")
    epochs: float | None = Field(default=100, gt=0, description="passes over the shards; parts of one are allowed")
    total_steps: int | None = Field(default=None, gt=0, description="overrides epochs")
    precision: Precision = "auto"
    compile: bool = Field(default=True, description="torch.compile of student, teacher and region cutting")
    cuda_graphs: bool = Field(
        default=False, description="replay all of that as CUDA graphs: for small batches on many GPUs; needs the native engine"
    )
    crop_backend: Literal["torch", "triton"] = Field(
        default="torch", description="who cuts the regions on a GPU: torch's operations, or one Triton kernel, not yet timed"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none", description="what of the encoder the backward pass computes again instead of keeping it"
    )
    max_skipped_steps: int = Field(
        default=10, gt=0, description="steps in a row that may be skipped because a gradient is not finite"
    )
    spike_factor: float | None = Field(
        default=None, gt=1, description="go back to a checkpoint when the loss is so many times its running mean; default never"
    )
    max_rollbacks: int = Field(default=3, gt=0, description="how often that may happen before the run stops")
    log_every: int = Field(default=50, gt=0, description="steps between two log lines")


class Data(Section):
    shards: Place = Field(min_length=1, description="directory or s3://bucket/prefix of MDS shards")
    cache_dir: Place = Field(default="", description="where shards of an object store are kept; default RUN_DIR/shards")
    cache_limit_gb: float | None = Field(
        default=None, gt=0, description="most that the shards of this data set may take there, on each host; default no limit"
    )
    retry_seconds: float = Field(
        default=600, ge=0, description="how long reading goes on without a byte from the store before the run stops"
    )
    num_connections: int = Field(default=8, gt=0, description="shards fetched at once, per rank")
    prefetch_shards: int = Field(default=64, ge=0, description="shards opened beyond those in use")
    num_threads: int = Field(
        default=0, ge=0, description="decoding threads per rank; 0 for the cores divided by the local ranks"
    )
    prefetch_batches: int = Field(default=4, gt=0, description="decoded batches kept ready, per rank")
    shuffle_block_size: int = Field(default=1 << 18, gt=0, description="samples that are shuffled among each other")
    max_bad_ratio: Fraction = Field(default=0.01, description="share of unreadable images above which the run stops")


class Probe(Section):
    benchmark: BenchmarkName | None = Field(
        default=None,
        description="what frozen features find on it is logged at multiples of checkpoint.every_steps and at the end",
    )
    root: Place | None = Field(default=None, description="directory of that benchmark")

    @model_validator(mode="after")
    def _both_or_neither(self) -> "Probe":
        if (self.benchmark is None) != (self.root is None):
            raise ValueError(f"benchmark={self.benchmark} and root={self.root} belong together: give both or neither")
        return self


class Deepspeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=0, description="what is sharded: 1 moments, 2 gradients too, 3 parameters too"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="merged last into the generated DeepSpeed dict")


class Fsdp(Section):
    shard_size: int | None = Field(
        default=None, gt=0, description="ranks that share one copy of the states (HSDP); default all of them"
    )


class Engine(Section):
    name: Literal["native", "deepspeed", "fsdp"] = Field(
        default="deepspeed", description="what splits the work over ranks; each resumes the others' checkpoints"
    )
    deepspeed: Deepspeed = Deepspeed()
    fsdp: Fsdp = Fsdp()


class Pretrain(Section):
    """PersonMAE pre-training."""

    run_dir: Place = Field(min_length=1, description="logs, checkpoints and the resolved configuration")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of weights, sample order, crops and masks")
    data: Data
    model: Model = Model()
    decoders: Decoders = Decoders()
    regions: Regions = Regions()
    mask: Mask = Mask()
    loss: Loss = Loss()
    target: Target = Target()
    teacher: Teacher = Teacher()
    optim: Optim = Optim()
    train: Train = Train()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _hides_some_patches(self) -> "Pretrain":
        total = self.model.img_size[0] * self.model.img_size[1] // self.model.patch_size**2
        if not 0 < round(self.mask.ratio * total) < total:
            raise ValueError(f"mask.ratio={self.mask.ratio} must hide at least one of {total} patches and leave one visible")
        return self

    @model_validator(mode="after")
    def _graphs_of_compiled_code(self) -> "Pretrain":
        if self.train.cuda_graphs and not (self.train.compile and self.engine.name == "native"):
            raise ValueError(
                f"train.cuda_graphs needs train.compile=true and engine.name=native; they are {self.train.compile} and "
                f"{self.engine.name}"
            )
        return self

    def region_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.personmae.RegionSpec``: how images become regions."""
        model, mask = self.model, self.mask
        return {
            **model.model_dump(exclude={"size"}),
            **self.regions.model_dump(),
            "mask_kind": mask.kind,
            "mask_ratio": mask.ratio,
            "min_block": mask.min_block,
            "block_ratio": mask.block_ratio,
        }

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.personmae.PersonMAE``, without the precision."""
        return {
            "size": self.model.size,
            "patch_size": self.model.patch_size,
            "decoder_depth": self.decoders.depth,
            "pixel_dim": self.decoders.pixel_dim,
            "feature_dim": self.decoders.feature_dim,
            "feature_weight": self.loss.feature_weight,
            "beta": self.loss.beta,
            "reduction": self.target.reduction,
            "visible_positions": self.decoders.visible_positions,
            "identity_weight": self.loss.identity_weight,
            "identity_dim": self.loss.identity_dim,
            "identity_group": self.loss.identity_group,
        }

    def teacher_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.teacher.Teacher``, without what it is of."""
        return {"features": self.target.features, "class_token": self.loss.identity_weight > 0}

    def prepare_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.personmae.choose_prepare``."""
        train = self.train
        return {"crop_backend": train.crop_backend, "compiled": train.compile, "cuda_graphs": train.cuda_graphs}

    def resume_key(self) -> dict[str, Any]:
        """What makes a run the run it is, by dotted key; a checkpoint is only resumed where all of it agrees."""
        values = self.model_dump(mode="json", exclude={"run_dir", "engine", "checkpoint", "metrics", "probe"})
        values["data"] = {"shuffle_block_size": self.data.shuffle_block_size}
        values["train"] = {name: values["train"][name] for name in ("global_batch_size", "epochs", "total_steps", "precision")}
        return flatten(values)

    @staticmethod
    def resume_key_before() -> dict[str, Any]:
        """What ``resume_key`` has come to hold since there are checkpoints, as it was before: the defaults."""
        sections = {"decoders": Decoders(), "mask": Mask(), "loss": Loss(), "target": Target()}
        return flatten({name: section.model_dump(mode="json") for name, section in sections.items()})


PROGRAMS: dict[str, type[Section]] = {"pretrain": Pretrain, "finetune": Finetune, "unsupervised": Unsupervised}
ConfigT = TypeVar("ConfigT", bound=Section)


def load(
    kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = (), expand: Callable[[str], str] = locations.expand
) -> ConfigT:
    """Read ``path`` and its bases, apply ``section.key=value`` overrides, and validate; ``expand`` is for places.

    Raises:
        OtherProgram: the file is one for another program.
        UserError: the file is missing or not YAML, a key is unknown or a value is wrong; the key, its origin and the
            nearest valid key are named.
    """
    tree = read(path)
    try:
        override(tree, kind, overrides)
        return validate(kind, tree, expand)
    except UserError:
        program = _program_of(read(path), kind)
        if program and not (program == "suite" and "stages" in kind.model_fields):
            raise OtherProgram(str(path), program) from None
        raise


def program_of(path: str | Path) -> str:
    """The program that a file is for, by its keys, or ``suite``; empty where they do not tell.

    Raises:
        UserError: the file cannot be read.
    """
    return _program_of(read(path), None)


def _program_of(tree: Tree, wanted: type[Section] | None) -> str:
    """The program that knows the most keys of a tree; the wanted one, or none, where others know as many."""
    if "stages" in tree.values:
        return "suite"
    unknown = {name: len(unknown_keys(kind, tree.values)) for name, kind in PROGRAMS.items()}
    fewest = min(unknown.values())
    best = [name for name, number in unknown.items() if number == fewest]
    if wanted is None:
        return best[0] if len(best) == 1 else ""
    return best[0] if fewest < len(unknown_keys(wanted, tree.values)) else ""

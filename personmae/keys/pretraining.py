"""Keys of ``pretrain``."""

from typing import Any, Literal

from pydantic import Field, model_validator

from personmae.keys.config_file import flatten
from personmae.keys.downstream import RANDOM, BenchmarkName
from personmae.keys.sections import (
    Checkpoint,
    Fraction,
    LogEvery,
    MaxSkippedSteps,
    Metrics,
    Model,
    Precision,
    Range,
    Section,
)
from personmae.keys.values import Place


class Decoders(Section):
    """The two decoders: one predicts pixels (Eq. (5)), the other predicts features of the teacher (Eq. (7))."""

    depth: int = Field(default=2, gt=0, description="ViT blocks in each decoder")
    pixel_dim: int | None = Field(
        default=None, gt=0, multiple_of=64, description="width of the pixel decoder, by default min(512, the encoder's width)"
    )
    feature_dim: int | None = Field(
        default=None, gt=0, multiple_of=64, description="width of the feature decoder, by default the encoder's width"
    )
    visible_positions: bool = Field(
        default=False,
        description="add positions to visible tokens again, as MAE does. In the paper mask tokens alone have them",
    )


class Regions(Section):
    """How an image becomes RegionA and RegionB (Eq. (1) and (2))."""

    max_shift: int = Field(
        default=64, ge=0, description="largest shift of RegionB, m of Eq. (1): pixels in height, half as many in width"
    )
    crop_scale: Range = Field(
        default=(0.8, 1.0), description="smallest and largest area of the global crop, as a share of the image"
    )
    crop_ratio: Range = Field(default=(0.375, 0.667), description="smallest and largest width / height of the global crop")
    flip_prob: Fraction = Field(default=0.5, description="probability of a horizontal flip")

    @model_validator(mode="after")
    def _in_order(self) -> "Regions":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high or (name == "crop_scale" and high > 1):
                raise ValueError(f"{name}={[low, high]} must be [smallest, largest], a scale at most 1")
        return self


class Mask(Section):
    """Which patches of RegionA are hidden (Eq. (3))."""

    kind: Literal["block", "random", "person"] = Field(
        default="block",
        description="block: rectangles, as in the paper. random: single patches. person: rectangles that hide the same share "
        "of the middle columns in every mask",
    )
    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of RegionA's patches that is hidden, r of Eq. (3)")
    block_ratio: Fraction | None = Field(
        default=None,
        description="share of all patches that blocks may hide, by default the whole ratio. The rest is hidden as single "
        "patches. For block and person",
    )
    min_block: int = Field(default=4, gt=0, description="area of the smallest block, in patches")

    @model_validator(mode="after")
    def _blocks_are_part_of_it(self) -> "Mask":
        if self.block_ratio is not None and self.block_ratio > self.ratio:
            raise ValueError(f"block_ratio={self.block_ratio} must be at most ratio={self.ratio}. Lower it or leave it out")
        return self


class Loss(Section):
    """The loss of pre-training: Eq. (8), and an optional term on class tokens beyond the paper."""

    feature_weight: float = Field(
        default=1.0, ge=0, description="lambda of Eq. (8), the weight of the feature loss. 0 removes the feature decoder"
    )
    beta: float = Field(default=2.0, gt=0, description="beta of the smooth-L1 loss in Eq. (7)")
    identity_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of a VICReg loss between the class tokens of both regions. 0 for none, as in the paper",
    )
    identity_dim: int = Field(default=256, gt=0, description="width of the embeddings that this loss compares")
    identity_group: int = Field(
        default=64,
        gt=1,
        description="neighbouring images over which this loss takes variance and covariance, a divisor of a rank's micro-batch",
    )


class Target(Section):
    """What the feature decoder predicts: tokens of the teacher (Eq. (7))."""

    features: Literal["layer_norm", "raw", "position_centred", "image_centred"] = Field(
        default="layer_norm",
        description="layer_norm: normalised tokens, as in the paper. raw: unchanged. position_centred: normalised, minus the "
        "mean at their position. image_centred: minus the mean of their image too",
    )
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="how Eq. (7) joins the channels of a token. The paper's formula has no 1 / D"
    )


class Teacher(Section):
    """The momentum encoder (Eq. (6))."""

    momentum: tuple[Fraction, Fraction] = Field(
        default=(0.999, 0.9999), description="gamma of Eq. (6) at the start and at the end"
    )
    ramp_fraction: Fraction = Field(default=0.2, description="share of the run in which gamma rises linearly")
    horizon_scaling: bool = Field(
        default=False, description="scale gamma so that (1 - gamma) * steps is as in the paper's 204,100 steps, for short runs"
    )


class Optim(Section):
    """AdamW, and a cosine schedule with a linear warm-up."""

    base_lr: float = Field(
        default=1.5e-4, gt=0, description="learning rate for 256 images: lr = base_lr * train.global_batch_size / 256"
    )
    lr: float | None = Field(default=None, gt=0, description="peak learning rate, used instead of base_lr")
    min_lr: float = Field(default=1e-5, ge=0, description="learning rate at the end of the cosine schedule")
    weight_decay: float = Field(default=0.05, ge=0, description="weight decay. Biases, norms and tokens have none")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="decay of AdamW's first and second moments")
    warmup_fraction: Fraction = Field(default=0.2, description="share of the run with a linear warm-up")
    max_norm: float | None = Field(
        default=None, gt=0, description="norm to which gradients are clipped, by default not clipped"
    )


class Train(Section):
    """Batches, length and execution of the training loop."""

    global_batch_size: int = Field(default=2048, gt=0, description="images per optimizer step, over all ranks")
    max_micro_batch_size: int = Field(default=256, gt=0, description="most images per rank in one forward pass")
    epochs: float | None = Field(default=100, gt=0, description="passes over the shards, whole or not")
    total_steps: int | None = Field(default=None, gt=0, description="optimizer steps, used instead of epochs")
    precision: Precision = "auto"
    compile: bool = Field(default=True, description="compile student, teacher and region cropping with torch.compile")
    cuda_graphs: bool = Field(
        default=False,
        description="replay steps as CUDA graphs, for small batches on many GPUs. Needs compile and engine.name=native",
    )
    crop_backend: Literal["torch", "triton"] = Field(
        default="torch", description="what crops the regions on a GPU: torch's operations, or one Triton kernel, not yet timed"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none", description="which activations of the encoder the backward pass computes again to save memory"
    )
    max_skipped_steps: MaxSkippedSteps = 10
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="roll back to a checkpoint when the loss exceeds its running mean by this factor. Off by default",
    )
    max_rollbacks: int = Field(default=3, gt=0, description="rollbacks before the run stops")
    log_every: LogEvery = 50


class Data(Section):
    """The training shards, and how they are read."""

    shards: Place = Field(min_length=1, description="directory or s3://bucket/prefix of MDS shards")
    cache_dir: Place = Field(default="", description="directory for shards of an object store, by default RUN_DIR/shards")
    cache_limit_gb: float | None = Field(
        default=None,
        gt=0,
        description="most 10^9 bytes that this data set may take in cache_dir on each host, by default no limit",
    )
    retry_seconds: float = Field(
        default=600, ge=0, description="how long the store may send nothing before the run stops, in seconds"
    )
    num_connections: int = Field(default=8, gt=0, description="shards that each rank fetches at once")
    prefetch_shards: int = Field(default=64, ge=0, description="shards that each rank opens before their use")
    num_threads: int = Field(
        default=0, ge=0, description="decoding threads per rank. 0: the cores divided by the ranks of the host"
    )
    prefetch_batches: int = Field(default=4, gt=0, description="decoded micro-batches that each rank keeps ready")
    shuffle_block_size: int = Field(default=1 << 18, gt=0, description="samples that are shuffled among each other")
    max_bad_ratio: Fraction = Field(default=0.01, description="largest share of unreadable images before the run stops")


class Probe(Section):
    """A retrieval test of the frozen encoder during pre-training. docs/method.md defines its scores."""

    benchmark: BenchmarkName | None = Field(
        default=None,
        description="benchmark to probe at multiples of checkpoint.every_steps and at the end, by default none",
    )
    root: Place | None = Field(default=None, description="directory of that benchmark")

    @model_validator(mode="after")
    def _both_or_neither(self) -> "Probe":
        if (self.benchmark is None) != (self.root is None):
            raise ValueError(f"benchmark={self.benchmark} and root={self.root} belong together: give both or neither")
        return self


class Deepspeed(Section):
    """Options of the DeepSpeed engine."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="what is sharded. 0: nothing. 1: optimizer states. 2: gradients too. 3: parameters too",
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="merged last into the generated DeepSpeed configuration")


class Fsdp(Section):
    """Options of the FSDP engine."""

    shard_size: int | None = Field(
        default=None, gt=0, description="ranks that share one copy of parameters and states (HSDP), by default all ranks"
    )


class Engine(Section):
    """What distributes the work over ranks. Each engine resumes the checkpoints of the others."""

    name: Literal["native", "deepspeed", "fsdp"] = Field(default="deepspeed", description="the engine")
    deepspeed: Deepspeed = Deepspeed()
    fsdp: Fsdp = Fsdp()


class Pretrain(Section):
    """PersonMAE pre-training on shards of unlabelled crops."""

    run_dir: Place = Field(min_length=1, description="directory for logs, checkpoints and the resolved configuration")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of weights, sample order, crops and masks")
    init: Place = Field(
        default=RANDOM,
        min_length=1,
        description="where the encoder's weights come from: a run, a checkpoint, what 'personmae import' wrote, or 'random'",
    )
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
                f"train.cuda_graphs needs train.compile=true and engine.name=native. They are {self.train.compile} and "
                f"{self.engine.name}"
            )
        return self

    def region_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.inputs.RegionSpec``: how images become regions."""
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
        """Arguments of ``model.teacher.Teacher``, without the encoder."""
        return {"features": self.target.features, "class_token": self.loss.identity_weight > 0}

    def prepare_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.compiled.choose_prepare``."""
        train = self.train
        return {"crop_backend": train.crop_backend, "compiled": train.compile, "cuda_graphs": train.cuda_graphs}

    def resume_key(self) -> dict[str, Any]:
        """The settings that must agree before a checkpoint is resumed, by dotted key, without first weights and data."""
        values = self.model_dump(mode="json", exclude={"run_dir", "init", "engine", "checkpoint", "metrics", "probe"})
        values["data"] = {"shuffle_block_size": self.data.shuffle_block_size}
        values["train"] = {name: values["train"][name] for name in ("global_batch_size", "epochs", "total_steps", "precision")}
        return flatten(values)

    @staticmethod
    def resume_key_before() -> dict[str, Any]:
        """Defaults of the keys that older checkpoints lack in their resume key."""
        sections = {"decoders": Decoders(), "mask": Mask(), "loss": Loss(), "target": Target()}
        return flatten({name: section.model_dump(mode="json") for name, section in sections.items()})

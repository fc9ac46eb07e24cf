"""Typed configuration: YAML files with ``_base_``, then ``section.key=value`` overrides, into frozen models.

Precedence: a default is overridden by ``_base_``, that by the file, that by the command line. Only programs read these
models; everything below them takes plain arguments. All sizes are global: per-rank values are derived from the world size.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from personmae.errors import UserError

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]  # (height, width) in pixels
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Fraction = Annotated[float, Field(ge=0, le=1)]
Triple = tuple[float, float, float]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    size: Literal["micro", "small", "base", "large"] = Field(
        default="base", description="encoder: micro, ViT-S, ViT-B or ViT-L"
    )
    img_size: Size = Field(default=(256, 128), description="(height, width) in pixels")
    patch_size: int = Field(default=16, gt=0)
    mean: Triple = Field(default=(0.5, 0.5, 0.5), description="input normalisation; it travels with the checkpoint")
    std: Triple = Field(default=(0.5, 0.5, 0.5), description="input normalisation; it travels with the checkpoint")

    @model_validator(mode="after")
    def _whole_patches(self) -> "Model":
        if any(side % self.patch_size for side in self.img_size):
            raise ValueError(f"img_size={self.img_size} must be multiples of patch_size={self.patch_size}")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be above 0")
        return self


class Decoders(Section):
    depth: int = Field(default=2, gt=0, description="ViT blocks in each decoder")
    pixel_dim: int | None = Field(default=None, gt=0, multiple_of=64, description="width; default min(512, embed_dim)")
    feature_dim: int | None = Field(default=None, gt=0, multiple_of=64, description="width; default embed_dim")


class Regions(Section):
    max_shift: int = Field(
        default=64, ge=0, description="m of Eq. (1), in pixels of the height; the width shifts by half of it"
    )
    crop_scale: Range = Field(default=(0.8, 1.0), description="area of the global crop, as a share of the picture")
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
    kind: Literal["block", "random"] = "block"
    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of RegionA's patches that is hidden; r of Eq. (3)")
    min_block: int = Field(default=4, gt=0, description="smallest block, in patches")


class Loss(Section):
    feature_weight: float = Field(default=1.0, ge=0, description="lambda of Eq. (8); 0 leaves the teacher out")
    beta: float = Field(default=2.0, gt=0, description="beta of the smooth-L1 of Eq. (7)")


class Teacher(Section):
    momentum: tuple[Fraction, Fraction] = Field(default=(0.999, 0.9999), description="gamma of Eq. (6): start and end")
    ramp_fraction: Fraction = Field(default=0.2, description="share of the run over which gamma rises linearly")
    horizon_scaling: bool = Field(
        default=False, description="keep (1 - gamma) * steps as in the paper's 204,100 steps, for much shorter runs"
    )


class Optim(Section):
    base_lr: float = Field(default=1.5e-4, gt=0, description="lr = base_lr * global_batch_size / 256")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate; overrides base_lr")
    min_lr: float = Field(default=1e-5, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    warmup_fraction: Fraction = Field(default=0.2, description="share of the run with a linear warm-up")
    max_norm: float | None = Field(default=None, gt=0, description="gradient clipping; none in the paper's family")


class Train(Section):
    global_batch_size: int = Field(default=2048, gt=0, description="images per optimizer step over all ranks")
    max_micro_batch_size: int = Field(default=256, gt=0, description="most images per rank and forward pass")
    epochs: float | None = Field(default=100, gt=0)
    total_steps: int | None = Field(default=None, gt=0, description="overrides epochs")
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = Field(default=True, description="torch.compile of student, teacher and region cutting")
    cuda_graphs: bool = Field(
        default=False, description="replay all of that as CUDA graphs: for small batches on many GPUs; needs the native engine"
    )
    cutter: Literal["torch", "triton"] = Field(
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
    shards: str = Field(description="directory or s3://bucket/prefix of MDS shards")
    cache_dir: str = Field(default="", description="where shards of an object store are kept; default RUN_DIR/shards")
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
    prefetch_batches: int = Field(default=4, gt=0)
    shuffle_block_size: int = Field(default=1 << 18, gt=0, description="samples that are shuffled among each other")
    max_bad_ratio: Fraction = Field(default=0.01, description="share of unreadable pictures above which the run stops")


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
    name: Literal["native", "deepspeed", "fsdp"] = "deepspeed"
    deepspeed: Deepspeed = Deepspeed()
    fsdp: Fsdp = Fsdp()


class Checkpoint(Section):
    every_steps: int = Field(default=1000, gt=0, description="save at multiples of so many steps")
    every_seconds: float | None = Field(default=None, gt=0, description="and so long after the last save, by rank 0's clock")
    keep_last: int = Field(default=2, gt=0, description="the newest ones, which are kept")
    keep_every: int | None = Field(default=None, gt=0, description="multiples of so many steps are saved and kept for good")
    store: str | None = Field(default=None, description="s3://bucket/prefix of this run alone: a copy of each checkpoint")
    retry_seconds: float = Field(default=600, gt=0, description="how long the upload of a checkpoint is tried again")
    close_seconds: float = Field(default=120, gt=0, description="how long the end of a run waits for uploads")
    resume: Literal["auto", "none"] = Field(default="auto", description="auto: continue the newest valid checkpoint of run_dir")

    @field_validator("store")
    @classmethod
    def _is_an_object_store(cls, store: str | None) -> str | None:
        if store is not None and "://" not in store:
            raise ValueError("must be a location like s3://bucket/prefix, or null; a run's own directory is run_dir")
        return store

    def writer_arguments(self) -> dict[str, Any]:
        """Arguments of ``keeper.Writer``, but for where."""
        return self.model_dump(include={"keep_last", "keep_every", "store", "retry_seconds", "close_seconds"})

    def schedule_arguments(self) -> dict[str, Any]:
        """Arguments of ``keeper.Schedule``."""
        return self.model_dump(include={"every_steps", "every_seconds", "keep_every"})


class Metrics(Section):
    port: int = Field(
        default=0, ge=0, lt=1 << 16, description="Prometheus endpoint of each host where no agent has one; 0 for none"
    )
    peak_tflops: float | None = Field(
        default=None, gt=0, description="10^12 operations a second of one GPU at most; default what is known of it"
    )
    gpu: bool = Field(default=True, description="ask NVML about the GPUs too; false where DCGM tells of them")
    linger_seconds: float = Field(
        default=0, ge=0, description="how long the endpoint of a complete run stays, for the last numbers to be scraped"
    )

    def meter_arguments(self) -> dict[str, Any]:
        """Arguments of ``meter.Meter``."""
        return self.model_dump(include={"port", "gpu", "linger_seconds"})


class Pretrain(Section):
    """PersonMAE pre-training."""

    run_dir: str = Field(description="logs, checkpoints and the resolved configuration")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    data: Data
    model: Model = Model()
    decoders: Decoders = Decoders()
    regions: Regions = Regions()
    mask: Mask = Mask()
    loss: Loss = Loss()
    teacher: Teacher = Teacher()
    optim: Optim = Optim()
    train: Train = Train()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

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

    def view_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.personmae.View``: how pictures become regions."""
        model, mask = self.model, self.mask
        return {
            **model.model_dump(exclude={"size"}),
            **self.regions.model_dump(),
            "mask_kind": mask.kind,
            "mask_ratio": mask.ratio,
            "min_block": mask.min_block,
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
        }

    def prepare_arguments(self) -> dict[str, Any]:
        """Arguments of ``model.personmae.choose_prepare``."""
        train = self.train
        return {"cutter": train.cutter, "compiled": train.compile, "cuda_graphs": train.cuda_graphs}

    def identity(self) -> dict[str, Any]:
        """What makes a run the run it is, by dotted key; a checkpoint is only resumed where all of it agrees."""
        values = self.model_dump(mode="json", exclude={"run_dir", "engine", "checkpoint", "metrics"})
        values["data"] = {"shuffle_block_size": self.data.shuffle_block_size}
        values["train"] = {name: values["train"][name] for name in ("global_batch_size", "epochs", "total_steps", "precision")}
        return flatten(values)


BenchmarkName = Literal[
    "market1501",
    "occluded_duke",
    "dukemtmc",
    "cuhk03_np_detected",
    "cuhk03_np_labeled",
    "msmt17",
    "msmt17_v1",
    "msmt17_v2",
    "folder",
    "csv",
]


class Head(Section):
    kind: Literal["mgn", "bnneck"] = "mgn"
    embed_dim: int = Field(default=256, gt=0, description="width of each of MGN's eight embeddings")
    split: Literal["adaptive", "chunk"] = Field(default="adaptive", description="how MGN cuts rows that 3 does not divide")
    pool: Literal["cls", "mean", "cls_mean"] = Field(default="cls", description="token pooling of the bnneck head")
    classifier: Literal["linear", "circle", "arc"] = Field(
        default="linear", description="scores of classes: linear, or cosines with the margin of circle loss or ArcFace"
    )


class Augment(Section):
    pad: int = Field(default=10, ge=0, description="pixels of padding before the random crop")
    flip_prob: Fraction = 0.5
    erase_prob: Fraction = 0.5


class Batch(Section):
    num_ids: int = Field(default=16, gt=0, description="P: identities in a global batch")
    num_instances: int = Field(default=16, gt=1, description="K: images of each")


class FinetuneOptim(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=5e-3, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    momentum: Fraction = Field(default=0.9, description="of SGD")
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    warmup_fraction: Fraction = Field(default=1 / 6, description="share of the run with a linear warm-up")
    max_norm: float | None = Field(default=None, gt=0)


class FinetuneTrain(Section):
    epochs: int = Field(default=60, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    label_smoothing: Fraction = 0.1
    drop_path_rate: Fraction = 0.1
    bn_group_size: int = Field(
        default=64, gt=1, description="images that batch normalisation takes together, whatever the number of ranks"
    )
    max_skipped_steps: int = Field(
        default=10, gt=0, description="steps in a row that may be skipped because a gradient is not finite"
    )
    log_every: int = Field(default=50, gt=0)


class Finetune(Section):
    """Supervised person re-identification on one benchmark."""

    run_dir: str
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    benchmark: BenchmarkName = "market1501"
    root: str = Field(description="directory of the benchmark")
    train_on_val: bool = Field(default=True, description="MSMT17: whether list_val belongs to training")
    init: str = Field(description="a pre-training run or checkpoint, or 'random'")
    model: Model = Model()
    head: Head = Head()
    batch: Batch = Batch()
    augment: Augment = Augment()
    optim: FinetuneOptim = FinetuneOptim()
    train: FinetuneTrain = FinetuneTrain()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    def identity(self) -> dict[str, Any]:
        """What makes a run the run it is, by dotted key, besides the weights and the data that it starts from."""
        return _downstream_identity(self)


class Feature(Section):
    pool: Literal["mean", "cls", "cls_mean"] = Field(
        default="mean", description="token pooling; pre-training gives the class token no loss of its own"
    )


class Cluster(Section):
    k1: int = Field(default=30, gt=1, description="neighbours whose neighbours are compared")
    k2: int = Field(default=6, gt=0, description="neighbours over which an encoding is averaged")
    eps: float = Field(default=0.6, gt=0, lt=1, description="largest Jaccard distance of neighbours in a cluster")
    min_samples: int = Field(default=4, gt=0, description="pictures that near together begin a cluster")
    per_camera: bool = Field(
        default=False, description="compare features standardised within each camera: a weak encoder else clusters by camera"
    )


class Memory(Section):
    mode: Literal["mean", "hard"] = Field(
        default="mean", description="which pictures of a batch move a centroid: all in turn, or the least similar"
    )
    momentum: Fraction = Field(default=0.1, description="what a centroid keeps of itself at each move")
    temperature: float = Field(default=0.05, gt=0)


class UnsupervisedBatch(Section):
    num_ids: int = Field(default=32, gt=0, description="P: clusters in a global batch")
    num_instances: int = Field(default=8, gt=1, description="K: images of each")


class UnsupervisedOptim(Section):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=7e-3, gt=0)
    momentum: Fraction = 0.9
    weight_decay: float = Field(default=5e-4, ge=0)
    decay_every_epochs: int = Field(default=20, gt=0)
    decay: Fraction = Field(default=0.1, description="by which the rate is multiplied then")
    max_norm: float | None = Field(default=None, gt=0)


class UnsupervisedTrain(Section):
    epochs: int = Field(default=50, gt=0)
    iters_per_epoch: int = Field(default=200, gt=0, description="batches between two clusterings")
    precision: Literal["bf16", "fp32"] = "bf16"
    drop_path_rate: Fraction = 0.3
    bn_group_size: int = Field(
        default=64, gt=1, description="images that batch normalisation takes together, whatever the number of ranks"
    )
    extract_batch_size: int = Field(default=256, gt=0, description="images per rank and forward pass before a clustering")
    max_skipped_steps: int = Field(
        default=10, gt=0, description="steps in a row that may be skipped because a gradient is not finite"
    )
    log_every: int = Field(default=50, gt=0)


class Unsupervised(Section):
    """Person re-identification without labels (USL), or with those of another benchmark behind it (UDA)."""

    run_dir: str
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    benchmark: BenchmarkName = "market1501"
    root: str = Field(description="directory of the benchmark")
    train_on_val: bool = Field(default=True, description="MSMT17: whether list_val belongs to training")
    init: str = Field(description="a pre-training run (USL), a fine-tuned one (UDA), or a checkpoint of either")
    model: Model = Model()
    feature: Feature = Feature()
    cluster: Cluster = Cluster()
    memory: Memory = Memory()
    batch: UnsupervisedBatch = UnsupervisedBatch()
    augment: Augment = Augment()
    optim: UnsupervisedOptim = UnsupervisedOptim()
    train: UnsupervisedTrain = UnsupervisedTrain()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    def identity(self) -> dict[str, Any]:
        """What makes a run the run it is, by dotted key, besides the weights and the data that it starts from."""
        return _downstream_identity(self)


DownstreamT = TypeVar("DownstreamT", bound=Finetune | Unsupervised)


def with_normalisation(settings: DownstreamT, mean: Sequence[float], std: Sequence[float]) -> DownstreamT:
    """The settings with the normalisation that came with the weights."""
    return settings.model_copy(update={"model": settings.model.model_copy(update={"mean": tuple(mean), "std": tuple(std)})})


def _downstream_identity(settings: Finetune | Unsupervised) -> dict[str, Any]:
    """All but where things lie and how the work is watched or shared; weights and data count by their digests."""
    values = settings.model_dump(mode="json", exclude={"run_dir", "root", "init", "checkpoint", "metrics"})
    for name in ("log_every", "max_skipped_steps", "extract_batch_size"):
        values["train"].pop(name, None)
    if settings.init != "random":  # else they come with the weights
        del values["model"]["mean"], values["model"]["std"]
    return flatten(values)


ConfigT = TypeVar("ConfigT", bound=Section)


def load(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` and its bases, apply ``section.key=value`` overrides, and validate.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value is wrong; the key, its origin and the
            nearest valid key are named.
    """
    values, origins = _read(Path(path), seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"an override must look like section.key=value; got '{override}'")
        _merge(values, _nest(key.split("."), _parse_yaml(text, f"the value of {key}")), origins, "the command line")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(kind, error, origins, str(path))) from None


def config_hash(config: Section) -> str:
    """A short digest of the resolved configuration."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


def dump_yaml(config: Section) -> str:
    """The resolved configuration as YAML that ``load`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise UserError(f"_base_ must not lead back to the same file; {path} does")
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none there"
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"a configuration file is required; {path} {found} (yaml files beside it: {known})")
    try:
        own = _parse_yaml(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be a text file in UTF-8: {error}") from None
    if not isinstance(own, dict):
        raise UserError(f"{path} must hold 'key: value' lines; it holds {type(own).__name__}")
    base = own.pop("_base_", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"_base_ in {path} must name one file; it is {base!r}")
    values, origins = _read(path.parent / base, (*seen, path.resolve())) if base else ({}, {})
    _merge(values, own, origins, str(path))
    return values, origins


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} must be YAML: {error}") from None


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nest(keys[1:], value) if len(keys) > 1 else value}


def _merge(into: dict[str, Any], new: dict[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origins, origin, f"{path}.")
        else:
            into[key] = value
            origins[path] = origin


def _explain(kind: type[BaseModel], error: ValidationError, origins: dict[str, str], file: str) -> str:
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    path = ".".join(keys)
    origin = next((origins[".".join(keys[:n])] for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in origins), file)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, _paths(kind), n=1, cutoff=0.0)
        return f"unknown key '{path}' in {origin}; the nearest known key is '{near[0]}'"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return f"'{'.'.join(keys[:-1])}' in {origin} needs more values; got {first['input']!r}"
    if first["type"] == "missing":
        return f"'{path}' is required and {file} does not set it; add it to the file or give {path}=VALUE"
    return f"'{path}' in {origin}: {first['msg'].removeprefix('Value error, ')}; got {_shortened(first['input'])}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += _paths(field.annotation, f"{prefix}{name}.")
    return paths

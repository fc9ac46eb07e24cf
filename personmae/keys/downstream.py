"""The keys of ``finetune`` and ``unsupervised``."""

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from personmae.keys.config_file import flatten
from personmae.keys.renamed import print_new_name
from personmae.keys.sections import (
    BnGroupSize,
    Checkpoint,
    Fraction,
    LogEvery,
    MaxSkippedSteps,
    Metrics,
    Model,
    Precision,
    Section,
)
from personmae.keys.values import Place
from personmae.keys.yaml_text import Plain

RANDOM: Final = "random"  # an ``init`` without weights
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
    """The head on the encoder and its classification loss."""

    kind: Literal["mgn", "bnneck"] = Field(
        default="mgn", description="mgn: three branches with eight embeddings. bnneck: one embedding with BNNeck"
    )
    embed_dim: int = Field(default=256, gt=0, description="width of each of MGN's eight embeddings")
    split: Literal["adaptive", "chunk"] = Field(
        default="adaptive", description="how MGN splits rows of patches into thirds where 3 does not divide them"
    )
    pool: Literal["cls", "mean", "cls_mean"] = Field(default="cls", description="token pooling of the bnneck head")
    classifier: Literal["linear", "circle", "arc"] = Field(
        default="linear",
        description="scores of classes. linear: a linear layer. circle, arc: cosines with the margin of circle loss or ArcFace",
    )


class Augment(Section):
    """Random changes to training images."""

    pad: int = Field(default=10, ge=0, description="padding before the random crop, in pixels")
    flip_prob: Fraction = Field(default=0.5, description="probability of a horizontal flip")
    erase_prob: Fraction = Field(default=0.5, description="probability that a random rectangle is erased")


class Batch(Section):
    """A global batch: P identities with K images each."""

    num_ids: int = Field(default=16, gt=0, description="P, identities in a global batch")
    num_instances: int = Field(default=16, gt=1, description="K, images of each identity")


class FinetuneOptim(Section):
    """The optimizer, and a cosine schedule with a linear warm-up."""

    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer")
    lr: float = Field(default=5e-3, gt=0, description="peak learning rate of the head")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the cosine schedule")
    weight_decay: float = Field(default=0.05, ge=0, description="weight decay. Biases, norms and tokens have none")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="decay of AdamW's first and second moments")
    momentum: Fraction = Field(default=0.9, description="momentum of SGD")
    layer_decay: float = Field(
        default=0.65, gt=0, le=1, description="learning rate of each block, as a factor of that of the block above"
    )
    warmup_fraction: Fraction = Field(default=1 / 6, description="share of the run with a linear warm-up")
    max_norm: float | None = Field(
        default=None, gt=0, description="norm to which gradients are clipped, by default not clipped"
    )


class FinetuneTrain(Section):
    """Length and execution of fine-tuning."""

    epochs: int = Field(default=60, gt=0, description="passes over the training identities")
    precision: Precision = "auto"
    compile: bool = Field(default=False, description="compile the network with torch.compile")
    label_smoothing: Fraction = Field(default=0.1, description="label smoothing of the classification loss")
    drop_path_rate: Fraction = Field(
        default=0.1, description="probability that an image skips the last block. It falls linearly to 0 at the first block"
    )
    bn_group_size: BnGroupSize = 64
    max_skipped_steps: MaxSkippedSteps = 10
    log_every: LogEvery = 50


class OverlappingModel(Model):
    """The encoder and its input."""

    stride: int | None = Field(
        default=None,
        gt=0,
        description="pixels from one patch to the next, by default patch_size. Below it patches overlap: TransReID has 12",
    )

    @model_validator(mode="after")
    def _without_gaps(self) -> "OverlappingModel":
        if self.stride and self.stride > self.patch_size:
            raise ValueError(f"stride={self.stride} must be at most patch_size={self.patch_size}, or pixels are left out")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches."""
        h, w = ((side - self.patch_size) // (self.stride or self.patch_size) + 1 for side in self.img_size)
        return h, w


class Downstream(Section):
    """What both programs on a benchmark begin with."""

    run_dir: Place = Field(min_length=1, description="directory for logs, checkpoints, results and the resolved configuration")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of new weights, batches and augmentation")
    benchmark: BenchmarkName = Field(
        default="market1501", description="layout of the data set. folder and csv are for your own data"
    )
    root: Place = Field(min_length=1, description="directory of the benchmark")
    train_on_val: bool = Field(default=True, description="MSMT17: train on list_val too")


class Finetune(Downstream):
    """Supervised person re-identification on one benchmark."""

    init: Place = Field(min_length=1, description="where the weights come from: a pre-training run or checkpoint, or 'random'")
    model: OverlappingModel = OverlappingModel()
    head: Head = Head()
    batch: Batch = Batch()
    augment: Augment = Augment()
    optim: FinetuneOptim = FinetuneOptim()
    train: FinetuneTrain = FinetuneTrain()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    def resume_key(self) -> dict[str, Any]:
        """The settings that must agree before a checkpoint is resumed, by dotted key, without weights and data."""
        return _downstream_resume_key(self)


class Feature(Section):
    """The feature that is clustered and searched."""

    pool: Literal["mean", "cls", "cls_mean", "rows"] = Field(
        default="mean",
        description="token pooling. cls has no loss of its own in pre-training. rows: a mean for each row of patches",
    )
    columns: Literal["all", "middle"] = Field(
        default="middle", description="for rows: all columns of patches, or the middle half of the width"
    )
    whiten_retrieval: bool = Field(
        default=False,
        description="whiten query and gallery per camera in the evaluation, with cluster.whiten_dim and whiten_shrinkage",
    )


class Cluster(Section):
    """Pseudo-labels: DBSCAN on k-reciprocal Jaccard distances."""

    k1: int = Field(default=30, gt=1, description="nearest neighbours from which k-reciprocal neighbours are taken")
    k2: int = Field(default=6, gt=0, description="nearest neighbours over which an encoding is averaged")
    eps: float = Field(default=0.6, gt=0, lt=1, description="largest Jaccard distance between neighbours in a cluster")
    min_samples: int = Field(
        default=4, gt=0, description="images within eps, itself included, that make an image a core of a cluster"
    )
    per_camera: Literal["none", "standardise", "whiten"] = Field(
        default="none",
        description="what is removed from features within each camera, since a weak encoder clusters by camera otherwise",
    )
    whiten_dim: int = Field(default=64, gt=0, description="principal components that whitening keeps")
    whiten_shrinkage: Fraction = Field(
        default=0.3, description="share of the identity matrix in a camera's covariance, for cameras with few images"
    )
    drop_one_camera: bool = Field(default=False, description="treat clusters seen by one camera only as outliers")

    @field_validator("per_camera", mode="before")
    @classmethod
    def _was_a_truth_value(cls, value: Any) -> Any:
        truth = Plain(value).value
        if not isinstance(truth, bool):
            return value
        new = "standardise" if truth else "none"
        print_new_name(f"cluster.per_camera={str(value).lower()}", f"cluster.per_camera={new}")
        return new


class Memory(Section):
    """The memory that features are compared with, and its loss."""

    kind: Literal["cluster", "camera"] = Field(
        default="cluster", description="cluster: a centroid per cluster. camera: one per camera of a cluster (camera proxies)"
    )
    mode: Literal["mean", "hard"] = Field(
        default="mean", description="which images of a batch update a centroid: all in turn, or the least similar one"
    )
    momentum: Fraction = Field(default=0.1, description="share of its old value that a centroid keeps in an update")
    temperature: float = Field(default=0.05, gt=0, description="temperature by which similarities to centroids are divided")
    intra_weight: float = Field(default=1.0, ge=0, description="camera proxies: weight of the loss within an image's camera")
    inter_weight: float = Field(default=0.5, ge=0, description="camera proxies: weight of the loss across cameras")
    num_negatives: int = Field(
        default=50, gt=0, description="camera proxies: most similar proxies of other clusters in the loss across cameras"
    )


class UnsupervisedBatch(Section):
    """A global batch: P clusters with K images each."""

    num_ids: int = Field(default=32, gt=0, description="P, clusters in a global batch")
    num_instances: int = Field(default=8, gt=1, description="K, images of each cluster")


class UnsupervisedOptim(Section):
    """The optimizer and its schedule."""

    kind: Literal["sgd", "adamw"] = Field(default="sgd", description="the optimizer")
    lr: float = Field(default=7e-3, gt=0, description="learning rate at the start")
    momentum: Fraction = Field(default=0.9, description="momentum of SGD")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="decay of AdamW's first and second moments")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay. Biases, norms and tokens have none")
    schedule: Literal["step", "cosine"] = Field(
        default="step", description="step: cuts at fixed intervals. cosine: half a cosine down to 0 over the whole run"
    )
    decay_every_epochs: int = Field(default=20, gt=0, description="schedule=step: epochs between two cuts")
    decay: Fraction = Field(default=0.1, description="schedule=step: factor of each cut")
    max_norm: float | None = Field(
        default=None, gt=0, description="norm to which gradients are clipped, by default not clipped"
    )


class UnsupervisedTrain(Section):
    """Length and execution of unsupervised training."""

    epochs: int = Field(default=50, gt=0, description="clusterings, each followed by iters_per_epoch batches")
    iters_per_epoch: int = Field(default=200, gt=0, description="batches between two clusterings")
    precision: Precision = "auto"
    drop_path_rate: Fraction = Field(
        default=0.3, description="probability that an image skips the last block. It falls linearly to 0 at the first block"
    )
    bn_group_size: BnGroupSize = 64
    extract_batch_size: int = Field(
        default=256, gt=0, description="images per rank in one forward pass when features are extracted for clustering"
    )
    max_skipped_steps: MaxSkippedSteps = 10
    log_every: LogEvery = 50


class Unsupervised(Downstream):
    """Person re-identification without labels (USL), or after fine-tuning on another benchmark (UDA)."""

    init: Place = Field(
        min_length=1,
        description="where the weights come from: a pre-training run (USL), a fine-tuned one (UDA), a checkpoint, or 'random'",
    )
    model: OverlappingModel = OverlappingModel()
    feature: Feature = Feature()
    cluster: Cluster = Cluster()
    memory: Memory = Memory()
    batch: UnsupervisedBatch = UnsupervisedBatch()
    augment: Augment = Augment()
    optim: UnsupervisedOptim = UnsupervisedOptim()
    train: UnsupervisedTrain = UnsupervisedTrain()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    def resume_key(self) -> dict[str, Any]:
        """The settings that must agree before a checkpoint is resumed, by dotted key, without weights and data."""
        return _downstream_resume_key(self)


WithModelT = TypeVar("WithModelT", bound=Section)


def completed_resume_key(kind: type[Finetune | Unsupervised], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved resume key with today's names, and defaults for the options that it lacks."""
    if not saved:
        return saved
    found = kind(run_dir="-", root="-", init="-").resume_key() | saved
    if isinstance(per_camera := saved.get("cluster.per_camera"), bool):
        found["cluster.per_camera"] = "standardise" if per_camera else "none"
    return found


def with_normalisation(settings: WithModelT, mean: Sequence[float], std: Sequence[float]) -> WithModelT:
    """The settings of a program with the normalisation that came with the weights."""
    model: Model = vars(settings)["model"]
    return settings.model_copy(update={"model": model.model_copy(update={"mean": tuple(mean), "std": tuple(std)})})


def _downstream_resume_key(settings: Finetune | Unsupervised) -> dict[str, Any]:
    """All settings but paths and those that change no result. Weights and data count by their digests."""
    values = settings.model_dump(mode="json", exclude={"run_dir", "root", "init", "checkpoint", "metrics"})
    for name in ("log_every", "max_skipped_steps", "extract_batch_size"):
        values["train"].pop(name, None)
    if settings.init != RANDOM:  # else they come with the weights
        del values["model"]["mean"], values["model"]["std"]
    return flatten(values)

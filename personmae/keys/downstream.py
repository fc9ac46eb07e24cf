"""Keys of ``finetune`` and ``unsupervised``."""

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeVar

from pydantic import Field, field_validator

from personmae.keys.config_file import flatten
from personmae.keys.renamed import print_new_name
from personmae.keys.sections import Checkpoint, Fraction, Metrics, Model, Precision, Section
from personmae.keys.values import Place
from personmae.keys.yaml_text import Plain

RANDOM: Final = "random"  # an ``init`` that stands for no weights at all
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
    kind: Literal["mgn", "bnneck"] = Field(default="mgn", description="MGN with eight embeddings, or one with BNNeck")
    embed_dim: int = Field(default=256, gt=0, description="width of each of MGN's eight embeddings")
    split: Literal["adaptive", "chunk"] = Field(default="adaptive", description="how MGN cuts rows that 3 does not divide")
    pool: Literal["cls", "mean", "cls_mean"] = Field(default="cls", description="token pooling of the bnneck head")
    classifier: Literal["linear", "circle", "arc"] = Field(
        default="linear", description="scores of classes: linear, or cosines with the margin of circle loss or ArcFace"
    )


class Augment(Section):
    pad: int = Field(default=10, ge=0, description="pixels of padding before the random crop")
    flip_prob: Fraction = Field(default=0.5, description="chance of a horizontal flip")
    erase_prob: Fraction = Field(default=0.5, description="chance that a rectangle is erased")


class Batch(Section):
    num_ids: int = Field(default=16, gt=0, description="P: identities in a global batch")
    num_instances: int = Field(default=16, gt=1, description="K: images of each")


class FinetuneOptim(Section):
    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer")
    lr: float = Field(default=5e-3, gt=0, description="peak learning rate, of the head")
    min_lr: float = Field(default=0.0, ge=0, description="where the cosine schedule ends")
    weight_decay: float = Field(default=0.05, ge=0, description="biases and norms have none")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    momentum: Fraction = Field(default=0.9, description="of SGD")
    layer_decay: float = Field(
        default=0.65, gt=0, le=1, description="each block's rate is so many times that of the block above it"
    )
    warmup_fraction: Fraction = Field(default=1 / 6, description="share of the run with a linear warm-up")
    max_norm: float | None = Field(default=None, gt=0, description="gradient clipping; default none")


class FinetuneTrain(Section):
    epochs: int = Field(default=60, gt=0, description="passes over the training identities")
    precision: Precision = "auto"
    compile: bool = Field(default=False, description="torch.compile of the network")
    label_smoothing: Fraction = Field(default=0.1, description="of the classification loss")
    drop_path_rate: Fraction = Field(default=0.1, description="chance that an image skips the last block, less in those before")
    bn_group_size: int = Field(
        default=64, gt=1, description="images that batch normalisation takes together, whatever the number of ranks"
    )
    max_skipped_steps: int = Field(
        default=10, gt=0, description="steps in a row that may be skipped because a gradient is not finite"
    )
    log_every: int = Field(default=50, gt=0, description="steps between two log lines")


class Finetune(Section):
    """Supervised person re-identification on one benchmark."""

    run_dir: Place = Field(min_length=1, description="logs, checkpoints, results and the resolved configuration")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of new weights, batches and augmentation")
    benchmark: BenchmarkName = Field(
        default="market1501", description="layout of the data set; folder and csv are for your own"
    )
    root: Place = Field(min_length=1, description="directory of the benchmark")
    train_on_val: bool = Field(default=True, description="MSMT17: whether list_val belongs to training")
    init: Place = Field(min_length=1, description="a pre-training run or checkpoint, or 'random'")
    model: Model = Model()
    head: Head = Head()
    batch: Batch = Batch()
    augment: Augment = Augment()
    optim: FinetuneOptim = FinetuneOptim()
    train: FinetuneTrain = FinetuneTrain()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    def resume_key(self) -> dict[str, Any]:
        """What makes a run the run it is, by dotted key, besides the weights and the data that it starts from."""
        return _downstream_resume_key(self)


class Feature(Section):
    pool: Literal["mean", "cls", "cls_mean", "rows"] = Field(
        default="mean",
        description="token pooling; pre-training gives the class token no loss of its own; rows: a mean for each row",
    )
    columns: Literal["all", "middle"] = Field(
        default="middle", description="of rows: all columns, or the middle half of the width"
    )
    whiten_retrieval: bool = Field(
        default=False,
        description="whiten query and gallery per camera in the evaluation, with cluster.whiten_dim and whiten_shrinkage",
    )


class Cluster(Section):
    k1: int = Field(default=30, gt=1, description="neighbours whose neighbours are compared")
    k2: int = Field(default=6, gt=0, description="neighbours over which an encoding is averaged")
    eps: float = Field(default=0.6, gt=0, lt=1, description="largest Jaccard distance of neighbours in a cluster")
    min_samples: int = Field(default=4, gt=0, description="images that near together begin a cluster")
    per_camera: Literal["none", "standardise", "whiten"] = Field(
        default="none", description="what is taken out of features within each camera: a weak encoder else clusters by camera"
    )
    whiten_dim: int = Field(default=64, gt=0, description="principal components that whitening keeps")
    whiten_shrinkage: Fraction = Field(
        default=0.3, description="share of the identity in a camera's covariance, against too few images of it"
    )
    drop_one_camera: bool = Field(default=False, description="take clusters that only one camera has seen for outliers")

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
    kind: Literal["cluster", "camera"] = Field(
        default="cluster", description="a centroid for each cluster, or for each camera of a cluster (camera proxies)"
    )
    mode: Literal["mean", "hard"] = Field(
        default="mean", description="which images of a batch move a centroid: all in turn, or the least similar"
    )
    momentum: Fraction = Field(default=0.1, description="what a centroid keeps of itself at each move")
    temperature: float = Field(default=0.05, gt=0, description="by which similarities to centroids are divided")
    intra_weight: float = Field(default=1.0, ge=0, description="camera proxies: weight of the loss within an image's camera")
    inter_weight: float = Field(default=0.5, ge=0, description="camera proxies: weight of the loss across cameras")
    num_negatives: int = Field(default=50, gt=0, description="camera proxies: most similar ones of other clusters it looks at")


class UnsupervisedBatch(Section):
    num_ids: int = Field(default=32, gt=0, description="P: clusters in a global batch")
    num_instances: int = Field(default=8, gt=1, description="K: images of each")


class UnsupervisedOptim(Section):
    kind: Literal["sgd", "adamw"] = Field(default="sgd", description="the optimizer")
    lr: float = Field(default=7e-3, gt=0, description="learning rate at the start")
    momentum: Fraction = Field(default=0.9, description="of SGD")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=5e-4, ge=0, description="biases and norms have none")
    schedule: Literal["step", "cosine"] = Field(
        default="step", description="cuts of the rate, or half a cosine down to 0 over the whole run"
    )
    decay_every_epochs: int = Field(default=20, gt=0, description="step: epochs between two cuts of the rate")
    decay: Fraction = Field(default=0.1, description="step: by which the rate is multiplied then")
    max_norm: float | None = Field(default=None, gt=0, description="gradient clipping; default none")


class UnsupervisedTrain(Section):
    epochs: int = Field(default=50, gt=0, description="clusterings, each followed by iters_per_epoch batches")
    iters_per_epoch: int = Field(default=200, gt=0, description="batches between two clusterings")
    precision: Precision = "auto"
    drop_path_rate: Fraction = Field(default=0.3, description="chance that an image skips the last block, less in those before")
    bn_group_size: int = Field(
        default=64, gt=1, description="images that batch normalisation takes together, whatever the number of ranks"
    )
    extract_batch_size: int = Field(default=256, gt=0, description="images per rank and forward pass before a clustering")
    max_skipped_steps: int = Field(
        default=10, gt=0, description="steps in a row that may be skipped because a gradient is not finite"
    )
    log_every: int = Field(default=50, gt=0, description="steps between two log lines")


class Unsupervised(Section):
    """Person re-identification without labels (USL), or with those of another benchmark behind it (UDA)."""

    run_dir: Place = Field(min_length=1, description="logs, checkpoints, results and the resolved configuration")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of new weights, batches and augmentation")
    benchmark: BenchmarkName = Field(
        default="market1501", description="layout of the data set; folder and csv are for your own"
    )
    root: Place = Field(min_length=1, description="directory of the benchmark")
    train_on_val: bool = Field(default=True, description="MSMT17: whether list_val belongs to training")
    init: Place = Field(
        min_length=1, description="a pre-training run (USL), a fine-tuned one (UDA), a checkpoint of one, or 'random'"
    )
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

    def resume_key(self) -> dict[str, Any]:
        """What makes a run the run it is, by dotted key, besides the weights and the data that it starts from."""
        return _downstream_resume_key(self)


DownstreamT = TypeVar("DownstreamT", bound=Finetune | Unsupervised)


def completed_resume_key(kind: type[Finetune | Unsupervised], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved identity in the words of today, with options that it does not know at their defaults."""
    if not saved:
        return saved
    found = kind(run_dir="-", root="-", init="-").resume_key() | saved
    if isinstance(per_camera := saved.get("cluster.per_camera"), bool):
        found["cluster.per_camera"] = "standardise" if per_camera else "none"
    return found


def with_normalisation(settings: DownstreamT, mean: Sequence[float], std: Sequence[float]) -> DownstreamT:
    """The settings with the normalisation that came with the weights."""
    return settings.model_copy(update={"model": settings.model.model_copy(update={"mean": tuple(mean), "std": tuple(std)})})


def _downstream_resume_key(settings: Finetune | Unsupervised) -> dict[str, Any]:
    """All but where things lie and how the work is watched or shared; weights and data count by their digests."""
    values = settings.model_dump(mode="json", exclude={"run_dir", "root", "init", "checkpoint", "metrics"})
    for name in ("log_every", "max_skipped_steps", "extract_batch_size"):
        values["train"].pop(name, None)
    if settings.init != RANDOM:  # else they come with the weights
        del values["model"]["mean"], values["model"]["std"]
    return flatten(values)

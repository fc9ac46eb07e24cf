"""What evaluations write, as a report reads it: ``result.json``, ``rank_lists.json`` and ``queries.json``."""

from typing import Annotated, Any

from pydantic import BaseModel, PlainValidator


def _as_text(value: Any) -> str:
    """Any string: pydantic's own check refuses file names that are not UTF-8."""
    if not isinstance(value, str):
        raise ValueError("Input should be a valid string")
    return value


Text = Annotated[str, PlainValidator(_as_text)]


class Scores(BaseModel):
    """The scores of one reading of a probe, in [0, 1]."""

    mAP: float  # noqa: N815
    rank1: float


class CameraPairs(BaseModel):
    """Scores in [0, 1] by the camera of the query (rows) and that of its matches, None where no query has a match."""

    query_cameras: list[int]
    gallery_cameras: list[int]
    mAP: list[list[float | None]]  # noqa: N815
    rank1: list[list[float | None]]
    num_queries: list[list[int]]


class Latency(BaseModel):
    """The time of a model alone, and on what."""

    milliseconds: float  # of one image
    images_per_second: float  # of a batch
    batch_size: int
    precision: str
    device: str
    threads: int
    hardware: dict[str, Any] = {}

    def __str__(self) -> str:
        """On what, in words."""
        hardware = self.device if self.device != "cpu" else f"{self.hardware.get('cpu', 'cpu')}, {self.threads} threads"
        return f"{hardware}, {self.precision}, batches of {self.batch_size}"


class TrainedOn(BaseModel):
    """What a run was trained on. Digest and title are of the test set that belongs to its training images."""

    benchmark: str | None = None
    root: Text | None = None
    benchmark_digest: str | None = None
    benchmark_title: Text | None = None
    labels: bool = True


class Result(BaseModel):
    """The measurements of ``finetune`` and ``evaluate``, with scores in [0, 1]. What older records lack is None or empty."""

    name: Text
    init: Text
    benchmark: str
    root: Text
    mAP: float  # noqa: N815 - the field's name for it
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815
    num_queries: int
    num_valid: int
    num_gallery: int
    seconds: float
    commit: str | None = None
    rerank: str = "none"
    whiten: dict[str, Any] | None = None  # how features were whitened per camera, where they were
    cmc: list[float] = []
    benchmark_digest: str | None = None
    benchmark_title: Text | None = None
    synthetic: bool | None = None
    counts: dict[str, tuple[int, int]] = {}
    checkpoint: Text | None = None
    step: int | None = None
    unfinished: str | None = None  # how far an evaluated run had come, such as "step 3 of 4"
    identity: dict[str, Any] = {}
    digest: str | None = None  # of the checkpoint
    run: Text | None = None  # that an evaluation is of
    trained_on: TrainedOn | None = None
    random: dict[str, Any] = {}  # size, img_size and seed of random weights that were drawn for an evaluation
    camera_pairs: CameraPairs | None = None
    latency: Latency | None = None
    probe: dict[str, Scores] = {}  # of frozen features: rows, whose scores stand above too, and lda


class RankList(BaseModel):
    """One query and its nearest gallery images. Paths are absolute, or relative to ``RankLists.root``."""

    query: Text
    gallery: list[Text]
    correct: list[bool]


class RankLists(BaseModel):
    root: Text
    entries: list[RankList]


class Queries(BaseModel):
    """AP of every query in their order, None where a query has no match."""

    benchmark_digest: str | None = None
    ap: list[float | None]

"""Sections that the configurations of several programs share, and the types of their values."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from personmae import normalisation
from personmae.keys.values import Place

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]  # (height, width) in pixels
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Fraction = Annotated[float, Field(ge=0, le=1)]
Triple = tuple[float, float, float]
Precision = Annotated[
    Literal["auto", "bf16", "fp32"],
    Field(description="arithmetic of forward and backward. auto: bf16 where the device computes it natively, else fp32"),
]
BnGroupSize = Annotated[
    int, Field(gt=1, description="images that batch normalisation normalises together, for any number of ranks")
]
MaxSkippedSteps = Annotated[
    int,
    Field(gt=0, description="consecutive steps with a non-finite gradient that are skipped before the run stops"),
]
LogEvery = Annotated[int, Field(gt=0, description="steps between two records of metrics.jsonl")]


class Section(BaseModel):
    """A section of a configuration. The docstring of each one is its description in ``personmae keys --markdown``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """The encoder and its input."""

    size: Literal["micro", "tiny", "small", "base", "large"] = Field(
        default="base", description="the encoder: micro, ViT-T, ViT-S, ViT-B or ViT-L"
    )
    img_size: Size = Field(default=(256, 128), description="(height, width) in pixels")
    patch_size: int = Field(default=16, gt=0, description="side of a square patch, in pixels")
    mean: Triple = Field(
        default=(0.5, 0.5, 0.5), description="subtracted from red, green and blue in [0, 1]. Checkpoints keep it"
    )
    std: Triple = Field(default=(0.5, 0.5, 0.5), description="red, green and blue are divided by it. Checkpoints keep it")

    @model_validator(mode="after")
    def _whole_patches(self) -> "Model":
        if any(side % self.patch_size for side in self.img_size):
            raise ValueError(f"img_size={self.img_size} must be multiples of patch_size={self.patch_size}")
        if wrong := normalisation.fault(self.mean, self.std):
            raise ValueError(wrong)
        return self


class Checkpoint(Section):
    """When checkpoints are saved, which are kept, and what a restarted run does with them."""

    every_steps: int = Field(default=1000, gt=0, description="save at multiples of this number of steps")
    every_seconds: float | None = Field(
        default=None, gt=0, description="save too when this many seconds have passed since the last save, by rank 0's clock"
    )
    keep_last: int = Field(default=2, gt=0, description="how many of the newest checkpoints are kept")
    keep_every: int | None = Field(
        default=None, gt=0, description="save at multiples of this number of steps too, and keep those for good"
    )
    upload_to: Place | None = Field(
        default=None, description="s3://bucket/prefix of this run alone, for a copy of each checkpoint, by default none"
    )
    retry_seconds: float = Field(default=600, gt=0, description="how long a failed upload is tried again, in seconds")
    close_seconds: float = Field(default=120, gt=0, description="how long the end of a run waits for uploads, in seconds")
    resume: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: resume from the newest valid checkpoint. none: start a new run and set the old one aside",
    )
    rebuild_moments: bool = Field(
        default=False, description="where only the optimizer's moments are damaged, resume with new ones"
    )

    @field_validator("upload_to")
    @classmethod
    def _is_an_object_store(cls, place: str | None) -> str | None:
        if place is not None and "://" not in place:
            raise ValueError("must be a location like s3://bucket/prefix, or null. A run's own directory is run_dir")
        return place.rstrip("/") if place else place

    def writer_arguments(self) -> dict[str, Any]:
        """Arguments of ``writer.Writer``, without the run directory."""
        return self.model_dump(include={"keep_last", "keep_every", "upload_to", "retry_seconds", "close_seconds"})

    def start_arguments(self) -> dict[str, Any]:
        """Arguments of ``start_anew.goes_on``, without the run directory."""
        return self.model_dump(include={"resume", "upload_to"})

    def resume_arguments(self) -> dict[str, Any]:
        """Arguments of ``resume_point.newest_for_all``, without the run directory."""
        return self.model_dump(include={"upload_to", "rebuild_moments"})

    def schedule_arguments(self) -> dict[str, Any]:
        """Arguments of ``writer.Schedule``."""
        return self.model_dump(include={"every_steps", "every_seconds", "keep_every"})


class Metrics(Section):
    """The Prometheus endpoint of a host on which no agent serves one. docs/metrics.md lists the metrics."""

    port: int = Field(default=0, ge=0, lt=1 << 16, description="port of the endpoint. 0 for none")
    host: str = Field(default="127.0.0.1", description="address on which the endpoint listens, or all for every interface")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="most 10^12 operations per second of one GPU, by default from a table of known GPUs"
    )
    gpu: bool = Field(default=True, description="export the GPUs' metrics from NVML. false where DCGM exports them")
    linger_seconds: float = Field(
        default=0, ge=0, description="how long the endpoint stays after a complete run, for a last scrape, in seconds"
    )

    def rank_metrics_arguments(self) -> dict[str, Any]:
        """Arguments of ``rank_metrics.RankMetrics``."""
        return self.model_dump(include={"port", "host", "gpu", "linger_seconds"})

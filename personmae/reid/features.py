"""Features of a whole image set for search: of a model, and of baselines without training, which a model has to beat."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from personmae import dist
from personmae.errors import Diverged, Stopped
from personmae.monitor.progress import EVERY_SECONDS, Pace, duration
from personmae.reid.rows import standardise_per_camera as standardise_per_camera
from personmae.reid.transforms import ImageSet, normalise

NUM_STRIPES = 6
NUM_BINS = 8
BIN_RANGE = 3.0  # bins cover this many standard deviations to either side of the image's mean
SIDE_SHARE = 3 / 16  # of the width, left out on either side: there is more background than person
THUMBNAIL_SIZE = (16, 4)  # (height, width) in pixels of what is left of the middle half of an image


@runtime_checkable
class Extractor(Protocol):
    """What turns normalised images (B, 3, H, W) into features (B, ``feature_dim``)."""

    feature_dim: int
    training: bool

    def features(self, images: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


def extract(
    model: Extractor,
    image_set: ImageSet,
    *,
    batch_size: int,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    stopped: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = lambda _: None,
) -> Float[Tensor, "N F"]:
    """The model's features in fp32 on the CPU, in the order of the set. ``dtype`` below fp32 is used through autocast.

    Called by all ranks together: each works on its share, and all get the whole. The model is put into evaluation mode and
    back. ``stopped`` is asked before each batch, Progress of this rank is logged every few seconds.

    Raises:
        UserError: an image cannot be read.
        Stopped: ``stopped`` was true on a rank.
    """
    was_training = model.training
    model.eval()
    ours = dist.share(len(image_set))
    features = torch.empty(ours.stop - ours.start, model.feature_dim)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            batches = _batches(image_set, batch_size, ours, log)
            for _ in range(0, dist.largest_share(len(image_set)), batch_size):  # as many on each rank
                if dist.any_rank(stopped()):
                    raise Stopped("while features were extracted")
                for block, images in itertools.islice(batches, 1):
                    features[block] = model.features(normalise(images.to(device), mean, std)).cpu()
    finally:
        model.train(was_training)
    return dist.gather_rows(features, len(image_set))


def require_finite(features: Float[Tensor, "N F"], step: int) -> None:
    """Raise Diverged where features of a model in training are not finite numbers."""
    if bad := int((~features.isfinite()).any(dim=1).sum()):
        raise Diverged(f"{bad} of {len(features)} features are not finite at step {step}. Lower optim.lr")


@contextlib.contextmanager
def timed(log: Callable[[str], None], work: str) -> Iterator[None]:
    """Say that a long work begins, and how many seconds it took."""
    log(f"{work} ...")
    start = time.monotonic()
    yield
    log(f"{work}: {time.monotonic() - start:.1f} s")


def colour_histogram(image_set: ImageSet, *, batch_size: int = 256) -> Float[Tensor, "N F"]:
    """Colour histograms: six horizontal stripes of the middle, 8 bins for each of RGB, square-rooted (F = 144).

    Each image's channels are standardised first. docs/decisions.md has the reasons.

    Raises:
        UserError: an image cannot be read.
    """
    return torch.cat([_stripe_histograms(images) for _, images in _batches(image_set, batch_size)]).sqrt()


def thumbnail(image_set: ImageSet, *, batch_size: int = 256) -> Float[Tensor, "N F"]:
    """The middle half of each image's width, shrunk to 16 x 4 pixels, which are means over areas (F = 3 * 64, 0 ... 255).

    Raises:
        UserError: an image cannot be read.
    """
    return torch.cat([_shrunk_middle(images) for _, images in _batches(image_set, batch_size)])


def _batches(
    image_set: ImageSet, batch_size: int, part: slice | None = None, log: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[slice, UInt8[Tensor, "B 3 H W"]]]:
    """Images of a part of the set, and their places in that part. Progress is logged every few seconds."""
    part = part or slice(0, len(image_set))
    pace, total = Pace(0), part.stop - part.start
    for start in range(part.start, part.stop, batch_size):
        stop = min(start + batch_size, part.stop)
        done = start - part.start
        if done and pace.seconds_since_mark >= EVERY_SECONDS:
            pace.mark(done)
            log(f"extracting: {done:,} of {total:,} images, {duration(pace.left(total) or 0)} to go")
        yield slice(done, stop - part.start), image_set.load(range(start, stop))


def _shrunk_middle(images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
    side = images.shape[3] // 4
    middle = images[..., side : images.shape[3] - side].float()
    return F.adaptive_avg_pool2d(middle, THUMBNAIL_SIZE).flatten(1)


def _stripe_histograms(images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
    """Share of the pixels of each (stripe, channel) that falls in each bin."""
    b, channels, height, width = images.shape
    middle = images[:, :, :, round(width * SIDE_SHARE) : round(width * (1 - SIDE_SHARE))].float()
    std, mean = torch.std_mean(images.float(), dim=(2, 3), keepdim=True)
    standardised = ((middle - mean) / (std + 1) / (2 * BIN_RANGE) + 0.5).clamp(0, 1)
    bins = (standardised * NUM_BINS).long().clamp(max=NUM_BINS - 1)  # (B, C, H, W')
    stripe = (torch.arange(height) * NUM_STRIPES // height)[:, None]
    cell = (torch.arange(b)[:, None] * NUM_STRIPES)[..., None, None] + stripe
    cell = cell * channels + torch.arange(channels)[:, None, None]
    counts = torch.bincount((cell * NUM_BINS + bins).flatten(), minlength=b * NUM_STRIPES * channels * NUM_BINS)
    histograms = counts.reshape(-1, NUM_BINS).float()
    return (histograms / histograms.sum(dim=1, keepdim=True).clamp(min=1)).reshape(b, -1)

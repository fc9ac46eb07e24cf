"""Search features of a whole image set: from a model, and from colour alone, the baseline that a model has to beat."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from personmae.reid.heads import ReIDModel
from personmae.reid.transforms import ImageSet, normalise

NUM_STRIPES = 6
NUM_BINS = 16


def extract(
    model: ReIDModel,
    image_set: ImageSet,
    *,
    batch_size: int,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "N F"]:
    """L2-normalised fp32 features on the CPU, in the order of the set; ``dtype`` below fp32 is used through autocast.

    The model is put into evaluation mode and back.

    Raises:
        UserError: an image cannot be read.
    """
    was_training = model.training
    model.eval()
    features = torch.empty(len(image_set), model.feature_dim)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            for block, images in _batches(image_set, batch_size):
                features[block] = model.features(normalise(images.to(device), mean, std)).cpu()
    finally:
        model.train(was_training)
    return features


def colour_histogram(
    image_set: ImageSet, camids: Int[np.ndarray, " N"], *, normalise_per_camera: bool, batch_size: int = 256
) -> Float[Tensor, "N F"]:
    """L2-normalised colour histograms: six horizontal stripes, 16 bins for each channel of RGB and HSV, square-rooted.

    With ``normalise_per_camera`` each bin is standardised within each camera, which takes out the camera's own colours;
    give query and gallery as one set, so that both are standardised alike.

    Raises:
        UserError: an image cannot be read.
    """
    parts = [_stripe_histograms(images) for _, images in _batches(image_set, batch_size)]
    features = torch.cat(parts).sqrt()
    if normalise_per_camera:
        features = standardise_per_camera(features, camids)
    return F.normalize(features, dim=1)


def standardise_per_camera(features: Float[Tensor, "N F"], camids: Int[np.ndarray, " N"]) -> Float[Tensor, "N F"]:
    """Subtract each camera's mean and divide by its standard deviation, channel by channel."""
    standardised = torch.empty_like(features)
    for camid in np.unique(camids):
        rows = torch.from_numpy(camids == camid)
        std, mean = torch.std_mean(features[rows], dim=0, correction=0)
        standardised[rows] = (features[rows] - mean) / std.clamp(min=1e-6)  # an empty bin stays zero
    return standardised


def _batches(image_set: ImageSet, batch_size: int) -> Iterator[tuple[slice, UInt8[Tensor, "B 3 H W"]]]:
    for start in range(0, len(image_set), batch_size):
        block = slice(start, min(start + batch_size, len(image_set)))
        yield block, image_set.load(range(block.start, block.stop))


def _stripe_histograms(images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
    """Share of the pixels of each (stripe, channel) that falls in each bin."""
    b, _, height, width = images.shape
    rgb = images.permute(0, 2, 3, 1).contiguous().numpy()
    tall = rgb.reshape(b * height, width, 3)  # one image below the other: colour conversion does not see the borders
    hsv = cv2.cvtColor(tall, cv2.COLOR_RGB2HSV_FULL).reshape(rgb.shape)
    bins = torch.from_numpy(np.concatenate([rgb, hsv], axis=-1)).long() * NUM_BINS // 256  # (B, H, W, 6)
    num_channels = bins.shape[-1]
    stripe = torch.arange(height)[:, None, None] * NUM_STRIPES // height
    cell = (torch.arange(b)[:, None, None, None] * NUM_STRIPES + stripe) * num_channels + torch.arange(num_channels)
    size = b * NUM_STRIPES * num_channels * NUM_BINS
    counts = torch.bincount((cell * NUM_BINS + bins).flatten(), minlength=size)
    histograms = counts.reshape(-1, NUM_BINS).float()
    return (histograms / histograms.sum(dim=1, keepdim=True).clamp(min=1)).reshape(b, -1)

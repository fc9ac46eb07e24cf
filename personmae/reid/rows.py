"""Rows of patch tokens as a feature, and two ways to remove the camera from any feature. Labels are never used here.

A person stands upright in every crop, so a row of patches is a part of the body. The mean of all rows would mix the parts.
Shapes: B images of a batch, N of a set, L = h * w patch tokens of width D, F channels of a feature.
"""

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personmae.errors import UserError

Columns = Literal["all", "middle"]
FEWEST_TO_STANDARDISE: Final = 4  # images that a camera needs before it is described by its own mean and deviation
FEWEST_TO_WHITEN: Final = 16  # and before it is by its own covariance
EXACT_CHANNELS: Final = 2048  # up to here the covariance is decomposed whole; beyond that it would take minutes


def row_features(tokens: Float[Tensor, "B L D"], grid: tuple[int, int], columns: Columns) -> Float[Tensor, "B F"]:
    """The mean of each row of patch tokens, from top to bottom, one after the other (F = h * D), in fp32.

    ``grid`` is (h, w). "middle" takes the middle half of the columns: a quarter of the width, rounded down, is left out on
    either side, where the background is. The class token is not among ``tokens``.
    """
    side = {"all": 0, "middle": grid[1] // 4}[columns]
    maps = tokens.unflatten(1, grid)[:, :, side : grid[1] - side]  # (B, h, w', D)
    return maps.float().mean(dim=2).flatten(1)


def standardise_per_camera(
    features: Float[Tensor, "N F"], camids: Int[np.ndarray, " N"], *, fewest: int = 1
) -> Float[Tensor, "N F"]:
    """Subtract each camera's mean and divide by its standard deviation, channel by channel.

    A camera of fewer than ``fewest`` images has those of the whole set.
    """
    standardised = torch.empty_like(features)
    for rows, known_by in _cameras(camids, fewest):
        std, mean = torch.std_mean(features[known_by], dim=0, correction=0)
        standardised[rows] = (features[rows] - mean) / std.clamp(min=1e-6)  # an empty bin stays zero
    return standardised


def whiten_per_camera(
    features: Float[Tensor, "N F"], camids: Int[np.ndarray, " N"], *, dim: int = 64, shrinkage: float = 0.3
) -> Float[Tensor, "N K"]:
    """Features of length one, fp32, in which every camera has about the same mean and covariance.

    They are standardised per camera, brought to ``dim`` principal components of the whole set (K, fewer where there are
    fewer channels or images), and then multiplied with the inverse square root of their camera's covariance (ZCA). That
    is shrunk first: ``shrinkage`` of it is replaced by its mean eigenvalue times the identity.

    A camera with few images gets the covariance of the whole set below 16 images, and its mean and deviation too
    below 4. A set without cameras, where all camids are the same, is one camera.

    Raises:
        UserError: a feature is not finite.
    """
    require_finite_features(features)
    standard = standardise_per_camera(exact(features), camids, fewest=FEWEST_TO_STANDARDISE).numpy()
    mean, axes = principal_axes(standard, dim)
    reduced = torch.from_numpy((standard - mean) @ axes.T).double()
    whitened = torch.empty_like(reduced)
    for rows, known_by in _cameras(camids, FEWEST_TO_WHITEN):
        known = reduced[known_by]
        centred = known - known.mean(dim=0)
        covariance = shrink(centred.T @ centred / len(known), shrinkage)
        whitened[rows] = (reduced[rows] - known.mean(dim=0)) @ _inverse_root(covariance)
    return F.normalize(whitened, dim=1).float().to(features.device)


def shrink(covariance: Float[Tensor, "K K"], shrinkage: float) -> Float[Tensor, "K K"]:
    """``shrinkage`` of a covariance replaced by its mean eigenvalue times the identity."""
    mean = covariance.diagonal().mean()
    return (1 - shrinkage) * covariance + shrinkage * mean * torch.eye(len(covariance), dtype=covariance.dtype)


def require_finite_features(features: Float[Tensor, "N F"]) -> None:
    """Raise a UserError where a feature is not a finite number: nothing could be decomposed."""
    if bad := int((~features.isfinite()).any(dim=1).sum()):
        raise UserError(f"{bad} of {len(features)} features are not finite. The model has diverged, use an earlier checkpoint")


def exact(features: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    """Features on the CPU as they are decomposed: fp64, but fp32 where they are so wide that it would double gigabytes."""
    return features.to("cpu", torch.float64 if features.shape[1] <= EXACT_CHANNELS else torch.float32)


def principal_axes(features: Float[np.ndarray, "N F"], dim: int) -> tuple[Float[np.ndarray, " F"], Float[np.ndarray, "K F"]]:
    """Mean and the first ``dim`` principal axes of a set, or as many as there are. Every call gives the same."""
    from sklearn.decomposition import PCA

    num_images, num_channels = features.shape
    solver = "randomized" if num_channels > EXACT_CHANNELS else "full" if num_images < num_channels else "covariance_eigh"
    with np.errstate(divide="ignore", invalid="ignore"):  # features that do not differ have no variance to share out
        found = PCA(min(dim, *features.shape), svd_solver=solver, random_state=0).fit(features)
    return np.asarray(found.mean_), np.asarray(found.components_)


def _inverse_root(covariance: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=1e-12).rsqrt() @ vectors.T


def _cameras(camids: Int[np.ndarray, " N"], fewest: int) -> Iterator[tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]]:
    """Each camera's images, and those that its statistics are taken from: the same, or all where it has few."""
    for camid in np.unique(camids):
        rows = torch.from_numpy(camids == camid)
        yield rows, rows if rows.sum() >= fewest else torch.ones_like(rows)

"""The probe: what frozen features of an encoder find, in seconds and without training.

It reads the same tokens in two ways, both as rows of patches. ``rows`` needs no label: the middle columns, whitened per
camera. ``lda`` knows the training identities and no camera: linear discriminants in closed form. docs/method.md defines both.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from personmae import dist
from personmae.errors import UserError
from personmae.model.vit import VisionTransformer
from personmae.reid import retrieval
from personmae.reid.datasets import Benchmark, pids_and_camids, train_labels
from personmae.reid.features import extract, timed
from personmae.reid.frozen import FrozenRows
from personmae.reid.rows import exact, principal_axes, require_finite_features, shrink, whiten_per_camera
from personmae.reid.transforms import ImageSet

COMPONENTS: Final = 192  # in which the linear discriminants are found
SHRINKAGE: Final = 0.1
DISCRIMINANTS: Final = 96
SCORES: Final = ("mAP", "rank1", "rank5", "rank10", "mINP")


def measure(
    benchmark: Benchmark,
    encoder: VisionTransformer,
    *,
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    num_threads: int,
    log: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """The record of a search by ``rows`` as ``retrieval.measure`` has it, and under "probe" the scores of both readings.

    All three splits of the benchmark are needed, and read once. Called by all ranks together: they share the extraction, the
    first one compares, and the others get None.

    Raises:
        UserError: an image cannot be read, a feature is not finite, or the training images do not separate identities.
        Stopped: ``stopped`` was true on a rank.
    """
    start = time.monotonic()
    samples = [*benchmark.train, *benchmark.query, *benchmark.gallery]
    with ThreadPoolExecutor(num_threads) as pool, timed(log, f"probe: extracting {len(samples):,} images"):
        images = ImageSet([sample.path for sample in samples], img_size, pool=pool, cache_bytes=0)
        frozen = FrozenRows(encoder, img_size, ("middle", "all"))
        features = extract(
            frozen, images, batch_size=256, device=device, mean=mean, std=std, stopped=stopped, log=log
        )  # (N, 2 F)

    def compare() -> dict[str, Any]:
        with timed(log, f"probe: ranking {len(benchmark.query):,} x {len(benchmark.gallery):,} twice"):
            records = {
                name: retrieval.rank_all(benchmark, vectors.to(device), stopped=stopped)
                for name, vectors in readings(benchmark, features).items()
            }
        probe = {name: {score: found[score] for score in SCORES} for name, found in records.items()}
        return records["rows"] | {"probe": probe, "seconds": time.monotonic() - start}

    return dist.on_first_rank(compare)


def readings(benchmark: Benchmark, features: Float[Tensor, "N F"]) -> dict[str, Tensor]:
    """``rows`` and ``lda`` of query and gallery, from the row means of all three splits: middle columns, then all of them."""
    require_finite_features(features)
    middle, whole = features.chunk(2, dim=1)
    num_train = len(benchmark.train)
    camids = pids_and_camids([*benchmark.query, *benchmark.gallery])[1]
    mean, directions = discriminants(whole[:num_train], train_labels(benchmark.train))
    return {
        "rows": whiten_per_camera(middle[num_train:], camids),
        "lda": F.normalize((whole[num_train:].double() - mean) @ directions, dim=1).float(),
    }


def discriminants(
    features: Float[Tensor, "N F"], labels: Int[np.ndarray, " N"]
) -> tuple[Float[Tensor, " F"], Float[Tensor, "F K"]]:
    """The mean of the features, and the directions that separate labels 0 ... C - 1 best, both in fp64.

    In 192 principal components, of which fewer are there for fewer features or channels: S_w is the covariance around the
    labels' means, a tenth of it replaced by its mean eigenvalue times the identity, and S_b that of these means, weighted by
    their images. The K = 96 directions (at most C - 1) are those of the largest eigenvalues of S_b v = l S_w v, each with
    v' S_w v = 1.

    Raises:
        UserError: there are not two labels, or none has two different features.
    """
    mean, axes = principal_axes(exact(features).numpy(), COMPONENTS)
    mean, axes = mean.astype(np.float64), axes.astype(np.float64)
    reduced = (features.double().numpy() - mean) @ axes.T
    counts = np.bincount(labels)
    centres = np.stack([np.bincount(labels, weights=column) for column in reduced.T], axis=1) / counts[:, None]
    spread = reduced - centres[labels]
    within = spread.T @ spread / len(labels)
    if len(counts) < 2 or not np.trace(within) > 0:
        raise UserError(
            f"the probe's discriminants need training images of two people or more, and two different images of one. Got "
            f"{len(labels):,} images of {len(counts):,} people"
        )
    between = (centres * counts[:, None]).T @ centres / len(labels)
    num = min(DISCRIMINANTS, len(counts) - 1, len(axes))
    chosen = (len(axes) - num, len(axes) - 1)
    shrunk = shrink(torch.from_numpy(within), SHRINKAGE).numpy()
    _, vectors = scipy.linalg.eigh(between, shrunk, subset_by_index=chosen)
    return torch.from_numpy(mean), torch.from_numpy(axes.T @ vectors)

"""The memory of unsupervised ReID: an fp32 vector for each cluster (cluster-contrast, arXiv 2103.11568), or for each camera of
a cluster (camera-aware proxies, arXiv 2012.10674).

The loss only reads it. Training calls ``update`` after the step with the whole global batch in its order. So the memory is
the same for any number of ranks and of accumulated micro-batches. K images of each of P clusters take K small steps.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Mode = Literal["mean", "hard"]


@dataclass(frozen=True, slots=True)
class Proxies:
    """Pairs of a cluster and a camera that have an image, ordered by cluster and then by camera.

    Attributes:
        labels: pair of each image, -1 for an outlier.
        clusters: cluster of each pair.
        cameras: camera of each pair. Images of an unknown camera, which is -1, are of one more.
    """

    labels: Int[np.ndarray, " N"]
    clusters: Int[np.ndarray, " Q"]
    cameras: Int[np.ndarray, " Q"]


def camera_proxies(labels: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]) -> Proxies:
    """Split each cluster by camera."""
    kept = labels >= 0
    pairs, places = np.unique(np.stack([labels[kept], camids[kept]]), axis=1, return_inverse=True)
    found = np.full(len(labels), -1, np.int64)
    found[kept] = places.reshape(-1)  # numpy 2.0 gives them another shape
    return Proxies(found, *pairs)


def mean_centroids(features: Float[Tensor, "N F"], labels: Int[Tensor, " N"]) -> Float[Tensor, "C F"]:
    """Mean feature of each cluster, then length one. Features are brought to length one first. Label -1 is left out.

    Raises:
        ValueError: a cluster between 0 and the highest label has no image.
    """
    kept = labels >= 0
    features, labels = F.normalize(features[kept].double(), dim=1), labels[kept]
    counts = torch.bincount(labels)
    if len(labels) == 0 or (counts == 0).any():
        raise ValueError("every cluster from 0 to the highest label must have an image")
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    return F.normalize(sums / counts[:, None], dim=1).float()


class ClusterMemory:
    """Centroids (C, F) of length one. They are its whole state, which is saved and loaded unchanged.

    ``momentum`` is the share of the old centroid that an update keeps. In mode "mean" every image of the batch moves its
    cluster's centroid, one after the other. In mode "hard" the image least similar to it does, alone.
    """

    def __init__(
        self, centroids: Float[Tensor, "C F"], *, temperature: float = 0.05, momentum: float = 0.1, mode: Mode = "mean"
    ):
        self.centroids = centroids.detach().float().clone()
        self.temperature, self.momentum, self.mode = temperature, momentum, mode

    def loss(self, features: Float[Tensor, "B F"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """Cross-entropy of a feature's cosines with all centroids, divided by the temperature. The memory is not changed."""
        with torch.autocast(features.device.type, enabled=False):
            return F.cross_entropy(F.normalize(features.float(), dim=1) @ self.centroids.T / self.temperature, labels)

    @torch.no_grad()
    def update(
        self, features: Float[Tensor, "B F"], labels: Int[Tensor, " B"], skipped: Float[Tensor, ""] | None = None
    ) -> None:
        """Move the centroids towards the features of the global batch, given in its order. Not at all in a ``skipped`` step."""
        before = self.centroids.clone()
        self._move_all(F.normalize(features.float(), dim=1), labels)
        if skipped is not None:
            self.centroids = torch.where(skipped.bool(), before, self.centroids)

    def _move_all(self, features: Float[Tensor, "B F"], labels: Int[Tensor, " B"]) -> None:
        if self.mode == "hard":
            hardest = self._hardest(features, labels)
            return self._move(features[hardest], labels[hardest])
        # Clusters do not touch each other: the first images of all take their step at once, then the second ones.
        turns = _turns(labels)
        for turn in range(int(turns.max()) + 1):
            self._move(features[turns == turn], labels[turns == turn])
        return None

    def _hardest(self, features: Float[Tensor, "B F"], labels: Int[Tensor, " B"]) -> Int[Tensor, " P"]:
        """Place of the least similar image of each cluster. The earlier one where two are alike."""
        similarities = (features * self.centroids[labels]).sum(dim=1)
        order = similarities.argsort(stable=True)
        return order[_turns(labels[order]) == 0]

    def _move(self, features: Float[Tensor, "P F"], labels: Int[Tensor, " P"]) -> None:
        """One step of different clusters."""
        moved = self.momentum * self.centroids[labels] + (1 - self.momentum) * features
        self.centroids[labels] = F.normalize(moved, dim=1)


class CameraMemory(ClusterMemory):
    """One centroid for each camera of a cluster, its proxy, and the loss of camera-aware proxies.

    Labels are places of proxies. ``clusters`` and ``cameras`` (Q,) are those of each. The loss is a weighted sum of two.
    Within a camera: cross-entropy over the camera's proxies. Across cameras: all proxies of the cluster against the
    ``num_negatives`` most similar ones of other clusters. Minus the mean over the former of their log-softmax over both.
    """

    def __init__(
        self,
        centroids: Float[Tensor, "Q F"],
        clusters: Int[Tensor, " Q"],
        cameras: Int[Tensor, " Q"],
        *,
        temperature: float = 0.07,
        momentum: float = 0.2,
        mode: Mode = "mean",
        intra_weight: float = 1.0,
        inter_weight: float = 0.5,
        num_negatives: int = 50,
    ):
        super().__init__(centroids, temperature=temperature, momentum=momentum, mode=mode)
        self.clusters, self.cameras = clusters, cameras
        self.intra_weight, self.inter_weight, self.num_negatives = intra_weight, inter_weight, num_negatives

    def loss(self, features: Float[Tensor, "B F"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The weighted sum of the loss within cameras and the one across them. The memory is not changed."""
        with torch.autocast(features.device.type, enabled=False):
            scores = F.normalize(features.float(), dim=1) @ self.centroids.T / self.temperature
            same_camera = self.cameras == self.cameras[labels, None]
            intra = F.cross_entropy(scores.masked_fill(~same_camera, -torch.inf), labels)
            return self.intra_weight * intra + self.inter_weight * self._across_cameras(scores, labels)

    def _across_cameras(self, scores: Float[Tensor, "B Q"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        positive = self.clusters == self.clusters[labels, None]
        others = scores.detach().masked_fill(positive, -torch.inf)
        nearest = others.topk(min(self.num_negatives, others.shape[1]), dim=1).indices
        compared = positive.scatter(1, nearest, True)  # where there are fewer others, positive ones are among the nearest
        log_shares = scores.masked_fill(~compared, -torch.inf).log_softmax(dim=1)
        return -(log_shares.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)).mean()


def _turns(labels: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """How many earlier places hold the same label."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    starts = (counts.cumsum(0) - counts)[labels[order]]
    turns = torch.empty_like(labels)
    turns[order] = torch.arange(len(labels), device=labels.device) - starts
    return turns

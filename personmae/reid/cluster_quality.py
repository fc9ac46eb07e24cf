"""The quality of clusters: against the true people, for the log alone, and against the cameras, which needs no label."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

FOLLOWING_AMI = 0.2  # above these two, clusters follow cameras: a score that is corrected for chance,
FOLLOWING_SHARE = 0.5  # and the share of clusters that only one camera has seen


@dataclass(frozen=True, slots=True)
class ClusterQuality:
    """Counts and scores. A score is None where nothing can be compared.

    Attributes:
        ari: adjusted Rand index with people in [-0.5, 1].
        ami_people: adjusted mutual information with people, 0 for chance and 1 for the same partition. Both are over the
            images in clusters whose person is known.
        pair_precision: share of the pairs of images in one cluster that are of one person.
        recall_across_cameras: share of a person's pairs of images of two cameras that are in one cluster. An outlier is in
            none.
        ami_cameras: adjusted mutual information with cameras, over the images in clusters whose camera is known.
        one_camera_share: share of the clusters whose images are all of one camera.
    """

    num_clusters: int
    num_outliers: int
    ari: float | None = None
    ami_people: float | None = None
    pair_precision: float | None = None
    recall_across_cameras: float | None = None
    ami_cameras: float | None = None
    one_camera_share: float | None = None


def follows_cameras(ami_cameras: float | None, one_camera_share: float | None) -> bool:
    """Whether clusters follow cameras, more than chance and people who are seen by few of them explain."""
    return (ami_cameras or 0) > FOLLOWING_AMI and (one_camera_share or 0) > FOLLOWING_SHARE


def quality(
    labels: Int[np.ndarray, " N"], pids: Int[np.ndarray, " N"] | None = None, camids: Int[np.ndarray, " N"] | None = None
) -> ClusterQuality:
    """The quality of pseudo-labels (-1: outlier), given the true people and the cameras (-1: unknown)."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    unknown = np.full(len(labels), -1)
    pids, camids = (unknown if found is None else found for found in (pids, camids))
    people, cameras = (labels >= 0) & (pids >= 0), (labels >= 0) & (camids >= 0)
    several = len(np.unique(camids[camids >= 0])) > 1
    return ClusterQuality(
        num_clusters=len(np.unique(labels[labels >= 0])),
        num_outliers=int((labels < 0).sum()),
        ari=float(adjusted_rand_score(pids[people], labels[people])) if people.any() else None,
        ami_people=float(adjusted_mutual_info_score(pids[people], labels[people])) if people.any() else None,
        pair_precision=_share(_num_pairs(labels[people], pids[people]), _num_pairs(labels[people])),
        recall_across_cameras=_recall_across_cameras(labels, pids, camids),
        ami_cameras=float(adjusted_mutual_info_score(camids[cameras], labels[cameras])) if several and cameras.any() else None,
        one_camera_share=one_camera_share(labels, camids) if several else None,
    )


def of_one_camera(labels: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " C"]:
    """For each cluster from 0 on, whether all its images are of one camera. False where a camera is unknown (-1)."""
    kept = labels >= 0
    clusters, cameras = np.unique(np.stack([labels[kept], camids[kept]]), axis=1)
    num_cameras = np.bincount(clusters)
    return (num_cameras == 1) & (np.bincount(clusters, weights=cameras < 0) == 0)


def one_camera_share(labels: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]) -> float | None:
    """Share of the clusters that are ``of_one_camera``, or None without a cluster."""
    return _share(int(of_one_camera(labels, camids).sum()), len(np.unique(labels[labels >= 0])))


def _recall_across_cameras(
    labels: Int[np.ndarray, " N"], pids: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]
) -> float | None:
    known = (pids >= 0) & (camids >= 0)
    labels, pids, camids = labels[known], pids[known], camids[known]
    found = labels >= 0
    together = _num_pairs(labels[found], pids[found]) - _num_pairs(labels[found], pids[found], camids[found])
    return _share(together, _num_pairs(pids) - _num_pairs(pids, camids))


def _num_pairs(*partitions: Int[np.ndarray, " n"]) -> int:
    """Pairs of images that are alike in all of the partitions."""
    counts = np.unique(np.stack(partitions), axis=1, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

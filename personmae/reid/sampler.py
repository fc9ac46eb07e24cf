"""The images of a training batch: P identities or clusters with K images each, as a pure function of (seed, epoch)."""

import numpy as np
from jaxtyping import Int

from personmae.errors import UserError


def pk_batches(
    pids: Int[np.ndarray, " N"], *, num_ids: int, num_instances: int, seed: int, epoch: int
) -> Int[np.ndarray, "num_batches PK"]:
    """Image indices of every batch of one epoch: ``num_ids`` (P) distinct identities, ``num_instances`` (K) of each.

    The K images of an identity are neighbours, so ranks may take equal slices of whole identities. An identity with
    fewer than K images repeats some. Images beyond a multiple of K rest for this epoch. The epoch ends when fewer than
    P identities have images left, so **the number of batches varies a little between epochs**.

    Raises:
        UserError: there are fewer than P identities.
    """
    order = np.argsort(pids, kind="stable")
    starts = np.unique(pids[order], return_index=True)[1]
    if len(starts) < num_ids:
        raise UserError(
            f"a batch of num_ids={num_ids} different people needs at least {num_ids} identities, and there are "
            f"{len(starts)}. Lower num_ids or use more data"
        )
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    groups = [_groups(images, num_instances, rng) for images in np.split(order, starts[1:])]
    left = np.array([len(group) for group in groups])
    batches = []
    while np.count_nonzero(left) >= num_ids:
        chosen = rng.choice(np.flatnonzero(left), num_ids, replace=False)
        left[chosen] -= 1
        batches.append(np.concatenate([groups[i][left[i]] for i in chosen]))
    return np.stack(batches).astype(np.int64)


def cluster_batches(
    labels: Int[np.ndarray, " N"],
    camids: Int[np.ndarray, " N"] | None = None,
    *,
    num_ids: int,
    num_instances: int,
    num_batches: int,
    seed: int,
    epoch: int,
) -> Int[np.ndarray, "num_batches PK"]:
    """Image indices of ``num_batches`` batches: ``num_ids`` (P) distinct clusters, ``num_instances`` (K) images of each.

    Outliers, label -1, are left out. Clusters come in a random order. Where fewer than P are left of it, a new order begins.
    The first of the K images is any of its cluster. The others are from other cameras than the first if the cluster has such
    images, else any others. Each is drawn at most once where there are enough, otherwise with repetition. Where
    ``camids`` is None or -1 the camera is unknown, and not another one. The K images of a cluster are neighbours in the batch.

    Raises:
        UserError: there are fewer than P clusters.
    """
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels[order], 0) :]
    clusters = np.split(order, np.unique(labels[order], return_index=True)[1][1:]) if len(order) else []
    if len(clusters) < num_ids:
        raise UserError(
            f"a batch of num_ids={num_ids} clusters needs at least {num_ids}, and the clustering found {len(clusters)} with "
            f"{len(order)} of {len(labels)} images. Lower num_ids, or change eps"
        )
    cameras = np.full(len(labels), -1) if camids is None else camids
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    orders = -(-num_batches // (len(clusters) // num_ids))
    whole = len(clusters) // num_ids * num_ids
    chosen = np.concatenate([rng.permutation(len(clusters))[:whole] for _ in range(orders)])[: num_batches * num_ids]
    drawn = [_from_other_cameras(clusters[i], cameras, num_instances, rng) for i in chosen]
    return np.concatenate(drawn).reshape(num_batches, num_ids * num_instances).astype(np.int64)


def _from_other_cameras(
    images: Int[np.ndarray, " n"], cameras: Int[np.ndarray, " N"], num_instances: int, rng: np.random.Generator
) -> Int[np.ndarray, " {num_instances}"]:
    """One image of a cluster and ``num_instances`` - 1 companions."""
    first = rng.choice(images)
    others = images[(cameras[images] != cameras[first]) & (cameras[images] >= 0)] if cameras[first] >= 0 else images[:0]
    if len(others) == 0:
        others = images[images != first]
    if len(others) == 0:
        others = images  # a cluster of one image
    replace = len(others) < num_instances - 1
    return np.concatenate([[first], rng.choice(others, num_instances - 1, replace=replace)])


def _groups(
    images: Int[np.ndarray, " n"], num_instances: int, rng: np.random.Generator
) -> Int[np.ndarray, "groups {num_instances}"]:
    """Deal the images of one identity into random groups. All are kept where they do not fill one group."""
    missing = max(num_instances - len(images), 0)
    images = rng.permutation(np.concatenate([images, rng.choice(images, missing)]))
    num_groups = len(images) // num_instances
    return images[: num_groups * num_instances].reshape(num_groups, num_instances)

"""Which images form a training batch: P identities with K images each, as a pure function of (seed, epoch)."""

import numpy as np
from jaxtyping import Int

from personmae.errors import UserError


def pk_batches(
    pids: Int[np.ndarray, " N"], *, num_ids: int, num_instances: int, seed: int, epoch: int
) -> Int[np.ndarray, "num_batches PK"]:
    """Image indices of every batch of one epoch: ``num_ids`` (P) distinct identities, ``num_instances`` (K) of each.

    The K images of an identity are neighbours, so ranks may take equal slices of whole identities. An identity with
    fewer than K images repeats some; images beyond a multiple of K rest for this epoch. The epoch ends when fewer than
    P identities have images left, so **the number of batches varies a little between epochs**.

    Raises:
        UserError: there are fewer than P identities.
    """
    order = np.argsort(pids, kind="stable")
    starts = np.unique(pids[order], return_index=True)[1]
    if len(starts) < num_ids:
        raise UserError(
            f"a batch of num_ids={num_ids} different people needs at least {num_ids} identities, and there are "
            f"{len(starts)}; lower num_ids or use more data"
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


def _groups(
    images: Int[np.ndarray, " n"], num_instances: int, rng: np.random.Generator
) -> Int[np.ndarray, "groups {num_instances}"]:
    """Deal the images of one identity into random groups; every image is kept where there are fewer than one group."""
    missing = max(num_instances - len(images), 0)
    images = rng.permutation(np.concatenate([images, rng.choice(images, missing)]))
    num_groups = len(images) // num_instances
    return images[: num_groups * num_instances].reshape(num_groups, num_instances)

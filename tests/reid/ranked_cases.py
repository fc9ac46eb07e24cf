"""Small retrievals with labels of every kind, and their rank lists by a loop written from the protocol."""

import numpy as np
import torch

from personmae.reid.ranking import Labels

NUM_QUERIES, NUM_GALLERY = 17, 60
Case = tuple[torch.Tensor, torch.Tensor, Labels]  # query features, gallery features, labels


def random_case(seed: int, *, ties: bool) -> Case:
    """Features and labels; with ``ties`` every similarity is one of nine exact values."""
    rng = np.random.default_rng(seed)

    def features(count: int) -> torch.Tensor:
        values = rng.choice([-0.25, 0.25], (count, 16)) if ties else rng.standard_normal((count, 16))
        return torch.from_numpy(values.astype(np.float32))

    query, gallery = features(NUM_QUERIES), features(NUM_GALLERY)
    labels = Labels(
        query_pids=rng.integers(1, 9, NUM_QUERIES),
        query_camids=rng.integers(1, 4, NUM_QUERIES),
        gallery_pids=rng.integers(0, 7, NUM_GALLERY),  # 0 is a distractor; queries 7 and 8 have no match
        gallery_camids=rng.integers(1, 4, NUM_GALLERY),
    )
    return query, gallery, labels


def odd_case(seed: int) -> Case:
    """Few images, few exact similarities, and everything that labels may hold; features have length one exactly."""
    rng = np.random.default_rng(seed)
    num_queries, num_gallery = int(rng.integers(1, 9)), int(rng.integers(1, 25))

    def features(count: int) -> torch.Tensor:
        values = rng.choice([-0.5, 0.5], (count, 4)) if rng.random() < 0.7 else rng.choice([-1, 1], (count, 1)) * [[0, 0, 0, 1]]
        return torch.from_numpy(values.astype(np.float32))

    def camids(count: int, lowest: int) -> np.ndarray:
        return rng.integers(lowest, int(rng.integers(lowest, 4)) + 1, count)

    query, gallery, lowest = features(num_queries), features(num_gallery), int(rng.choice([-1, 1]))
    labels = Labels(
        query_pids=rng.integers(-1, 4, num_queries),
        query_camids=camids(num_queries, lowest),
        gallery_pids=rng.integers(-1, int(rng.integers(1, 4)), num_gallery),
        gallery_camids=camids(num_gallery, lowest),
        own_index=rng.integers(-1, num_gallery, num_queries) if rng.random() < 0.5 else None,
    )
    return query, gallery, labels


def slow_lists(case: Case) -> list[list[int]]:
    """Gallery indices from near to far, for each query, without those that the protocol removes."""
    query, gallery, labels = case[0].double().numpy(), case[1].double().numpy(), case[2]
    lists = []
    for i, q in enumerate(query):
        pid, camid = labels.query_pids[i], labels.query_camids[i]
        kept = []
        for j in range(len(gallery)):
            same_pid_and_camera = labels.gallery_pids[j] == pid and labels.gallery_camids[j] == camid
            own = labels.own_index is not None and labels.own_index[i] == j
            if not ((same_pid_and_camera and camid != -1) or own or labels.gallery_pids[j] == -1):
                kept.append(j)
        similarity = {j: q @ gallery[j] / np.linalg.norm(q) / np.linalg.norm(gallery[j]) for j in kept}
        lists.append(sorted(kept, key=lambda j: (-similarity[j], j)))
    return lists

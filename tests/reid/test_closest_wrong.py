"""The closest gallery image of another person, against a loop over the whole gallery."""

import numpy as np
import pytest
import torch

from personmae.reid.ranking import Labels, closest_wrong, cosine


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [3, 256])
def test_it_is_the_most_similar_image_of_another_person(seed, block_size):
    rng = np.random.default_rng(seed)
    query, gallery = (torch.from_numpy(rng.standard_normal((count, 8)).astype(np.float32)) for count in (11, 40))
    labels = Labels(
        query_pids=rng.integers(1, 5, 11),
        query_camids=rng.integers(1, 4, 11),
        gallery_pids=rng.integers(-1, 5, 40),  # -1 is junk, 0 a distractor
        gallery_camids=rng.integers(1, 4, 40),
    )
    scores, found = closest_wrong(cosine(query, gallery), labels, block_size=block_size)
    compared = torch.nn.functional.cosine_similarity(query[:, None], gallery[None], dim=2).numpy()
    for row, pid, score, number in zip(compared, labels.query_pids, scores.tolist(), found.tolist(), strict=True):
        others = [g for g in range(40) if labels.gallery_pids[g] not in (-1, pid)]
        best = max(others, key=lambda g: row[g])
        assert number == best
        assert score == pytest.approx(row[best], abs=1e-6)


def test_a_gallery_of_one_person_has_none():
    ones = np.ones(3, np.int64)
    labels = Labels(ones[:1], ones[:1], ones, np.array([1, 2, 3]))
    scores, found = closest_wrong(cosine(torch.eye(3)[:1], torch.eye(3)), labels)
    assert scores.tolist() == [-np.inf]
    assert found.tolist() == [-1]

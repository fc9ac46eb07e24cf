"""The blocked product with the best of each block, beside a sort of all similarities."""

import galleries
import numpy as np
import pytest
import torch
from galleries import build, named

from personmae.gallery import exact
from personmae.gallery.catalog import open_gallery


def sorted_whole(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin: falling similarity, and equal ones in the gallery's order."""
    found = scores.sort(dim=1, descending=True, stable=True)
    rows = found.indices.masked_fill(found.values == -torch.inf, -1)
    return found.values[:, :k], rows[:, :k]


def blocks_of(features: np.ndarray, size: int):
    for start in range(0, len(features), size):
        rows = np.arange(start, min(start + size, len(features)))
        yield rows, features[rows]


@pytest.mark.parametrize("size", [1, 3, 7, 50, 500])
@pytest.mark.parametrize("k", [1, 10, 60, 200, 500])
def test_the_best_of_blocks_are_the_head_of_a_sort_of_all_also_among_equal_ones(size, k):
    rng = np.random.default_rng(size * k)
    # Small whole numbers: sums are exact, so that blocks of any size give the same, and most similarities are equal.
    features = rng.integers(-2, 3, (200, 4)).astype(np.float32)
    queries = torch.from_numpy(rng.integers(-2, 3, (6, 4)).astype(np.float32))
    hidden = torch.from_numpy(rng.random((6, 200)) < 0.4)
    hidden[0] = True
    found = exact.top_k(queries, blocks_of(features, size), k, lambda rows: hidden[:, rows])
    scores, rows = sorted_whole((queries @ torch.from_numpy(features).T).masked_fill(hidden, -torch.inf), k)
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.scores, scores)
    assert (found.rows[0] == -1).all()


def test_a_gallery_of_several_segments_is_searched_whole(tmp_path, monkeypatch):
    from personmae.gallery import edit

    monkeypatch.setattr(edit, "SEGMENT_ROWS", 70)
    monkeypatch.setattr(exact, "_SIMILARITIES", 100)
    monkeypatch.setattr(exact, "_QUERIES", 7)
    ids = named(300)
    gallery = open_gallery(build(tmp_path, ids))
    features = torch.from_numpy(np.stack([galleries.feature(name) for name in ids]))
    queries = features[::15]
    found = exact.search(gallery, queries, 12)
    assert found.scores.shape == found.rows.shape == (20, 12)
    assert (found.rows[:, 0] == torch.arange(0, 300, 15)).all()
    scores, _ = sorted_whole(queries @ features.T, 12)
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-6)
    torch.testing.assert_close((queries[:, None] * features[found.rows]).sum(dim=2), scores, rtol=0, atol=1e-6)

    allowed = np.arange(300) % 3 == 1
    found = exact.search(gallery, queries, 12, allowed=allowed)
    assert (found.rows % 3 == 1).all()
    scores, _ = sorted_whole((queries @ features.T).masked_fill(~torch.from_numpy(allowed), -torch.inf), 12)
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-6)


def test_a_block_never_grows_with_the_gallery():
    assert exact.block_rows(1) == 1 << 16
    assert exact.block_rows(1024) * 1024 == 1 << 24
    assert exact.block_rows(1 << 30) == 1

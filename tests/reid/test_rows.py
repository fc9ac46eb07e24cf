"""Rows of tokens and whitening per camera, against numpy in float64 written from their definitions."""

import pickle
from collections.abc import Iterable

import numpy as np
import pytest
import scipy.linalg
import torch
from closeness import assert_allclose

from personmae.errors import UserError
from personmae.reid.rows import Columns, row_features, standardise_per_camera, whiten_per_camera


@pytest.mark.parametrize(
    ("grid", "middle"), [((8, 4), (1, 2)), ((3, 8), (2, 3, 4, 5)), ((2, 3), (0, 1, 2)), ((2, 5), (1, 2, 3))]
)
def test_rows_are_means_over_columns_from_top_to_bottom(grid: tuple[int, int], middle: tuple[int, ...]):
    tokens = np.random.default_rng(0).standard_normal((2, grid[0] * grid[1], 5))
    wanted: dict[Columns, Iterable[int]] = {"all": range(grid[1]), "middle": middle}
    for columns, taken in wanted.items():
        got = row_features(torch.from_numpy(tokens), grid, columns)
        expected = [[np.mean([image[y * grid[1] + x] for x in taken], axis=0) for y in range(grid[0])] for image in tokens]
        assert got.dtype == torch.float32
        assert_allclose(got.numpy(), np.reshape(expected, (2, -1)), atol=1e-6)


def test_rows_of_bf16_tokens_are_summed_in_fp32():
    tokens = torch.tensor([256.0, 1.0, 1.0, 1.0]).reshape(1, 4, 1).bfloat16()  # bf16 loses a 1 beside 256
    assert row_features(tokens, (1, 4), "all").item() == 259 / 4


def whitened_by_definition(features: np.ndarray, camids: np.ndarray, dim: int, shrinkage: float) -> np.ndarray:
    """Float64, camera by camera; where a camera has few images it is described by all."""
    standard, found = np.empty_like(features), np.empty((len(features), min(dim, *features.shape)))
    for camid in set(camids.tolist()):
        seen = camids == camid
        own = features if seen.sum() < 4 else features[seen]
        standard[seen] = (features[seen] - own.mean(0)) / own.std(0)
    centred = standard - standard.mean(0)
    reduced = centred @ np.linalg.svd(centred, full_matrices=False)[2][:dim].T
    for camid in set(camids.tolist()):
        seen = camids == camid
        own = reduced if seen.sum() < 16 else reduced[seen]
        covariance = np.cov(own.T, bias=True)
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        found[seen] = (reduced[seen] - own.mean(0)) @ scipy.linalg.fractional_matrix_power(shrunk, -0.5)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def seen_by_cameras(counts: dict[int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features whose mean, scale and correlation are each camera's own, in mixed order."""
    rng = np.random.default_rng(0)
    camids = rng.permutation(np.repeat(list(counts), list(counts.values())))
    mixes = {camid: rng.standard_normal((width, width)) * rng.uniform(0.2, 5, width) for camid in counts}
    features = np.stack([rng.standard_normal(width) @ mixes[camid] + 3 * camid for camid in camids])
    return features, camids


@pytest.mark.parametrize("shrinkage", [0.3, 0.0])
@pytest.mark.parametrize("counts", [{1: 40, 2: 60, 7: 50}, {1: 40, 2: 15, 5: 4, 7: 60, 8: 3, 9: 1}, {-1: 30}], ids=str)
def test_whitening_equals_its_definition(counts: dict[int, int], shrinkage: float):
    features, camids = seen_by_cameras(counts, 12)
    got = whiten_per_camera(torch.from_numpy(features), camids, dim=8, shrinkage=shrinkage)
    expected = whitened_by_definition(features, camids, 8, shrinkage)
    assert (got.dtype, got.shape) == (torch.float32, (len(camids), 8))
    assert_allclose(got.double() @ got.double().T, expected @ expected.T, atol=1e-5)  # signs of components are free


def test_there_are_no_more_components_than_channels_and_images():
    features, camids = seen_by_cameras({1: 20, 2: 20}, 12)
    assert whiten_per_camera(torch.from_numpy(features), camids).shape == (40, 12)
    assert whiten_per_camera(torch.from_numpy(features[:5]), camids[:5]).shape == (5, 5)


def test_whitening_finds_people_that_cameras_hide():
    """What a camera shows large another shows small, and each has an offset of its own."""
    rng = np.random.default_rng(0)
    people, camids = np.repeat(np.arange(30), 2), np.tile([1, 2], 30)
    seen = rng.standard_normal((30, 10))[people] + 0.1 * rng.standard_normal((60, 10))
    scales, offsets = np.exp(2 * rng.standard_normal((2, 10))), 20 * rng.standard_normal((2, 10))
    features = torch.from_numpy(seen * scales[camids - 1] + offsets[camids - 1])

    def found(of: torch.Tensor) -> float:
        unit = torch.nn.functional.normalize(of.double(), dim=1)
        similarity = unit[::2] @ unit[1::2].T
        return (similarity.argmax(dim=1) == torch.arange(30)).double().mean().item()

    assert found(whiten_per_camera(features, camids)) > 0.9 > 0.5 > found(features)


def test_wide_features_are_whitened_alike_every_time_and_draw_from_no_one_elses_numbers():
    rng = np.random.default_rng(0)
    camids = np.repeat([1, 2], 60)
    strong = rng.standard_normal((120, 5)) @ rng.standard_normal((5, 2100))
    features = strong + 0.01 * rng.standard_normal((120, 2100))
    before, legacy = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    got = whiten_per_camera(torch.from_numpy(features), camids, dim=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == legacy
    assert torch.equal(got, whiten_per_camera(torch.from_numpy(features), camids, dim=5))
    expected = whitened_by_definition(features, camids, 5, 0.3)
    assert_allclose(got.double() @ got.double().T, expected @ expected.T, atol=1e-4)


def test_features_without_any_difference_stay_finite():
    assert whiten_per_camera(torch.ones(40, 3), np.repeat([1, 2], 20)).isfinite().all()


def test_features_that_are_not_finite_are_told():
    features = torch.ones(4, 3)
    features[1, 2] = float("nan")
    with pytest.raises(UserError, match=r"1 of 4 features are not finite\. The model has diverged"):
        whiten_per_camera(features, np.ones(4, dtype=np.int64))


@pytest.mark.parametrize("fewest", [1, 4])
def test_standardising_takes_out_each_cameras_mean_and_scale(fewest: int):
    features, camids = seen_by_cameras({1: 5, 2: 3}, 4)
    features[:, 0] = 1.0  # a channel that never changes stays zero
    got = standardise_per_camera(torch.from_numpy(features), camids, fewest=fewest).numpy()
    for camid, own in ((1, features[camids == 1]), (2, features[camids == 2] if fewest == 1 else features)):
        expected = (features[camids == camid] - own.mean(0)) / np.maximum(own.std(0), 1e-6)
        assert_allclose(got[camids == camid], expected, atol=1e-9)
    assert (got[:, 0] == 0).all()

"""The distances that clustering compares, beside numbers that another program computed (``jaccard_definition.py``)."""

import json
from collections.abc import Callable
from typing import Any

import jaccard_definition
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_allclose

from personmae.bench.cluster import _dense_distances
from personmae.reid.cluster import k_reciprocal_encoding, minimum_sums

NUMBERS = json.loads(jaccard_definition.NUMBERS.read_text())
FEATURES = torch.tensor(NUMBERS["features"])
UPPER = np.triu_indices(len(FEATURES), 1)


def sparse_distances(features: torch.Tensor, k1: int, k2: int, half_k1: int | None = None) -> np.ndarray:
    sums = np.concatenate([s for _, s in minimum_sums(k_reciprocal_encoding(features, k1, k2, half_k1=half_k1))])
    return 1 - sums / (2 - sums)


def dense_distances(features: torch.Tensor, k1: int, k2: int) -> np.ndarray:
    return _dense_distances(F.normalize(features, dim=1), k1, k2)


@pytest.mark.parametrize("case", NUMBERS["cases"], ids=lambda case: f"k1={case['k1']}, k2={case['k2']}")
@pytest.mark.parametrize("way", [sparse_distances, dense_distances])
def test_distances_are_those_of_cluster_contrasts_definition(way: Callable[..., np.ndarray], case: dict[str, Any]) -> None:
    found = way(FEATURES, case["k1"], case["k2"])
    assert_allclose(found[UPPER], case["distances"], atol=2e-6)
    assert_allclose(found, found.T, atol=1e-6)


def test_the_numbers_are_those_that_the_program_writes() -> None:
    assert [(case["k1"], case["k2"]) for case in NUMBERS["cases"]] == list(jaccard_definition.CASES)
    np.testing.assert_array_equal(jaccard_definition.draw_features(), NUMBERS["features"])
    for case in NUMBERS["cases"]:
        expected = jaccard_definition.distances(np.array(NUMBERS["features"]), case["k1"], case["k2"])
        assert_allclose(expected[UPPER], case["distances"], atol=1e-7)


@pytest.mark.parametrize("case", NUMBERS["cases"], ids=lambda case: f"k1={case['k1']}")
def test_the_numbers_tell_a_half_set_that_is_one_image_short(case: dict[str, Any]) -> None:
    short = sparse_distances(FEATURES, case["k1"], case["k2"], half_k1=round(case["k1"] / 2))
    assert np.abs(short[UPPER] - case["distances"]).max() > 0.01  # the tolerance above is 2e-6

"""Comparisons that do not pass on what is not a number: ``max(0.0, nan)`` is 0, and nan is never above a bound."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

assert_allclose = functools.partial(np.testing.assert_allclose, equal_nan=False)  # numpy's own finds nan equal to nan


def largest(values: Iterable[float]) -> float:
    """The largest of some finite values; there must be one, and none that is infinite or not a number."""
    found = [float(value) for value in values]
    assert found, "there is nothing to compare"
    assert all(map(math.isfinite, found)), found
    return max(found)


def assert_close(got: Sequence[Any], wanted: Sequence[Any], *, rel: float, spoiled: Iterable[int] = (), what: str = "") -> None:
    """Two runs of finite numbers agree, but for places that must be spoiled in the first of them."""
    assert len(got) == len(wanted) > 0, (what, len(got), len(wanted))
    places = {*spoiled}
    assert places <= {*range(len(got))}, (what, places)
    for place, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert math.isfinite(theirs), (what, place, theirs)
        if place in places:
            assert not math.isfinite(ours), (what, place, ours)
        else:
            assert ours == pytest.approx(theirs, rel=rel), (what, place)

"""The comparisons that other tests rest on."""

import math

import pytest
from calls import num_calls
from closeness import assert_allclose, assert_close, largest

NAN = math.nan


@pytest.mark.parametrize("values", [[], [NAN], [1.0, NAN], [NAN, 1.0], [math.inf, 1.0]])
def test_the_largest_of_nothing_or_of_what_is_not_finite_is_refused(values: list[float]) -> None:
    with pytest.raises(AssertionError):
        largest(values)


def test_the_largest_of_finite_values_is_theirs() -> None:
    assert largest(iter([1, 3.0, -5])) == 3.0


@pytest.mark.parametrize(
    ("got", "wanted", "spoiled"),
    [
        ([NAN, NAN], [NAN, NAN], []),
        ([1.0, NAN], [1.0, 2.0], []),
        ([1.0, 2.0], [1.0, NAN], []),
        ([1.0, 2.0], [1.0, 2.0], [1]),
        ([1.0], [1.0, 2.0], []),
        ([], [], []),
        ([1.0, NAN], [1.0, 2.0], [1, 7]),
        ([1.0, 2.1], [1.0, 2.0], []),
    ],
)
def test_runs_that_differ_or_are_not_finite_are_not_close(got: list[float], wanted: list[float], spoiled: list[int]) -> None:
    with pytest.raises(AssertionError):
        assert_close(got, wanted, rel=1e-3, spoiled=spoiled)


def test_runs_that_agree_but_where_they_must_not_be_finite_are_close() -> None:
    assert_close([1.0, 2.0001], [1.0, 2.0], rel=1e-3)
    assert_close([1.0, NAN, 3.0], [1.0, 2.0, 3.0], rel=1e-3, spoiled=[1])


def test_calls_are_counted_of_python_and_of_c() -> None:
    def work(times: int) -> None:
        for _ in range(times):
            len([])

    assert num_calls(lambda: work(7)) - num_calls(lambda: work(2)) == 5


def test_arrays_of_nan_are_not_close() -> None:
    with pytest.raises(AssertionError):
        assert_allclose([NAN], [NAN])
    assert_allclose([1.0], [1.0 + 1e-9])

"""What the mean and the deviation of colours can be, on the scale 0 ... 1: one rule for options, keys and stored weights."""

from collections.abc import Callable
from typing import Any


def fault(mean: Any, std: Any) -> str | None:
    """Why two values are no normalisation of red, green and blue, in a sentence. None where they are one.

    Each has three numbers. Those of ``mean`` are from 0 to 1, those of ``std`` above 0 and at most 1. Nothing else comes from
    pixels in 0 ... 1, and a network would give features of any numbers without a word.
    """
    if not _are(mean, lambda value: 0 <= value <= 1):
        return f"mean must be three numbers from 0 to 1. Got {_shown(mean)}{_advice(mean)}"
    if not _are(std, lambda value: 0 < value <= 1):
        return f"std must be above 0 and at most 1, three numbers. Got {_shown(std)}{_advice(std)}"
    return None


def _numbers(values: Any) -> list[float]:
    """The numbers among ``values``. A bool is none."""
    found = values if isinstance(values, list | tuple) else []
    return [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]


def _are(values: Any, fits: Callable[[float], bool]) -> bool:
    numbers = _numbers(values)
    return len(numbers) == 3 == len(values) and all(map(fits, numbers))  # a NaN fits nowhere


def _shown(values: Any) -> str:
    numbers = _numbers(values)
    return f"({', '.join(f'{value:g}' for value in numbers)})" if len(numbers) == 3 == len(values) else repr(values)


def _advice(values: Any) -> str:
    """What to do where they look like those of pixels in 0 ... 255."""
    numbers = _numbers(values)
    return ": divide numbers of 0 ... 255 by 255" if numbers and 1 < max(numbers) <= 255 and min(numbers) >= 0 else ""

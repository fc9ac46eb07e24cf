"""Independent random streams, and two ways to choose from a list."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
T = TypeVar("T")

_SPLITS = ("pool", "market_train", "market_test", "market_distractor", "market_junk", "duke_train", "duke_test")
_PURPOSES = ("identity", "cameras", "track", "image", "occluder", "camera")


def rng_of(seed: int, split: str, purpose: str, *key: int) -> Rng:
    """An independent generator for one thing of one split."""
    spawn_key = (_SPLITS.index(split), _PURPOSES.index(purpose), *key)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=spawn_key)))


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def pick_weighted(rng: Rng, weights: dict[str, int]) -> str:
    place = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        place -= weight
        if place < 0:
            return name
    return next(reversed(weights))

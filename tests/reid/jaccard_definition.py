"""Jaccard distances of k-reciprocal sets as cluster-contrast defines them, written out in float64.

    python tests/reid/jaccard_definition.py

writes the numbers that ``test_jaccard_numbers.py`` compares with. The definition is that of arXiv 1701.08398 with the sizes in
cluster-contrast's code: the whole set looks at k1 images, the half set at round(k1 / 2) + 1, and both count the image itself.
Nothing of the package is used.
"""

import json
from pathlib import Path

import numpy as np

NUMBERS = Path(__file__).parents[1] / "golden" / "jaccard_distances.json"
CASES = ((8, 3), (20, 6), (7, 1))  # k1 and k2; half of 7 is rounded to 4


def draw_features() -> np.ndarray:
    """40 images of ten people, in three decimals."""
    rng = np.random.default_rng(15)
    centres = rng.normal(size=(10, 6))
    return np.round(centres[rng.integers(10, size=40)] + 0.7 * rng.normal(size=(40, 6)), 3)


def distances(features: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """The distance of every pair, (N, N)."""
    unit = features / np.sqrt((features**2).sum(axis=1, keepdims=True))
    squared = 2 - 2 * unit @ unit.T
    num = len(unit)
    nearest = [sorted(range(num), key=lambda j: (j != i, squared[i, j]))[:k1] for i in range(num)]

    def reciprocal(i: int, size: int) -> set[int]:
        return {j for j in nearest[i][:size] if i in nearest[j][:size]}

    weights = np.zeros((num, num))
    for i in range(num):
        whole = reciprocal(i, k1)
        members = set(whole)
        for j in whole:
            half = reciprocal(j, round(k1 / 2) + 1)
            if len(half & whole) > 2 / 3 * len(half):
                members |= half
        for j in members:
            weights[i, j] = np.exp(-squared[i, j])
        weights[i] /= weights[i].sum()
    expanded = np.array([weights[nearest[i][:k2]].mean(axis=0) for i in range(num)])
    found = np.zeros((num, num))
    for i in range(num):
        for j in range(num):
            shared = np.minimum(expanded[i], expanded[j]).sum()
            found[i, j] = 1 - shared / np.maximum(expanded[i], expanded[j]).sum()
    return found


def main() -> None:
    """Write the upper triangles of all cases."""
    features = draw_features()
    upper = np.triu_indices(len(features), 1)
    cases = [{"k1": k1, "k2": k2, "distances": distances(features, k1, k2)[upper].round(7).tolist()} for k1, k2 in CASES]
    lines = [f'"features": {json.dumps(features.tolist())}', f'"cases": [{", ".join(json.dumps(case) for case in cases)}]']
    NUMBERS.write_text("{" + ",\n ".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Person crops as a masked autoencoder sees them: fourteen statistics, next to those of Market-1501's training set.

They show whether crops are like those that the configurations were tuned on. Drawn people are held to them too.
Images are resized to 128 x 64 and cut into 16-pixel patches. "Energy" is the energy of the target of Eq. (5): patches minus
their mean, over their deviation. It is split into the share that follows from the position, from the image's mean colour,
from the patch's own mean colour, and the rest. Rows that need people or cameras are left out where those are not known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from personmae.errors import UserError
from personmae.images import BadImage, decode

SIZE: Final = (128, 64)  # (height, width) in pixels
PATCH: Final = 16
THUMBNAIL: Final = (16, 4)  # (height, width) of the middle half of an image
MAX_PEOPLE, MAX_IMAGES, MAX_QUERIES = 300, 5000, 800
MIN_PER_CAMERA = 10
LUMINANCE: Final = np.array([0.299, 0.587, 0.114], np.float32)

MARKET: Final[Mapping[str, float]] = {  # by this code, of the 300 people (4,954 images) that it takes of the training set
    "energy: position": 0.030,
    "energy: image's colour": 0.019,
    "energy: patch's colour": 0.047,
    "energy: texture": 0.904,
    "colour variance between cameras": 0.050,
    "hue variance between cameras": 0.051,
    "camera told from colour": 0.423,
    "nearest thumbnail of same camera": 0.415,
    "thumbnail mAP": 5.58,
    "thumbnail mAP, per camera": 6.3,
    "deviation of pixels": 0.192,
    "deviation of luminance in a patch": 0.122,
    "saturation": 0.150,
    "horizontal gradient": 0.034,
}


@dataclass(frozen=True, slots=True)
class Crops:
    """Images in RGB. People and cameras are None where nobody knows them."""

    images: UInt8[np.ndarray, "N 128 64 3"]
    pids: Int[np.ndarray, " N"] | None = None
    camids: Int[np.ndarray, " N"] | None = None


def read_crops(
    paths: Sequence[str | Path], pids: Int[np.ndarray, " N"] | None = None, camids: Int[np.ndarray, " N"] | None = None
) -> Crops:
    """Images of at most 300 random people, or 5,000 images where the people are unknown. Cameras may be unknown too.

    Raises:
        UserError: an image cannot be read.
    """
    rng = np.random.default_rng(0)
    if pids is None:
        kept = np.sort(rng.permutation(len(paths))[:MAX_IMAGES])
    else:
        kept = np.flatnonzero(np.isin(pids, rng.permutation(np.unique(pids))[:MAX_PEOPLE]))
    images = _load([paths[place] for place in kept])
    return Crops(images, None if pids is None else pids[kept], None if camids is None else camids[kept])


def _load(paths: Sequence[str | Path]) -> UInt8[np.ndarray, "N 128 64 3"]:
    images = np.empty((len(paths), *SIZE, 3), np.uint8)
    for place, path in enumerate(paths):
        try:
            images[place] = cv2.resize(decode(Path(path).read_bytes()).pixels, SIZE[::-1], interpolation=cv2.INTER_AREA)
        except (BadImage, OSError) as error:
            raise UserError(f"each image must be readable, and {path} is not ({error}). Remove it") from error
    return images


def statistics(crops: Crops) -> dict[str, float]:
    """The rows of ``MARKET`` for these crops, in its order. The mAP is in %. Others are shares, or of pixels in [0, 1].

    Cameras with fewer than ten images are left out where cameras are compared.
    """
    pixels = crops.images.astype(np.float32) / 255
    found = energies(pixels) | looks(pixels)
    if crops.pids is not None and crops.camids is not None:
        known, counts = np.unique(crops.camids, return_counts=True)
        large = np.isin(crops.camids, known[counts >= MIN_PER_CAMERA])
        if len(np.unique(crops.camids[large])) > 1:
            found |= cameras(pixels[large], crops.camids[large])
            found |= neighbours(crops.images[large], crops.pids[large], crops.camids[large])
    return {name: found[name] for name in MARKET if name in found}


def energies(pixels: Float[np.ndarray, "N 128 64 3"]) -> dict[str, float]:
    """Shares of the energy of Eq. (5)'s target that follow from the position, the image's and the patch's mean colour."""
    target = normalised_patches(pixels)
    constant = target.mean(0, keepdims=True)
    rest = target - constant
    hues = rest.mean(3)  # (N, L, 3)
    hue = hues.mean(1, keepdims=True)
    parts = {
        "energy: position": constant,
        "energy: image's colour": hue,
        "energy: patch's colour": hues - hue,
        "energy: texture": rest - hues[..., None],
    }
    energy = max(float((target**2).mean()), 1e-12)  # of plain images there is none
    return {name: float((part**2).mean()) / energy for name, part in parts.items()}


def normalised_patches(pixels: Float[np.ndarray, "N 128 64 3"]) -> Float[np.ndarray, "N L 3 P"]:
    """Patches minus their mean over their deviation, both over all values of a patch."""
    h, w = SIZE[0] // PATCH, SIZE[1] // PATCH
    patches = pixels.reshape(-1, h, PATCH, w, PATCH, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, h * w, 3 * PATCH**2)
    target = (patches - patches.mean(2, keepdims=True)) / (patches.std(2, keepdims=True) + 1e-3)
    return target.reshape(-1, h * w, 3, PATCH**2)


def looks(pixels: Float[np.ndarray, "N 128 64 3"]) -> dict[str, float]:
    """Contrast, saturation and sharpness."""
    light = pixels @ LUMINANCE
    h, w = SIZE[0] // PATCH, SIZE[1] // PATCH
    patches = light.reshape(-1, h, PATCH, w, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, h * w, PATCH**2)
    high = pixels.max(3)
    return {
        "deviation of pixels": float(pixels.std((1, 2)).mean()),
        "deviation of luminance in a patch": float(patches.std(2).mean()),
        "saturation": float(((high - pixels.min(3)) / np.maximum(high, 1e-6)).mean()),
        "horizontal gradient": float(np.abs(np.diff(light, axis=2)).mean()),
    }


def cameras(pixels: Float[np.ndarray, "N 128 64 3"], camids: Int[np.ndarray, " N"]) -> dict[str, float]:
    """How well colour alone predicts the camera: by variance, and by logistic regression on nine colour statistics."""
    from sklearn.linear_model import LogisticRegression

    colour = pixels.mean((1, 2))
    hue = colour - colour.mean(1, keepdims=True)
    nine = np.concatenate([colour, pixels.std((1, 2)), hue], 1)
    nine = (nine - nine.mean(0)) / np.maximum(nine.std(0), 1e-6)
    order = np.random.default_rng(0).permutation(len(nine))
    train, test = np.array_split(order, 2)
    accuracy = LogisticRegression(max_iter=1000).fit(nine[train], camids[train]).score(nine[test], camids[test])
    return {
        "colour variance between cameras": _share_between(colour, camids),
        "hue variance between cameras": _share_between(hue / np.maximum(hue.std(0), 1e-6), camids),
        "camera told from colour": float(accuracy),
    }


def _share_between(values: Float[np.ndarray, "N K"], camids: Int[np.ndarray, " N"]) -> float:
    """Share of the variance of ``values`` between cameras."""
    mean = values.mean(0)
    own = [(camids == camid, values[camids == camid].mean(0)) for camid in np.unique(camids)]
    return float(sum(mask.mean() * ((centre - mean) ** 2).sum() for mask, centre in own) / max(values.var(0).sum(), 1e-12))


def neighbours(
    images: UInt8[np.ndarray, "N 128 64 3"], pids: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]
) -> dict[str, float]:
    """What the nearest 16 x 4 thumbnails of the middle half show: the same camera, the same person."""
    quarter = SIZE[1] // 4
    middle = [cv2.resize(image[:, quarter:-quarter], THUMBNAIL[::-1], interpolation=cv2.INTER_AREA) for image in images]
    thumbnails = np.stack(middle).reshape(len(images), -1).astype(np.float32)
    standard = thumbnails.copy()
    for camid in np.unique(camids):
        own = standard[camids == camid]
        standard[camids == camid] = (own - own.mean(0)) / (own.std(0) + 1e-6)
    raw, same = _retrieve(thumbnails - thumbnails.mean(0), pids, camids)
    return {
        "nearest thumbnail of same camera": same,
        "thumbnail mAP": raw,
        "thumbnail mAP, per camera": _retrieve(standard, pids, camids)[0],
    }


def _retrieve(
    features: Float[np.ndarray, "N F"], pids: Int[np.ndarray, " N"], camids: Int[np.ndarray, " N"]
) -> tuple[float, float]:
    """mAP in % of at most 800 queries, and the share of them whose nearest image is of the same camera.

    Images of the query's person by the query's camera are left out.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    queries = np.random.default_rng(0).permutation(len(unit))[:MAX_QUERIES]
    precisions, same = [], 0
    for query, scores in zip(queries, unit[queries] @ unit.T, strict=True):
        kept = ~((pids == pids[query]) & (camids == camids[query]))
        order = np.argsort(-scores[kept], kind="stable")
        same += int(camids[kept][order[0]] == camids[query])
        hits = np.flatnonzero((pids[kept] == pids[query])[order])
        if len(hits):
            precisions.append(((np.arange(len(hits)) + 1) / (hits + 1)).mean())
    return 100 * float(np.mean(precisions)) if precisions else 0.0, same / len(queries)


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """The statistics of several sets next to Market-1501's, as lines of text."""
    columns = {"Market-1501": MARKET} | dict(columns)
    width = max(map(len, MARKET))
    lines = [" " * width + "".join(f"  {name:>12}" for name in columns)]
    for row in MARKET:
        found = (f"{values[row]:12.3f}" if row in values else f"{'-':>12}" for values in columns.values())
        lines.append(f"{row:{width}}" + "".join(f"  {text}" for text in found))
    return "\n".join(lines)

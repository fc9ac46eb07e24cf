"""From image files to network input: decode and resize on threads, then augment as batched tensor operations.

``personmae.images`` turns a file into upright RGB pixels, by the same rule as in pre-training. Sizes are (H, W). Training and
test resize alike (bicubic). Everything random comes from one explicit generator.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from personmae.errors import RankError
from personmae.images import BadImage, decode

ERASE_AREA: Final = (0.02, 0.4)  # of the image
ERASE_ASPECT: Final = (0.3, 3.3)  # height / width
ERASE_ATTEMPTS: Final = 10
CHUNK: Final = 256  # images decoded at a time while the cache is filled


def decode_image(path: str) -> UInt8[np.ndarray, "H W 3"]:
    """Decode one file to upright RGB.

    Raises:
        RankError: the file cannot be read, is not an image, or ends too early.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RankError(f"cannot read {path}: {error.strerror}. Check the data set") from error
    try:
        return decode(data).pixels
    except BadImage as error:
        raise RankError(f"{path} is not a whole image: {error}. Copy it again, replace it or remove it") from error


def read_image(path: str, img_size: tuple[int, int]) -> UInt8[np.ndarray, "3 H W"]:
    """Decode one file to RGB and resize it to (H, W), bicubic, without smoothing where it shrinks.

    Raises:
        RankError: the file cannot be read or is not a whole image.
    """
    return fitted(decode_image(path), img_size)


def fitted(image: UInt8[np.ndarray, "h w 3"], img_size: tuple[int, int]) -> UInt8[np.ndarray, "3 H W"]:
    """RGB pixels resized to (H, W), bicubic, without smoothing where they shrink, channels first."""
    height, width = img_size
    if image.shape[:2] != img_size:
        image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def load_images(paths: Sequence[str], img_size: tuple[int, int], pool: ThreadPoolExecutor) -> UInt8[Tensor, "B 3 H W"]:
    """Decode files on the threads of ``pool``, in order. OpenCV releases the GIL.

    Raises:
        UserError: names the first file that cannot be read.
    """
    images = torch.empty(len(paths), 3, *img_size, dtype=torch.uint8)
    for row, image in zip(images, pool.map(lambda path: read_image(path, img_size), paths), strict=True):
        row.copy_(torch.from_numpy(image))
    return images


class ImageSet:
    """Images by index. Decoded once into memory where all of them take at most ``cache_bytes``, else on every read."""

    def __init__(
        self,
        paths: Sequence[str],
        img_size: tuple[int, int],
        *,
        pool: ThreadPoolExecutor,
        cache_bytes: int = 2**30,
    ):
        self.paths, self.img_size = list(paths), img_size
        self._pool = pool
        self._cache: Tensor | None = None
        if len(self.paths) * 3 * math.prod(img_size) <= cache_bytes:
            self._cache = torch.empty(len(self.paths), 3, *img_size, dtype=torch.uint8)
            for start in range(0, len(self.paths), CHUNK):  # in chunks, so that nothing is held twice
                chunk = slice(start, start + CHUNK)
                self._cache[chunk] = load_images(self.paths[chunk], img_size, pool)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Sequence[int] | Int[np.ndarray, " B"]) -> UInt8[Tensor, "B 3 H W"]:
        """The images with these indices, in this order.

        Raises:
            UserError: a file cannot be read.
        """
        if self._cache is not None:
            return self._cache[torch.tensor(np.asarray(indices), dtype=torch.int64)]
        return load_images([self.paths[int(i)] for i in indices], self.img_size, self._pool)


def load_ahead(images: ImageSet, batches: Iterable[Int[np.ndarray, " B"]]) -> Iterator[UInt8[Tensor, "B 3 H W"]]:
    """The images of each batch of indices in turn. While one is worked on, a thread reads the next.

    Raises:
        UserError: a file cannot be read. It is raised in the batch of that file.
    """
    with ThreadPoolExecutor(1) as reader:
        coming: Future[Tensor] | None = None
        for indices in batches:
            ready, coming = coming, reader.submit(images.load, indices)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def normalise(images: UInt8[Tensor, "B C H W"], mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "B C H W"]:
    """The test transform: 0 ... 255 to 0 ... 1, minus ``mean``, over ``std`` (per channel, on the 0 ... 1 scale)."""
    mean_, std_ = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() / 255 - mean_) / std_


class Augmentation(NamedTuple):
    """What is drawn for each image of a batch. ``part`` takes a rank's share, so that no result depends on the ranks."""

    flipped: Bool[Tensor, " B"]
    offsets: Int[Tensor, "B 2"]  # (y, x) of the crop in the padded image, in pixels
    boxes: Int[Tensor, "B 4"]  # (y0, x0, y1, x1) that is erased, in pixels, end exclusive
    noise_seeds: Int[Tensor, " B"]

    def part(self, rows: slice) -> "Augmentation":
        """The draws of some images."""
        return Augmentation(*(drawn[rows] for drawn in self))


def draw_augmentation(
    batch_size: int,
    img_size: tuple[int, int],
    *,
    seed: int,
    step: int,
    pad: int = 10,
    flip_prob: float = 0.5,
    erase_prob: float = 0.5,
) -> Augmentation:
    """Flips, shifts by up to ``pad`` pixels and boxes to erase of a global batch: a function of the seed and the step."""
    number = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(number >> np.uint64(1)))
    return Augmentation(
        flipped=torch.rand(batch_size, generator=generator) < flip_prob,
        offsets=torch.randint(2 * pad + 1, (batch_size, 2), generator=generator),
        boxes=erase_boxes(batch_size, img_size, generator, prob=erase_prob),
        noise_seeds=torch.randint(1 << 62, (batch_size,), generator=generator),
    )


def augment(
    images: UInt8[Tensor, "B C H W"], drawn: Augmentation, *, mean: Sequence[float], std: Sequence[float], pad: int = 10
) -> Float[Tensor, "B C H W"]:
    """The training transform: flip, pad and crop, normalise, erase."""
    shifted = shift(flip(images, drawn.flipped), drawn.offsets, pad=pad)
    return erase(normalise(shifted, mean, std), drawn.boxes, drawn.noise_seeds)


def flip(images: UInt8[Tensor, "B C H W"], flipped: Bool[Tensor, " B"]) -> UInt8[Tensor, "B C H W"]:
    """Mirror some images left to right."""
    return torch.where(flipped.to(images.device)[:, None, None, None], images.flip(-1), images)


def shift(images: UInt8[Tensor, "B C H W"], offsets: Int[Tensor, "B 2"], *, pad: int) -> UInt8[Tensor, "B C H W"]:
    """Pad each side with ``pad`` black pixels and crop the original size from ``offsets``."""
    b, c, height, width = images.shape
    offsets = offsets.to(images.device)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)  # (B, W)
    padded = F.pad(images, (pad, pad, pad, pad))
    padded = padded.gather(2, rows[:, None, :, None].expand(b, c, height, width + 2 * pad))
    return padded.gather(3, columns[:, None, None, :].expand(b, c, height, width))


def erase(
    images: Float[Tensor, "B C H W"], boxes: Int[Tensor, "B 4"], noise_seeds: Int[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """Replace a box of each image, in place, by N(0, 1) noise, pixel by pixel (arXiv 1708.04896)."""
    generator = torch.Generator()
    for image, (y0, x0, y1, x1), seed in zip(images, boxes.tolist(), noise_seeds.tolist(), strict=True):
        if y1 > y0:
            noise = torch.randn(len(image), y1 - y0, x1 - x0, generator=generator.manual_seed(seed))
            image[:, y0:y1, x0:x1] = noise.to(image)
    return images


def erase_boxes(
    batch_size: int, img_size: tuple[int, int], generator: torch.Generator, *, prob: float
) -> Int[Tensor, "{batch_size} 4"]:
    """Boxes (y0, x0, y1, x1) in pixels, end exclusive. An image that keeps all its pixels has an empty box.

    The first of ten proposals that is smaller than the image counts.
    """
    height, width = img_size
    device = generator.device
    draws = torch.rand(2, batch_size, ERASE_ATTEMPTS, generator=generator, device=device)
    area = height * width * (ERASE_AREA[0] + draws[0] * (ERASE_AREA[1] - ERASE_AREA[0]))
    low, high = (math.log(aspect) for aspect in ERASE_ASPECT)
    aspect = torch.exp(low + draws[1] * (high - low))
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits & (fits.cumsum(1) == 1)
    chance, y, x = torch.rand(3, batch_size, generator=generator, device=device)
    erased = chance < prob
    h, w = (h * first).sum(1) * erased, (w * first).sum(1) * erased
    y0, x0 = (y * (height - h + 1)).floor(), (x * (width - w + 1)).floor()
    return torch.stack([y0, x0, y0 + h, x0 + w], dim=1).long()

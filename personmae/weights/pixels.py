"""What a user calls an image, to the pixels that a network is fed with: the same as from the file in training and test."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from personmae.errors import UserError
from personmae.images import BadImage, rgb
from personmae.reid.transforms import decode_image, fitted

KINDS = "an image is a path, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W) of uint8 or of floats in 0 ... 1"
ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def one_by_one(images: Any) -> Iterator[ImageLike]:
    """Images of a sequence, an iterator or a batch (B, ...). One image alone is a batch of one."""
    alone = isinstance(images, str | Path | Image.Image)
    if alone or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3):
        yield images
    elif isinstance(images, Iterable):
        yield from images
    else:
        raise UserError(f"{KINDS}. Got {_named(images)}")


def to_pixels(image: ImageLike, img_size: tuple[int, int]) -> UInt8[np.ndarray, "3 H W"]:
    """An image as RGB of (H, W) = ``img_size``, upright, resized as in training and test.

    Raises:
        UserError: it is no image, or its file cannot be read.
    """
    return fitted(to_rgb(image), img_size)


def to_rgb(image: ImageLike) -> UInt8[np.ndarray, "H W 3"]:
    """An image as RGB of its own size, upright.

    Raises:
        UserError: it is no image, or its file cannot be read.
    """
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            found = "is a folder: give the files in it" if Path(image).is_dir() else "does not exist"
            raise UserError(f"a file with an image is required. {image} {found}")
        return decode_image(str(image))
    if isinstance(image, Image.Image):
        try:
            return rgb(ImageOps.exif_transpose(image))
        except BadImage as error:
            raise UserError(f"an image with pixels of a known range is required. Got mode {image.mode}: {error}") from error
    if isinstance(image, Tensor):
        return _of_tensor(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return image
    raise UserError(f"{KINDS}. Got {_named(image)}")


def _of_tensor(image: Tensor) -> UInt8[np.ndarray, "H W 3"]:
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        raise UserError(f"{KINDS}. Got {_named(image)}")
    if image.is_floating_point():
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{KINDS}. This tensor reaches from {low:.3g} to {high:.3g}: normalised images go to .model instead"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise UserError(f"{KINDS}. Got {_named(image)}")
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def _named(image: Any) -> str:
    shape = f" of {image.dtype}, shape {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else ""
    return f"{type(image).__name__}{shape}"

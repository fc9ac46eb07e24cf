"""Uploaded images: what they are is seen in their first bytes, and how large before anything is decoded."""

import io
import math
from typing import Final, NamedTuple

from PIL import Image, UnidentifiedImageError

from personmae import images
from personmae.images import BadImage, Pixels
from personmae.serve.limits import Limits, Refusal

_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP")
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"  # the second begins each pass over a progressive JPEG, and cannot be in its data
_MOST_SCANS: Final = 100
LEAST_SIDE: Final = 8  # pixels of a box


class Box(NamedTuple):
    """A part of an image, in shares of its width and height from 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float


def decode(data: bytes, limits: Limits) -> Pixels:
    """An upright RGB image from the bytes of a JPEG, PNG, WebP or BMP file.

    Raises:
        Refusal: 415, it is none of these, 413, it has too many pixels, or 422, it is damaged.
    """
    height, width = _announced(data)
    if height * width > limits.pixels:
        raise Refusal(
            413,
            f"an image may have {limits.pixels / 1e6:g} million pixels. This one has {width:,} x {height:,}: make it smaller",
        )
    if data.startswith(_JPEG) and data.count(_SCAN) > _MOST_SCANS:
        raise Refusal(422, "this JPEG is stored in too many passes: save it again")
    try:
        return images.decode(data).pixels
    except BadImage as error:
        raise Refusal(422, f"this image cannot be read, {error}: save it again") from error


def _announced(data: bytes) -> tuple[int, int]:
    """(height, width) as the header of a file has them."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return image.height, image.width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refusal(413, "this image has far too many pixels: make it smaller") from error
    except UnidentifiedImageError as error:
        raise Refusal(415, "a JPEG, PNG, WebP or BMP image is required, whatever the file is called: save it as one") from error
    except Exception as error:  # Pillow's readers raise errors of a dozen kinds for damaged bytes
        raise Refusal(422, "this image is damaged: save it again") from error


def cropped(pixels: Pixels, box: Box | None) -> Pixels:
    """The part of an image within a box, or all of it.

    Raises:
        Refusal: 422, hardly anything is in the box.
    """
    if box is None:
        return pixels
    height, width = pixels.shape[:2]
    top, bottom = math.floor(box.top * height), math.ceil(box.bottom * height)
    left, right = math.floor(box.left * width), math.ceil(box.right * width)
    if bottom - top < LEAST_SIDE or right - left < LEAST_SIDE:
        raise Refusal(422, f"a box must be at least {LEAST_SIDE} pixels wide and high: draw a larger one")
    return pixels[top:bottom, left:right]

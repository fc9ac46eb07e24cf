"""JPEG bytes to uint8 canvases, many at a time. The decoder runs without the interpreter's lock."""

import threading
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from personmae import images
from personmae.images import BadImage

Canvas = NDArray[np.uint8]  # (Hc, Wc, 3), RGB
Size = tuple[int, int]  # (height, width) in pixels

_EIGHTHS = 8  # the decoder can shrink an image to any number of eighths while it decodes, which saves time
_scratch = threading.local()


class Placed(NamedTuple):
    """An image's own size, upright, and its size in the upper left corner of its canvas."""

    native_size: Size
    size: Size


def decode_onto(jpeg: bytes | memoryview, canvas: Canvas) -> Placed:
    """Decode a JPEG into the upper left corner of ``canvas``. The rest of the canvas is unchanged.

    The image is turned by its EXIF orientation. One that fits is not resized. The decoder shrinks a larger one to the
    most eighths of its size that fit.

    Raises:
        BadImage: the bytes are not a whole image, or the decoder warns.
    """
    try:
        height, width = map(int, simplejpeg.decode_jpeg_header(jpeg)[:2])
        orientation = images.orientation(jpeg)
        if orientation != images.AS_STORED:
            return _decode_turned(jpeg, (height, width), orientation, canvas)
        size = fitted_size((height, width), canvas.shape[:2])
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=size[0], min_width=size[1], buffer=_buffer(size))
    except (ValueError, LookupError) as error:  # an IndexError where there are no bytes, a KeyError for an odd subsampling
        raise BadImage(f"{len(jpeg)} bytes are not a whole JPEG: {error}") from error
    return Placed((height, width), _place(pixels, canvas))


def _decode_turned(jpeg: bytes | memoryview, stored: Size, orientation: int, canvas: Canvas) -> Placed:
    """As ``decode_onto``, for an image of the size ``stored`` that is not stored upright.

    Raises:
        ValueError: the bytes are not a whole JPEG.
    """
    native_size = images.turned_size(stored, orientation)
    height, width = images.turned_size(fitted_size(native_size, canvas.shape[:2]), orientation)  # as it is stored
    pixels = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=height, min_width=width, buffer=_buffer((height, width)))
    return Placed(native_size, _place(images.turned(pixels, orientation), canvas))


def _place(pixels: Canvas, canvas: Canvas) -> Size:
    """Put pixels into the upper left corner of a canvas and return their size on it."""
    height, width = pixels.shape[:2]
    if height > canvas.shape[0] or width > canvas.shape[1]:  # even an eighth is too large
        height, width = min(height, canvas.shape[0]), min(width, canvas.shape[1])
        shrunk = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA)
        pixels = shrunk.astype(np.uint8, copy=False)
    canvas[:height, :width] = pixels
    return height, width


def fitted_size(native_size: Size, canvas_size: tuple[int, ...]) -> Size:
    """The largest size, at most its own, at which the decoder can make an image fit. Otherwise an eighth of its size."""
    height, width = native_size
    # The decoder rounds up.
    sizes = [(-(-height * eighths // _EIGHTHS), -(-width * eighths // _EIGHTHS)) for eighths in range(_EIGHTHS, 0, -1)]
    return next((size for size in sizes if size[0] <= canvas_size[0] and size[1] <= canvas_size[1]), sizes[-1])


def _buffer(size: Size) -> NDArray[np.uint8]:
    """This thread's memory for a decoded image: it stays in the processor's cache, and nothing is allocated."""
    needed = size[0] * size[1] * 3
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < needed:
        buffer = _scratch.buffer = np.empty(needed, np.uint8)
    return buffer

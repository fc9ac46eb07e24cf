"""JPEG bytes to uint8 canvases, many at a time: the decoder runs without holding the interpreter's lock."""

import cv2
import numpy as np
from numpy.typing import NDArray

Canvas = NDArray[np.uint8]  # (H, 3, W), RGB: the layout that model/regions.py multiplies without moving it
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


class BadImage(ValueError):  # noqa: N818 - names what it is
    """Bytes that do not decode to a picture."""


def decode_onto(jpeg: bytes | memoryview, canvas: Canvas) -> tuple[int, int]:
    """Decode a JPEG and resize it to fill ``canvas``; returns the picture's own (height, width).

    Raises:
        BadImage: the bytes are not a readable picture.
    """
    try:
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), _FLAGS)
    except cv2.error as error:
        raise BadImage(str(error)) from error
    if image is None:
        raise BadImage(f"{len(jpeg)} bytes are not a picture")
    height, width = image.shape[:2]
    canvas_h, _, canvas_w = canvas.shape
    shrinks = height >= canvas_h and width >= canvas_w
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    canvas[:] = cv2.resize(image, (canvas_w, canvas_h), interpolation=interpolation).transpose(0, 2, 1)
    return height, width

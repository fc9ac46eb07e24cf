"""Images next to each other, with words above them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import cv2
import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from personmae.images import Pixels

PAPER: Final = "#ffffff"
MUTED: Final = "#55606e"
GAP: Final = 10  # pixels between images and around them
LINE: Final = 22  # pixels, of the words above


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which has the letters of most languages. ``size`` is in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def scaled(image: Pixels, height: int) -> Pixels:
    """An image brought to a height in pixels. Its shape stays."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method).astype(np.uint8, copy=False)


def row(images: Sequence[Pixels], words: Sequence[str], *, height: int = 256) -> Pixels:
    """Images of one height next to each other, each below its words. A column is as wide as the wider of both."""
    columns = [scaled(image, height) for image in images]
    letters = font(14)
    widths = [max(image.shape[1], round(letters.getlength(text))) for image, text in zip(columns, words, strict=True)]
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), height + LINE + 2 * GAP), PAPER)
    canvas, left = ImageDraw.Draw(sheet), GAP
    for image, text, width in zip(columns, words, widths, strict=True):
        canvas.text((left + width / 2, GAP), text, font=letters, fill=MUTED, anchor="ma")
        sheet.paste(Image.fromarray(image), (left + (width - image.shape[1]) // 2, GAP + LINE))
        left += width + GAP
    return np.asarray(sheet)

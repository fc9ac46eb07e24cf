"""Sheets of images with words on them, and figures of matplotlib as pixels and as vectors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import cv2
import matplotlib as mpl
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from personmae.explain.sheet import font
from personmae.report import charts, figures
from personmae.report.figures import Pixels

PAPER, INK, MUTED = (255, 255, 255), (22, 32, 44), (85, 96, 110)  # those of the page in light
COLOURS: Final = {  # the page's variables in light, for pixels
    "--ink": "#16202c",
    "--muted": "#55606e",
    "--line": "#d9dfe7",
    "--accent": "#0d3b9e",
} | {f"--curve-{i}": colour for i, colour in enumerate(charts.LIGHT)}
STYLE: Final[dict[Any, Any]] = charts.STYLE | {
    "text.color": COLOURS["--ink"],
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), COLOURS["--muted"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), COLOURS["--line"]),
}
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")  # beside five colours these make 35 kinds of points
DPI: Final = 160
MARGIN, GAP, LINE = 16, 5, 20  # pixels of a sheet


def sheet_of_rows(rows: Sequence[tuple[str, Sequence[Pixels]]]) -> Pixels:
    """Rows of images of one size, each below its line of words. The first image of a row stands a little apart."""
    height, width = rows[0][1][0].shape[:2]
    most = max(len(images) for _, images in rows)
    across = 2 * MARGIN + most * (width + GAP) + GAP
    down = 2 * MARGIN + len(rows) * (LINE + height + 2 * GAP)
    sheet = Image.new("RGB", (across, down), PAPER)
    canvas = ImageDraw.Draw(sheet)
    for number, (words, images) in enumerate(rows):
        top = MARGIN + number * (LINE + height + 2 * GAP)
        canvas.text((MARGIN, top), words, font=font(13), fill=MUTED)
        for place, image in enumerate(images):
            left = MARGIN + place * (width + GAP) + (2 * GAP if place else 0)
            sheet.paste(Image.fromarray(image), (left, top + LINE))
    return np.asarray(sheet)


def place_images(
    places: np.ndarray, images: Sequence[Pixels], colours: Sequence[str], *, size: tuple[int, int]
) -> list[tuple[int, int, Pixels]]:
    """Small images at points (n, 2) in 0 ... 1, y upwards, in frames of their colours. Those that would overlap are left out.

    Returns (left, top, image) of each that is left, in pixels of a sheet of ``size`` (height, width).
    """
    taken = np.zeros(size, bool)
    placed = []
    for number in np.random.default_rng(0).permutation(len(images)).tolist():  # no group comes first
        (x, y), image = places[number], images[number]
        height, width = image.shape[:2]
        top = round((1 - y) * (size[0] - height - 2 * MARGIN)) + MARGIN
        left = round(x * (size[1] - width - 2 * MARGIN)) + MARGIN
        if taken[top - 2 : top + height + 2, left - 2 : left + width + 2].any():
            continue
        framed = np.array(image)
        cv2.rectangle(framed, (0, 0), (width - 1, height - 1), _rgb(str(colours[number])), 5)
        taken[top : top + height, left : left + width] = True
        placed.append((left, top, framed))
    return placed


def sheet_of(placed: Sequence[tuple[int, int, Pixels]], size: tuple[int, int]) -> Pixels:
    """Placed images as one."""
    sheet = np.full((*size, 3), 250, np.uint8)
    for left, top, image in placed:
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def html_of(placed: Sequence[tuple[int, int, Pixels]], size: tuple[int, int], words: str) -> Markup:
    """Placed images on the page's own paper."""
    height, width = size
    images = Markup("").join(
        Markup('<img src="{}" alt="" style="left: {:.2f}%; top: {:.2f}%; width: {:.2f}%">').format(
            data_uri(image, photograph=True), 100 * left / width, 100 * top / height, 100 * image.shape[1] / width
        )
        for left, top, image in placed
    )
    return Markup('<div class="placed" role="img" aria-label="{}" style="aspect-ratio: {} / {}">{}</div>').format(
        words, width, height, images
    )


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def to_pixels(draw: Callable[[], Figure]) -> UInt8[np.ndarray, "H W 3"]:
    """What ``draw`` returns as pixels, in the style and on the paper of the page in light."""
    with mpl.rc_context(STYLE):
        figure = draw()
    figure.set_facecolor("white")
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])


def to_svg(draw: Callable[[], Figure], words: str) -> Markup:
    """What ``draw`` returns in the colours of ``charts.STAND_INS``, as vectors for the page. ``words`` describe it."""
    with mpl.rc_context({**charts.STYLE, "svg.hashsalt": words}):
        return Markup(charts.to_svg(draw(), words))


def to_png(pixels: Pixels) -> bytes:
    """The bytes of a PNG file."""
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    return encoded.tobytes()


def scatter(
    places: np.ndarray, groups: Sequence[str], queries: np.ndarray, colours: Mapping[str, str], *, legend: str
) -> Figure:
    """Points (n, 2) by group. A group has a colour and a marker of its own, and a query an edge."""
    names = list(dict.fromkeys(sorted(groups, key=_by_number)))
    rows = -(-len(names) // 5)
    figure = Figure(figsize=(5.4, 4.6 + 0.2 * rows), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        chosen = np.array([group == name for group in groups])
        style = {"marker": MARKERS[number % len(MARKERS)], "color": colours[f"--curve-{number % len(charts.LIGHT)}"]}
        axes.scatter(*places[chosen & ~queries].T, s=22, linewidths=0, alpha=0.85, label=name, **style)
        axes.scatter(*places[chosen & queries].T, s=34, linewidths=1.1, edgecolors=colours["--ink"], **style)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(
        loc="outside lower left", ncols=5, frameon=False, title=legend, fontsize=8.5, title_fontsize=8.5, alignment="left"
    )
    return figure


def _by_number(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdecimal() else (0, name)


def data_uri(pixels: Pixels, *, photograph: bool = False) -> str:
    """Pixels inside a ``data:`` address, as JPEG where they are a photograph."""
    return figures.data_uri(pixels, ".jpg" if photograph else ".png")

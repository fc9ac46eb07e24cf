"""Occluders in front of the people: poles, walls, cars, panels and boards."""

from collections.abc import Callable

import numpy as np

from personmae.synthetic.canvas import LABELS_PER_FIGURE, NEUTRAL_SHADE, Canvas
from personmae.synthetic.rng import Rng

OCCLUDERS = ("pole", "wall", "car", "panel", "board", "person")  # "person" is drawn by the caller
OCCLUDER_LABEL = 3 * LABELS_PER_FIGURE  # the three figure slots come first


def draw_occluder(canvas: Canvas, kind: str, severity: float, rng: Rng) -> None:
    """Put a thing in front of what is on the canvas. It hides roughly the share ``severity`` of the image."""
    colours = rng.integers(25, 215, (2, 3))
    tint = rng.uniform(0.05, 0.35)
    colours = np.rint(colours * tint + colours.mean(axis=1, keepdims=True) * (1 - tint)).astype(np.int64)
    for offset, colour in enumerate((colours[0], colours[1], (30, 30, 30), (105, 90, 75))):
        canvas.palette[OCCLUDER_LABEL + offset] = (*colour, 255)
    _OCCLUDER_PAINTERS[kind](canvas, severity, rng)


def _box(canvas: Canvas, x0: float, y0: float, x1: float, y1: float, part: int, shade: int = NEUTRAL_SHADE) -> None:
    """A rectangle in fractions of the canvas."""
    height, width = canvas.label.shape
    _outline(canvas, [(x0 * width, y0 * height), (x1 * width, y0 * height), (x1 * width, y1 * height),
                      (x0 * width, y1 * height)], part, shade)  # fmt: skip


def _outline(canvas: Canvas, points: list[tuple[float, float]], part: int, shade: int = NEUTRAL_SHADE) -> None:
    corners = np.rint(np.array(points) * 16).astype(np.int32)
    canvas.fill(corners, OCCLUDER_LABEL + part, shade)


def _paint_pole(canvas: Canvas, severity: float, rng: Rng) -> None:
    x, half = rng.uniform(0.33, 0.67), 0.05 + 0.26 * severity
    _box(canvas, x - half, -0.1, x + half, 1.1, 0, 90)
    _box(canvas, x - 0.6 * half, -0.1, x + 0.2 * half, 1.1, 0, 150)
    y = rng.uniform(0.1, 0.7)
    _box(canvas, x - half, y, x + half, y + 0.03, 1, 120)


def _paint_wall(canvas: Canvas, severity: float, rng: Rng) -> None:
    top = 0.97 - 0.85 * severity
    _box(canvas, -0.1, top, 1.1, 1.1, 0, 118)
    _box(canvas, -0.1, top, 1.1, top + 0.03, 1, 160)
    for row in range(12):
        y = top + 0.05 + row * 0.06
        _box(canvas, -0.1, y, 1.1, y + 0.006, 2, 100)
        for column in range(5):
            x = (column + (row % 2) / 2) / 4.5 + rng.uniform(0, 0.02)
            _box(canvas, x, y, x + 0.012, y + 0.06, 2, 100)


def _paint_car(canvas: Canvas, severity: float, rng: Rng) -> None:
    height, width = canvas.label.shape
    top, x = 0.95 - 0.8 * severity, rng.uniform(-0.6, 0.2)
    tall = 1.02 - top

    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((x + u * 1.7) * width, (top + v * tall) * height) for u, v in points]

    _outline(canvas, at([(0.0, 0.5), (0.22, 0.42), (0.34, 0.02), (0.72, 0), (0.9, 0.4), (1, 0.5), (1, 1), (0, 1)]), 0)
    _outline(canvas, at([(0.27, 0.4), (0.37, 0.08), (0.7, 0.06), (0.84, 0.4)]), 3, 110)
    _outline(canvas, at([(0.0, 0.52), (1, 0.52), (1, 0.56), (0, 0.56)]), 0, 165)
    for wheel in (0.2, 0.78):
        ring = [(wheel + 0.09 * float(np.cos(t)), 0.93 + 0.2 * float(np.sin(t))) for t in np.arange(12) * np.pi / 6]
        _outline(canvas, at(ring), 2, 90)


def _paint_panel(canvas: Canvas, severity: float, rng: Rng) -> None:
    """A door frame or pillar that hides one side."""
    edge = 0.12 + 0.62 * severity
    if rng.random() < 0.5:
        _box(canvas, -0.1, -0.1, edge, 1.1, 0, 112)
        _box(canvas, edge - 0.04, -0.1, edge, 1.1, 1, 150)
    else:
        _box(canvas, 1 - edge, -0.1, 1.1, 1.1, 0, 132)
        _box(canvas, 1 - edge, -0.1, 1.04 - edge, 1.1, 1, 84)


def _paint_board(canvas: Canvas, severity: float, rng: Rng) -> None:
    """A sign or a hedge at mid-height, on two legs."""
    y, x = rng.uniform(0.3, 0.6), rng.uniform(-0.25, 0.1)
    low = y + 0.12 + 0.5 * severity
    _box(canvas, x + 0.25, low, x + 0.3, 1.1, 2)
    _box(canvas, x + 0.9, low, x + 0.95, 1.1, 2)
    _box(canvas, x, y, x + 1.1, low, 0, 140)
    _box(canvas, x + 0.06, y + 0.03, x + 1.04, low - 0.03, 1, 125)
    for line in range(3):
        at = y + (low - y) * (0.3 + 0.2 * line)
        _box(canvas, x + 0.2, at, x + 0.9 - 0.1 * line, at + 0.018, 2, 130)


_OCCLUDER_PAINTERS: dict[str, Callable[[Canvas, float, Rng], None]] = {
    "pole": _paint_pole, "wall": _paint_wall, "car": _paint_car, "panel": _paint_panel, "board": _paint_board,
}  # fmt: skip

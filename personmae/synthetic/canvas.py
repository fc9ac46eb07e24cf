"""The drawing surface: a canvas of labels and shades, and the pen that draws on it in body units.

A ``Canvas`` holds two 8-bit planes: the material of each pixel and its brightness. Polygons are rounded to 1/16 pixel and
filled by integer scan conversion, and colours come from one integer table. So a drawing has the same bytes on every machine.

In body units the height of the figure is 1, x = 0 is the body's axis, y = 0 the top of the head, and y = 1 the soles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Bgr = tuple[int, int, int]  # 0..255 each
Image = NDArray[np.uint8]  # BGR, (H, W, 3)
Point = tuple[float, float]  # (x, y) in body units
Points = Sequence[Point] | NDArray[np.float64]

# Materials of one figure; a second figure on the same canvas adds LABELS_PER_FIGURE.
SHADOW, SKIN, HAIR, UPPER, ACCENT, INNER, LOWER, LOWER_ACCENT = range(1, 9)
SHOES, SOLES, BAG, BAG_TRIM, HEADWEAR, SCARF, FACE, LIPS, METAL = range(9, 18)
LABELS_PER_FIGURE = 20
MAX_LABELS = 80

SHADE_LEVELS = 64
NEUTRAL_SHADE = 128  # a pixel of this shade shows its material's own colour
EDGE_SHADE, CORE_GAIN = 78, 44  # a limb is dark at its outline and this much brighter along its middle
WRINKLE_DEPTH = 26
MAX_CANVAS = 1100  # pixels, the longer side
WRINKLE_STEPS = 64  # offsets into the wrinkle tile run over [0, WRINKLE_STEPS)

_FIXED = 4  # fractional bits of polygon corners
_HALF_TURN = np.linspace(-np.pi / 2, np.pi / 2, 6)
_CAP = np.exp(1j * np.concatenate([_HALF_TURN, _HALF_TURN + np.pi]))
_CIRCLE = np.exp(1j * np.linspace(0, 2 * np.pi, 20, endpoint=False))


class Canvas:
    """Material labels and shades of an image, both uint8 (H, W), and the colour of each label."""

    def __init__(self, height: int, width: int) -> None:
        self.label = np.zeros((height, width), np.uint8)
        self.shade = np.full((height, width), EDGE_SHADE, np.uint8)
        self.palette = np.zeros((MAX_LABELS, 4), np.int64)

    def fill(self, corners: NDArray[np.int32], label: int, shade: float) -> None:
        """Fill a polygon, corners int32 (N, 2) in 1/16 pixel, (x, y)."""
        cv2.fillPoly(self.label, [corners], (label,), cv2.LINE_8, _FIXED)
        cv2.fillPoly(self.shade, [corners], (round(shade),), cv2.LINE_8, _FIXED)

    def lighten(self, corners: NDArray[np.int32], shade: float) -> None:
        cv2.fillPoly(self.shade, [corners], (round(shade),), cv2.LINE_8, _FIXED)

    def render(self, *, softness: int, wrinkle_offset: tuple[int, int]) -> NDArray[np.uint8]:
        """The image as premultiplied BGRA uint8 (H, W, 4). ``softness`` is the shading blur in pixels."""
        height, width = self.label.shape
        kernel = 2 * softness + 1
        shade = cv2.blur(self.shade, (kernel, kernel))
        y, x = wrinkle_offset
        shade = cv2.add(shade, _wrinkles()[y : y + height, x : x + width])
        levels = (np.arange(SHADE_LEVELS) * 4 + 2)[None, :, None]
        table = np.minimum(self.palette[:, None, :] * levels // (NEUTRAL_SHADE + WRINKLE_DEPTH // 2), 255)
        table[..., 3] = self.palette[:, None, 3]
        packed = np.ascontiguousarray(table.astype(np.uint8)).view(np.uint32).reshape(-1)
        index = (self.label.astype(np.uint16) << 6) | np.right_shift(shade, 2)
        return packed.take(index).view(np.uint8).reshape(height, width, 4)


@lru_cache(maxsize=1)
def _wrinkles() -> NDArray[np.uint8]:
    """Smooth noise in [0, WRINKLE_DEPTH], uint8: the folds of cloth."""
    rng = np.random.default_rng(5)
    size = MAX_CANVAS + WRINKLE_STEPS
    fine = (rng.random((size // 6, size // 10)) * 256).astype(np.uint8)
    noise = cv2.resize(fine, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)
    return (cv2.blur(noise, (5, 5)).astype(np.uint16) * WRINKLE_DEPTH // 256).astype(np.uint8)


@dataclass(slots=True)
class Pen:
    """Maps body units to one place on a canvas. ``pitch`` > 0 looks down: a larger head, shorter legs."""

    canvas: Canvas
    x: float  # pixels, the body's axis
    top: float  # pixels, the top of the head
    scale: float  # pixels per body unit
    width: float = 1.0
    mirror: int = 1
    pitch: float = 0.0
    light: float = 0.3  # side the light comes from, -1 left .. 1 right
    first_label: int = 0

    def corners(self, points: Points) -> NDArray[np.int32]:
        xy = np.asarray(points, np.float64)
        y = xy[:, 1]
        out = np.empty_like(xy)
        out[:, 0] = self.x + self.mirror * self.scale * self.width * xy[:, 0] * (1 + self.pitch * (0.5 - y))
        out[:, 1] = self.top + self.scale * y * (1 + self.pitch * (1 - y))
        return np.rint(out * (1 << _FIXED)).astype(np.int32)

    def area(self, points: Points, material: int, *, shade: float = 0, flat: bool = False) -> None:
        """A polygon with a brighter middle, or evenly lit if ``flat``. ``shade`` is added to the brightness."""
        corners = self.corners(points)
        edge = (EDGE_SHADE + CORE_GAIN if flat else EDGE_SHADE + 6) + shade
        self.canvas.fill(corners, self.first_label + material, edge)
        if not flat:
            x0, x1 = int(corners[:, 0].min()), int(corners[:, 0].max())
            middle = (x0 + x1) // 2 + int(self.light * (x1 - x0)) // 5
            core = corners.copy()
            core[:, 0] = middle + (corners[:, 0] - middle) * 11 // 20
            self.canvas.lighten(core, EDGE_SHADE + CORE_GAIN + shade)

    def slab(
        self, x: float, top: float, low: float, half: tuple[float, float], material: int, *, shade: float = 0,
        flat: bool = False,
    ) -> None:  # fmt: skip
        """An upright trapezoid around ``x``, ``half`` wide to each side at its top and at its lower edge."""
        corners = [(x - half[0], top), (x + half[0], top), (x + half[1], low), (x - half[1], low)]
        self.area(corners, material, shade=shade, flat=flat)

    def limb(self, start: Point, end: Point, radii: tuple[float, float], material: int, *, shade: float = 0) -> None:
        """A tapered limb with round ends."""
        a, b = complex(*start), complex(*end)
        axis = (b - a) / (abs(b - a) or 1.0)
        for width, gain in ((1.0, 6), (0.5, CORE_GAIN)):
            outline = _CAP * axis
            outline[:6] = b + outline[:6] * (radii[1] * width)
            outline[6:] = a + outline[6:] * (radii[0] * width)
            corners = self.corners(outline.view(np.float64).reshape(-1, 2))
            if width == 1.0:
                self.canvas.fill(corners, self.first_label + material, EDGE_SHADE + gain + shade)
            else:
                corners[:, 0] += int(self.light * self.scale * min(radii) * 5)
                self.canvas.lighten(corners, EDGE_SHADE + gain + shade)

    def oval(self, centre: Point, radii: tuple[float, float], material: int, *, flat: bool = False) -> None:
        ring = np.stack([centre[0] + radii[0] * _CIRCLE.real, centre[1] + radii[1] * _CIRCLE.imag], axis=1)
        self.area(ring, material, flat=flat)

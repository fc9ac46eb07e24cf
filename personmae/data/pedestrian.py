"""The drawn figure: what one identity looks like, and how it is put on a canvas of labels and shades.

A ``Canvas`` holds two 8-bit planes: which material a pixel shows and how bright it is. Polygons are rounded to
1/16 pixel and filled by integer scan conversion, colours come from one integer table, so that the same drawing has
the same bytes on every machine. Cameras, backgrounds and occluders are in ``scene``.

Body units: the height of the figure is 1, x = 0 is the body's axis, y = 0 the top of the head, y = 1 the soles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Bgr = tuple[int, int, int]  # 0..255 each
Point = tuple[float, float]  # (x, y) in body units
Points = Sequence[Point] | NDArray[np.float64]
Joints = tuple[Point, Point, Point]  # hip, knee, ankle or shoulder, elbow, wrist

FRONT, BACK, LEFT, RIGHT = "front", "back", "left", "right"  # which side of the person the camera sees
VIEWS = (FRONT, BACK, LEFT, RIGHT)

# Materials of one figure; a second figure on the same canvas adds LABELS_PER_FIGURE.
SHADOW, SKIN, HAIR, UPPER, ACCENT, INNER, LOWER, LOWER_ACCENT = range(1, 9)
SHOES, SOLES, BAG, BAG_TRIM, HEADWEAR, SCARF, FACE, LIPS, METAL = range(9, 18)
LABELS_PER_FIGURE = 20
MAX_LABELS = 80

SHADOW_ALPHA = 105
SHADE_LEVELS = 64
NEUTRAL_SHADE = 128  # a pixel of this shade shows its material's own colour
EDGE_SHADE, CORE_GAIN = 78, 44  # a limb is dark at its outline and this much brighter along its middle
FAR = -26  # added to the shade of limbs on the far side of the body
WRINKLE_DEPTH = 26

_FIXED = 4  # fractional bits of polygon corners
_HALF_TURN = np.linspace(-np.pi / 2, np.pi / 2, 6)
_CAP = np.exp(1j * np.concatenate([_HALF_TURN, _HALF_TURN + np.pi]))
_CIRCLE = np.exp(1j * np.linspace(0, 2 * np.pi, 20, endpoint=False))


class Garment(NamedTuple):
    """A piece of clothing: its cut and main colour."""

    cut: str
    colour: Bgr


class Item(NamedTuple):
    """Something worn, carried, grown or printed; kind ``none`` means it is absent."""

    kind: str
    colour: Bgr


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that stays the same between two pictures of one person; each field is one visible detail."""

    height: float  # of the figure in its detection box, 0.9..1
    build: float  # width factor, 0.85 slim .. 1.25 heavy
    curved: float  # 0 straight shoulders-to-hip line .. 1 narrow waist and shoulders
    skin: Bgr
    hair: Item  # bald, short, bob, long, ponytail, bun
    upper: Garment  # tshirt, longsleeve, jacket, coat, hoodie, dress, vest
    decoration: Item  # hstripes, vstripes, checks, dots, twotone, sleeves; logo, open (front only); backprint (back only)
    lower: Garment  # trousers, leggings, wide, shorts, skirt, longskirt
    lower_decoration: Item  # none, sidestripe, checks
    shoes: Item  # shoes, boots
    bag: Item  # none, backpack, shoulder, handbag, shopping, umbrella
    carry_side: int  # +1 the person's left hand, -1 the right
    headwear: Item  # none, cap, hat, beanie
    scarf: Item  # none, scarf


@dataclass(frozen=True, slots=True)
class Pose:
    """How the person stands to the camera: ``phase`` of the gait in [0, 1), ``turn`` a small yaw in [-0.3, 0.3]."""

    view: str
    phase: float
    turn: float = 0.0


class Canvas:
    """Material labels and shades of a picture, both uint8 (H, W), and the colour of each label."""

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
        """The picture as premultiplied BGRA uint8 (H, W, 4); ``softness`` is the shading blur in pixels."""
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


MAX_CANVAS = 1100  # pixels, the longer side
WRINKLE_STEPS = 64  # offsets into the wrinkle tile run over [0, WRINKLE_STEPS)


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
        """A polygon with a brighter middle, or evenly lit if ``flat``; ``shade`` is added to the brightness."""
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


def draw_person(
    canvas: Canvas,
    identity: Identity,
    pose: Pose,
    *,
    x: float,
    top: float,
    scale: float,
    pitch: float = 0.0,
    light: float = 0.3,
    slot: int = 0,
) -> None:
    """Draw one person with the head's top at (x, top) pixels, ``scale`` pixels tall, into label range ``slot`` 0..2."""
    pen = Pen(canvas, x, top, scale, identity.build, 1, pitch, light, slot * LABELS_PER_FIGURE)
    _set_palette(pen, identity)
    if pose.view in (FRONT, BACK):
        _draw_frontal(pen, identity, pose)
    else:
        pen.mirror = -1 if pose.view == LEFT else 1
        _draw_profile(pen, identity, pose)
    _apply_texture(pen, identity)


def _set_palette(pen: Pen, who: Identity) -> None:
    dark = tuple(channel * 3 // 5 for channel in who.bag.colour)
    colours = {
        SHADOW: (0, 0, 0), SKIN: who.skin, HAIR: who.hair.colour, UPPER: who.upper.colour,
        ACCENT: who.decoration.colour, INNER: who.decoration.colour, LOWER: who.lower.colour,
        LOWER_ACCENT: who.lower_decoration.colour, SHOES: who.shoes.colour, SOLES: (60, 60, 60), BAG: who.bag.colour,
        BAG_TRIM: dark, HEADWEAR: who.headwear.colour, SCARF: who.scarf.colour, FACE: (35, 35, 45),
        LIPS: (70, 70, 150), METAL: (120, 120, 120),
    }  # fmt: skip
    for material, colour in colours.items():
        pen.canvas.palette[pen.first_label + material] = (*colour, SHADOW_ALPHA if material == SHADOW else 255)


# --- the two kinds of view ------------------------------------------------------------------------------------------


def _draw_frontal(pen: Pen, who: Identity, pose: Pose) -> None:
    front = pose.view == FRONT
    swing = float(np.sin(2 * np.pi * pose.phase))
    left = 1 if front else -1  # image side of the person's left
    pen.oval((0.05 * pen.light, 0.985), (0.2, 0.022), SHADOW, flat=True)
    if front and who.hair.kind in ("long", "bob"):
        drop = 0.26 if who.hair.kind == "long" else 0.15
        pen.slab(0, 0.05, drop, (0.055, 0.068), HAIR, shade=-20)
    if front and who.bag.kind == "backpack":
        pen.slab(0, 0.19, 0.4, (0.1, 0.118), BAG, shade=FAR)
    for side in (-1, 1) if swing > 0 else (1, -1):  # the far leg first
        _draw_leg(pen, who, _frontal_leg(side, swing * side), toe=None)
    arms = {side: _frontal_arm(who, side, -swing * side, pose.view) for side in (-1, 1)}
    _draw_skirt(pen, who, profile=False)
    pen.area(_torso(who, profile=False), UPPER)
    if front:
        _draw_chest(pen, who, 0.06 * pose.turn)
    for joints in arms.values():
        _draw_arm(pen, who, joints)
    if not front:
        _draw_back(pen, who, 0.06 * pose.turn)
    _draw_head_frontal(pen, who, front, pose.turn)
    _draw_bag_frontal(pen, who, front, who.carry_side * left, arms[who.carry_side * left][2])


def _draw_profile(pen: Pen, who: Identity, pose: Pose) -> None:
    """Facing +x before mirroring; the near side is the person's left when the view is LEFT."""
    angle = 2 * np.pi * pose.phase
    near_side = 1 if pose.view == LEFT else -1
    pen.oval((0.02, 0.985), (0.19, 0.02), SHADOW, flat=True)
    drop = 0.45 * (1 - float(np.cos(0.42 * np.sin(angle))))  # a wide stride lowers the hip
    pen.top += pen.scale * drop * 0.5
    if who.bag.kind == "backpack":
        pen.area([(-0.035, 0.185), (-0.1, 0.2), (-0.15, 0.27), (-0.15, 0.4), (-0.045, 0.42)], BAG)
    near_hand, far_hand = _profile_arm(angle + np.pi), _profile_arm(angle)
    if who.carry_side != near_side:
        _draw_bag_profile(pen, who, far_hand[2], near=False)
    _draw_arm(pen, who, far_hand, shade=FAR)
    _draw_leg(pen, who, _profile_leg(angle + np.pi), toe=1, shade=FAR)
    _draw_leg(pen, who, _profile_leg(angle), toe=1)
    stride = float(abs(np.sin(angle)))
    _draw_skirt(pen, who, profile=True, stride=stride)
    pen.area(_torso(who, profile=True, stride=stride), UPPER)
    _draw_flank(pen, who)
    _draw_head_profile(pen, who)
    if who.carry_side == near_side and who.bag.kind == "shopping":
        _draw_bag_profile(pen, who, near_hand[2], near=True)
    _draw_arm(pen, who, near_hand, shade=4)
    if who.carry_side == near_side and who.bag.kind != "shopping":
        _draw_bag_profile(pen, who, near_hand[2], near=True)


# --- limbs ----------------------------------------------------------------------------------------------------------


def _frontal_leg(side: int, near: float) -> Joints:
    lift = 0.055 * max(0.0, -near) - 0.012 * max(0.0, near)
    x = side * (0.05 - 0.012 * abs(near))
    return (side * 0.046, 0.5), (x, 0.73 - 0.3 * lift), (x * 0.96, 0.945 - lift)


def _frontal_arm(who: Identity, side: int, near: float, view: str) -> Joints:
    shoulder = _shoulder(who) - 0.031
    raised = 0.05 * max(0.0, near) + 0.02 * max(0.0, -near)
    if view == FRONT and who.bag.kind == "umbrella" and side == who.carry_side:
        return (side * shoulder, 0.212), (side * (shoulder + 0.03), 0.33), (side * 0.06, 0.26)
    inward = 0.03 * max(0.0, near)
    return (
        (side * shoulder, 0.212),
        (side * (shoulder + 0.02), 0.345 - 0.3 * raised),
        (side * (shoulder + 0.028 - inward), 0.475 - raised),
    )


def _profile_leg(angle: float) -> Joints:
    thigh = 0.42 * float(np.sin(angle))
    shin = thigh - 0.1 - 0.55 * max(0.0, float(np.cos(angle)))
    knee = (0.235 * float(np.sin(thigh)), 0.5 + 0.235 * float(np.cos(thigh)))
    ankle = (knee[0] + 0.22 * float(np.sin(shin)), knee[1] + 0.22 * float(np.cos(shin)))
    return (0.0, 0.5), knee, ankle


def _profile_arm(angle: float) -> Joints:
    upper = 0.4 * float(np.sin(angle))
    fore = upper + 0.3 + 0.2 * max(0.0, float(np.sin(angle)))
    elbow = (0.145 * float(np.sin(upper)) - 0.005, 0.205 + 0.145 * float(np.cos(upper)))
    wrist = (elbow[0] + 0.13 * float(np.sin(fore)), elbow[1] + 0.13 * float(np.cos(fore)))
    return (-0.005, 0.205), elbow, wrist


def _between(a: Point, b: Point, t: float) -> Point:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t


def _draw_leg(pen: Pen, who: Identity, joints: Joints, *, toe: int | None, shade: float = 0) -> None:
    """One leg with its shoe; ``toe`` is +1 where the foot points along +x, None where it points at the camera."""
    hip, knee, ankle = joints
    cut = "bare" if who.upper.cut == "dress" else who.lower.cut
    covered = {"trousers": 1.0, "wide": 1.2, "leggings": 0.82}.get(cut)
    if covered is None:
        pen.limb(hip, knee, (0.048, 0.035), SKIN, shade=shade)
        pen.limb(knee, ankle, (0.034, 0.02), SKIN, shade=shade)
    _draw_shoe(pen, who, ankle, toe, shade)
    if covered is not None:
        pen.limb(knee, _between(knee, ankle, 0.98), (0.042 * covered, 0.03 * covered**2), LOWER, shade=shade)
        pen.limb(hip, knee, (0.058, 0.044 * covered), LOWER, shade=shade)
        if who.lower_decoration.kind == "sidestripe":
            out = 0.0 if toe else np.sign(hip[0]) * 0.03
            line = [(hip[0] + out * 1.4, hip[1]), (knee[0] + out, knee[1]), (ankle[0] + out * 0.7, ankle[1])]
            for a, b in pairwise(line):
                pen.limb(a, b, (0.007, 0.007), LOWER_ACCENT, shade=shade)
    elif cut == "shorts":
        pen.limb(hip, _between(hip, knee, 0.8), (0.058, 0.052), LOWER, shade=shade)


def _draw_shoe(pen: Pen, who: Identity, ankle: Point, toe: int | None, shade: float) -> None:
    x, y = ankle
    if who.shoes.kind == "boots":
        pen.limb((x, y - 0.08), (x, y + 0.01), (0.033, 0.03), SHOES, shade=shade)
    if toe is None:
        pen.slab(x, y, y + 0.048, (0.026, 0.033), SHOES, shade=shade)
    else:
        heel, tip = x - 0.034 * toe, x + 0.085 * toe
        pen.area([(heel, y - 0.005), (x + 0.03, y), (tip, y + 0.03), (tip, y + 0.046), (heel, y + 0.046)], SHOES)
        pen.slab((heel + tip) / 2, y + 0.038, y + 0.048, (0.06, 0.06), SOLES, flat=True)


def _draw_arm(pen: Pen, who: Identity, joints: Joints, *, shade: float = -4) -> None:
    shoulder, elbow, wrist = joints
    cut = who.upper.cut
    thick = {"coat": 1.15, "jacket": 1.1, "hoodie": 1.1}.get(cut, 0.95)
    pen.limb(_between(elbow, wrist, 1.02), _between(elbow, wrist, 1.18), (0.019, 0.016), SKIN, shade=shade)
    if cut in ("tshirt", "dress", "vest"):
        pen.limb(elbow, wrist, (0.025, 0.018), SKIN, shade=shade)
        pen.limb(shoulder, elbow, (0.03, 0.026), SKIN, shade=shade)
        if cut != "vest":
            pen.limb(shoulder, _between(shoulder, elbow, 0.72), (0.036, 0.034), UPPER, shade=shade)
        return
    material = ACCENT if who.decoration.kind == "sleeves" else UPPER
    pen.limb(elbow, wrist, (0.03 * thick, 0.023 * thick), material, shade=shade)
    pen.limb(shoulder, elbow, (0.036 * thick, 0.031 * thick), material, shade=shade)


# --- torso ----------------------------------------------------------------------------------------------------------


def _shoulder(who: Identity) -> float:
    return 0.122 - 0.02 * who.curved


def _hem(who: Identity) -> tuple[float, float]:
    """Where the upper garment ends, and how much wider than the hip it is there."""
    return {"coat": (0.74, 0.022), "dress": (0.70, 0.05), "jacket": (0.55, 0.01), "hoodie": (0.55, 0.006)}.get(
        who.upper.cut, (0.535, 0.0)
    )


def _torso(who: Identity, *, profile: bool, stride: float = 0.0) -> list[tuple[float, float]]:
    hem, flare = _hem(who)
    loose = 0.006 if who.upper.cut in ("coat", "jacket", "hoodie") else 0.0
    waist, hip = 0.088 - 0.018 * who.curved + loose, 0.088 + 0.01 * who.curved + loose
    if profile:
        chest = 0.068 + 0.01 * who.curved + loose
        flare += 0.05 * stride if hem > 0.6 else 0.0
        front = [(0.02, 0.165), (0.052, 0.2), (chest, 0.28), (waist - 0.022, 0.4), (0.062, 0.5), (0.06 + flare, hem)]
        back = [(-0.064 - flare, hem), (-hip + 0.018, 0.5), (-waist + 0.034, 0.4), (-0.066, 0.27), (-0.052, 0.195)]
        return [*front, *back, (-0.024, 0.165)]
    edge = _shoulder(who)
    right = [(0.032, 0.16), (edge - 0.034, 0.177), (edge - 0.008, 0.198), (edge - 0.014, 0.24), (0.092 + loose, 0.29)]
    right += [(waist, 0.4), (hip, 0.5), (hip + flare, hem)]
    return right + [(-x, y) for x, y in reversed(right)]


def _draw_skirt(pen: Pen, who: Identity, *, profile: bool, stride: float = 0.0) -> None:
    """Skirts, and the seat of shorts and trousers."""
    if who.upper.cut == "dress":
        return
    hem, flare = {"skirt": (0.67, 0.03), "longskirt": (0.86, 0.035)}.get(who.lower.cut, (0.55, -0.01))
    top = 0.065 if profile else 0.085
    wide = 0.095 + flare + 0.04 * stride if hem > 0.6 else top
    pen.slab(0, 0.44, hem, (top, wide), LOWER)


def _draw_chest(pen: Pen, who: Identity, shift: float) -> None:
    """What only the front shows: zip or opening, neckline, print, backpack straps."""
    hem, kind = _hem(who)[0], who.decoration.kind
    if kind == "twotone":
        pen.slab(0, 0.34, 0.43, (0.1, 0.1), ACCENT)
    elif kind == "open":
        pen.slab(shift, 0.165, hem, (0.03, 0.042), INNER)
    elif who.upper.cut in ("jacket", "coat"):
        pen.slab(shift, 0.17, hem, (0.004, 0.004), UPPER, shade=-30, flat=True)
    if kind == "logo":
        pen.slab(shift, 0.245, 0.34, (0.052, 0.052), ACCENT, flat=True)
        pen.oval((shift, 0.293), (0.025, 0.028), UPPER, flat=True)
    pen.area([(-0.03, 0.155), (0.03, 0.155), (shift, 0.2)], SKIN, shade=-10)
    if who.bag.kind == "backpack":
        for side in (-1, 1):
            pen.limb((side * 0.06, 0.175), (side * 0.075, 0.36), (0.013, 0.011), BAG)


def _draw_back(pen: Pen, who: Identity, shift: float) -> None:
    """What only the back shows: hood, print, backpack."""
    if who.decoration.kind == "twotone":
        pen.slab(0, 0.34, 0.43, (0.1, 0.1), ACCENT)
    elif who.decoration.kind == "backprint":
        pen.slab(shift, 0.24, 0.38, (0.062, 0.045), ACCENT, flat=True)
    if who.upper.cut == "hoodie":
        pen.oval((shift, 0.19), (0.06, 0.035), UPPER)
    if who.bag.kind == "backpack":
        pack = [(-0.055, 0.175), (0.055, 0.175), (0.085, 0.22), (0.088, 0.42), (-0.088, 0.42), (-0.085, 0.22)]
        pen.area([(x + shift, y) for x, y in pack], BAG)
        pen.slab(shift, 0.32, 0.4, (0.06, 0.06), BAG_TRIM)


def _draw_flank(pen: Pen, who: Identity) -> None:
    """What the side shows: two tones, the edge of an open jacket, a strap."""
    if who.decoration.kind == "twotone":
        pen.slab(0, 0.34, 0.43, (0.07, 0.07), ACCENT)
    elif who.decoration.kind == "open":
        hem = _hem(who)[0]
        pen.area([(0.045, 0.19), (0.06, 0.2), (0.07, 0.3), (0.064, hem), (0.05, hem)], INNER)
    if who.bag.kind == "backpack":
        pen.limb((-0.03, 0.175), (0.03, 0.24), (0.012, 0.012), BAG)
        pen.limb((0.03, 0.24), (-0.02, 0.38), (0.012, 0.012), BAG)


def _apply_texture(pen: Pen, who: Identity) -> None:
    """Stripes, checks and dots: part of the garment's pixels become its accent."""
    pairs = ((who.decoration.kind, UPPER, ACCENT), (who.lower_decoration.kind, LOWER, LOWER_ACCENT))
    for kind, material, accent in pairs:
        if kind not in ("hstripes", "vstripes", "checks", "dots"):
            continue
        height, width = pen.canvas.label.shape
        period = max(2, round(pen.scale * 0.024))
        rows = (np.arange(height) - round(pen.top)) // period
        columns = (np.arange(width) - round(pen.x) - period // 2) // period
        odd_row, odd_column = (rows & 1).astype(bool)[:, None], (columns & 1).astype(bool)[None]
        pattern = {
            "hstripes": odd_row,
            "vstripes": odd_column,
            "checks": odd_row | odd_column,
            "dots": odd_row & odd_column,
        }[kind]
        chosen = (pen.canvas.label == pen.first_label + material) & pattern
        pen.canvas.label[chosen] = pen.first_label + accent


# --- head -----------------------------------------------------------------------------------------------------------


def _draw_head_frontal(pen: Pen, who: Identity, front: bool, turn: float) -> None:
    pen.limb((0, 0.12), (0, 0.17), (0.027, 0.03), SKIN, shade=-18)
    x = 0.02 * turn
    pen.oval((x, 0.075), (0.049, 0.066), SKIN if front or who.hair.kind == "bald" else HAIR)
    if front:
        _draw_face(pen, who, x + 0.05 * turn)
    elif who.hair.kind in ("long", "bob", "ponytail"):
        drop, half = {"long": (0.28, 0.062), "bob": (0.16, 0.062), "ponytail": (0.25, 0.022)}[who.hair.kind]
        pen.slab(x, 0.05, drop, (half * 0.8, half), HAIR)
    else:
        pen.slab(0, 0.118, 0.15, (0.03, 0.028), SKIN, shade=-14)
    if who.hair.kind == "bun":
        pen.oval((x, 0.002), (0.026, 0.022), HAIR)
    if who.scarf.kind != "none":
        pen.limb((-0.042, 0.16), (0.042, 0.16), (0.024, 0.024), SCARF)
        if front:
            pen.limb((0.03, 0.17), (0.036, 0.33), (0.02, 0.024), SCARF)
    _draw_headwear(pen, who, x, 0.053, front)


def _draw_face(pen: Pen, who: Identity, x: float) -> None:
    for side in (-1, 1):
        pen.oval((x + side * 0.019, 0.07), (0.007, 0.0045), FACE, flat=True)
    pen.area([(x - 0.007, 0.094), (x + 0.007, 0.094), (x, 0.078)], SKIN, shade=-26, flat=True)
    pen.oval((x, 0.111), (0.014, 0.004), LIPS, flat=True)
    if who.hair.kind == "bald":
        return
    pen.area([(-0.05, 0.066), (-0.046, 0.02), (-0.02, -0.002), (0.02, -0.002), (0.046, 0.02), (0.05, 0.066),
              (0.036, 0.044), (0.0, 0.036), (-0.036, 0.044)], HAIR)  # fmt: skip
    if who.hair.kind in ("long", "bob"):
        for side in (-1, 1):
            low = 0.22 if who.hair.kind == "long" else 0.145
            pen.limb((side * 0.048, 0.05), (side * 0.055, low), (0.012, 0.014), HAIR)


def _draw_head_profile(pen: Pen, who: Identity) -> None:
    pen.limb((-0.008, 0.12), (-0.004, 0.17), (0.028, 0.032), SKIN, shade=-18)
    pen.oval((0.004, 0.075), (0.053, 0.066), SKIN)
    pen.area([(0.05, 0.066), (0.072, 0.09), (0.05, 0.097)], SKIN, flat=True)
    pen.area([(0.01, 0.12), (0.05, 0.115), (0.042, 0.14), (0.012, 0.138)], SKIN, shade=-8)
    pen.oval((0.04, 0.07), (0.006, 0.005), FACE, flat=True)
    if who.hair.kind != "bald":
        pen.area([(0.048, 0.04), (0.03, 0.008), (-0.005, -0.002), (-0.042, 0.018), (-0.056, 0.06), (-0.046, 0.115),
                  (-0.02, 0.125), (-0.01, 0.085), (0.008, 0.075), (0.014, 0.046)], HAIR)  # fmt: skip
    if who.hair.kind in ("long", "bob"):
        low = 0.27 if who.hair.kind == "long" else 0.155
        pen.area([(-0.054, 0.05), (-0.005, 0.06), (-0.015, low), (-0.07, low)], HAIR)
    elif who.hair.kind == "ponytail":
        pen.limb((-0.055, 0.06), (-0.085, 0.2), (0.018, 0.012), HAIR)
    elif who.hair.kind == "bun":
        pen.oval((-0.05, 0.018), (0.026, 0.024), HAIR)
    if who.scarf.kind != "none":
        pen.limb((-0.03, 0.158), (0.036, 0.164), (0.024, 0.026), SCARF)
    _draw_headwear(pen, who, 0.0, 0.057, front=None)


def _draw_headwear(pen: Pen, who: Identity, x: float, half: float, front: bool | None) -> None:
    """A hat on a head ``half`` wide; ``front`` is None in profile, where a peak points along +x."""
    kind = who.headwear.kind
    if kind == "none":
        return
    dome = [(x - half, 0.05), (x - half * 0.9, 0.012), (x - half * 0.4, -0.012), (x + half * 0.4, -0.012)]
    pen.area([*dome, (x + half * 0.9, 0.012), (x + half, 0.05)], HEADWEAR)
    if kind == "beanie":
        pen.limb((x - half, 0.046), (x + half, 0.046), (0.012, 0.012), HEADWEAR, shade=-14)
    elif kind == "hat":
        pen.limb((x - half * 1.5, 0.046), (x + half * 1.5, 0.046), (0.008, 0.008), HEADWEAR, shade=-10)
    elif front is None:
        pen.limb((x + half * 0.7, 0.046), (x + half * 1.75, 0.054), (0.009, 0.006), HEADWEAR, shade=-10)
    elif front:
        pen.limb((x - half * 0.7, 0.054), (x + half * 0.7, 0.054), (0.011, 0.011), HEADWEAR, shade=-18)


# --- carried things -------------------------------------------------------------------------------------------------


def _draw_bag_frontal(pen: Pen, who: Identity, front: bool, side: int, hand: Point) -> None:
    x, y = hand
    match who.bag.kind:
        case "shoulder":
            pen.limb((-side * 0.07, 0.175), (side * 0.1, 0.43), (0.009, 0.009), BAG_TRIM)
            _draw_pouch(pen, side * 0.115, 0.47, 0.052, 0.1)
        case "handbag":
            pen.limb((x - 0.02, y + 0.06), (x, y), (0.005, 0.005), BAG_TRIM)
            pen.limb((x + 0.02, y + 0.06), (x, y), (0.005, 0.005), BAG_TRIM)
            _draw_pouch(pen, x, y + 0.1, 0.045, 0.085)
        case "shopping":
            _draw_pouch(pen, x + side * 0.01, y + 0.12, 0.06, 0.2)
        case "umbrella":
            _draw_umbrella(pen, side * 0.06 if front else side * 0.02)


def _draw_bag_profile(pen: Pen, who: Identity, hand: Point, *, near: bool) -> None:
    x, y = hand
    match who.bag.kind:
        case "shoulder":
            if near:
                pen.limb((0.0, 0.175), (-0.03, 0.43), (0.009, 0.009), BAG_TRIM)
                _draw_pouch(pen, -0.035, 0.47, 0.085, 0.105)
            else:
                pen.limb((-0.02, 0.17), (0.05, 0.3), (0.009, 0.009), BAG_TRIM)
        case "handbag":
            pen.limb((x, y), (x, y + 0.06), (0.006, 0.006), BAG_TRIM)
            _draw_pouch(pen, x, y + 0.1, 0.075, 0.085)
        case "shopping":
            _draw_pouch(pen, x, y + 0.12, 0.09, 0.2)
        case "umbrella":
            _draw_umbrella(pen, 0.05)


def _draw_pouch(pen: Pen, x: float, y: float, half: float, height: float) -> None:
    top, low = y - height / 2, y + height / 2
    pen.slab(x, top, low, (half * 0.85, half), BAG)
    pen.slab(x, top, top + 0.02, (half * 0.85, half * 0.87), BAG_TRIM, flat=True)


def _draw_umbrella(pen: Pen, x: float) -> None:
    pen.limb((x, -0.08), (x, 0.27), (0.005, 0.005), METAL)
    canopy = [(x - 0.21, 0.05), (x - 0.17, -0.03), (x - 0.08, -0.085), (x, -0.1), (x + 0.08, -0.085)]
    pen.area([*canopy, (x + 0.17, -0.03), (x + 0.21, 0.05), (x + 0.1, 0.03), (x, 0.045), (x - 0.1, 0.03)], BAG)

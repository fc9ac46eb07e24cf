"""Limbs and torso of a figure with their clothes: where the joints are, and how each part is drawn."""

from itertools import pairwise

import numpy as np

from personmae.synthetic.canvas import ACCENT, BAG, BAG_TRIM, INNER, LOWER, LOWER_ACCENT, SHOES, SKIN, SOLES, UPPER, Pen, Point
from personmae.synthetic.wardrobe import Identity

Joints = tuple[Point, Point, Point]  # hip, knee, ankle or shoulder, elbow, wrist

FRONT, BACK, LEFT, RIGHT = "front", "back", "left", "right"  # which side of the person the camera sees
VIEWS = (FRONT, BACK, LEFT, RIGHT)


# --- limbs ----------------------------------------------------------------------------------------------------------


def frontal_leg(side: int, near: float) -> Joints:
    lift = 0.055 * max(0.0, -near) - 0.012 * max(0.0, near)
    x = side * (0.05 - 0.012 * abs(near))
    return (side * 0.046, 0.5), (x, 0.73 - 0.3 * lift), (x * 0.96, 0.945 - lift)


def frontal_arm(who: Identity, side: int, near: float, view: str) -> Joints:
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


def profile_leg(angle: float) -> Joints:
    thigh = 0.42 * float(np.sin(angle))
    shin = thigh - 0.1 - 0.55 * max(0.0, float(np.cos(angle)))
    knee = (0.235 * float(np.sin(thigh)), 0.5 + 0.235 * float(np.cos(thigh)))
    ankle = (knee[0] + 0.22 * float(np.sin(shin)), knee[1] + 0.22 * float(np.cos(shin)))
    return (0.0, 0.5), knee, ankle


def profile_arm(angle: float) -> Joints:
    upper = 0.4 * float(np.sin(angle))
    fore = upper + 0.3 + 0.2 * max(0.0, float(np.sin(angle)))
    elbow = (0.145 * float(np.sin(upper)) - 0.005, 0.205 + 0.145 * float(np.cos(upper)))
    wrist = (elbow[0] + 0.13 * float(np.sin(fore)), elbow[1] + 0.13 * float(np.cos(fore)))
    return (-0.005, 0.205), elbow, wrist


def _between(a: Point, b: Point, t: float) -> Point:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t


def draw_leg(pen: Pen, who: Identity, joints: Joints, *, toe: int | None, shade: float = 0) -> None:
    """One leg with its shoe. ``toe`` is +1 where the foot points along +x, None where it points at the camera."""
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


def draw_arm(pen: Pen, who: Identity, joints: Joints, *, shade: float = -4) -> None:
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


def torso(who: Identity, *, profile: bool, stride: float = 0.0) -> list[tuple[float, float]]:
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


def draw_skirt(pen: Pen, who: Identity, *, profile: bool, stride: float = 0.0) -> None:
    """Skirts, and the seat of shorts and trousers."""
    if who.upper.cut == "dress":
        return
    hem, flare = {"skirt": (0.67, 0.03), "longskirt": (0.86, 0.035)}.get(who.lower.cut, (0.55, -0.01))
    top = 0.065 if profile else 0.085
    wide = 0.095 + flare + 0.04 * stride if hem > 0.6 else top
    pen.slab(0, 0.44, hem, (top, wide), LOWER)


def draw_chest(pen: Pen, who: Identity, shift: float) -> None:
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


def draw_back(pen: Pen, who: Identity, shift: float) -> None:
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


def draw_flank(pen: Pen, who: Identity) -> None:
    """What the side shows: two tones, the edge of an open jacket, a strap."""
    if who.decoration.kind == "twotone":
        pen.slab(0, 0.34, 0.43, (0.07, 0.07), ACCENT)
    elif who.decoration.kind == "open":
        hem = _hem(who)[0]
        pen.area([(0.045, 0.19), (0.06, 0.2), (0.07, 0.3), (0.064, hem), (0.05, hem)], INNER)
    if who.bag.kind == "backpack":
        pen.limb((-0.03, 0.175), (0.03, 0.24), (0.012, 0.012), BAG)
        pen.limb((0.03, 0.24), (-0.02, 0.38), (0.012, 0.012), BAG)


def apply_texture(pen: Pen, who: Identity) -> None:
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

"""One person on a canvas: the pose, the order in which parts are drawn, the head, and what is carried."""

from dataclasses import dataclass

import numpy as np

from personmae.synthetic.body import (
    BACK,
    FRONT,
    LEFT,
    apply_texture,
    draw_arm,
    draw_back,
    draw_chest,
    draw_flank,
    draw_leg,
    draw_skirt,
    frontal_arm,
    frontal_leg,
    profile_arm,
    profile_leg,
    torso,
)
from personmae.synthetic.canvas import (
    ACCENT,
    BAG,
    BAG_TRIM,
    FACE,
    HAIR,
    HEADWEAR,
    INNER,
    LABELS_PER_FIGURE,
    LIPS,
    LOWER,
    LOWER_ACCENT,
    METAL,
    SCARF,
    SHADOW,
    SHOES,
    SKIN,
    SOLES,
    UPPER,
    Canvas,
    Pen,
    Point,
)
from personmae.synthetic.wardrobe import Identity

SHADOW_ALPHA = 105
FAR = -26  # added to the shade of limbs on the far side of the body


@dataclass(frozen=True, slots=True)
class Pose:
    """The person's pose towards the camera: ``phase`` of the gait in [0, 1), ``turn`` a small yaw in [-0.3, 0.3]."""

    view: str
    phase: float
    turn: float = 0.0


def draw_person(
    canvas: Canvas,
    identity: Identity,
    pose: Pose,
    *,
    x: float,
    top: float,
    scale: float,
    stretch: float = 1.0,
    pitch: float = 0.0,
    light: float = 0.3,
    slot: int = 0,
) -> None:
    """Draw one person with the head's top at (x, top) pixels, ``scale`` pixels tall, into label range ``slot`` 0..2.

    ``stretch`` widens the person, as a resized box does.
    """
    pen = Pen(canvas, x, top, scale, identity.build * stretch, 1, pitch, light, slot * LABELS_PER_FIGURE)
    _set_palette(pen, identity)
    if pose.view in (FRONT, BACK):
        _draw_frontal(pen, identity, pose)
    else:
        pen.mirror = -1 if pose.view == LEFT else 1
        _draw_profile(pen, identity, pose)
    apply_texture(pen, identity)


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
        draw_leg(pen, who, frontal_leg(side, swing * side), toe=None)
    arms = {side: frontal_arm(who, side, -swing * side, pose.view) for side in (-1, 1)}
    draw_skirt(pen, who, profile=False)
    pen.area(torso(who, profile=False), UPPER)
    if front:
        draw_chest(pen, who, 0.06 * pose.turn)
    for joints in arms.values():
        draw_arm(pen, who, joints)
    if not front:
        draw_back(pen, who, 0.06 * pose.turn)
    _draw_head_frontal(pen, who, front, pose.turn)
    _draw_bag_frontal(pen, who, front, who.carry_side * left, arms[who.carry_side * left][2])


def _draw_profile(pen: Pen, who: Identity, pose: Pose) -> None:
    """Facing +x before mirroring. The near side is the person's left when the view is LEFT."""
    angle = 2 * np.pi * pose.phase
    near_side = 1 if pose.view == LEFT else -1
    pen.oval((0.02, 0.985), (0.19, 0.02), SHADOW, flat=True)
    drop = 0.45 * (1 - float(np.cos(0.42 * np.sin(angle))))  # a wide stride lowers the hip
    pen.top += pen.scale * drop * 0.5
    if who.bag.kind == "backpack":
        pen.area([(-0.035, 0.185), (-0.1, 0.2), (-0.15, 0.27), (-0.15, 0.4), (-0.045, 0.42)], BAG)
    near_hand, far_hand = profile_arm(angle + np.pi), profile_arm(angle)
    if who.carry_side != near_side:
        _draw_bag_profile(pen, who, far_hand[2], near=False)
    draw_arm(pen, who, far_hand, shade=FAR)
    draw_leg(pen, who, profile_leg(angle + np.pi), toe=1, shade=FAR)
    draw_leg(pen, who, profile_leg(angle), toe=1)
    stride = float(abs(np.sin(angle)))
    draw_skirt(pen, who, profile=True, stride=stride)
    pen.area(torso(who, profile=True, stride=stride), UPPER)
    draw_flank(pen, who)
    _draw_head_profile(pen, who)
    if who.carry_side == near_side and who.bag.kind == "shopping":
        _draw_bag_profile(pen, who, near_hand[2], near=True)
    draw_arm(pen, who, near_hand, shade=4)
    if who.carry_side == near_side and who.bag.kind != "shopping":
        _draw_bag_profile(pen, who, near_hand[2], near=True)


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
    """A hat on a head ``half`` wide. ``front`` is None in profile, where a peak points along +x."""
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

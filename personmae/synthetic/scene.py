"""Backgrounds: something far away, the ground in front of it, and a few things on the ground."""

from collections.abc import Callable

import cv2
import numpy as np

from personmae.synthetic.canvas import Bgr, Image
from personmae.synthetic.rng import Rng

SCENE_SIZE = (352, 1024)  # height, width of a background in pixels; a person in it is about 200 pixels tall
SATURATION = 22  # of 64


def paint_scene(kind: str, rng: Rng) -> Image:
    """A background of SCENE_SIZE: something far behind, the ground in front of it, a few things on it."""
    far, ground, things, far_colour, ground_colour = _SCENES[kind]
    height, width = SCENE_SIZE
    horizon = int(height * rng.uniform(0.34, 0.48))
    scene = np.empty((height, width, 3), np.uint8)
    vary = rng.integers(-22, 23, (2, 1)) + rng.integers(-9, 10, (2, 3))
    scene[:horizon] = np.clip(np.array(far_colour) + vary[0], 0, 255)
    scene[horizon:] = np.clip(np.array(ground_colour) + vary[1], 0, 255)
    far(scene[:horizon], rng)
    ground(scene[horizon:], rng)
    for _ in range(int(rng.integers(5, 11))):
        things(scene, horizon, rng)
    scene = _mottle(_muted(scene), rng)
    return cv2.GaussianBlur(scene, (3, 3), 0)  # type: ignore[return-value]


def _muted(scene: Image) -> Image:
    """Less saturated: streets are greyer than the paint box."""
    grey = cv2.cvtColor(scene, cv2.COLOR_BGR2GRAY).astype(np.int16)[..., None]
    return np.clip(grey + ((scene.astype(np.int16) - grey) * SATURATION >> 6), 0, 255).astype(np.uint8)


def _mottle(scene: Image, rng: Rng) -> Image:
    """Patchy light: smooth noise of two sizes, +-20 grey levels."""
    height, width = scene.shape[:2]
    for cell, depth in ((60, 26), (7, 16)):
        coarse = rng.integers(0, depth, (height // cell + 2, width // cell + 2), np.uint8)
        noise = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
        scene = cv2.subtract(cv2.add(scene, cv2.merge([noise] * 3)), (depth // 2,) * 3)  # type: ignore[assignment]
    return scene


def _rectangle(scene: Image, x0: int, y0: int, x1: int, y1: int, colour: Bgr) -> None:
    scene[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = colour


def _random_colour(rng: Rng, low: int, high: int) -> Bgr:
    b, g, r = rng.integers(low, high, 3).tolist()
    return b, g, r


def _muted_colour(rng: Rng, low: int, high: int) -> Bgr:
    grey = int(rng.integers(low, high))
    b, g, r = (grey + int(rng.integers(-12, 13)) for _ in range(3))
    return b, g, r


# --- far behind -----------------------------------------------------------------------------------------------------


def _far_windows(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    pitch_x, pitch_y = int(rng.integers(46, 80)), int(rng.integers(44, 64))
    glass = _muted_colour(rng, 50, 130)
    for y in range(8, height, pitch_y):
        for x in range(0, width, pitch_x):
            _rectangle(area, x, y, x + pitch_x * 6 // 10, y + pitch_y * 7 // 10, glass)
            _rectangle(area, x, y, x + pitch_x * 6 // 10, y + 6, (190, 190, 190))


def _far_foliage(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    for _ in range(420):
        x, y, radius = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(6, 26))
        green = int(rng.integers(50, 150))
        cv2.circle(area, (x, y), radius, (green * 5 // 10, green, green * 6 // 10), -1)


def _far_shops(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    x = 0
    while x < width:
        wide = int(rng.integers(90, 170))
        _rectangle(area, x, 0, x + wide, height, _random_colour(rng, 90, 220))
        _rectangle(area, x + 6, 40, x + wide - 6, height - 12, _random_colour(rng, 40, 110))
        _rectangle(area, x, 14, x + wide, 38, _random_colour(rng, 30, 250))
        for _ in range(7):
            at, low = x + int(rng.integers(10, max(wide - 20, 11))), height - 14 - int(rng.integers(40))
            _rectangle(area, at, low - int(rng.integers(16, 44)), at + 14, low, _random_colour(rng, 30, 250))
        x += wide


def _far_bricks(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    mortar = tuple((area[0, 0].astype(int) * 7 // 10).tolist())
    for row, y in enumerate(range(0, height, 12)):
        cv2.line(area, (0, y), (width, y), mortar, 1)
        for x in range((row % 2) * 14, width, 28):
            cv2.line(area, (x, y), (x, y + 12), mortar, 1)


def _far_panels(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    pitch = int(rng.integers(90, 150))
    for x in range(0, width, pitch):
        _rectangle(area, x, 0, x + 3, height, (60, 60, 60))
        if rng.random() < 0.45:
            _rectangle(area, x + 20, 30, x + pitch - 20, height - 30, _random_colour(rng, 40, 240))
    _rectangle(area, 0, height - 10, width, height, (70, 70, 70))


def _far_lights(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    for _ in range(40):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        cv2.circle(area, (x, y), int(rng.integers(3, 12)), _random_colour(rng, 120, 255), -1)


# --- the ground -----------------------------------------------------------------------------------------------------


def _ground_plain(area: Image, rng: Rng) -> None:
    for _ in range(60):
        x, y = int(rng.integers(area.shape[1])), int(rng.integers(area.shape[0]))
        shade = area[y, x].astype(int) + int(rng.integers(-18, 19))
        cv2.ellipse(area, (x, y), (int(rng.integers(8, 60)), int(rng.integers(3, 14))), 0, 0, 360,
                    tuple(np.clip(shade, 0, 255).tolist()), -1)  # fmt: skip


def _ground_tiles(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    joint = tuple((area[0, 0].astype(int) * 8 // 10).tolist())
    y, step = 2.0, 5.0
    while y < height:
        cv2.line(area, (0, int(y)), (width, int(y)), joint, 1)
        y, step = y + step, step * 1.22
    for x in range(-width, 2 * width, 60):
        cv2.line(area, (width // 2 + (x - width // 2) // 2, 0), (x, height), joint, 1)


def _ground_road(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    _rectangle(area, 0, 0, width, height // 6, (150, 152, 155))
    _rectangle(area, 0, height // 6, width, height // 6 + 4, (105, 105, 105))
    for x in range(0, width, 150):
        _rectangle(area, x, height * 6 // 10, x + 80, height * 6 // 10 + 8, (215, 220, 220))


def _ground_crossing(area: Image, rng: Rng) -> None:
    height, width = area.shape[:2]
    for x in range(0, width, 84):
        bar = np.array([(x, height // 4), (x + 38, height // 4), (x + 52, height * 8 // 10), (x + 2, height * 8 // 10)])
        cv2.fillPoly(area, [bar.astype(np.int32)], (215, 218, 220))


# --- things on it ---------------------------------------------------------------------------------------------------


def _thing_tree(scene: Image, horizon: int, rng: Rng) -> None:
    x, wide = int(rng.integers(scene.shape[1])), int(rng.integers(8, 22))
    _rectangle(scene, x, 0, x + wide, horizon + int(rng.integers(10, 60)), (45, 62, 80))


def _thing_lamp(scene: Image, horizon: int, rng: Rng) -> None:
    x, wide = int(rng.integers(scene.shape[1])), int(rng.integers(4, 12))
    _rectangle(scene, x, 0, x + wide, horizon + int(rng.integers(10, 90)), _muted_colour(rng, 50, 130))


def _thing_car(scene: Image, horizon: int, rng: Rng) -> None:
    x, y = int(rng.integers(scene.shape[1])), horizon + int(rng.integers(0, 30))
    colour = _random_colour(rng, 20, 235)
    body = [(0, 0), (14, -26), (28, -48), (88, -48), (108, -26), (130, -22), (130, 0)]
    cv2.fillPoly(scene, [np.array([(x + u, y + v) for u, v in body], np.int32)], colour)
    glass = np.array([(x + u, y + v) for u, v in [(22, -27), (33, -43), (84, -43), (98, -27)]], np.int32)
    cv2.fillPoly(scene, [glass], (70, 62, 55))
    for wheel in (28, 102):
        cv2.circle(scene, (x + wheel, y), 11, (30, 30, 30), -1)


def _thing_pillar(scene: Image, horizon: int, rng: Rng) -> None:
    x, wide = int(rng.integers(scene.shape[1])), int(rng.integers(24, 50))
    light = int(rng.integers(90, 190))
    foot = horizon + int(rng.integers(10, 50))
    _rectangle(scene, x, 0, x + wide, foot, (light, light, light))
    _rectangle(scene, x + wide * 2 // 3, 0, x + wide, foot, (light * 7 // 10, light * 7 // 10, light * 7 // 10))


# far, ground, things, colour of the far wall, colour of the ground
Painter = Callable[[Image, Rng], None]
_SCENES: dict[str, tuple[Painter, Painter, Callable[[Image, int, Rng], None], Bgr, Bgr]] = {
    "park": (_far_foliage, _ground_plain, _thing_tree, (70, 120, 80), (75, 150, 110)),
    "shops": (_far_shops, _ground_tiles, _thing_lamp, (150, 150, 160), (165, 175, 185)),
    "plaza": (_far_windows, _ground_tiles, _thing_tree, (170, 185, 200), (170, 185, 195)),
    "wall": (_far_bricks, _ground_plain, _thing_lamp, (90, 120, 175), (150, 155, 160)),
    "crossing": (_far_shops, _ground_crossing, _thing_lamp, (150, 160, 170), (110, 108, 106)),
    "street": (_far_windows, _ground_road, _thing_car, (140, 160, 175), (125, 122, 120)),
    "station": (_far_panels, _ground_tiles, _thing_pillar, (120, 125, 125), (120, 122, 125)),
    "snow": (_far_foliage, _ground_plain, _thing_tree, (110, 100, 95), (215, 205, 200)),
    "corridor": (_far_panels, _ground_plain, _thing_pillar, (140, 150, 155), (105, 110, 118)),
    "carpark": (_far_windows, _ground_plain, _thing_car, (100, 100, 105), (95, 95, 97)),
    "bricks": (_far_bricks, _ground_tiles, _thing_car, (70, 80, 120), (110, 112, 115)),
    "night": (_far_lights, _ground_road, _thing_lamp, (45, 38, 34), (70, 66, 64)),
}

"""Where the drawn people are seen: cameras with their background and photometry, and what stands in front of them.

A camera is a pure function of its random generator: one background scene, a colour cast, blur, resolution and JPEG
quality that all its pictures share. The figures themselves are in ``pedestrian``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from personmae.data.pedestrian import LABELS_PER_FIGURE, NEUTRAL_SHADE, Bgr, Canvas

Image = NDArray[np.uint8]  # BGR, (H, W, 3)
Rng = np.random.Generator

SCENE_SIZE = (352, 1024)  # height, width of a background in pixels; a person in it is about 200 pixels tall
OCCLUDERS = ("pole", "wall", "car", "panel", "board", "person")  # "person" is drawn by the caller
OCCLUDER_LABEL = 3 * LABELS_PER_FIGURE  # the three figure slots come first


@dataclass(frozen=True, slots=True)
class Domain:
    """What the cameras of one benchmark have in common."""

    scenes: tuple[str, ...]
    brightness: tuple[float, float]
    gamma: tuple[float, float]
    haze: tuple[int, int]  # lift of black, grey levels
    cast: tuple[float, float]  # log-gain amplitude of the colour cast
    resolution: tuple[float, float]  # of the sensor, relative to the stored picture
    quality: tuple[int, int]  # JPEG
    pitch: tuple[float, float]


DOMAINS = {
    "summer": Domain(
        ("park", "shops", "plaza", "wall", "crossing", "street"),
        (0.85, 1.25), (0.8, 1.15), (0, 18), (0.14, 0.30), (0.45, 1.0), (60, 92), (0.0, 0.16),
    ),
    "winter": Domain(
        ("station", "snow", "corridor", "carpark", "bricks", "night"),
        (0.55, 0.95), (0.9, 1.35), (8, 40), (0.11, 0.24), (0.6, 1.0), (50, 85), (0.05, 0.26),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera: its scene at full, half and quarter size, and what its sensor does to a picture."""

    scenes: tuple[Image, ...]
    lut: Image  # (256, 3), cast and exposure
    blur: int  # 0 none, 1 weak, 2 strong
    resolution: float
    quality: int
    noise: int  # grey levels, peak
    pitch: float
    light: float  # side the light comes from, -1..1
    view_weights: tuple[float, ...]  # of pedestrian.VIEWS
    size_factor: float  # of native crops


def make_camera(rng: Rng, domain: str, index: int) -> Camera:
    """Camera ``index`` of a benchmark; the index spreads scenes and cast hues evenly over its cameras."""
    kind = DOMAINS[domain]
    scene = paint_scene(kind.scenes[index % len(kind.scenes)], rng)
    half = cv2.pyrDown(scene)
    weights = rng.random(4) ** 2 + 0.08
    return Camera(
        scenes=(scene, half, cv2.pyrDown(half)),  # type: ignore[arg-type]
        lut=_exposure(kind, rng, hue=2.4 * index + rng.uniform(-0.4, 0.4)),
        blur=int(rng.integers(3)),
        resolution=rng.uniform(*kind.resolution),
        quality=int(rng.integers(*kind.quality)),
        noise=int(rng.integers(3, 12)),
        pitch=rng.uniform(*kind.pitch),
        light=rng.uniform(-0.8, 0.8),
        view_weights=tuple(weights / weights.sum()),
        size_factor=rng.uniform(0.8, 1.3),
    )


def _exposure(kind: Domain, rng: Rng, *, hue: float) -> Image:
    """A 256-entry curve per channel: colour gain, gamma and haze."""
    # Lamps and white balance err along blue-red far more than on green.
    warm, green = np.cos(hue), 0.2 * np.sin(hue)
    cast = np.array([-warm - green, 2 * green, warm - green]) * rng.uniform(*kind.cast)
    gain = rng.uniform(*kind.brightness) * np.exp(cast)
    level = np.minimum(np.arange(256)[:, None] / 255 * gain, 1.0) ** rng.uniform(*kind.gamma)
    haze = rng.uniform(*kind.haze)
    return np.rint(haze + level * (255 - haze)).astype(np.uint8)


def background(camera: Camera, size: tuple[int, int], rng: Rng) -> Image:
    """A window of the camera's scene at ``size`` (height, width) pixels, the ground at its lower edge."""
    height, width = size
    window = int(rng.integers(200, SCENE_SIZE[0] - 40))
    level = 0 if height * 2 > window else 1 if height * 4 > window else 2
    scene = camera.scenes[level]
    window >>= level
    across = min(max(4, window * width // height), scene.shape[1])
    y = int(rng.integers(scene.shape[0] // 12, scene.shape[0] - window + 1))
    x = int(rng.integers(scene.shape[1] - across + 1))
    crop = scene[y : y + window, x : x + across]
    return cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)  # type: ignore[return-value]


def expose(camera: Camera, image: Image, rng: Rng) -> Image:
    """What the sensor makes of a picture: blur, the camera's curve in sun or shade with drifting white, noise."""
    if camera.blur:
        kernel = 3 if camera.blur == 1 or image.shape[0] < 90 else 5
        image = cv2.GaussianBlur(image, (kernel, kernel), 0)  # type: ignore[assignment]
    gain = int(rng.integers(190, 305)) + rng.integers(-18, 19, 3)  # 256 is the camera's usual exposure
    lut = np.minimum(camera.lut.astype(np.int64) * gain >> 8, 255).astype(np.uint8)
    image = cv2.LUT(image, lut.reshape(256, 1, 3))  # type: ignore[assignment]
    return add_noise(image, camera.noise, rng)


def add_noise(image: Image, amount: int, rng: Rng) -> Image:
    """Uniform noise within +-``amount`` grey levels, the same in the three channels."""
    height, width = image.shape[:2]
    noise = rng.integers(0, 2 * amount + 1, (height, width), np.uint8)
    noise = cv2.merge([noise, noise, noise])
    return cv2.subtract(cv2.add(image, noise), (amount,) * 3)  # type: ignore[return-value]


# --- occluders ------------------------------------------------------------------------------------------------------


def draw_occluder(canvas: Canvas, kind: str, severity: float, rng: Rng) -> None:
    """Put a thing in front of what is on the canvas; it hides roughly the share ``severity`` of the picture."""
    colours = rng.integers(25, 215, (2, 3))
    tint = rng.uniform(0.15, 0.7)
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


# --- backgrounds ----------------------------------------------------------------------------------------------------


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
    scene = _mottle(scene, rng)
    return cv2.GaussianBlur(scene, (3, 3), 0)  # type: ignore[return-value]


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

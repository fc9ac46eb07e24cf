"""What sees the people: cameras with their background and photometry.

A camera is a pure function of its random generator: one background scene, a colour cast, blur, resolution and JPEG
quality that all its pictures share.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from personmae.data.pedestrians.canvas import Image
from personmae.data.pedestrians.chance import Rng
from personmae.data.pedestrians.scene import SCENE_SIZE, paint_scene


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
    view_weights: tuple[float, ...]  # of body.VIEWS
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

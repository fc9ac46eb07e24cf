"""Cameras with their backgrounds and their photometry.

A camera is a pure function of its random generator. All its images share one background scene, a curve of exposure and
colour, blur, sharpening, resolution and JPEG quality. Like real cameras it sets exposure and white balance by what it sees,
so that an image's mean colour says little about the camera. docs/results.md compares the statistics with Market-1501's.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from personmae.synthetic.canvas import Image
from personmae.synthetic.rng import Rng
from personmae.synthetic.scene import SCENE_SIZE, paint_scene

AUTOMATIC = 0.95  # share of the way from the scene's mean colour to the grey that exposure and white balance aim at
SURROUNDINGS = 14  # sharpening compares a pixel with its surroundings, so many of which make the height of an image
CONTRAST = 44  # grey levels, the deviation of a scene's pixels that automatic exposure aims at
GOLDEN = 0.618  # ratio
TIMES_OF_DAY = 3
TILT_DRIFT = 0.3  # people stand nearer or farther
WHITE_DRIFT = 7  # of 256, of each colour between images


@dataclass(frozen=True, slots=True)
class Domain:
    """What the cameras of one benchmark have in common. Pairs are ranges."""

    scenes: tuple[str, ...]
    grey: int  # grey level that automatic exposure aims at
    automatic: float
    gain: tuple[float, float]
    gamma: tuple[float, float]
    haze: tuple[int, int]  # lift of black, grey levels
    cast: tuple[float, float]  # log-gain amplitude of the colour cast
    drift: tuple[float, float]  # of exposure between images
    daylight: float  # log-gain between the brightest and the darkest time of day
    sharpening: tuple[float, float]  # contrast against the surroundings is multiplied by so much
    resolution: tuple[float, float]  # of the sensor, relative to the stored image
    quality: tuple[int, int]  # JPEG
    pitch: tuple[float, float]


DOMAINS = {
    "summer": Domain(
        scenes=("park", "shops", "plaza", "wall", "crossing", "street"),
        grey=105, automatic=AUTOMATIC, gain=(0.97, 1.05), gamma=(0.95, 1.05), haze=(0, 5), cast=(0.0, 0.015),
        drift=(0.78, 1.2), daylight=0.0, sharpening=(1.8, 2.1), resolution=(0.5, 1.0), quality=(60, 92), pitch=(0.0, 0.2),
    ),
    "winter": Domain(
        scenes=("station", "snow", "corridor", "carpark", "bricks", "night"),
        grey=96, automatic=0.85, gain=(0.8, 1.05), gamma=(0.95, 1.2), haze=(4, 24), cast=(0.0, 0.06),
        drift=(0.72, 1.2), daylight=0.35, sharpening=(1.8, 2.1), resolution=(0.6, 1.0), quality=(50, 85), pitch=(0.05, 0.26),
    ),
}  # fmt: skip
# Cameras that set neither exposure nor white: what they see is hard to match by colour, and unlike published benchmarks.
HARD = {
    "summer": {"automatic": 0.0, "cast": (0.14, 0.30), "gain": (0.85, 1.25), "gamma": (0.8, 1.15), "haze": (0, 18)},
    "winter": {"automatic": 0.0, "cast": (0.11, 0.24), "gain": (0.55, 0.95), "gamma": (0.9, 1.35), "haze": (8, 40)},
}
CAMERAS = ("usual", "hard")


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera: its scene at full, half and quarter size, and what its sensor does to an image."""

    scenes: tuple[Image, ...]
    lut: Image  # (256, 3), cast and exposure
    drift: tuple[float, float]
    daylight: tuple[float, ...]  # gain at each time of day
    blur: int  # 0 none, 1 weak, 2 strong
    sharpening: int  # contrast against the surroundings is multiplied by 1/64 of it
    resolution: float
    quality: int
    noise: int  # grey levels, peak
    pitch: float
    tilt: float  # which part of the scene is behind people: 0 the upper one, 1 the ground
    light: float  # side the light comes from, -1..1
    view_weights: tuple[float, ...]  # of body.VIEWS
    size_factor: float  # of native crops


def make_camera(rng: Rng, domain: str, index: int, kind: str = "usual") -> Camera:
    """Camera ``index`` of a benchmark. The index spreads scenes and cast hues evenly over its cameras."""
    known = DOMAINS[domain] if kind == "usual" else replace(DOMAINS[domain], **HARD[domain])
    scene = _set_exposure(paint_scene(known.scenes[index % len(known.scenes)], rng), known)
    half = cv2.pyrDown(scene)
    weights = rng.random(4) ** 3 + 0.04
    return Camera(
        scenes=(scene, half, cv2.pyrDown(half)),  # type: ignore[arg-type]
        lut=_exposure(known, rng, index),
        drift=known.drift,
        daylight=tuple(np.exp(known.daylight * (rng.random(TIMES_OF_DAY) - 0.5)).tolist()),
        blur=int(rng.integers(3)),
        sharpening=round(64 * rng.uniform(*known.sharpening)),
        resolution=rng.uniform(*known.resolution),
        quality=int(rng.integers(*known.quality)),
        noise=int(rng.integers(3, 8)),
        pitch=rng.uniform(*known.pitch),
        tilt=rng.random(),
        light=rng.uniform(-0.8, 0.8),
        view_weights=tuple(weights / weights.sum()),
        size_factor=rng.uniform(0.8, 1.3),
    )


def _set_exposure(scene: Image, kind: Domain) -> Image:
    """Exposure, white balance and contrast: the scene's mean colour and deviation come near to what a camera aims at."""
    mean, deviation = scene.mean(axis=(0, 1)), scene.std(axis=(0, 1))
    contrast = (CONTRAST / deviation) ** kind.automatic  # of each colour
    aim = mean + kind.automatic * (kind.grey - mean)
    levels = aim + (np.arange(256)[:, None] - mean) * contrast
    curve = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return cv2.LUT(scene, curve.reshape(256, 1, 3))  # type: ignore[return-value]


def _exposure(kind: Domain, rng: Rng, index: int) -> Image:
    """A 256-entry curve per channel: colour gain, gamma and haze."""
    hue = 2.4 * index + rng.uniform(-0.4, 0.4)
    # Lamps and white balance err along blue-red far more than on green.
    warm, green = np.cos(hue), 0.2 * np.sin(hue)
    cast = np.array([-warm - green, 2 * green, warm - green]) * rng.uniform(*kind.cast)
    spread = (index * GOLDEN + rng.uniform(0.0, 0.1)) % 1  # evenly over the range, whatever their number
    gain = (kind.gain[0] + spread * (kind.gain[1] - kind.gain[0])) * np.exp(cast)
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
    high, low = scene.shape[0] // 12, scene.shape[0] - window
    y = round(high + (low - high) * min(max(camera.tilt + rng.uniform(-TILT_DRIFT, TILT_DRIFT), 0.0), 1.0))
    x = int(rng.integers(scene.shape[1] - across + 1))
    crop = scene[y : y + window, x : x + across]
    return cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)  # type: ignore[return-value]


def expose(camera: Camera, image: Image, rng: Rng, time_of_day: int = 0) -> Image:
    """What the sensor makes of an image: blur, the curve at that time of day with drifting white, noise, sharpening."""
    if camera.blur:
        kernel = 3 if camera.blur == 1 or image.shape[0] < 90 else 5
        image = cv2.GaussianBlur(image, (kernel, kernel), 0)  # type: ignore[assignment]
    usual = 256 * rng.uniform(*camera.drift) * camera.daylight[time_of_day]
    gain = int(usual) + rng.integers(-WHITE_DRIFT, WHITE_DRIFT + 1, 3)
    lut = np.minimum(camera.lut.astype(np.int64) * gain >> 8, 255).astype(np.uint8)
    image = cv2.LUT(image, lut.reshape(256, 1, 3))  # type: ignore[assignment]
    return _sharpen(add_noise(image, camera.noise, rng), camera.sharpening)


def _sharpen(image: Image, gain: int) -> Image:
    """Raise the contrast of each pixel against its surroundings to ``gain`` / 64, as the processing in cameras does."""
    kernel = image.shape[0] // SURROUNDINGS | 1
    around = cv2.GaussianBlur(image, (kernel, kernel), kernel / 2).astype(np.int16)
    return np.clip(around + ((image.astype(np.int16) - around) * gain >> 6), 0, 255).astype(np.uint8)


def add_noise(image: Image, amount: int, rng: Rng) -> Image:
    """Uniform noise within +-``amount`` grey levels, the same in the three channels."""
    height, width = image.shape[:2]
    noise = rng.integers(0, 2 * amount + 1, (height, width), np.uint8)
    noise = cv2.merge([noise, noise, noise])
    return cv2.subtract(cv2.add(image, noise), (amount,) * 3)  # type: ignore[return-value]

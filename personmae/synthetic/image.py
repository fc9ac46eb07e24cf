"""One image: the person of a shot, its occluder and the camera's background, as the sensor stores them."""

import math
from functools import lru_cache
from statistics import NormalDist

import cv2
import numpy as np

from personmae.synthetic.body import VIEWS
from personmae.synthetic.camera import TIMES_OF_DAY, Camera, background, expose, make_camera
from personmae.synthetic.canvas import LABELS_PER_FIGURE, MAX_CANVAS, SHADOW, WRINKLE_STEPS, Canvas, Image
from personmae.synthetic.figure import Pose, draw_person
from personmae.synthetic.occluders import OCCLUDERS, draw_occluder
from personmae.synthetic.plan import Shot, SynthSettings
from personmae.synthetic.rng import Rng, pick, rng_of
from personmae.synthetic.wardrobe import domain_of, identity_of, sample_identity

MARKET_SIZE = (128, 64)  # height, width in pixels of every Market-1501 crop
NATIVE_HEIGHT = (60, 500)  # pixels, the range of native crops
NATIVE_ASPECT = (0.34, 0.5)  # width / height
MEDIAN_HEIGHT, HEIGHT_SPREAD = 150, 0.42  # of the log-normal law of native heights
CHANCE_OCCLUSION = (0.12, 0.5)  # share hidden in ordinary images that are occluded
TURNING_FRACTION = 0.15  # of images show another view than the rest of their track
SHADING_BLUR = 0.011  # of the canvas height


@lru_cache(maxsize=64)
def _camera(seed: int, kind: str, benchmark: str, index: int) -> Camera:
    """Camera ``index`` of ``pool``, ``market`` or ``duke``: train and test of a benchmark share their cameras."""
    domain = {"market": "summer", "duke": "winter"}.get(benchmark, ("summer", "winter")[index % 2])
    stream = {"market": "market_train", "duke": "duke_train"}.get(benchmark, "pool")
    place = index // 2 if benchmark == "pool" else index
    return make_camera(rng_of(seed, stream, "camera", index), domain, place, kind)


def draw_shot(settings: SynthSettings, shot: Shot) -> tuple[Image, int]:
    """The image of a shot, BGR uint8 (H, W, 3), and its JPEG quality."""
    camera, rng, size, seen = _taken(settings, shot)
    scene = background(camera, seen, rng)
    figure = _draw_figures(settings, shot, camera, seen, rng)
    time_of_day = int(rng_of(settings.seed, shot.split, "track", shot.subject, shot.camera).integers(TIMES_OF_DAY))
    image = expose(camera, _blend(figure, scene), rng, time_of_day)
    if seen != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
    return image, camera.quality  # type: ignore[return-value]


def draw_silhouette(settings: SynthSettings, shot: Shot) -> Image:
    """Where the image of a shot shows its person: 255 there, 0 elsewhere and where something hides it, uint8 (H, W)."""
    camera, rng, size, seen = _taken(settings, shot)
    background(camera, seen, rng)  # for what it draws
    label = _draw_labels(settings, shot, camera, seen, rng).label
    figure = ((label > SHADOW) & (label < LABELS_PER_FIGURE)).astype(np.uint8) * 255
    return cv2.resize(figure, size[::-1], interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _taken(settings: SynthSettings, shot: Shot) -> tuple[Camera, Rng, tuple[int, int], tuple[int, int]]:
    """The camera of a shot, its random numbers, and the image's (height, width) as it is stored and as the sensor sees it."""
    seed, split = settings.seed, shot.split
    camera = _camera(seed, settings.cameras, split.split("_")[0], shot.camera)
    rng = rng_of(seed, split, "image", shot.subject, shot.image)
    size = MARKET_SIZE if split.startswith("market") else _native_size(rng, camera)
    sensor = camera.resolution if size[0] * camera.resolution >= 48 else 1.0
    return camera, rng, size, (max(16, round(size[0] * sensor)), max(8, round(size[1] * sensor)))


def _native_size(rng: Rng, camera: Camera) -> tuple[int, int]:
    """Height and width of a detection: log-normal heights, as cameras see people near and far."""
    height = MEDIAN_HEIGHT * camera.size_factor * math.exp(HEIGHT_SPREAD * NormalDist().inv_cdf(1e-6 + rng.random() * 0.999))
    rows = round(min(max(height, NATIVE_HEIGHT[0]), NATIVE_HEIGHT[1]))
    return rows, round(rows * rng.uniform(*NATIVE_ASPECT))


def _draw_figures(settings: SynthSettings, shot: Shot, camera: Camera, size: tuple[int, int], rng: Rng) -> Image:
    """Person and occluders as premultiplied BGRA of ``size``."""
    canvas = _draw_labels(settings, shot, camera, size, rng)
    offset = int(rng.integers(WRINKLE_STEPS)), int(rng.integers(WRINKLE_STEPS))
    figures = canvas.render(softness=max(1, round(canvas.label.shape[0] * SHADING_BLUR)), wrinkle_offset=offset)
    if canvas.label.shape[0] != size[0]:
        return cv2.resize(figures, size[::-1], interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
    return cv2.GaussianBlur(figures, (3, 3), 0)  # type: ignore[return-value]


def _draw_labels(settings: SynthSettings, shot: Shot, camera: Camera, size: tuple[int, int], rng: Rng) -> Canvas:
    """Person and occluders on a canvas of ``size``, or of twice that size where it is small."""
    oversampling = 2 if size[0] * 4 <= MAX_CANVAS else 1
    canvas = Canvas(size[0] * oversampling, size[1] * oversampling)
    _draw_subject(settings, shot, camera, canvas, rng)
    hidden = shot.occlusion
    if hidden is None:
        hidden = rng.uniform(*CHANCE_OCCLUSION) if rng.random() < settings.occluded_fraction else 0.0
    if hidden:
        _draw_in_front(settings, shot, camera, canvas, hidden)
    return canvas


def _draw_subject(settings: SynthSettings, shot: Shot, camera: Camera, canvas: Canvas, rng: Rng) -> None:
    """The person the image is of. Every second piece of junk shows nobody."""
    height, width = canvas.label.shape
    identity = identity_of(settings.seed, shot.split, shot.subject)
    top, bottom, shift = _detector_box(rng, shot.framing, settings.cut_fraction)
    scale = height * (bottom - top) * identity.height
    if identity.bag.kind == "umbrella":  # the box holds its canopy too
        scale *= 0.9
    pose = _sample_pose(settings, shot, camera, rng)
    if shot.framing != "junk" or shot.subject % 2 == 0:
        # Boxes of all shapes are brought to that of the stored image, which makes people wider in some.
        stretch = width / height / rng.uniform(*NATIVE_ASPECT) if shot.split.startswith("market") else 1.0
        place = {"x": width * (0.5 + shift), "top": height * bottom - scale, "scale": scale, "stretch": stretch}
        draw_person(canvas, identity, pose, **place, pitch=camera.pitch, light=camera.light)


def _sample_pose(settings: SynthSettings, shot: Shot, camera: Camera, rng: Rng) -> Pose:
    """A person mostly keeps the view while crossing a camera. A camera sees some views more often."""
    track = rng_of(settings.seed, shot.split, "track", shot.subject, shot.camera)
    view = VIEWS[int(np.searchsorted(np.cumsum(camera.view_weights[:3]), track.random()))]
    if rng.random() < TURNING_FRACTION:
        view = pick(rng, VIEWS)
    return Pose(view, phase=rng.random(), turn=rng.uniform(-0.3, 0.3))


def _detector_box(rng: Rng, framing: str, cut_fraction: float) -> tuple[float, float, float]:
    """Where head and soles are in the box (0 top edge, 1 lower edge), and how far the person is off centre."""
    top, bottom, shift = rng.uniform(-0.02, 0.12), rng.uniform(0.9, 1.04), rng.uniform(-0.13, 0.13)
    if framing == "junk":
        return pick(rng, ((0.55, 1.5, 0.2), (-0.9, 0.2, -0.2), (0.0, 1.0, 0.55), (-0.2, 1.6, -0.5)))
    draw = rng.random() + (cut_fraction if framing == "whole" else 0.0)
    if draw < cut_fraction:
        match int(draw / cut_fraction * 4):
            case 0 | 1:
                bottom = rng.uniform(1.1, 1.6)  # without feet or legs
            case 2:
                top = rng.uniform(-0.3, -0.08)  # without head
            case _:
                shift = pick(rng, (-1, 1)) * rng.uniform(0.2, 0.35)
    elif draw < cut_fraction + 0.1:
        top, bottom = rng.uniform(0.1, 0.2), rng.uniform(0.8, 0.9)  # floats in a loose box
    return top, bottom, shift


def _draw_in_front(settings: SynthSettings, shot: Shot, camera: Camera, canvas: Canvas, hide: float) -> None:
    rng = rng_of(settings.seed, shot.split, "occluder", shot.subject, shot.image)
    kind = pick(rng, OCCLUDERS)
    if kind != "person":
        draw_occluder(canvas, kind, hide, rng)
        return
    height, width = canvas.label.shape
    other = sample_identity(rng, domain_of(shot.split, shot.subject))
    side = pick(rng, (-1, 1))
    scale = height * rng.uniform(0.95, 1.15)
    x = width * (0.5 + side * (0.62 - 0.75 * hide))
    pose = Pose(pick(rng, VIEWS), rng.random())
    draw_person(canvas, other, pose, x=x, top=height * rng.uniform(1.0, 1.2) - scale, scale=scale,
                pitch=camera.pitch, light=camera.light, slot=1)  # fmt: skip


def _blend(figure: Image, scene: Image) -> Image:
    """Premultiplied BGRA over BGR, in integers."""
    behind = scene.astype(np.uint16) * (255 - figure[..., 3:]).astype(np.uint16)
    behind = (behind + 128 + (behind >> 8)) >> 8
    return cv2.add(figure[..., :3], behind.astype(np.uint8))  # type: ignore[return-value]

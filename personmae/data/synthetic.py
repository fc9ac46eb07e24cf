"""``personmae synth OUT``: procedural pedestrians, the stand-in for ReID data that cannot be shipped.

Owns the identities, the plan of which picture is where, and writing it. An unlabelled pool and two benchmarks with a
visible domain gap come out: ``market1501`` (summer clothes, outdoor, 128 x 64) and ``occluded_duke`` (winter clothes,
darker scenes, native sizes, every query occluded). Every picture is a pure function of the seed, its split, its
identity and its number, so the number of processes changes nothing. The drawing is in ``pedestrian`` and ``scene``.
"""

import json
import math
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from personmae.data.pedestrian import (
    MAX_CANVAS,
    VIEWS,
    WRINKLE_STEPS,
    Bgr,
    Canvas,
    Garment,
    Identity,
    Item,
    Pose,
    draw_person,
)
from personmae.data.scene import OCCLUDERS, Camera, Image, Rng, background, draw_occluder, expose, make_camera
from personmae.errors import UserError

FORMAT_VERSION = 1
COMPLETION_MARK = "synthetic.json"
MARKET_SIZE = (128, 64)  # height, width in pixels of every Market-1501 crop
NATIVE_HEIGHT = (60, 500)  # pixels, the range of native crops
NATIVE_ASPECT = (0.36, 0.5)  # width / height
MEDIAN_HEIGHT, HEIGHT_SPREAD = 150, 0.42  # of the log-normal law of native heights
POOL_FOLDER_IMAGES = 1000
CAMERAS_PER_IDENTITY = 4
MAX_PIDS = 9999  # four digits in a file name
MARKET_CAMERAS, DUKE_CAMERAS = 6, 8
CHANCE_OCCLUSION = (0.12, 0.5)  # share hidden in ordinary pictures that are occluded
TURNING_FRACTION = 0.15  # of pictures show another view than the rest of their track
SHADING_BLUR = 0.011  # of the canvas height
OCCLUSION_GRADES = (0.25, 0.45, 0.65)  # mild, medium, severe: the share of the picture that is hidden, roughly


@dataclass(frozen=True, slots=True)
class SynthSettings:
    """How much to draw. The same settings give the same bytes on any machine."""

    seed: int = 0
    pool_images: int = 20_000
    pool_identities: int = 2_500
    pool_cameras: int = 24
    market_train_ids: int = 300
    market_test_ids: int = 300
    market_distractors: int = 200
    market_junk: int = 100
    occluded_duke_train_ids: int = 200
    occluded_duke_test_ids: int = 150
    images_per_id: int = 8  # of a training or gallery identity, spread over four cameras
    queries_per_id: int = 4  # at most one per camera
    occluded_fraction: float = 0.15  # of ordinary pictures
    cut_fraction: float = 0.12  # of ordinary pictures: the box cuts the person

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"synth.{name} must be at least {least}, got {getattr(self, name)}; raise it")
        if self.queries_per_id > CAMERAS_PER_IDENTITY:
            raise UserError(f"synth.queries_per_id must be at most {CAMERAS_PER_IDENTITY}, got {self.queries_per_id}")
        for name in ("market", "occluded_duke"):
            ids = getattr(self, f"{name}_train_ids") + getattr(self, f"{name}_test_ids")
            if ids > MAX_PIDS:
                raise UserError(f"synth.{name}_train_ids + {name}_test_ids must be at most {MAX_PIDS}, got {ids}")
        for name in ("occluded_fraction", "cut_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"synth.{name} must be in [0, 1], got {getattr(self, name)}")


# A query needs a gallery picture from another camera, hence two images on two cameras.
_LEAST = {
    "seed": 0, "pool_images": 1, "pool_identities": 1, "pool_cameras": 2, "market_train_ids": 1, "market_test_ids": 1,
    "market_distractors": 0, "market_junk": 0, "occluded_duke_train_ids": 1, "occluded_duke_test_ids": 1,
    "images_per_id": 2, "queries_per_id": 1,
}  # fmt: skip


T = TypeVar("T")


# --- random streams -------------------------------------------------------------------------------------------------

_SPLITS = ("pool", "market_train", "market_test", "market_distractor", "market_junk", "duke_train", "duke_test")
_PURPOSES = ("identity", "cameras", "track", "image", "occluder", "camera")


def _rng(seed: int, split: str, purpose: str, *key: int) -> Rng:
    """An independent generator for one thing of one split."""
    spawn_key = (_SPLITS.index(split), _PURPOSES.index(purpose), *key)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=spawn_key)))


# --- identities -----------------------------------------------------------------------------------------------------

LOOK_ALIKES, GROUP = 3, 5  # of every five identities three differ from each other in one detail only

# fmt: off
_COLOURS: dict[str, Bgr] = {
    "black": (38, 34, 34), "charcoal": (70, 66, 64), "grey": (135, 132, 130), "white": (232, 232, 235),
    "navy": (92, 48, 34), "blue": (185, 98, 48), "sky": (222, 178, 122), "denim": (135, 95, 70), "red": (48, 42, 190),
    "wine": (52, 34, 112), "pink": (175, 140, 232), "orange": (45, 120, 235), "yellow": (60, 205, 235),
    "green": (70, 145, 60), "olive": (55, 95, 95), "mint": (180, 215, 150), "beige": (150, 185, 208),
    "brown": (48, 70, 105), "purple": (140, 60, 120), "teal": (130, 125, 35),
}
# What is drawn how often: name -> weight.
_BRIGHT = {
    "white": 2, "sky": 1, "red": 1, "pink": 1, "orange": 1, "yellow": 1, "green": 1, "mint": 1, "beige": 1,
    "blue": 1, "purple": 1, "grey": 1, "black": 1, "navy": 1,
}
_DARK = {
    "black": 2, "charcoal": 2, "navy": 2, "grey": 1, "brown": 1, "olive": 1, "wine": 1, "beige": 1, "blue": 1,
    "red": 1, "green": 1, "purple": 1,
}
_LEGS = {
    "denim": 2, "navy": 1, "black": 1, "charcoal": 1, "grey": 1, "beige": 1, "olive": 1, "brown": 1,
    "white": 1, "wine": 1, "sky": 1,
}
_SHOES = {"black": 2, "white": 1, "brown": 1, "red": 1, "grey": 1}
_SKINS = ((175, 200, 232), (150, 180, 222), (120, 155, 205), (90, 125, 180), (60, 88, 135), (45, 62, 95))
_HAIRS = (
    (28, 26, 28), (36, 40, 52), (45, 66, 96), (80, 130, 175), (110, 180, 215), (165, 165, 168), (40, 62, 140),
)
_UPPERS = {
    "summer": {"tshirt": 3, "longsleeve": 2, "vest": 1, "hoodie": 1, "jacket": 1, "dress": 1},
    "winter": {"coat": 2, "jacket": 2, "hoodie": 1, "longsleeve": 1},
}
_LOWERS = {
    "summer": {"trousers": 2, "leggings": 1, "shorts": 2, "skirt": 1, "longskirt": 1, "wide": 1},
    "winter": {"trousers": 3, "wide": 1, "leggings": 1, "longskirt": 1},
}
_DECORATIONS = {
    "none": 3, "hstripes": 1, "vstripes": 1, "checks": 1, "dots": 1, "twotone": 1, "sleeves": 2, "logo": 2,
    "backprint": 1, "open": 2,
}
_LOWER_DECORATIONS = {"none": 6, "sidestripe": 1, "checks": 1}
_BAGS = {"none": 3, "backpack": 2, "shoulder": 2, "handbag": 2, "shopping": 1, "umbrella": 1}
_HAIRSTYLES = {"short": 3, "bald": 1, "bob": 1, "long": 2, "ponytail": 1, "bun": 1}
_HEADWEAR = {
    "summer": {"none": 6, "cap": 2, "hat": 1},
    "winter": {"none": 5, "beanie": 2, "cap": 1, "hat": 1},
}
_SCARVES = {"summer": {"none": 19, "scarf": 1}, "winter": {"none": 2, "scarf": 1}}
_DETAILS = {"bag": 3, "hair": 1, "decoration": 1, "headwear": 1, "shoes": 1, "upper": 1, "scarf": 1, "lower": 1}
# fmt: on


def _pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _pick_weighted(rng: Rng, weights: dict[str, int]) -> str:
    place = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        place -= weight
        if place < 0:
            return name
    return next(reversed(weights))


def _colour(rng: Rng, names: dict[str, int]) -> Bgr:
    """A named colour, a little off."""
    b, g, r = (min(max(c + int(rng.integers(-14, 15)), 8), 248) for c in _COLOURS[_pick_weighted(rng, names)])
    return b, g, r


def sample_identity(rng: Rng, domain: str) -> Identity:
    """A person dressed for ``summer`` or ``winter``."""
    cloth = _BRIGHT if domain == "summer" else _DARK
    who = Identity(
        height=rng.uniform(0.9, 1.0),
        build=rng.uniform(0.82, 1.22),
        curved=rng.random(),
        skin=_pick(rng, _SKINS),
        hair=Item(_pick_weighted(rng, _HAIRSTYLES), _pick(rng, _HAIRS)),
        upper=Garment(_pick_weighted(rng, _UPPERS[domain]), _colour(rng, cloth)),
        decoration=Item(_pick_weighted(rng, _DECORATIONS), _colour(rng, _BRIGHT)),
        lower=Garment(_pick_weighted(rng, _LOWERS[domain]), _colour(rng, _LEGS)),
        lower_decoration=Item(_pick_weighted(rng, _LOWER_DECORATIONS), _colour(rng, _BRIGHT)),
        shoes=Item("boots" if rng.random() < 0.2 else "shoes", _colour(rng, _SHOES)),
        bag=Item(_pick_weighted(rng, _BAGS), _colour(rng, _pick(rng, (_BRIGHT, _DARK)))),
        carry_side=1 if rng.random() < 0.5 else -1,
        headwear=Item(_pick_weighted(rng, _HEADWEAR[domain]), _colour(rng, cloth)),
        scarf=Item(_pick_weighted(rng, _SCARVES[domain]), _colour(rng, _BRIGHT)),
    )
    return _wearable(who)


def look_alikes(rng: Rng, domain: str) -> list[Identity]:
    """Three identities that are the same but for one detail, in which all three differ."""
    base = sample_identity(rng, domain)
    detail = _pick_weighted(rng, _DETAILS)
    if detail == "lower" and base.upper.cut == "dress":
        detail = "bag"  # a dress leaves no lower garment to see
    group = [base]
    while len(group) < LOOK_ALIKES:
        value = getattr(sample_identity(rng, domain), detail)
        if detail in ("upper", "lower"):
            value = getattr(base, detail)._replace(colour=value.colour)
        one = _wearable(replace(base, **{detail: value}))
        if all(_differ(getattr(one, detail), getattr(other, detail)) for other in group):
            group.append(one)
    return group


def _wearable(who: Identity) -> Identity:
    """Only jackets, coats and hoodies are worn open, and short sleeves are not set off."""
    heavy = who.upper.cut in ("jacket", "coat", "hoodie")
    swap = {"open": "twotone", "sleeves": "logo"}.get(who.decoration.kind)
    if heavy or swap is None or (who.decoration.kind == "sleeves" and who.upper.cut == "longsleeve"):
        return who
    return replace(who, decoration=who.decoration._replace(kind=swap))


def _differ(a: Item | Garment, b: Item | Garment) -> bool:
    """Whether two values of one detail can be told apart in a picture: another kind, or a clearly other colour."""
    return a[0] != b[0] or (a[0] != "none" and sum(abs(p - q) for p, q in zip(a.colour, b.colour, strict=True)) > 120)


@lru_cache(maxsize=4096)
def identity_of(seed: int, split: str, index: int) -> Identity:
    """Identity ``index`` of a split."""
    group, member = divmod(index, GROUP)
    domain = _domain(split, index)
    if member < LOOK_ALIKES:
        return look_alikes(_rng(seed, split, "identity", group, 0), domain)[member]
    return sample_identity(_rng(seed, split, "identity", group, member), domain)


def _domain(split: str, index: int) -> str:
    if split == "pool":
        return ("summer", "winter")[index // GROUP % 2]
    return "winter" if split.startswith("duke") else "summer"


# --- the plan: which picture is where -------------------------------------------------------------------------------


class Shot(NamedTuple):
    """One picture to be drawn."""

    path: str  # below OUT
    split: str
    subject: int  # identity index in the split
    image: int  # number among the pictures of the subject
    camera: int  # index among the cameras of the benchmark
    occlusion: float | None  # share hidden, 0 nothing; None leaves it to chance
    framing: str = "usual"  # usual: the box cuts some people; whole: nobody; junk: it misses them


def plan(settings: SynthSettings) -> list[Shot]:
    """Every picture of the settings, in a fixed order."""
    return [*_pool_shots(settings), *_market_shots(settings), *_duke_shots(settings)]


def _pool_shots(settings: SynthSettings) -> Iterator[Shot]:
    order = np.argsort(_rng(settings.seed, "pool", "cameras").random(settings.pool_images), kind="stable")
    for number, place in enumerate(order.tolist()):
        image, subject = divmod(number, settings.pool_identities)
        path = f"pool/{place // POOL_FOLDER_IMAGES:03d}/{place:06d}.jpg"
        yield Shot(path, "pool", subject, image, _camera_of(settings, "pool", subject, image // 2), None)


def _camera_of(settings: SynthSettings, split: str, subject: int, slot: int) -> int:
    """The camera of an identity's slot 0, 1, ...: four different ones, all of its domain, in random order."""
    rng = _rng(settings.seed, split, "cameras", subject)
    if split == "pool":
        kind = ("summer", "winter").index(_domain(split, subject))
        cameras = np.arange(kind, settings.pool_cameras, 2)
    else:
        cameras = np.arange(DUKE_CAMERAS if split.startswith("duke") else MARKET_CAMERAS)
    chosen = cameras[np.argsort(rng.random(len(cameras)), kind="stable")][:CAMERAS_PER_IDENTITY]
    return int(chosen[slot % len(chosen)])


def _identity_shots(
    settings: SynthSettings, split: str, count: int, images: range, *, occlusion: Callable[[int], float | None]
) -> Iterator[Shot]:
    """Pictures ``images`` of each identity, without their paths; two pictures in a row share a camera slot."""
    gallery = settings.images_per_id
    for subject in range(count):
        for image in images:
            slot = image * CAMERAS_PER_IDENTITY // gallery if image < gallery else image - gallery
            camera = _camera_of(settings, split, subject, slot)
            yield Shot("", split, subject, image, camera, occlusion(subject + image))


def _market_shots(settings: SynthSettings) -> Iterator[Shot]:
    images = range(settings.images_per_id)
    queries = range(settings.images_per_id, settings.images_per_id + settings.queries_per_id)
    train, test = settings.market_train_ids, settings.market_test_ids
    shots = partial(_identity_shots, settings, occlusion=lambda _: None)
    for shot in shots("market_train", train, images):
        yield _market_named("bounding_box_train", shot, shot.subject + 1)
    for shot in shots("market_test", test, queries):
        yield _market_named("query", shot, shot.subject + 1 + train)
    for shot in shots("market_test", test, images):
        yield _market_named("bounding_box_test", shot, shot.subject + 1 + train)
    for shot in shots("market_distractor", settings.market_distractors, range(1)):
        yield _market_named("bounding_box_test", shot, 0)
    for shot in shots("market_junk", settings.market_junk, range(1)):
        yield _market_named("bounding_box_test", shot._replace(framing="junk"), -1)


def _market_named(folder: str, shot: Shot, pid: int) -> Shot:
    pid_text = "-1" if pid < 0 else f"{pid:04d}"
    frame, box = shot.subject * 40 + shot.image * 3 + 1, shot.image % 5
    return shot._replace(path=f"market1501/{folder}/{pid_text}_c{shot.camera + 1}s1_{frame:06d}_{box:02d}.jpg")


def _occlusion_grade(number: int) -> float:
    return OCCLUSION_GRADES[number % len(OCCLUSION_GRADES)]


def _duke_shots(settings: SynthSettings) -> Iterator[Shot]:
    images = range(settings.images_per_id)
    queries = range(settings.images_per_id, settings.images_per_id + settings.queries_per_id)
    train, test = settings.occluded_duke_train_ids, settings.occluded_duke_test_ids
    for folder, split, count, first, which, occlusion in (
        ("bounding_box_train", "duke_train", train, 1, images, lambda _: None),
        ("query", "duke_test", test, 1 + train, queries, _occlusion_grade),
        ("bounding_box_test", "duke_test", test, 1 + train, images, lambda _: 0.0),
    ):
        for shot in _identity_shots(settings, split, count, which, occlusion=occlusion):
            name = f"{shot.subject + first:04d}_c{shot.camera + 1}_f{46000 + shot.subject * 60 + shot.image:07d}.jpg"
            framing = "whole" if folder == "bounding_box_test" else "usual"
            yield shot._replace(path=f"occluded_duke/{folder}/{name}", framing=framing)


# --- one picture ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _camera(seed: int, benchmark: str, index: int) -> Camera:
    """Camera ``index`` of ``pool``, ``market`` or ``duke``: train and test of a benchmark share their cameras."""
    domain = {"market": "summer", "duke": "winter"}.get(benchmark, ("summer", "winter")[index % 2])
    stream = {"market": "market_train", "duke": "duke_train"}.get(benchmark, "pool")
    return make_camera(_rng(seed, stream, "camera", index), domain, index // 2 if benchmark == "pool" else index)


def draw_shot(settings: SynthSettings, shot: Shot) -> tuple[Image, int]:
    """The picture of a shot, BGR uint8 (H, W, 3), and its JPEG quality."""
    seed, split = settings.seed, shot.split
    camera = _camera(seed, split.split("_")[0], shot.camera)
    rng = _rng(seed, split, "image", shot.subject, shot.image)
    size = MARKET_SIZE if split.startswith("market") else _native_size(rng, camera)
    sensor = camera.resolution if size[0] * camera.resolution >= 48 else 1.0
    seen = (max(16, round(size[0] * sensor)), max(8, round(size[1] * sensor)))
    scene = background(camera, seen, rng)
    figure = _draw_figures(settings, shot, camera, seen, rng)
    image = expose(camera, _blend(figure, scene), rng)
    if seen != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
    return image, camera.quality  # type: ignore[return-value]


def _native_size(rng: Rng, camera: Camera) -> tuple[int, int]:
    """Height and width of a detection: log-normal heights, as cameras see people near and far."""
    height = MEDIAN_HEIGHT * camera.size_factor * math.exp(HEIGHT_SPREAD * NormalDist().inv_cdf(1e-6 + rng.random() * 0.999))
    rows = round(min(max(height, NATIVE_HEIGHT[0]), NATIVE_HEIGHT[1]))
    return rows, round(rows * rng.uniform(*NATIVE_ASPECT))


def _draw_figures(settings: SynthSettings, shot: Shot, camera: Camera, size: tuple[int, int], rng: Rng) -> Image:
    """Person and occluders as premultiplied BGRA of ``size``, drawn at twice that size where it is small."""
    oversampling = 2 if size[0] * 4 <= MAX_CANVAS else 1
    canvas = Canvas(size[0] * oversampling, size[1] * oversampling)
    _draw_subject(settings, shot, camera, canvas, rng)
    hidden = shot.occlusion
    if hidden is None:
        hidden = rng.uniform(*CHANCE_OCCLUSION) if rng.random() < settings.occluded_fraction else 0.0
    if hidden:
        _draw_in_front(settings, shot, camera, canvas, hidden)
    offset = int(rng.integers(WRINKLE_STEPS)), int(rng.integers(WRINKLE_STEPS))
    figures = canvas.render(softness=max(1, round(canvas.label.shape[0] * SHADING_BLUR)), wrinkle_offset=offset)
    if oversampling == 2:
        return cv2.resize(figures, size[::-1], interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
    return cv2.GaussianBlur(figures, (3, 3), 0)  # type: ignore[return-value]


def _draw_subject(settings: SynthSettings, shot: Shot, camera: Camera, canvas: Canvas, rng: Rng) -> None:
    """The person the picture is of; every second piece of junk shows nobody."""
    height, width = canvas.label.shape
    identity = identity_of(settings.seed, shot.split, shot.subject)
    top, bottom, shift = _detector_box(rng, shot.framing, settings.cut_fraction)
    scale = height * (bottom - top) * identity.height
    if identity.bag.kind == "umbrella":  # the box holds its canopy too
        scale *= 0.9
    pose = _sample_pose(settings, shot, camera, rng)
    if shot.framing != "junk" or shot.subject % 2 == 0:
        place = {"x": width * (0.5 + shift), "top": height * bottom - scale, "scale": scale}
        draw_person(canvas, identity, pose, **place, pitch=camera.pitch, light=camera.light)


def _sample_pose(settings: SynthSettings, shot: Shot, camera: Camera, rng: Rng) -> Pose:
    """A person keeps the view while crossing a camera, mostly; a camera sees some views more often."""
    track = _rng(settings.seed, shot.split, "track", shot.subject, shot.camera)
    view = VIEWS[int(np.searchsorted(np.cumsum(camera.view_weights[:3]), track.random()))]
    if rng.random() < TURNING_FRACTION:
        view = _pick(rng, VIEWS)
    return Pose(view, phase=rng.random(), turn=rng.uniform(-0.3, 0.3))


def _detector_box(rng: Rng, framing: str, cut_fraction: float) -> tuple[float, float, float]:
    """Where head and soles are in the box (0 top edge, 1 lower edge), and how far the person is off centre."""
    top, bottom, shift = rng.uniform(0.01, 0.09), rng.uniform(0.92, 0.995), rng.uniform(-0.09, 0.09)
    if framing == "junk":
        return _pick(rng, ((0.55, 1.5, 0.2), (-0.9, 0.2, -0.2), (0.0, 1.0, 0.55), (-0.2, 1.6, -0.5)))
    chance = rng.random() + (cut_fraction if framing == "whole" else 0.0)
    if chance < cut_fraction:
        match int(chance / cut_fraction * 4):
            case 0 | 1:
                bottom = rng.uniform(1.1, 1.6)  # without feet or legs
            case 2:
                top = rng.uniform(-0.3, -0.08)  # without head
            case _:
                shift = _pick(rng, (-1, 1)) * rng.uniform(0.2, 0.35)
    elif chance < cut_fraction + 0.1:
        top, bottom = rng.uniform(0.1, 0.2), rng.uniform(0.8, 0.9)  # floats in a loose box
    return top, bottom, shift


def _draw_in_front(settings: SynthSettings, shot: Shot, camera: Camera, canvas: Canvas, hide: float) -> None:
    rng = _rng(settings.seed, shot.split, "occluder", shot.subject, shot.image)
    kind = _pick(rng, OCCLUDERS)
    if kind != "person":
        draw_occluder(canvas, kind, hide, rng)
        return
    height, width = canvas.label.shape
    other = sample_identity(rng, _domain(shot.split, shot.subject))
    side = _pick(rng, (-1, 1))
    scale = height * rng.uniform(0.95, 1.15)
    x = width * (0.5 + side * (0.62 - 0.75 * hide))
    pose = Pose(_pick(rng, VIEWS), rng.random())
    draw_person(canvas, other, pose, x=x, top=height * rng.uniform(1.0, 1.2) - scale, scale=scale,
                pitch=camera.pitch, light=camera.light, slot=1)  # fmt: skip


def _blend(figure: Image, scene: Image) -> Image:
    """Premultiplied BGRA over BGR, in integers."""
    behind = scene.astype(np.uint16) * (255 - figure[..., 3:]).astype(np.uint16)
    behind = (behind + 128 + (behind >> 8)) >> 8
    return cv2.add(figure[..., :3], behind.astype(np.uint8))  # type: ignore[return-value]


# --- writing --------------------------------------------------------------------------------------------------------


def write_synthetic(
    out: Path,
    settings: SynthSettings,
    *,
    num_processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Draw everything into ``out`` and return the number of pictures per folder.

    ``out`` appears complete or not at all: the work is done in ``out.partial`` beside it and renamed. If ``out`` is
    there with the same settings, nothing is done. ``progress(done, total)`` counts pictures. Beside the pictures
    stand ``contact_sheet.png``, ``occluded_duke/query_occlusion.json`` (file name -> share hidden) and, written last,
    the completion mark ``synthetic.json``.

    Raises:
        UserError: ``out`` was written with other settings, or holds something else.
    """
    if num_processes < 1:
        raise UserError(f"synth.num_processes must be at least 1, got {num_processes}; use 1 to draw in this process")
    out = out.resolve()
    counts = finished_counts(out, settings)
    if counts is not None:
        return counts
    partial_out = out.with_name(out.name + ".partial")
    if partial_out.exists():
        shutil.rmtree(partial_out)
    shots = plan(settings)
    for folder in sorted({str(Path(shot.path).parent) for shot in shots}):
        (partial_out / folder).mkdir(parents=True)
    with _one_opencv_thread():
        done = 0
        for written in _draw_all(partial_out, settings, shots, num_processes):
            done += written
            progress(done, len(shots))
        _, sheet = cv2.imencode(".png", contact_sheet(settings, shots))
    (partial_out / "contact_sheet.png").write_bytes(sheet.tobytes())
    hidden = {Path(shot.path).name: shot.occlusion for shot in shots if shot.path.startswith("occluded_duke/query/")}
    (partial_out / "occluded_duke" / "query_occlusion.json").write_text(json.dumps(hidden, indent=0) + "\n")
    counts = _count(shots)
    record = {"format_version": FORMAT_VERSION, "settings": asdict(settings), "counts": counts}
    (partial_out / COMPLETION_MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial_out.rename(out)
    return counts


def finished_counts(out: Path, settings: SynthSettings) -> dict[str, int] | None:
    """The counts of a complete ``out`` with these settings; None where nothing is there yet."""
    mark = out / COMPLETION_MARK
    if not mark.is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        if out.exists():
            raise UserError(f"{out} must be absent or empty, but it holds something else; choose another directory")
        return None
    try:
        record = json.loads(mark.read_text(encoding="utf-8"))
        found, counts = (record["format_version"], dict(record["settings"])), dict(record["counts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{mark} must be the record of a finished run, but it cannot be read ({error}); delete {out}"
        ) from error
    if found != (FORMAT_VERSION, asdict(settings)):
        wanted = asdict(settings)
        other = {key: found[1].get(key) for key in wanted if found[1].get(key) != wanted[key]}
        raise UserError(
            f"{out} must have format version {FORMAT_VERSION} and the settings asked for, but it has version "
            f"{found[0]} and {other or 'the same settings'}; choose another directory or delete it"
        )
    return counts


def _count(shots: Iterable[Shot]) -> dict[str, int]:
    folders = ("pool" if shot.split == "pool" else str(Path(shot.path).parent) for shot in shots)
    return dict(Counter(folders))


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


CHUNK_IMAGES = 250


def _draw_all(out: Path, settings: SynthSettings, shots: list[Shot], num_processes: int) -> Iterator[int]:
    """Draw in chunks; yields how many pictures each finished chunk has."""
    draw = partial(_draw_chunk, out, settings)
    chunks = [shots[start : start + CHUNK_IMAGES] for start in range(0, len(shots), CHUNK_IMAGES)]
    if num_processes == 1:
        yield from map(draw, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        yield from pool.map(draw, chunks)


def _draw_chunk(out: Path, settings: SynthSettings, shots: list[Shot]) -> int:
    with _one_opencv_thread():
        for shot in shots:
            image, quality = draw_shot(settings, shot)
            _, jpeg = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))
            (out / shot.path).write_bytes(jpeg.tobytes())
    return len(shots)


# --- the contact sheet ----------------------------------------------------------------------------------------------

TILE = (192, 96)  # height, width in pixels
SHEET_COLUMNS = 14


def contact_sheet(settings: SynthSettings, shots: list[Shot]) -> Image:
    """A picture for people: samples of every folder, one identity over its cameras, look-alikes, hard cases."""
    folders = {
        name: [s for s in shots if s.path.startswith(name)]
        for name in ("pool", "market1501/b", "market1501/q", "occluded_duke/b", "occluded_duke/q")
    }
    gallery = [s for s in folders["market1501/b"] if s.split == "market_test"]
    a, b = (asdict(identity_of(settings.seed, "market_test", subject)) for subject in (0, 1))
    detail = next(name for name in a if a[name] != b[name])
    pool, stride = folders["pool"], max(1, len(folders["pool"]) // SHEET_COLUMNS)
    alike = [s for s in gallery if s.subject < LOOK_ALIKES and s.image % 2 == 0]
    rows = {
        "pool": pool[::stride],
        "pool, more": pool[7::stride],
        "market: one identity over cameras": [s for s in gallery if s.subject == LOOK_ALIKES],
        f"market: three look-alikes, the {detail} differs": alike,
        "market: query": folders["market1501/q"][:: settings.queries_per_id],
        "market: train": [s for s in folders["market1501/b"] if s.split == "market_train"][::9],
        "market: distractors": [s for s in folders["market1501/b"] if s.split == "market_distractor"],
        "market: junk": [s for s in folders["market1501/b"] if s.framing == "junk"],
        "occluded_duke: query": folders["occluded_duke/q"],
        "occluded_duke: gallery of the same": [s for s in folders["occluded_duke/b"] if s.split == "duke_test"][::2],
    }
    return np.vstack([_sheet_row(settings, caption, row[:SHEET_COLUMNS]) for caption, row in rows.items() if row])


def _sheet_row(settings: SynthSettings, caption: str, shots: list[Shot]) -> Image:
    height, width = TILE
    row = np.full((height + 34, SHEET_COLUMNS * (width + 6), 3), 250, np.uint8)
    cv2.putText(row, caption, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    for column, shot in enumerate(shots):
        image, _ = draw_shot(settings, shot)
        factor = min(height / image.shape[0], width / image.shape[1])
        tile = cv2.resize(image, (round(image.shape[1] * factor), round(image.shape[0] * factor)))
        x = column * (width + 6)
        row[20 : 20 + tile.shape[0], x : x + tile.shape[1]] = tile
        label = f"{shot.subject} c{shot.camera + 1} {image.shape[0]}px"
        cv2.putText(row, label, (x, height + 30), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (70, 70, 70), 1, cv2.LINE_AA)
    return row

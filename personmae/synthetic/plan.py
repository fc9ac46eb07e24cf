"""The plan of the images: the settings, and every shot of the pool and of the two benchmarks in a fixed order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from personmae.errors import UserError
from personmae.synthetic.camera import CAMERAS
from personmae.synthetic.rng import rng_of
from personmae.synthetic.wardrobe import domain_of

POOL_FOLDER_IMAGES = 1000
CAMERAS_PER_IDENTITY = 4
MAX_PIDS = 9999  # four digits in a file name
MARKET_CAMERAS, DUKE_CAMERAS = 6, 8
OCCLUSION_GRADES = (0.25, 0.45, 0.65)  # mild, medium, severe: the share of the image that is hidden, roughly
MOST_PEOPLE = MAX_PIDS // 2  # of a benchmark to train on, for as many are to be tested on


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
    occluded_fraction: float = 0.15  # of ordinary images
    cut_fraction: float = 0.12  # of ordinary images: the box cuts the person
    cameras: str = "usual"  # or hard: without white balance, with strong colour casts

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"synth.{name} must be at least {least}, got {getattr(self, name)}. Raise it")
        if self.queries_per_id > CAMERAS_PER_IDENTITY:
            raise UserError(f"synth.queries_per_id must be at most {CAMERAS_PER_IDENTITY}, got {self.queries_per_id}")
        for name in ("market", "occluded_duke"):
            ids = getattr(self, f"{name}_train_ids") + getattr(self, f"{name}_test_ids")
            if ids > MAX_PIDS:
                raise UserError(f"synth.{name}_train_ids + {name}_test_ids must be at most {MAX_PIDS}, got {ids}")
        if self.cameras not in CAMERAS:
            raise UserError(f"synth.cameras must be one of {', '.join(CAMERAS)}, got {self.cameras!r}")
        for name in ("occluded_fraction", "cut_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"synth.{name} must be in [0, 1], got {getattr(self, name)}")


def counts_of(people: int) -> dict[str, Any]:
    """Settings of both benchmarks for so many people of market1501 to train on. The rest is in proportion to the defaults.

    Raises:
        UserError: file names have no room for so many.
    """
    if people > MOST_PEOPLE:
        raise UserError(f"--people must be at most {MOST_PEOPLE:,}, got {people:,}. Lower it")
    usual = SynthSettings()
    return {name: max(1, round(getattr(usual, name) * people / usual.market_train_ids)) for name in _IN_PROPORTION}


_IN_PROPORTION = (
    *("market_train_ids", "market_test_ids", "market_distractors", "market_junk"),
    *("occluded_duke_train_ids", "occluded_duke_test_ids"),
)

# A query needs a gallery image from another camera, hence two images on two cameras.
_LEAST = {
    "seed": 0, "pool_images": 1, "pool_identities": 1, "pool_cameras": 2, "market_train_ids": 1, "market_test_ids": 1,
    "market_distractors": 0, "market_junk": 0, "occluded_duke_train_ids": 1, "occluded_duke_test_ids": 1,
    "images_per_id": 2, "queries_per_id": 1,
}  # fmt: skip


class Shot(NamedTuple):
    """One image to be drawn."""

    path: str  # below OUT
    split: str
    subject: int  # identity index in the split
    image: int  # number among the images of the subject
    camera: int  # index among the cameras of the benchmark
    occlusion: float | None  # share hidden, 0 for none. None: drawn at random
    framing: str = "usual"  # usual: the box cuts some people; whole: nobody; junk: it misses them


def plan(settings: SynthSettings) -> list[Shot]:
    """Every image of the settings, in a fixed order."""
    return [*_pool_shots(settings), *_market_shots(settings), *_duke_shots(settings)]


def _pool_shots(settings: SynthSettings) -> Iterator[Shot]:
    order = np.argsort(rng_of(settings.seed, "pool", "cameras").random(settings.pool_images), kind="stable")
    for number, place in enumerate(order.tolist()):
        image, subject = divmod(number, settings.pool_identities)
        path = f"pool/{place // POOL_FOLDER_IMAGES:03d}/{place:06d}.jpg"
        yield Shot(path, "pool", subject, image, _camera_of(settings, "pool", subject, image // 2), None)


def _camera_of(settings: SynthSettings, split: str, subject: int, slot: int) -> int:
    """The camera of an identity's slot 0, 1, ...: four different ones, all of its domain, in random order."""
    rng = rng_of(settings.seed, split, "cameras", subject)
    if split == "pool":
        kind = ("summer", "winter").index(domain_of(split, subject))
        cameras = np.arange(kind, settings.pool_cameras, 2)
    else:
        cameras = np.arange(DUKE_CAMERAS if split.startswith("duke") else MARKET_CAMERAS)
    chosen = cameras[np.argsort(rng.random(len(cameras)), kind="stable")][:CAMERAS_PER_IDENTITY]
    return int(chosen[slot % len(chosen)])


def _identity_shots(
    settings: SynthSettings, split: str, count: int, images: range, *, occlusion: Callable[[int], float | None]
) -> Iterator[Shot]:
    """Images ``images`` of each identity, without their paths. Two images in a row share a camera slot."""
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

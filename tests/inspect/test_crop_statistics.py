"""What crops look like: known cases for each statistic, and drawn people beside Market-1501."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from closeness import assert_allclose

from personmae.__main__ import main
from personmae.errors import UserError
from personmae.inspect import crop_statistics
from personmae.inspect.crop_statistics import MARKET, Crops, statistics
from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import SynthSettings, plan

PEOPLE, CAMERAS = 12, 3


def crops(images: np.ndarray) -> Crops:
    """Images with people and cameras in turn: each person by each camera, twice."""
    places = np.arange(len(images))
    return Crops(images, places % PEOPLE, places // PEOPLE % CAMERAS)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 196, (*shape, 3)).astype(np.uint8)


def test_images_that_are_all_alike_follow_from_the_position() -> None:
    found = statistics(Crops(np.repeat(noise(0, 1, 128, 64), 20, axis=0)))
    assert_allclose(found["energy: position"], 1, atol=1e-4)
    assert_allclose(found["energy: texture"], 0, atol=1e-4)


def test_the_parts_of_the_energy_add_up_and_noise_is_texture() -> None:
    found = statistics(Crops(noise(1, 200, 128, 64)))
    parts = [value for name, value in found.items() if name.startswith("energy: ")]
    assert len(parts) == 4
    assert_allclose(sum(parts), 1, atol=1e-3)
    assert found["energy: texture"] > 0.98


def test_casts_of_cameras_are_hue_of_the_image_and_tell_the_camera() -> None:
    images = noise(2, PEOPLE * CAMERAS * 2, 128, 64).astype(int) // 4 + 96
    images += np.array([[40, 0, -40], [0, 0, 0], [-40, 20, 40]])[np.arange(len(images)) // PEOPLE % CAMERAS][:, None, None]
    found = statistics(crops(images.astype(np.uint8)))
    assert found["energy: image's colour"] > 0.5
    assert found["hue variance between cameras"] > 0.99
    assert found["camera told from colour"] == 1
    assert found["nearest thumbnail of same camera"] == 1
    grey = statistics(crops(noise(2, PEOPLE * CAMERAS * 2, 128, 64)))
    assert grey["camera told from colour"] < 0.7
    assert grey["hue variance between cameras"] < 0.3


def test_people_whom_their_thumbnails_tell_have_a_full_map_and_noise_has_chance() -> None:
    own = noise(3, PEOPLE, 128, 64)[np.arange(PEOPLE * CAMERAS * 2) % PEOPLE]
    found = statistics(crops(own))
    assert_allclose([found["thumbnail mAP"], found["thumbnail mAP, per camera"]], 100, atol=1e-6)
    assert statistics(crops(noise(4, PEOPLE * CAMERAS * 2, 128, 64)))["thumbnail mAP"] < 40


def test_looks_against_a_loop() -> None:
    images = noise(5, 3, 128, 64)
    found = statistics(Crops(images))
    light = images / 255 @ [0.299, 0.587, 0.114]
    patches = [image[y : y + 16, x : x + 16].std() for image in light for y in range(0, 128, 16) for x in range(0, 64, 16)]
    saturation = np.mean([cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean() / 255 for image in images])
    assert_allclose(found["deviation of luminance in a patch"], np.mean(patches), rtol=1e-4)
    assert_allclose(found["saturation"], saturation, atol=3e-3)  # OpenCV rounds it to 1/255
    assert_allclose(found["horizontal gradient"], np.abs(light[:, :, 1:] - light[:, :, :-1]).mean(), rtol=1e-4)
    assert_allclose(found["deviation of pixels"], np.mean([(image / 255).std(axis=(0, 1)) for image in images]), rtol=1e-4)


def drawn(settings: SynthSettings, prefix: str, count: int) -> Crops:
    shots = [shot for shot in plan(settings) if shot.path.startswith(prefix)][:count]
    images = [cv2.resize(draw_shot(settings, shot)[0], (64, 128), interpolation=cv2.INTER_AREA) for shot in shots]
    people = np.array([shot.subject for shot in shots])
    return Crops(np.stack(images)[..., ::-1], people, np.array([shot.camera for shot in shots]))


def within(row: str, found: float) -> bool:
    """A fifth of Market-1501's; .02 of small shares; 2 points of mAP."""
    aim = MARKET[row]
    if "mAP" in row:
        return abs(found - aim) <= 2
    small = aim < 0.1 and row != "horizontal gradient"
    return abs(found - aim) <= (0.02 if small else aim / 5)


def test_drawn_people_are_like_those_of_market1501() -> None:
    found = statistics(drawn(SynthSettings(), "market1501/bounding_box_train", 2400))
    assert list(found) == list(MARKET)
    assert {row: (value, MARKET[row]) for row, value in found.items() if not within(row, value)} == {}


def test_the_pool_is_like_market1501_in_what_needs_no_camera() -> None:
    crops = drawn(SynthSettings(pool_images=600, pool_identities=150), "pool", 600)
    found = statistics(Crops(crops.images))
    assert len(found) == 8
    assert {row: (value, MARKET[row]) for row, value in found.items() if not within(row, value)} == {}


def test_hard_cameras_are_told_by_their_colour_and_usual_ones_hardly() -> None:
    few: dict[str, Any] = {"market_train_ids": 60, "pool_images": 1}
    usual, hard = (
        statistics(drawn(SynthSettings(**few, cameras=kind), "market1501/bounding_box_train", 480))
        for kind in ("usual", "hard")
    )
    assert hard["camera told from colour"] > 0.8 > usual["camera told from colour"]
    assert hard["hue variance between cameras"] > 5 * usual["hue variance between cameras"]


def test_doctor_prints_the_statistics_of_a_folder_of_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, image in enumerate(noise(6, 4, 150, 60)):
        cv2.imwrite(str(tmp_path / f"{place}.png"), image)
    assert main(["doctor", "--data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (texture,) = (line.split() for line in lines if "energy: texture" in line)
    assert texture[2:3] == ["0.904"]
    assert 0 < float(texture[3]) <= 1
    (output,) = (line.split() for line in lines if "camera told" in line)
    assert output[-1] == "-"  # nobody knows the cameras


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        crop_statistics.read_crops([tmp_path / "bad.jpg"])

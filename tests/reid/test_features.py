"""Extraction over a set, and the baselines without training against loops."""

import re
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from closeness import assert_allclose

from personmae.errors import Diverged, Stopped
from personmae.model.vit import VisionTransformer
from personmae.reid.features import colour_histogram, extract, require_finite, thumbnail
from personmae.reid.heads import BNNeck, ReIDModel
from personmae.reid.transforms import ImageSet, normalise

SIZE = (64, 32)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def image_set(tmp_path):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(7)]
    for path in paths:
        cv2.imwrite(path, rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    with ThreadPoolExecutor(2) as pool:
        yield ImageSet(paths, SIZE, pool=pool)


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = VisionTransformer(embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.5)
    return ReIDModel(encoder, BNNeck(encoder, 3))


def run(model: ReIDModel, image_set: ImageSet, batch_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return extract(model, image_set, batch_size=batch_size, device=torch.device("cpu"), mean=MEAN, std=STD, dtype=dtype)


def test_extraction_gives_the_features_of_every_image_in_order(model, image_set):
    features = run(model, image_set, 3)
    images = normalise(image_set.load(range(7)), MEAN, STD)
    expected = torch.cat([model.eval().features(image[None]) for image in images])
    torch.testing.assert_close(features, expected.detach())
    assert not features.requires_grad


def test_extraction_says_how_far_it_is(model, image_set, monkeypatch):
    monkeypatch.setattr("personmae.reid.features.EVERY_SECONDS", 0.0)
    said: list[str] = []
    extract(model, image_set, batch_size=3, device=torch.device("cpu"), mean=MEAN, std=STD, log=said.append)
    assert [line.rpartition(", ")[0] for line in said] == ["extracting: 3 of 7 images", "extracting: 6 of 7 images"]
    assert all(re.fullmatch(r".* \d\d:\d\d:\d\d to go", line) for line in said)


def test_extraction_leaves_the_model_in_its_mode_and_state(model, image_set):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        run(model, image_set, 4)
        assert model.training is mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_extraction_in_bf16_is_close_and_comes_back_in_fp32(model, image_set):
    features = run(model, image_set, 4, torch.bfloat16)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(7))
    assert (features * run(model, image_set, 4)).sum(dim=1).min() > 0.999


def slow_histogram(rgb: np.ndarray) -> np.ndarray:
    """Six stripes x RGB x 8 bins of the middle 5/8 of one (H, W, 3) image, its channels standardised over all of it."""
    height, width, _ = rgb.shape
    pixels = (rgb - rgb.mean(axis=(0, 1))) / (rgb.std(axis=(0, 1), ddof=1) + 1)
    parts = []
    for stripe in range(6):
        rows = [y for y in range(height) if y * 6 // height == stripe]
        for channel in range(3):
            values = pixels[rows, round(width * 3 / 16) : round(width * 13 / 16), channel].clip(-3, 3)
            counts, _ = np.histogram(values, bins=8, range=(-3, 3))
            parts.append(counts / counts.sum())
    return np.sqrt(np.concatenate(parts))


def test_colour_histogram_equals_the_loop(image_set):
    features = colour_histogram(image_set, batch_size=3)
    assert features.shape == (7, 6 * 3 * 8)
    images = image_set.load(range(7)).permute(0, 2, 3, 1).numpy()
    expected = np.stack([slow_histogram(np.ascontiguousarray(image)) for image in images])
    assert_allclose(features.numpy(), expected, atol=1e-6)


def test_a_thumbnail_is_the_middle_half_in_means_over_areas(image_set):
    features = thumbnail(image_set, batch_size=3)
    images = image_set.load(range(7)).numpy()  # 64 x 32: cells of 4 x 4 pixels, from column 8 on
    expected = [
        [image[c, 4 * y : 4 * y + 4, 8 + 4 * x : 12 + 4 * x].mean() for c in range(3) for y in range(16) for x in range(4)]
        for image in images
    ]
    assert features.shape == (7, 192)
    assert_allclose(features.numpy(), np.array(expected), rtol=1e-6)


def test_extraction_stops_before_the_next_batch_and_puts_the_model_back(model, image_set):
    asked = []

    def stopped() -> bool:
        asked.append(len(asked))
        return len(asked) > 2

    model.train()
    with pytest.raises(Stopped):
        extract(model, image_set, batch_size=2, device=torch.device("cpu"), mean=MEAN, std=STD, stopped=stopped)
    assert len(asked) == 3
    assert model.training


def test_features_of_a_broken_model_in_training_are_a_divergence():
    features = torch.ones(5, 3)
    require_finite(features, 7)
    features[2, 1] = float("nan")
    with pytest.raises(Diverged, match="1 of 5 features are not finite at step 7"):
        require_finite(features, 7)

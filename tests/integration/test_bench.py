"""``personmae bench data`` on a small data set: every way is measured, and ours is faster."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from programs import one_line_error, personmae

from personmae.data import importer

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,200 crops of 300 x 120 pixels as shards."""
    folder, out = tmp_path_factory.mktemp("crops"), tmp_path_factory.mktemp("crops_shards") / "set"
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 16, 3), dtype=np.uint8)
    for i in range(2200):
        cv2.imwrite(str(folder / f"{i:04}.jpg"), cv2.resize(np.roll(noise, i, axis=0), (120, 300)))
    importer.write(folder, str(out), shard_bytes=1 << 21)
    return out


def test_every_way_is_measured_and_the_record_says_on_what(crops: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "data.json"
    done = personmae("bench", "data", crops, "--images", "2048", "--rounds", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["data"]["samples"] == 2200
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["simplejpeg"]
    rates = {name: values["images_per_second"] for name, values in record["measured"].items()}
    assert len(rates) == 7
    assert min(rates.values()) > 0
    assert record["ratio"] == pytest.approx(rates["whole pipeline"] / rates["StreamingDataset, PIL, DataLoader: cropped"])
    assert 0 <= record["measured"]["whole pipeline"]["waited"] < 1
    for name in rates:
        assert name.split(",")[0] in done.stdout


def test_too_few_samples_are_refused(shard_dir: Path) -> None:
    line = one_line_error(personmae("bench", "data", shard_dir))
    assert f"at least 2048 samples in {shard_dir} are required, got 50" in line

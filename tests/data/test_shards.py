"""Verifying and describing shards."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from personmae.data import shards
from personmae.errors import UserError
from personmae.system import mosaic

NUM_IMAGES = 50


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (40 + i, 20, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{i}.jpg"), image)
    return folder


@pytest.fixture
def own_shards(shard_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shard_dir, tmp_path / "own"))


def test_every_sample_of_a_whole_data_set_is_verified(shard_dir, tmp_path):
    seen = []
    count = shards.verify(str(shard_dir), cache_dir=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert count == NUM_IMAGES
    assert seen[-1] == (NUM_IMAGES, NUM_IMAGES)


def test_verifying_finds_a_flipped_byte_and_names_the_shard(own_shards, tmp_path):
    path = own_shards / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own/shard\.00001\.mds does not have the size and hash its index gives"):
        shards.verify(str(own_shards), cache_dir=tmp_path)


def without_hashes(root: Path) -> None:
    index = json.loads((root / "index.json").read_text())
    for entry in index["shards"]:
        entry["raw_data"]["hashes"] = {}
    (root / "index.json").write_text(json.dumps(index))


def test_verifying_reads_the_images_where_the_index_has_no_hashes(own_shards, tmp_path):
    without_hashes(own_shards)
    path = own_shards / "shard.00000.mds"
    content = path.read_bytes()
    at = content.index(b"\xff\xd8\xff")
    path.write_bytes(content[:at] + b"\x00\x00" + content[at + 2 :])
    with pytest.raises(UserError, match=r"sample 0 of .*/shard\.00000\.mds is not a whole JPEG"):
        shards.verify(str(own_shards), cache_dir=tmp_path)


def test_verifying_compares_the_recorded_height_and_width(source, tmp_path):
    sample = {"jpeg": (source / "2.jpg").read_bytes(), "key": "2.jpg", "height": np.uint16(42), "width": np.uint16(21)}
    new_writer = mosaic.load("streaming.base.format.mds.writer").MDSWriter
    with new_writer(out=str(tmp_path / "out"), columns=shards.COLUMNS, hashes=shards.HASHES) as writer:
        writer.write(sample)
    with pytest.raises(UserError, match=r"sample 0 of .*mds is \(42, 20\), its record says \(42, 21\)"):
        shards.verify(str(tmp_path / "out"), cache_dir=tmp_path)


def test_a_description_counts_shards_samples_bytes_and_heights(images, shard_dir, tmp_path):
    stats = shards.describe(str(shard_dir), cache_dir=tmp_path)
    files = list(shard_dir.glob("*.mds"))
    assert (stats.num_shards, stats.num_samples) == (len(files), NUM_IMAGES)
    assert stats.num_bytes == sum(path.stat().st_size for path in files)
    heights = [np.asarray(cv2.imread(str(path))).shape[0] for path in sorted(images.rglob("*.jp*g"))]
    assert sum(stats.heights.values()) == NUM_IMAGES
    for band, count in stats.heights.items():
        low, high = map(int, band.removesuffix(" px").split("-"))
        assert count == sum(low <= height <= high for height in heights)

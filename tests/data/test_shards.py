"""Writing, verifying and describing shards in a directory; what goes wrong leaves nothing behind."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from streaming import MDSWriter

from personmae.data import shards
from personmae.errors import UserError

NUM_PICTURES = 50
SHARD_BYTES = 20_000


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


def refused(source: Path, destination: Path) -> str:
    with pytest.raises(UserError) as caught:
        shards.write(source, str(destination))
    return str(caught.value)


def test_writing_again_gives_the_same_bytes(pictures, shard_dir, tmp_path):
    shards.write(pictures, str(tmp_path / "again"), shard_bytes=SHARD_BYTES)
    names = sorted(path.name for path in shard_dir.iterdir())
    assert len(names) > 3
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (shard_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_no_shard_is_larger_than_asked_for(shard_dir):
    sizes = [path.stat().st_size for path in shard_dir.glob("*.mds")]
    assert max(sizes) <= SHARD_BYTES
    assert sorted(sizes)[1] > SHARD_BYTES / 2  # all but the last are full


def test_pictures_are_found_at_any_depth_in_upper_and_lower_case_and_in_order(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c/d.jpg", "c/ignored.png", "ignored.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in shards.find_pictures(tmp_path)]
    assert found == ["a.jpeg", "b.JPG", "c/d.jpg"]


def test_a_missing_source_is_named(tmp_path):
    assert f"{tmp_path}/nowhere is not a folder" in refused(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_pictures_says_what_is_wanted(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").touch()
    assert "holds none (other formats must be converted first)" in refused(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_file_named_jpg_is_named_before_anything_is_written(source, tmp_path):
    (source / "note.jpg").write_text("hello, I am a text")
    message = refused(source, tmp_path / "out")
    assert f"{source}/note.jpg must be a JPEG file" in message
    assert "hello" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_jpeg_that_is_cut_off_is_named_and_others_like_it_are_counted(source, tmp_path):
    for i in (1, 2):
        whole = (source / f"{i}.jpg").read_bytes()
        (source / f"{i}.jpg").write_bytes(whole[: len(whole) // 2])
    message = refused(source, tmp_path / "out")
    assert f"{source}/1.jpg must be a JPEG file, but its end-of-image mark is missing" in message
    assert "(1 more like it)" in message


def test_an_empty_file_is_named(source, tmp_path):
    (source / "3.jpg").write_bytes(b"")
    assert f"{source}/3.jpg must be a JPEG file" in refused(source, tmp_path / "out")


def test_a_destination_that_is_not_empty_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert "already holds precious" in refused(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_an_empty_destination_is_used(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert shards.write(source, str(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("failure", [RuntimeError("half way"), KeyboardInterrupt()])
def test_an_interruption_half_way_leaves_nothing(source, tmp_path, failure):
    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == 3:
            assert (tmp_path / "out.partial").exists()
            raise failure

    with pytest.raises(type(failure)):
        shards.write(source, str(tmp_path / "out"), shard_bytes=1500, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_an_earlier_kill_left_does_not_stand_in_the_way(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard.00000.mds").write_bytes(b"half")
    assert shards.write(source, str(tmp_path / "out")) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert shards.verify(str(tmp_path / "out"), cache_dir=tmp_path) == 4


def test_progress_counts_to_the_end(source, tmp_path):
    seen = []
    shards.write(source, str(tmp_path / "out"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_every_sample_of_a_whole_data_set_is_verified(shard_dir, tmp_path):
    seen = []
    count = shards.verify(str(shard_dir), cache_dir=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert count == NUM_PICTURES
    assert seen[-1] == (NUM_PICTURES, NUM_PICTURES)


def test_verifying_finds_a_flipped_byte_and_names_the_shard(own_shards, tmp_path):
    path = own_shards / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own/shard\.00001\.mds does not have the hash its index gives"):
        shards.verify(str(own_shards), cache_dir=tmp_path)


def without_hashes(root: Path) -> None:
    index = json.loads((root / "index.json").read_text())
    for entry in index["shards"]:
        entry["raw_data"]["hashes"] = {}
    (root / "index.json").write_text(json.dumps(index))


def test_verifying_reads_the_pictures_where_the_index_has_no_hashes(own_shards, tmp_path):
    without_hashes(own_shards)
    path = own_shards / "shard.00000.mds"
    content = path.read_bytes()
    at = content.index(b"\xff\xd8\xff")
    path.write_bytes(content[:at] + b"\x00\x00" + content[at + 2 :])
    with pytest.raises(UserError, match=r"sample 0 of .*/shard\.00000\.mds is not a whole JPEG"):
        shards.verify(str(own_shards), cache_dir=tmp_path)


def test_verifying_compares_the_recorded_height_and_width(source, tmp_path):
    sample = {"jpeg": (source / "2.jpg").read_bytes(), "key": "2.jpg", "height": np.uint16(42), "width": np.uint16(21)}
    with MDSWriter(out=str(tmp_path / "out"), columns=shards.COLUMNS, hashes=shards.HASHES) as writer:
        writer.write(sample)
    with pytest.raises(UserError, match=r"sample 0 of .*mds is \(42, 20\), its record says \(42, 21\)"):
        shards.verify(str(tmp_path / "out"), cache_dir=tmp_path)


def test_a_description_counts_shards_samples_bytes_and_heights(pictures, shard_dir, tmp_path):
    stats = shards.describe(str(shard_dir), cache_dir=tmp_path)
    files = list(shard_dir.glob("*.mds"))
    assert (stats.num_shards, stats.num_samples) == (len(files), NUM_PICTURES)
    assert stats.num_bytes == sum(path.stat().st_size for path in files)
    heights = [np.asarray(cv2.imread(str(path))).shape[0] for path in shards.find_pictures(pictures)]
    assert sum(stats.heights.values()) == NUM_PICTURES
    for band, count in stats.heights.items():
        low, high = map(int, band.removesuffix(" px").split("-"))
        assert count == sum(low <= height <= high for height in heights)


def test_a_jpegs_size_is_height_then_width(source):
    assert shards.jpeg_size((source / "2.jpg").read_bytes()) == (42, 20)

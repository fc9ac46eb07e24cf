"""Importing images into a directory of shards, interruptions included."""

import errno
import fcntl
import json
import os
import pickle
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import simplejpeg

from personmae.data import importer, shards
from personmae.data.selection import Selection
from personmae.data.sources import Source, open_source
from personmae.errors import Stopped, UserError
from personmae.system import mosaic

StreamingDataset = mosaic.load("streaming.base.dataset").StreamingDataset
MDSWriter = mosaic.load("streaming.base.format.mds.writer").MDSWriter
NUM_IMAGES = 50
SHARD_BYTES = 20_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (40 + i, 20, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{i}.jpg"), image)
    return folder


def refused(source: Path, destination: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        importer.write(source, str(destination), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_writing_again_gives_the_same_bytes(images, shard_dir, tmp_path):
    importer.write(images, str(tmp_path / "again"), shard_bytes=SHARD_BYTES)
    assert len(tree(shard_dir)) > 3
    assert tree(tmp_path / "again") == tree(shard_dir)


def test_no_shard_is_larger_than_asked_for(shard_dir):
    sizes = [path.stat().st_size for path in shard_dir.glob("*.mds")]
    assert max(sizes) <= SHARD_BYTES
    assert sorted(sizes)[1] > SHARD_BYTES / 2  # all but the last are full


def test_shards_are_those_of_streamings_own_writer(images, shard_dir, tmp_path):
    with MDSWriter(out=str(tmp_path / "own"), columns=shards.COLUMNS, hashes=shards.HASHES, size_limit=SHARD_BYTES) as writer:
        for path in sorted(images.rglob("*.jp*g")):
            height, width = np.asarray(cv2.imread(str(path))).shape[:2]
            key = path.relative_to(images).as_posix()
            writer.write({"jpeg": path.read_bytes(), "key": key, "height": np.uint16(height), "width": np.uint16(width)})
    assert tree(tmp_path / "own") == {name: content for name, content in tree(shard_dir).items() if name != importer.DONE}


def test_streaming_opens_what_was_written_even_where_a_whole_shard_was_rejected(source, tmp_path):
    (source / "1.jpg").write_bytes(b"not an image" * 100)
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500) == 3
    names = sorted(path.name for path in (tmp_path / "out").glob("*.mds"))
    assert names == ["shard.00000.mds", "shard.00002.mds", "shard.00003.mds"]
    samples = list(StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False))
    assert [sample["key"] for sample in samples] == ["0.jpg", "2.jpg", "3.jpg"]
    assert samples[1]["jpeg"] == (source / "2.jpg").read_bytes()
    assert (samples[1]["height"], samples[1]["width"]) == (42, 20)


def test_a_missing_source_is_named(tmp_path):
    assert f"{tmp_path}/nowhere is not there" in refused(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_images_says_what_is_wanted(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.gif").touch()
    assert "holds none next to 1 .gif" in refused(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shard_bytes": 0}, "a shard must have from 1 byte"),
        ({"shard_bytes": 2**32}, "a shard must have from 1 byte to below 4096 MiB"),
        ({"num_processes": 0}, "--processes must be at least 1"),
        ({"max_side": 0}, "--max-side must be at least 1"),
    ],
)
def test_an_option_out_of_range_is_named(source, tmp_path, options, expected):
    assert expected in refused(source, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


# --- images that cannot be used ---


def rejects(root: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (root / importer.REJECTS).read_text().splitlines()]
    return {line["key"]: line["reason"] for line in lines}


def test_what_is_no_whole_jpeg_is_left_out_and_listed_with_its_reason(source, tmp_path):
    whole = (source / "1.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "empty.jpg").touch()
    (source / "gone.jpg").symlink_to("nowhere")
    (source / "note.jpg").write_text("hello, I am a text")
    (source / "header.jpg").write_bytes(whole[:30])
    os.link(source / "0.jpg", os.fsencode(source) + b"/caf\xe9.jpg")
    assert importer.write(source, str(tmp_path / "out")) == 5
    found = rejects(tmp_path / "out")
    assert list(found) == ["cut.jpg", "empty.jpg", "gone.jpg", "header.jpg", "note.jpg"]
    assert found["cut.jpg"] == "it ends early: Premature end of JPEG file"
    assert found["empty.jpg"] == "it is empty"
    assert found["gone.jpg"] == "it cannot be read: No such file or directory"
    assert found["note.jpg"].startswith("it begins with b'hello, I'")
    assert shards.verify(str(tmp_path / "out"), cache_dir=tmp_path) == 5


def test_a_name_that_is_no_utf_8_is_written_with_its_bytes_spelt_out(source, tmp_path):
    os.rename(source / "0.jpg", os.fsencode(source) + b"/caf\xe9.jpg")
    os.rename(source / "1.jpg", source / "käfer.jpg")
    assert importer.write(source, str(tmp_path / "out")) == 4
    samples = list(StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False))
    assert [sample["key"] for sample in samples] == ["2.jpg", "3.jpg", r"caf\xe9.jpg", "käfer.jpg"]


def test_a_shard_with_such_names_is_no_larger_than_asked_for(source, tmp_path):
    for number in range(40):
        os.link(source / "0.jpg", os.fsencode(source) + b"/" + b"\xe9" * 60 + f"{number}.jpg".encode())
    importer.write(source, str(tmp_path / "out"), shard_bytes=10_000)
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.mds")) <= 10_000


def test_a_whole_source_leaves_no_list_of_rejects(source, tmp_path):
    importer.write(source, str(tmp_path / "out"))
    assert sorted(tree(tmp_path / "out")) == ["imported.json", "index.json", "shard.00000.mds"]


def test_an_image_that_claims_to_be_enormous_is_not_decoded(source):
    jpeg = (source / "0.jpg").read_bytes()
    at = jpeg.index(b"\xff\xc0") + 5
    claim = jpeg[:at] + (60_000).to_bytes(2, "big") * 2 + jpeg[at + 4 :]
    with pytest.raises(ValueError, match="it has 60,000 x 60,000 pixels"):
        shards.checked(claim, len(claim))


def test_an_image_that_changed_since_it_was_listed_is_not_used(source):
    jpeg = (source / "0.jpg").read_bytes()
    assert shards.checked(jpeg, len(jpeg)) == (jpeg, 40, 20)
    with pytest.raises(ValueError, match="when the source was listed"):
        shards.checked(jpeg, len(jpeg) - 1)


def test_a_source_without_a_single_readable_image_is_refused_and_leaves_nothing(source, tmp_path):
    for path in source.iterdir():
        path.write_text("hello")
    message = refused(source, tmp_path / "out", shard_bytes=50)
    assert f"All 4 of {source} were rejected: 4 no image that can be decoded (first: 0.jpg: it begins with" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_rejects_from_an_lmdb_are_listed_too(source, tmp_path):
    with lmdb.open(str(tmp_path / "lup"), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        transaction.put(b"01_02_0003_00000004", (source / "0.jpg").read_bytes())
        transaction.put(b"other", pickle.dumps(["a"] * 300))
        transaction.put(b"\xff\xfe", (source / "0.jpg").read_bytes())
        transaction.put(b"__len__", b"1")
    assert importer.write(tmp_path / "lup", str(tmp_path / "out")) == 2
    assert list(rejects(tmp_path / "out")) == ["other"]


# --- shrinking ---


def test_only_images_with_a_longer_side_are_shrunk_to_it(source, tmp_path):
    assert importer.write(source, str(tmp_path / "out"), max_side=41) == 4
    samples = list(StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False))
    assert [(sample["height"], sample["width"]) for sample in samples] == [(40, 20), (41, 20), (41, 20), (41, 19)]
    for name, sample in zip(range(4), samples, strict=True):
        original = (source / f"{name}.jpg").read_bytes()
        assert (sample["jpeg"] == original) == (name < 2)
        assert simplejpeg.decode_jpeg_header(sample["jpeg"])[:2] == (sample["height"], sample["width"])


def test_a_shrunk_image_shows_what_it_showed(tmp_path):
    red_over_blue = np.zeros((400, 100, 3), np.uint8)
    red_over_blue[:200, :, 0] = red_over_blue[200:, :, 2] = 255
    jpeg, height, width = shards.checked(*sized(simplejpeg.encode_jpeg(red_over_blue, 95)), max_side=100)
    assert (height, width) == (100, 25)
    small = simplejpeg.decode_jpeg(jpeg).astype(int)
    assert np.abs(small[:45] - (255, 0, 0)).max() < 8
    assert np.abs(small[55:] - (0, 0, 255)).max() < 8


def sized(jpeg: bytes) -> tuple[bytes, int]:
    return jpeg, len(jpeg)


# --- destinations ---


def test_a_destination_that_is_not_empty_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert "already holds precious" in refused(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_an_empty_destination_is_used(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert importer.write(source, str(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "index.json").exists()


def test_another_import_into_the_same_destination_is_refused_while_one_is_at_work(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    held = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "another process is writing" in refused(source, tmp_path / "out")
    os.close(held)
    assert importer.write(source, str(tmp_path / "out")) == 4


# --- interruptions ---


def interrupted(source: Path, out: Path, *, after: int, **options) -> list[str]:
    """Interrupt after that many of four shards, return what is left beside the source."""

    def stop(done: int, total: int) -> None:
        assert total == 4
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="run the same command again"):
        importer.write(source, str(out), shard_bytes=1500, progress=stop, **options)
    return sorted(path.name for path in out.with_name("out.partial").glob("*"))


def test_an_interrupted_import_goes_on_where_it_was_and_ends_with_the_same_bytes(source, tmp_path):
    (source / "2.jpg").write_text("hello")  # rejects are remembered too
    assert importer.write(source, str(tmp_path / "undisturbed"), shard_bytes=1500) == 3
    left = interrupted(source, tmp_path / "out", after=3)
    assert {"import.json", "import-00000.json", "shard.00000.mds"} <= set(left)
    assert not [name for name in left if name.startswith("staging") or name == "index.json"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.mds")}
    seen = []
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500, progress=lambda *now: seen.append(now)) == 3
    assert seen[0][0] >= 3
    assert seen[-1] == (4, 4)
    assert {path: (tmp_path / "out" / path.name).stat().st_mtime_ns for path in before} == before  # not written again
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()


def test_an_interruption_before_the_first_shard_leaves_nothing(source, tmp_path):
    assert interrupted(source, tmp_path / "out", after=0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shard_bytes": 2000}, "shard_bytes=1500 instead of 2000"),
        ({"shard_bytes": 1500, "max_side": 30}, "max_side=None instead of 30"),
        ({"shard_bytes": 1500, "selection": Selection(fraction=0.5)}, "num_images=4 instead of 2"),
    ],
)
def test_an_unfinished_import_goes_on_with_its_own_options_only(source, tmp_path, options, expected):
    left = interrupted(source, tmp_path / "out", after=2)
    message = refused(source, tmp_path / "out", **options)
    assert f"{tmp_path}/out.partial holds an unfinished import with {expected}" in message
    assert f"or delete {tmp_path}/out.partial" in message
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == left
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500) == 4


def test_an_import_of_another_version_is_neither_gone_on_with_nor_mixed_with(source, tmp_path):
    """Sizes as stored and upright ones stood in one set."""
    interrupted(source, tmp_path / "out", after=2)
    record = tmp_path / "out.partial" / importer.PLAN
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format_version": 1}))
    message = refused(source, tmp_path / "out", shard_bytes=1500)
    assert f"{tmp_path}/out.partial holds an unfinished import by another version" in message
    assert "start again with an empty destination" in message
    record.unlink()
    for path in (tmp_path / "out.partial").iterdir():
        path.unlink()
    (tmp_path / "out.partial").rmdir()
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500) == 4
    done = tmp_path / "out" / importer.DONE
    assert json.loads(done.read_text())["format_version"] > 1
    done.write_text(json.dumps(json.loads(done.read_text()) | {"format_version": 1}))
    assert "holds a complete import by another version" in refused(source, tmp_path / "out", shard_bytes=1500)


def test_a_record_without_the_digest_of_its_plan_does_not_count(source, tmp_path):
    interrupted(source, tmp_path / "out", after=2)
    before = sorted((tmp_path / "out.partial").glob("import-*.json"))
    output = json.loads(before[0].read_text())
    output["shard"]["samples"] = 99
    before[0].write_text(json.dumps({name: value for name, value in output.items() if name != "plan"}))
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500) == 4


def test_an_unfinished_import_does_not_go_on_with_other_images(source, tmp_path):
    interrupted(source, tmp_path / "out", after=2)
    (source / "3.jpg").rename(source / "4.jpg")
    assert "unfinished import with other images" in refused(source, tmp_path / "out", shard_bytes=1500)


def test_a_shard_that_a_power_cut_has_shortened_is_written_again(source, tmp_path):
    importer.write(source, str(tmp_path / "undisturbed"), shard_bytes=1500)
    interrupted(source, tmp_path / "out", after=3)
    os.truncate(tmp_path / "out.partial" / "shard.00001.mds", 10)
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500) == 4
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_a_kill_between_the_new_name_and_the_last_record_is_mended_by_the_same_call(source, tmp_path):
    importer.write(source, str(tmp_path / "out"), shard_bytes=1500)
    whole = tree(tmp_path / "out")
    plan = importer.make_plan(open_source(source), Selection(), 1500, None)
    (tmp_path / "out" / importer.PLAN).write_text(json.dumps(plan.record))
    assert "holds an unfinished import" in refused(source, tmp_path / "out", shard_bytes=2000)
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=1500) == 4
    assert tree(tmp_path / "out") == whole


def test_a_partial_directory_that_is_no_import_is_left_alone(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("data")
    assert "out.partial already holds precious" in refused(source, tmp_path / "out")
    assert tree(tmp_path / "out.partial") == {"precious": b"data"}


def test_progress_counts_to_the_end(source, tmp_path):
    seen = []
    importer.write(source, str(tmp_path / "out"), shard_bytes=1500, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


# --- reading back ---


def failing_reads(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The first ``times`` reads of 2.jpg fail as on a network that is away; nobody waits for it."""
    left, read = [times], Source.read

    def fail(self, image):
        if image.key == "2.jpg" and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(self, image)

    monkeypatch.setattr(Source, "read", fail)
    monkeypatch.setattr("personmae.system.retry.time.sleep", lambda seconds: None)


def test_a_read_that_fails_for_a_while_changes_nothing(source, tmp_path, monkeypatch):
    importer.write(source, str(tmp_path / "undisturbed"))
    failing_reads(monkeypatch, 3)
    assert importer.write(source, str(tmp_path / "out")) == 4
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_a_read_that_keeps_failing_stops_the_import_and_rejects_nothing(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        failing_reads(patched, 1000)
        assert f"2.jpg of {source} cannot be read: Input/output error" in refused(source, tmp_path / "out")
    assert importer.write(source, str(tmp_path / "out")) == 4
    assert not (tmp_path / "out" / importer.REJECTS).exists()


@pytest.mark.parametrize("destination", ["", "s3:/bucket/x", "run:1"])
def test_what_is_neither_a_directory_nor_a_location_is_refused(source, destination, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a directory or a location like s3://bucket/prefix is required"):
        importer.write(source, destination)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_link_to_an_empty_directory_is_followed_and_a_mount_point_is_refused_at_once(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert importer.write(source, str(tmp_path / "link")) == 4
    assert (tmp_path / "real" / "index.json").exists()
    assert (tmp_path / "link").is_symlink()
    assert "/proc is a mount point" in refused(source, Path("/proc"))

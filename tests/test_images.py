"""One rule for every reader: what pre-training takes, fine-tuning opens, and both see the same upright pixels."""

import contextlib
import io
from pathlib import Path

import cv2
import numpy as np
import odd_images
import pytest
from PIL import Image, ImageOps

from personmae import images
from personmae.data import importer, shards
from personmae.data.decode import decode_onto
from personmae.data.shard_set import ShardSet
from personmae.errors import UserError
from personmae.reid.transforms import decode_image, read_image
from personmae.system import mosaic

WHOLE, BROKEN = odd_images.whole(), odd_images.broken()
CANVAS = (64, 64, 3)
NOT_PILLOWS = ("16 bits, grey", "many clear", "EXIF cut short")  # Pillow clips the first and warns of the others


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)


def differing(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two images, which must be of one size."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def on_canvas(jpeg: bytes | memoryview) -> np.ndarray:
    canvas = np.zeros(CANVAS, np.uint8)
    height, width = decode_onto(jpeg, canvas).size
    return canvas[:height, :width]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_image_gives_the_upright_pixels_of_pillow_and_of_opencv(name):
    found = images.decode(WHOLE[name]).pixels
    assert found.dtype == np.uint8
    if not name.endswith(NOT_PILLOWS):
        assert differing(found, by_pillow(WHOLE[name])) <= 1
    opencv = cv2.imdecode(np.frombuffer(WHOLE[name], np.uint8), cv2.IMREAD_COLOR)  # which read for fine-tuning before
    assert differing(found, np.asarray(opencv)[..., ::-1]) <= 1


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_image_is_refused_with_a_reason(name):
    with pytest.raises(images.BadImage) as caught:
        images.decode(BROKEN[name])
    assert "\n" not in str(caught.value)
    expected = "ends too early" if name.startswith(("cut", "JPEG and zeros")) and name != "cut WebP" else None
    assert caught.value.kind == (expected or caught.value.kind)


def test_shards_take_what_fine_tuning_opens_and_both_see_the_same_pixels(tmp_path):
    """Files are named .jpg whatever they are: the content decides."""
    opened, expected, names = {}, [], {}
    (tmp_path / "source").mkdir()
    for name, file, data, taken in odd_images.named():
        path = tmp_path / "source" / file
        path.write_bytes(data)
        names[file] = name
        expected += [file] if taken else []
        with contextlib.suppress(UserError):
            opened[file] = decode_image(str(path))
    assert list(opened) == expected
    assert importer.write(tmp_path / "source", str(tmp_path / "set")) == len(expected)
    assert shards.verify(str(tmp_path / "set"), cache_dir=tmp_path) == len(expected)
    with ShardSet(str(tmp_path / "set"), tmp_path) as found:
        assert len(found.shards) == 1
        for position, file in enumerate(expected):
            sample = found.open(0).sample(position)
            assert bytes(sample["key"]).decode() == file
            upright = on_canvas(sample["jpeg"])
            original = (tmp_path / "source" / file).read_bytes()
            assert upright.shape == opened[file].shape, names[file]
            difference = np.abs(upright.astype(int) - opened[file])
            if bytes(sample["jpeg"]) == original:
                assert difference.max() == 0, names[file]
            else:  # encoded once more
                assert difference.mean() < 4, names[file]
                assert np.quantile(difference, 0.9) <= 10, names[file]


def test_jpegs_that_the_fast_decoder_takes_are_kept_byte_for_byte():
    kept = {name for name, data in WHOLE.items() if shards.checked(data, len(data))[0] == data}
    assert {name for name in WHOLE if name.startswith(("subsampling", "EXIF", "1x", "CMYK", "progressive"))} <= kept
    assert {name for name in WHOLE if name.startswith(("PNG", "WebP", "BMP", "GIF", "TIFF", "unknown"))} & kept == set()
    assert all(images.decode(shards.checked(data, len(data))[0]).fast for data in WHOLE.values())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_both_readers_turn_an_image_as_its_orientation_says(kind, orientation, tmp_path):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = odd_images.oriented(kind, orientation, **options)
    expected = by_pillow(data)
    assert expected.shape == ((30, 46, 3) if orientation >= 5 else (46, 30, 3))
    stored, height, width = shards.checked(data, len(data))
    assert (height, width) == expected.shape[:2]
    assert differing(on_canvas(stored), expected) <= (0 if kind == "JPEG" else 10)
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    assert differing(decode_image(str(path)), expected) == 0
    assert read_image(str(path), expected.shape[:2]).transpose(1, 2, 0).tolist() == expected.tolist()


@pytest.mark.parametrize("size", [(30, 60), (160, 80), (100, 300), (400, 120), (1500, 100), (100, 1500)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_canvas_of_a_turned_image_is_that_of_the_image_turned_first(size, orientation):
    """The decoder shrinks what is stored; the slow way is to decode all of it, turn it, and store that."""
    image = Image.fromarray(odd_images.pixels(*size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = odd_images.saved(image, "JPEG", exif=exif, quality=100, subsampling=0)
    upright = odd_images.saved(Image.fromarray(by_pillow(turned).astype(np.uint8)), "JPEG", quality=100, subsampling=0)
    fast, slow = np.zeros((160, 80, 3), np.uint8), np.zeros((160, 80, 3), np.uint8)
    assert decode_onto(turned, fast) == decode_onto(upright, slow)
    assert np.abs(fast.astype(int) - slow).mean() < 1  # at the far edges the decoder shrinks what it has filled up with
    assert images.upright_size(turned) == images.upright_size(upright)


def test_an_image_without_an_orientation_costs_no_reading_of_exif(monkeypatch):
    def read(segment):
        raise AssertionError

    monkeypatch.setattr(images, "_read_orientation", read)
    for name in ("subsampling 420", "progressive", "profile", "comment", "MPO"):
        assert on_canvas(WHOLE[name]).any()
    with pytest.raises(AssertionError):
        on_canvas(WHOLE["EXIF orientation 6"])


@pytest.mark.parametrize("length", range(40))
def test_a_header_that_ends_anywhere_has_no_orientation(length):
    jpeg = WHOLE["EXIF orientation 6"]
    assert images.orientation(jpeg) == images.orientation(memoryview(jpeg)) == 6
    assert images.orientation(jpeg[:length]) in (1, 6)


def test_samples_of_shards_written_before_images_were_turned_are_whole_too(tmp_path):
    MDSWriter = mosaic.load("streaming.base.format.mds.writer").MDSWriter  # noqa: N806

    jpeg = WHOLE["EXIF orientation 6"]
    sample = {"jpeg": jpeg, "key": "a", "height": np.uint16(46), "width": np.uint16(30)}
    with MDSWriter(out=str(tmp_path / "out"), columns=shards.COLUMNS, hashes=shards.HASHES) as writer:
        writer.write(sample)
    assert shards.verify(str(tmp_path / "out"), cache_dir=tmp_path) == 1
    stats = shards.describe(str(tmp_path / "out"), cache_dir=tmp_path)
    assert list(stats.heights) == ["23-31 px"]  # 30, upright


def test_a_stored_jpeg_that_training_cannot_read_is_told_by_verify(tmp_path):
    MDSWriter = mosaic.load("streaming.base.format.mds.writer").MDSWriter  # noqa: N806

    jpeg = WHOLE["stray bytes"]
    with MDSWriter(out=str(tmp_path / "out"), columns=shards.COLUMNS, hashes=shards.HASHES) as writer:
        writer.write({"jpeg": jpeg, "key": "a", "height": np.uint16(46), "width": np.uint16(30)})
    with pytest.raises(images.BadImage):
        on_canvas(jpeg)
    with pytest.raises(UserError, match=r"sample 0 of .* is not a JPEG that the decoder of training takes"):
        shards.verify(str(tmp_path / "out"), cache_dir=Path(tmp_path))


def test_crops_of_every_suffix_are_imported_and_stored_as_jpegs_of_the_same_pixels(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = {"a.png": "PNG RGB", "b.webp": "WebP", "c.bmp": "BMP RGB", "d.PNG": "PNG orientation 6", "e.jpeg": "progressive"}
    for file, name in names.items():
        (source / file).write_bytes(WHOLE[name])
    assert importer.write(source, str(tmp_path / "set")) == len(names)
    with ShardSet(str(tmp_path / "set"), tmp_path) as found:
        for position, file in enumerate(sorted(names)):
            stored = found.open(0).jpeg(position)
            assert bytes(stored[:2]) == b"\xff\xd8"
            assert differing(on_canvas(stored), decode_image(str(source / file))) <= 10


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds in damaged metadata
def test_damage_anywhere_is_a_bad_image_or_something_that_training_can_read():
    rng = np.random.default_rng(0)
    files, stored = list(WHOLE.values()), 0
    for _ in range(2000):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(min(len(data), rng.choice([60, 400, len(data)])))] = rng.integers(256)
        with contextlib.suppress(images.BadImage):
            jpeg, *size = shards.checked(bytes(data), len(data))
            assert images.upright_size(jpeg) == tuple(size)
            decode_onto(jpeg, np.zeros(CANVAS, np.uint8))
            stored += 1
    assert 200 < stored < 1800


def test_no_other_reader_decodes_by_a_rule_of_its_own():
    package = Path(images.__file__).parent
    calls = ("cv2.imread(", "cv2.imdecode(", "Image.open(", "decode_jpeg(")
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if any(c in p.read_text("utf-8") for c in calls)}
    twins = {"data/decode.py", "bench/data.py"}  # the fast twin, and the usual way beside it
    headers = {"serve/uploads.py"}  # what an upload says of its size before anything is decoded
    assert found == {"images.py"} | twins | headers

"""MDS shards that others wrote and parquet files, as sources: whole images out of them, with little read at once."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from personmae.__main__ import main
from personmae.data import importer, parquet
from personmae.data.shard_set import ShardSet
from personmae.data.sources import open_source
from personmae.errors import Stopped, UserError
from personmae.system import mosaic

MDSWriter = mosaic.load("streaming.base.format.mds.writer").MDSWriter


@pytest.fixture(scope="module")
def jpegs(images: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(images.rglob("*.jp*g"))[:30]]


def foreign(out: Path, jpegs: list[bytes], column: str = "image", encoding: str = "bytes", **options) -> Path:
    columns = {column: encoding, "label": "int", "name": "str"}
    with MDSWriter(out=str(out), columns=columns, size_limit=30_000, **options) as writer:
        for number, jpeg in enumerate(jpegs):
            value: Any = Image.open(io.BytesIO(jpeg)) if encoding != "bytes" else jpeg
            writer.write({column: value, "label": number, "name": f"n{number}"})
    return out


def contents(location: Path | str, column: str | None = None) -> dict[str, bytes]:
    source = open_source(location, column)
    with source:
        return {image.key: source.read(image) for image in source.images()}


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# --- MDS ---


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz"])
def test_shards_that_others_wrote_give_their_images_in_order(jpegs, tmp_path, compression):
    foreign(tmp_path / "set", jpegs, compression=compression, hashes=["sha1", "xxh64"])
    found = contents(tmp_path / "set")
    assert list(found.values()) == jpegs
    names = list(found)
    assert names[0] == "shard.00000/00000000"
    assert any(name.startswith("shard.00001/00000000") for name in names)
    assert len({name.partition("/")[0] for name in names}) > 1


def test_a_column_of_pixels_is_read_too(jpegs, tmp_path):
    found = contents(foreign(tmp_path / "set", jpegs[:5], encoding="pil"))
    assert [pixels(content).tolist() for content in found.values()] == [pixels(jpeg).tolist() for jpeg in jpegs[:5]]


def test_an_import_of_compressed_shards_is_resumed_and_trained_from(jpegs, tmp_path, capsys):
    source = foreign(tmp_path / "set", jpegs, compression="zstd")
    with pytest.raises(UserError, match=f"These have the compression zstd:7?.*personmae shards write {source} OUT"):
        ShardSet(str(source), tmp_path)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        importer.write(source, str(tmp_path / "out"), shard_bytes=20_000, progress=stop)
    assert importer.write(source, str(tmp_path / "out"), shard_bytes=20_000) == 30
    with ShardSet(str(tmp_path / "out"), tmp_path) as shards:
        assert [bytes(shards.jpeg(number)) for number in range(30)] == jpegs
    assert importer.write(source, str(tmp_path / "twice"), shard_bytes=20_000) == 30
    assert [(tmp_path / "twice" / path.name).read_bytes() for path in sorted((tmp_path / "out").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "out").iterdir())
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # merge_index's
def test_an_index_over_indices_counts_once_and_others_beside_it_too(jpegs, tmp_path):
    merge_index = mosaic.load("streaming.base.util").merge_index

    for number in range(2):
        foreign(tmp_path / "set" / str(number), jpegs[number * 10 : number * 10 + 10])
    assert list(contents(tmp_path / "set").values()) == jpegs[:20]
    apart = list(contents(tmp_path / "set"))
    merge_index(str(tmp_path / "set"))
    assert list(contents(tmp_path / "set").values()) == jpegs[:20]
    assert apart == list(contents(tmp_path / "set"))
    (tmp_path / "set" / "index.json").write_text('{"something": "else"}')
    source = open_source(tmp_path / "set")
    assert len(source.images()) == 20
    assert +source.passed_over == {".json": 1}


def test_our_own_shards_are_a_source_too_and_keep_their_names(shard_dir, images, tmp_path):
    """They became SHARD/ROW, so that no list of names fitted them any more."""
    source = open_source(shard_dir)
    original = {image.key: open_source(images).read(image) for image in open_source(images).images()}
    assert contents(shard_dir) == original
    (tmp_path / "set" / "below").mkdir(parents=True)
    for path in shard_dir.iterdir():
        os.link(path, tmp_path / "set" / "below" / path.name)
    assert list(contents(tmp_path / "set")) == [f"below/{key}" for key in original]
    names = sorted(original)[3:20:4]
    (tmp_path / "names.txt").write_text("\n".join(names))
    command = [
        "shards",
        "write",
        str(shard_dir),
        str(tmp_path / "out"),
        "--processes",
        "1",
        "--list",
        str(tmp_path / "names.txt"),
    ]
    assert main(command) == 0
    assert {name: original[name] for name in names} == contents(tmp_path / "out")
    assert len(source.images()) == 50
    assert +source.passed_over == {".json": 1}  # imported.json


@pytest.mark.parametrize("names", [["a", "b", "a", "c"], ["a", "", "b", "c"]])
def test_a_column_of_keys_that_do_not_tell_the_rows_apart_is_left_alone(jpegs, tmp_path, names):
    with MDSWriter(out=str(tmp_path / "set"), columns={"image": "bytes", "key": "str"}) as writer:
        for jpeg, name in zip(jpegs, names, strict=False):
            writer.write({"image": jpeg, "key": name})
    assert list(contents(tmp_path / "set")) == [f"shard.00000/{row:08}" for row in range(4)]


def test_our_shards_that_are_cut_off_are_refused_by_their_hashes(shard_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("personmae.system.retry.time.sleep", lambda seconds: None)
    shutil.copytree(shard_dir, tmp_path / "set")
    os.truncate(tmp_path / "set" / "shard.00001.mds", 200)
    with pytest.raises(UserError, match=r"shard\.00001\.mds does not have the size and hash"):
        importer.write(tmp_path / "set", str(tmp_path / "out"))


def test_a_damaged_or_missing_shard_stops_the_import_and_names_it(jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr("personmae.system.retry.time.sleep", lambda seconds: None)
    source = foreign(tmp_path / "set", jpegs, hashes=["sha1"])
    shard = source / "shard.00001.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard\.00001\.mds does not have the size and hash"):
        importer.write(source, str(tmp_path / "out"))
    shard.unlink()
    with pytest.raises(UserError, match=r"all shards of .*index\.json are required. shard\.00001\.mds is not there"):
        open_source(source).images()


def test_a_column_is_chosen_where_it_is_not_plain(jpegs, tmp_path, capsys):
    with MDSWriter(out=str(tmp_path / "set"), columns={"front": "bytes", "back": "jpeg", "id": "int"}) as writer:
        for jpeg in jpegs[:4]:
            writer.write({"front": jpeg, "back": Image.open(io.BytesIO(jpegs[-1])), "id": 1})
    command = ["shards", "write", str(tmp_path / "set"), str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 78
    assert "may have images in back, front. Choose one with --column" in capsys.readouterr().err
    assert list(contents(tmp_path / "set", "front").values()) == jpegs[:4]
    assert main([*command, "--column", "id"]) == 78
    assert "holds none next to 1 json files without a column of images (name it with --column)" in capsys.readouterr().err
    assert main([*command, "--column", "front"]) == 0


# --- parquet ---


def table(path: Path, jpegs: list[bytes | None], kind: str = "struct", column: str = "image", rows: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "struct":
        values = pa.array([{"bytes": jpeg, "path": f"{i}.jpg"} for i, jpeg in enumerate(jpegs)])
    else:
        values = pa.array(jpegs, pa.large_binary() if kind == "large" else pa.binary())
    pq.write_table(pa.table({"label": list(range(len(jpegs))), column: values}), path, row_group_size=rows, compression="zstd")
    return path


@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
def test_a_data_set_as_hugging_face_publishes_it_gives_its_images_in_order(jpegs, tmp_path, kind):
    for number in range(2):
        table(tmp_path / "set" / "data" / f"train-{number:05}-of-00002.parquet", jpegs[number * 15 : number * 15 + 15], kind)
    (tmp_path / "set" / "README.md").write_text("a card")
    found = contents(tmp_path / "set")
    assert list(found.values()) == jpegs
    assert list(found)[15] == "data/train-00001-of-00002/00000000"
    assert importer.write(tmp_path / "set", str(tmp_path / "out"), shard_bytes=20_000) == 30
    with ShardSet(str(tmp_path / "out"), tmp_path) as shards:
        assert [bytes(shards.jpeg(number)) for number in range(30)] == jpegs
    assert list(contents(tmp_path / "set" / "data" / "train-00000-of-00002.parquet").values()) == jpegs[:15]


def test_parquet_in_a_bucket_is_read_a_row_group_at_a_time(jpegs, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr("personmae.data.files._AHEAD", 1000)
    name = s3_server.bucket("parquet")
    path = table(tmp_path / "a.parquet", [*jpegs], rows=5)
    s3_server.client.upload_file(str(path), name, "set/a.parquet")
    loaded, load = [], parquet.Parquet.load
    monkeypatch.setattr(parquet.Parquet, "load", lambda self, number: loaded.append(number) or load(self, number))
    source = open_source(f"s3://{name}/set")
    listed = source.images()
    assert (len(listed), loaded) == (30, [])
    assert [source.read(image) for image in listed] == jpegs
    assert loaded == list(range(6))


def test_mds_in_a_bucket_gives_the_same_set_as_in_a_folder(jpegs, s3_server, tmp_path):
    name = s3_server.bucket("mds")
    for path in foreign(tmp_path / "set", jpegs, compression="zstd").iterdir():
        s3_server.client.upload_file(str(path), name, f"set/{path.name}")
    assert list(contents(f"s3://{name}/set").values()) == jpegs
    assert contents(f"s3://{name}/set") == contents(tmp_path / "set")


def test_a_row_without_bytes_is_rejected_and_a_table_without_images_is_told(jpegs, tmp_path):
    table(tmp_path / "set" / "a.parquet", [jpegs[0], None, jpegs[1]])
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "set" / "labels.parquet")
    (tmp_path / "set" / "b.jpg").write_bytes(jpegs[2])
    outcome = importer.carry_out(tmp_path / "set", str(tmp_path / "out"))
    assert outcome.num_images == 3
    assert outcome.passed_over == "1 parquet files without a column of images (name it with --column)"
    assert (
        '"key": "a/00000001", "reason": "it cannot be read: its row has no bytes"'
        in (tmp_path / "out" / importer.REJECTS).read_text()
    )


def test_a_parquet_file_that_is_cut_off_is_refused(jpegs, tmp_path):
    path = table(tmp_path / "a.parquet", [*jpegs])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a whole parquet file is required. .*a\.parquet is not one"):
        open_source(path).images()


def test_a_row_group_is_described_once_however_many_of_its_images_are_read(jpegs, tmp_path, monkeypatch):
    """A description has every column of the group, so that one for each image cost more than the image."""
    path = table(tmp_path / "a.parquet", [*jpegs], rows=15)
    asked = []
    opened = parquet.Parquet._opened
    monkeypatch.setattr(parquet.Parquet, "_opened", lambda self: asked.append(self) or opened(self))
    with open_source(path) as source:
        images = source.images()
        asked.clear()
        assert [source.read(image) for image in images] == jpegs
    assert 0 < len(asked) <= 2 * 2  # for each group: it is described, and it is read


@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
def test_of_a_large_row_group_some_rows_are_held_at_a_time(jpegs, tmp_path, monkeypatch, kind):
    """Three whole groups were kept in each process: 24 GB where they have 500 MB and 16 processes read them."""
    many = [*jpegs, None, *(jpeg + b"1" for jpeg in jpegs), *(jpeg + b"2" for jpeg in jpegs)]
    path = table(tmp_path / "a.parquet", many, kind, rows=len(many))
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", sum(map(len, jpegs)) // 4)
    monkeypatch.setattr(parquet, "_BUFFER_BYTES", 100)
    held, load = [], parquet.Parquet.load
    monkeypatch.setattr(parquet.Parquet, "load", lambda self, number: held.append(load(self, number)) or held[-1])
    with open_source(path) as source:
        images = source.images()
        assert [image.key for image in images] == [f"a/{row:08}" for row in range(91)]
        assert [source.read(image) for image in images if many[image.offset]] == [jpeg for jpeg in many if jpeg]
    assert len(held) > 8
    assert max(sum(len(content or b"") for content in contents) for contents in held) < sum(map(len, jpegs)) / 2
    with open_source(path) as source:  # from the end to the beginning, as another process may begin in the middle
        images = source.images()
        assert [source.read(image) for image in images[:59:-1]] == many[:59:-1]
    with open_source(path) as source, pytest.raises(FileNotFoundError, match="its row has no bytes"):
        source.read(source.images()[30])


def test_the_first_rows_of_a_group_are_there_before_the_others_are_read(tmp_path, monkeypatch):
    noise = [np.random.default_rng(row).bytes(5_000) for row in range(100)]
    values = pa.array(noise, pa.binary())
    pq.write_table(
        pa.table({"image": values}), tmp_path / "a.parquet", data_page_size=5_000, write_batch_size=1, use_dictionary=False
    )
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", 50_000)
    monkeypatch.setattr(parquet, "_BUFFER_BYTES", 10_000)
    with open_source(tmp_path / "a.parquet") as source:
        first = source.images()[0]
        assert source.read(first) == noise[0]
        container: Any = source._containers["a.parquet"]
        assert container._handle.tell() < 200_000 < (tmp_path / "a.parquet").stat().st_size


def test_images_of_arrays_that_are_too_large_for_one_are_found():
    values = parquet._Values([pa.array([b"a", None]), pa.array([], pa.binary()), pa.array([b"c"])])
    assert list(values) == [b"a", None, b"c"]

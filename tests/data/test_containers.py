"""What a source takes of what lies side by side, and what it counts and tells instead: nothing is left out without a word."""

import gc
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import lmdb
import pytest

from personmae.__main__ import main
from personmae.data import containers, importer, shards
from personmae.data.files import key_of, name_of
from personmae.data.selection import Selection
from personmae.data.sources import Source, open_source, summary
from personmae.errors import UserError

JPEG = b"\xff\xd8 not really one"


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG + name.encode())
    return root


def tar(*names: str, links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(JPEG + name.encode())
            archive.addfile(member, io.BytesIO(JPEG + name.encode()))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            archive.addfile(member)
    return packed.getvalue()


def database(path: Path, entries: dict[bytes, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def listing(location: Path) -> tuple[list[str], Counter[str]]:
    source = open_source(location)
    return [image.key for image in source.images()], +source.passed_over


def test_every_kind_of_image_is_taken_in_any_case_and_all_else_is_counted(tmp_path):
    put(tmp_path, "a.jpg", "b.JPEG", "c.PNG", "d.webp", "e.Bmp", "n.txt", "m.TXT", "l.mat", "README", "x.tar.gz", "y.zip")
    put(tmp_path, ".a.jpg", "._b.jpg", ".cache/c.jpg", "s/.cache/d.jpg")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "up").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.jpg")
    keys, passed_over = listing(tmp_path)
    assert keys == ["a.jpg", "b.JPEG", "c.PNG", "d.webp", "e.Bmp"]
    assert passed_over == {
        ".txt": 2,
        ".mat": 1,
        ".zip": 1,
        "without a suffix": 1,
        "compressed tars (decompress them)": 1,
        "hidden files": 2,
        "hidden folders": 2,
        "links that lead nowhere": 1,
        "links to a folder above": 1,
        "devices, pipes and sockets": 1,
    }


def test_what_was_passed_over_is_told_most_frequent_first_and_long_lists_are_cut():
    assert summary(Counter({".mat": 3, ".txt": 1200, ".b": 0})) == "1,200 .txt, 3 .mat"
    assert summary(Counter({f".{i:02}": 20 - i for i in range(11)})).endswith("13 .07, 33 of 3 other kinds")
    assert summary(Counter()) == ""


def test_of_tars_that_were_written_one_behind_another_all_members_are_read(tmp_path):
    (tmp_path / "two.tar").write_bytes(tar("a.jpg", "b.jpg") + tar("c.jpg", "b.jpg") + tar("d.txt"))
    source = open_source(tmp_path / "two.tar")
    images = source.images()
    assert [image.key for image in images] == ["two/a.jpg", "two/b.jpg", "two/c.jpg"]
    assert [source.read(image) for image in images] == [JPEG + name for name in (b"a.jpg", b"b.jpg", b"c.jpg")]
    assert +source.passed_over == {".txt": 1, "tar members replaced by a later one": 1}


def test_damage_behind_the_end_of_a_tar_is_no_end(tmp_path):
    (tmp_path / "two.tar").write_bytes(tar("a.jpg") + b"rubbish" * 1000)
    with pytest.raises(UserError, match=r"a whole tar is required. .*what follows byte 10,240 is neither"):
        open_source(tmp_path / "two.tar").images()


def test_a_hard_link_in_a_tar_is_the_image_it_leads_to(tmp_path):
    (tmp_path / "l.tar").write_bytes(tar("a.jpg", ".h.jpg", links={"b.jpg": "a.jpg", "c.jpg": "missing.jpg"}))
    source = open_source(tmp_path / "l.tar")
    assert {image.key: source.read(image) for image in source.images()} == {
        "l/a.jpg": JPEG + b"a.jpg",
        "l/b.jpg": JPEG + b"a.jpg",
    }
    assert +source.passed_over == {"links and sparse members of tars": 1, "hidden files": 1}


def test_labels_counts_and_other_small_entries_of_an_lmdb_are_counted_not_rejected(tmp_path):
    entries = {f"image-{i:03}".encode(): JPEG for i in range(3)} | {f"label-{i:03}".encode(): b"17" for i in range(3)}
    entries |= {b"num-samples": b"3", b"label-long": b"x" * 600, b"note": b"hello", b"image-003": b"\x89PNG" + b"x" * 600}
    keys, passed_over = listing(database(tmp_path / "lup", entries))
    assert keys == [f"image-{i:03}" for i in range(4)]
    assert passed_over == {
        "LMDB entries label-N": 3,
        "LMDB entries num-samples": 1,
        "LMDB entries label-long": 1,
        "LMDB entries note": 1,
    }


def test_an_lmdb_is_found_in_a_folder_further_down_and_its_own_files_are_not_told(tmp_path):
    database(tmp_path / "LUP" / "lmdb", {b"01_a": JPEG})
    (tmp_path / "LUP" / "lmdb" / "keys.pkl").write_bytes(b"x")
    put(tmp_path / "LUP", "more/a.jpg")
    source = open_source(tmp_path / "LUP")
    assert [(image.key, source.read(image)) for image in source.images()] == [
        ("lmdb/01_a", JPEG),
        ("more/a.jpg", JPEG + b"more/a.jpg"),
    ]
    assert +source.passed_over == {".pkl": 1}
    with source:
        pass
    assert source.read(source.images()[0]) == JPEG  # it is opened again


def test_two_images_of_one_name_are_refused(tmp_path):
    put(tmp_path, "a/b.jpg")
    (tmp_path / "a.tar").write_bytes(tar("b.jpg"))
    with pytest.raises(UserError, match=r"different names. a/b.jpg is in a file and a.tar. Rename one"):
        open_source(tmp_path).images()


# --- names that are no UTF-8 ---

ODD = [b"caf\xe9.jpg", b"caf\\xe9.jpg", b"\\\xff\\x5c", b"\\x\xe9", "日本 #1?.jpg".encode(), b"a\\b.jpg", b"\\xE9"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_valid_text_and_leads_back(name):
    text = name.decode("utf-8", "surrogateescape")
    assert name_of(key_of(text)) == text
    key_of(text).encode()


def test_names_differ_as_keys_and_common_ones_stay_as_they_are():
    keys = [key_of(name.decode("utf-8", "surrogateescape")) for name in ODD]
    assert len(set(keys)) == len(ODD)
    assert keys[0] == r"caf\xe9.jpg"
    assert keys[4:6] == ["日本 #1?.jpg", r"a\b.jpg"]


def test_images_whose_names_are_no_utf8_are_imported_resumed_listed_and_rejected(images, tmp_path):
    folder = os.fsencode(tmp_path / "odd")
    os.makedirs(folder + b"/d\xe9")
    for number, name in enumerate((b"d\xe9/a.jpg", b"caf\xe9.jpg", b"b.jpg")):
        os.link(sorted(images.glob("*.jpg"))[number], folder + b"/" + name)
    with open(folder + b"/\xfcbad.jpg", "wb") as file:
        file.write(b"hello")
    assert importer.write(tmp_path / "odd", str(tmp_path / "out")) == 3
    line = json.loads((tmp_path / "out" / importer.REJECTS).read_text("utf-8"))
    assert line["key"] == r"\xfcbad.jpg"
    assert shards.verify(str(tmp_path / "out"), cache_dir=tmp_path) == 3
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\nd\\xe9/a.jpg\n")  # as the file system has it, and as it is told
    chosen = Selection(list_file=tmp_path / "list.txt").of(open_source(tmp_path / "odd").images())
    assert [image.key for image in chosen] == [r"caf\xe9.jpg", r"d\xe9/a.jpg"]


# --- the command ---


def test_the_command_tells_what_it_passes_over_at_the_plan_and_at_the_end(images, tmp_path, capsys):
    os.link(images / "p01.jpg", tmp_path / "a.jpg")
    put(tmp_path, "a.txt", "b.txt", "c.mat")
    assert main(["shards", "write", str(tmp_path), str(tmp_path / "out"), "--processes", "1"]) == 0
    out, err = capsys.readouterr()
    assert f"shards write: {tmp_path}: 1 image for 1 shard. Passed over: 2 .txt, 1 .mat" in err
    assert out == f"1 image written to {tmp_path}/out. Passed over: 2 .txt, 1 .mat\n"


def test_a_complete_import_that_is_repeated_says_so_and_one_of_something_else_is_refused(images, tmp_path, capsys):
    command = ["shards", "write", str(images), str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == f"already complete: 50 images in {tmp_path}/out\n"
    assert main([*command, "--fraction", "0.5"]) == 78
    assert "already holds a complete import with other num_images: delete it or choose another" in capsys.readouterr().err
    assert main([*command, "--max-side", "30"]) == 78
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / importer.DONE).unlink()  # as an older version left it
    assert main(command) == 78
    assert "already holds index.json" in capsys.readouterr().err


def test_a_source_can_be_pickled_after_it_was_listed_and_opened(tmp_path):
    database(tmp_path / "lup", {b"k": JPEG})
    source = open_source(tmp_path / "lup")
    (image,) = source.images()
    assert source.read(image) == JPEG
    copy: Source = pickle.loads(pickle.dumps(source))
    with source:
        pass  # a process opens an LMDB once
    assert copy.read(image) == JPEG
    assert copy.location == source.location


def test_the_members_of_a_tar_are_not_all_kept_while_it_is_listed(tmp_path):
    """The standard library keeps each one that it reads: gigabytes for millions of images."""
    (tmp_path / "a.tar").write_bytes(tar(*(f"{number}.jpg" for number in range(50))))
    with (tmp_path / "a.tar").open("rb") as file:
        names = []
        for member in containers._members(file):
            names.append(member.name)
            assert sum(type(each) is tarfile.TarInfo for each in gc.get_objects()) <= 3
    assert len(names) == 50

"""Folders, LMDBs and tars as sources of images; lists and shares of them."""

import errno
import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import lmdb
import pytest

from personmae.data.containers import ImageEntry
from personmae.data.selection import Selection, read_list
from personmae.data.sources import open_source
from personmae.errors import UserError

JPEG = b"\xff\xd8 not really one"
METADATA = [(b"__len__", b"3"), (b"__keys__", pickle.dumps(["01_02_0003_00000004"]))]


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG + name.encode())
    return root


def database(path: Path, entries: list[tuple[bytes, bytes]], *, subdir: bool = True) -> Path:
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        for key, value in entries:
            transaction.put(key, value)
    return path


def tar(path: Path, *names: str, content: bytes = JPEG) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content + name.encode())
            archive.addfile(member, io.BytesIO(content + name.encode()))
    return path


def keys(path: Path, selection: Selection | None = None) -> list[str]:
    images = open_source(path).images()
    return [image.key for image in (selection.of(images) if selection else images)]


def contents(path: Path) -> dict[str, bytes]:
    """All images as another process gets them; their listed sizes are compared on the way."""
    images = open_source(path).images()
    with pickle.loads(pickle.dumps(open_source(path))) as source:
        found = {image.key: source.read(image) for image in images}
    assert [image.num_bytes for image in images] == [len(content) for content in found.values()]
    return found


def refused(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ---


def test_images_are_found_at_any_depth_in_upper_and_lower_case_and_in_order(tmp_path):
    files(tmp_path, "b.JPG", "a.jpeg", "c/d.jpg", "c-1/e.jpg", "c/ignored.gif", "ignored.txt")
    assert keys(tmp_path) == ["a.jpeg", "b.JPG", "c-1/e.jpg", "c/d.jpg"]
    assert contents(tmp_path)["c/d.jpg"] == JPEG + b"c/d.jpg"


def test_links_are_followed_and_a_link_to_a_folder_above_is_not(tmp_path):
    files(tmp_path, "source/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "loop").symlink_to(tmp_path / "source")
    (tmp_path / "source" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert open_source(tmp_path / "source").images()[1] == ImageEntry("gone.jpg", 0)
    assert keys(tmp_path / "source") == ["a.jpg", "gone.jpg", "link/b.jpg"]


def test_a_source_that_is_not_there_or_empty_or_of_another_kind_says_what_is_wanted(tmp_path):
    assert f"{tmp_path}/nowhere is not there" in refused(open_source, tmp_path / "nowhere")
    assert "holds none next to 2 .gif, 1 .txt" in refused(keys, files(tmp_path / "gif", "a.gif", "b.gif", "c.txt"))
    files(tmp_path, "a.zip")
    assert "a.zip is a file of another kind" in refused(open_source, tmp_path / "a.zip")


# --- LMDB ---


def test_an_lmdb_is_read_by_its_own_keys_and_known_metadata_is_left_out(tmp_path):
    entries = [(f"01_02_0003_{i:08}".encode(), JPEG + bytes([i])) for i in (5, 3, 4)]
    database(tmp_path / "lup", [*entries, *METADATA])
    files(tmp_path / "lup", "keys.pkl")
    assert keys(tmp_path / "lup") == [f"01_02_0003_{i:08}" for i in (3, 4, 5)]
    assert contents(tmp_path / "lup")["01_02_0003_00000005"] == JPEG + b"\x05"


@pytest.mark.parametrize("name", ["lup.lmdb", "lup.mdb"])
def test_an_lmdb_in_a_single_file_is_read_too(tmp_path, name):
    database(tmp_path / name, [(b"00001_a.jpg", JPEG)], subdir=False)
    assert contents(tmp_path / name) == {"00001_a.jpg": JPEG}


def test_an_lmdb_is_opened_without_writing_to_its_directory(tmp_path):
    database(tmp_path / "lup", [(b"k", JPEG)])
    (tmp_path / "lup" / "lock.mdb").unlink()
    contents(tmp_path / "lup")
    assert os.listdir(tmp_path / "lup") == ["data.mdb"]


def test_a_key_that_is_not_text_is_written_as_text_and_found_by_it(tmp_path):
    database(tmp_path / "lup", [(b"\xff\xfe", JPEG)])
    assert contents(tmp_path / "lup") == {r"\xff\xfe": JPEG}


def test_an_lmdb_that_is_cut_off_empty_or_none_at_all_is_refused(tmp_path):
    database(tmp_path / "cut", [(f"{i}".encode(), JPEG * 1000) for i in range(50)])
    os.truncate(tmp_path / "cut" / "data.mdb", 100_000)
    assert "must have at least" in refused(keys, tmp_path / "cut")
    assert "holds none next to 1 LMDB entries __keys__" in refused(keys, database(tmp_path / "empty", METADATA))
    (tmp_path / "text.lmdb").write_text("hello" * 10_000)
    assert "text.lmdb cannot be opened as one" in refused(keys, tmp_path / "text.lmdb")


# --- tars ---


def test_one_tar_and_a_directory_of_tars_are_read_by_offset(tmp_path):
    tar(tmp_path / "wds" / "000.tar", "b.jpg", "b.json", "b.cls", "./sub/a.JPEG")
    tar(tmp_path / "wds" / "001.tar", "a.jpg", "x" * 150 + ".jpg")
    assert contents(tmp_path / "wds" / "000.tar") == {"000/b.jpg": JPEG + b"b.jpg", "000/sub/a.JPEG": JPEG + b"./sub/a.JPEG"}
    assert keys(tmp_path / "wds") == ["000/b.jpg", "000/sub/a.JPEG", "001/a.jpg", f"001/{'x' * 150}.jpg"]
    assert contents(tmp_path / "wds")["001/a.jpg"] == JPEG + b"a.jpg"


def test_of_members_with_one_name_the_last_counts(tmp_path):
    tar(tmp_path / "a.tar", "a.jpg", "b.jpg")
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"newer"))
    assert contents(tmp_path / "a.tar") == {"a/a.jpg": b"newer", "a/b.jpg": JPEG + b"b.jpg"}


def test_a_folder_that_holds_images_and_tars_gives_all_of_them(tmp_path):
    tar(files(tmp_path / "mixed", "deep/a.jpg") / "b.tar", "b.jpg")
    tar(tmp_path / "mixed" / "deep" / "c.tar", "c.jpg")
    assert keys(tmp_path / "mixed") == ["b/b.jpg", "deep/a.jpg", "deep/c/c.jpg"]
    assert contents(tmp_path / "mixed")["deep/c/c.jpg"] == JPEG + b"c.jpg"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_tar_is_refused_whatever_its_name(tmp_path, name):
    whole = tar(tmp_path / "plain.tar", "a.jpg").read_bytes()
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / name).write_bytes(gzip.compress(whole))
    for path in (tmp_path / "wds" / name, tmp_path / "wds"):
        assert f"Decompress {tmp_path}/wds/{name} first" in refused(keys, path)


def test_a_tar_that_is_cut_off_or_none_or_holds_no_image_is_refused(tmp_path):
    whole = tar(tmp_path / "plain.tar", "a.jpg", content=JPEG * 1000).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2000])
    (tmp_path / "text.tar").write_text("hello" * 1000)
    for name in ("cut.tar", "text.tar"):
        assert f"a whole tar is required. {tmp_path}/{name} is not one" in refused(keys, tmp_path / name)
    assert "holds none" in refused(keys, tar(tmp_path / "none.tar", "a.gif"))


def test_a_tar_written_by_webdataset_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed; it is no dependency")
    with webdataset.TarWriter(str(tmp_path / "000.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:04}", "jpg": JPEG + bytes([i]), "cls": i})
    assert contents(tmp_path / "000.tar") == {f"000/{i:04}.jpg": JPEG + bytes([i]) for i in range(3)}


# --- lists ---


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return files(tmp_path / "source", "a/1.jpg", "a/2.jpg", "b/2.jpg", "b/3.JPEG", "b/4.jpg")


def text_list(folder: Path, *names: str) -> Path:
    (folder / "list.txt").write_text("".join(f"{name}\r\n" for name in names))
    return folder / "list.txt"


def test_a_list_takes_keys_last_parts_and_names_without_suffix_each_once_in_the_order_of_the_source(source, tmp_path):
    named = text_list(tmp_path, "b/3", "1.jpg", "", "b/2.jpg", "1", "4")
    assert keys(source, Selection(list_file=named)) == ["a/1.jpg", "b/2.jpg", "b/3.JPEG", "b/4.jpg"]


def test_a_list_of_file_names_selects_from_an_lmdb_whose_keys_have_no_suffix(tmp_path):
    database(tmp_path / "lup", [(f"01_02_0003_{i:08}".encode(), JPEG) for i in range(3)])
    named = text_list(tmp_path, "01_02_0003_00000002.jpg")
    assert keys(tmp_path / "lup", Selection(list_file=named)) == ["01_02_0003_00000002"]


def test_unknown_and_ambiguous_names_are_counted_and_the_first_is_given(source, tmp_path):
    message = refused(keys, source, Selection(list_file=text_list(tmp_path, "1.jpg", "c/1.jpg", "9.jpg")))
    assert "2 of 3 mean no image of the source, the first is 'c/1.jpg'" in message
    message = refused(keys, source, Selection(list_file=text_list(tmp_path, "2.jpg", "1.jpg")))
    assert "1 of 2 mean several images of the source, the first is '2.jpg'" in message


def test_the_first_share_is_that_of_the_list_not_of_the_source(source, tmp_path):
    named = text_list(tmp_path, "4.jpg", "3.JPEG", "1.jpg", "unknown")
    assert keys(source, Selection(list_file=named, first=0.5)) == ["b/3.JPEG", "b/4.jpg"]
    assert "--first 0.5 is a share of a list" in refused(keys, source, Selection(first=0.5))
    assert "--first must be above 0 and at most 1, got 1.5" in refused(keys, source, Selection(list_file=named, first=1.5))


def test_a_list_that_is_missing_or_empty_is_refused(tmp_path):
    assert "cannot be read: No such file" in refused(read_list, tmp_path / "none.txt")
    assert "is empty" in refused(read_list, text_list(tmp_path, "", " "))


@pytest.mark.parametrize("content", [["b.jpg", "a.jpg"], {"keys": ["b.jpg", "a.jpg"], "vids": [1, 2]}])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickled_list_is_read_only_when_it_is_trusted(tmp_path, content, protocol):
    path = tmp_path / "CFS_list.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert "add --trust-pickle-list to read it" in refused(read_list, path)
    assert read_list(path, trust_pickle=True) == ["b.jpg", "a.jpg"]


class Malicious:
    """A pickle of it would create a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path):
    path = tmp_path / "list.txt"  # the name does not decide
    path.write_bytes(pickle.dumps(["a.jpg", Malicious(tmp_path / "ran")]))
    pickle.loads(path.read_bytes())
    (tmp_path / "ran").unlink()  # it works
    assert "is a pickle" in refused(read_list, path)
    assert "is not one: it asks for pathlib" in refused(read_list, path, trust_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [pickle.dumps([1, 2]), pickle.dumps({"names": []}), b"\x80\x04", b"hello"])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "list.pkl").write_bytes(content)
    message = refused(read_list, tmp_path / "list.pkl", trust_pickle=True)
    assert "a pickle" in message
    assert "list.pkl" in message


# --- random shares ---

MANY = [ImageEntry(f"{i:05}.jpg", i) for i in range(1001)]


def share(fraction: float, seed: int = 0, images: list[ImageEntry] = MANY) -> list[ImageEntry]:
    return Selection(fraction=fraction, seed=seed).of(images)


def test_a_share_has_the_exact_count_and_keeps_the_order():
    for fraction in (0.001, 0.25, 0.5, 0.75, 1.0):
        assert len(share(fraction)) == round(fraction * 1001)
    assert share(0.25) == sorted(share(0.25))


def test_a_smaller_share_is_contained_in_a_larger_one_of_the_same_seed_only():
    quarter, half, most = (set(share(fraction)) for fraction in (0.25, 0.5, 0.75))
    assert quarter < half < most
    assert not quarter < set(share(0.5, seed=1))
    assert 0.2 < len(quarter & set(share(0.25, seed=1))) / len(quarter) < 0.3


def test_a_share_depends_on_names_not_on_their_order_or_sizes():
    turned = [ImageEntry(image.key, 7) for image in reversed(MANY)]
    assert {image.key for image in share(0.5, images=turned)} == {image.key for image in share(0.5)}


def test_a_share_that_is_empty_or_no_share_is_refused():
    assert "--fraction must be above 0 and at most 1, got 0" in refused(share, 0)
    assert "the shares asked for leave none" in refused(share, 0.0001)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_tar_that_is_damaged_after_its_first_member_is_refused_and_not_half_read(tmp_path, damage):
    path = tmp_path / "crops.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(20):
            member = tarfile.TarInfo(f"{i:02}.jpg")
            member.size = 600
            archive.addfile(member, io.BytesIO(bytes([i]) * 600))
    assert len(open_source(path).images()) == 20
    content, header = bytearray(path.read_bytes()), 12 * (512 + 1024)
    content[header + 3] ^= 1
    path.write_bytes(content if damage == "flip" else content[: header + 100])
    with pytest.raises(UserError, match=rf"a whole tar is required. .*crops\.tar is not one: what follows byte {header:,} is"):
        open_source(path).images()


def test_folders_that_are_linked_to_each_other_are_walked_once_from_each_side(tmp_path):
    for here, there in (("a", "b"), ("b", "a")):
        (tmp_path / here).mkdir()
        (tmp_path / here / f"{here}.jpg").touch()
        (tmp_path / here / "l").symlink_to(f"../{there}")
    keys = [image.key for image in open_source(tmp_path).images()]
    assert keys == ["a/a.jpg", "a/l/b.jpg", "b/b.jpg", "b/l/a.jpg"]


def test_a_folder_that_cannot_be_listed_stops_the_import(tmp_path, monkeypatch):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.jpg").touch()
    (tmp_path / "lost").mkdir()
    scandir = os.scandir

    def failing(path):
        if os.fsdecode(path).endswith("/lost"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(UserError, match=r"all folders below .* must be readable. .*/lost is not: Input/output error"):
        open_source(tmp_path).images()

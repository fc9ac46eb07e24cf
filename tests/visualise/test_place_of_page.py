"""The folder of a page: whole or not at all, and only what an earlier call wrote is replaced."""

from pathlib import Path

import pytest

from personmae.errors import UserError
from personmae.visualise import place


def write(out: Path, text: str) -> None:
    with place.new_folder(out) as folder:
        (folder / place.PAGE).write_text(text)
        (folder / "a.png").write_bytes(b"x")
        place.write_record(folder, seed=0)


def fail_halfway(out: Path, failure: type[BaseException]) -> None:
    with place.new_folder(out) as folder:
        (folder / place.PAGE).write_text("half")
        raise failure


def test_a_page_takes_the_place_of_an_earlier_one(tmp_path):
    write(tmp_path / "out", "first")
    write(tmp_path / "out", "second")
    assert (tmp_path / "out" / place.PAGE).read_text() == "second"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "index.html", "visualise.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "first")
    assert (tmp_path / "out" / place.PAGE).is_file()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    write(tmp_path / "out", "first")
    with pytest.raises(failure):
        fail_halfway(tmp_path / "out", failure)
    assert (tmp_path / "out" / place.PAGE).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(failure):
        fail_halfway(tmp_path / "new", failure)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_somebody_else_wrote_is_never_replaced(tmp_path):
    out = tmp_path / "out"
    write(out, "first")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt beside it"):
        write(out, "second")
    assert (out / place.PAGE).read_text() == "first"
    other = tmp_path / "other"
    other.mkdir()
    (other / place.PAGE).write_text("a page of somebody")
    with pytest.raises(UserError, match=r"holds index.html: choose another"):
        write(other, "second")
    assert (other / place.PAGE).read_text() == "a page of somebody"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    write(out, "first")
    with pytest.raises(UserError, match=r"holds late\.txt"), place.new_folder(out):
        (out / "late.txt").write_text("mine")
    assert (out / "late.txt").read_text() == "mine"
    assert (out / place.PAGE).read_text() == "first"


def test_a_file_or_a_link_is_no_place(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is no folder"):
            place.require_ours(tmp_path / name)


def test_one_call_at_a_time(tmp_path):
    with place.new_folder(tmp_path / "out") as folder:
        with pytest.raises(UserError, match="one process at a time"):
            write(tmp_path / "out", "second")
        (folder / place.PAGE).write_text("first")
        place.write_record(folder)
    assert (tmp_path / "out" / place.PAGE).read_text() == "first"

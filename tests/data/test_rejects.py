"""An import that leaves images out: what is told, and when it is too much."""

import json
import shutil
from pathlib import Path

import pytest

from personmae.__main__ import main
from personmae.data import importer, rejects
from personmae.errors import TooManyRejects, UserError

SHARD_BYTES = 20_000


@pytest.fixture
def source(images: Path, tmp_path: Path) -> Path:
    """50 images, two that end early and one that is a text: 5.7 % cannot be used."""
    folder = Path(shutil.copytree(images, tmp_path / "source"))
    whole = (folder / "p01.jpg").read_bytes()
    (folder / "cut1.jpg").write_bytes(whole[:-20])
    (folder / "cut2.jpg").write_bytes(whole[:-40])
    (folder / "text.jpg").write_text("hello")
    return folder


def tree(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_too_many_rejects_end_with_code_1_and_a_summary_by_kind(source, tmp_path, capsys):
    code = main(["shards", "write", str(source), str(tmp_path / "out"), "--processes", "1"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert line.startswith("error: at most 0.05 of the images may be left out (--max-rejects). 3 of 53 are (5.7%): ")
    assert "2 ends too early (first: cut1.jpg: it ends early: Premature end of JPEG file); 1 no image that can be" in line
    assert f"All are listed in {tmp_path}/out.partial/rejects.jsonl" in line
    assert "Take the rest with --max-rejects 0.06, which ends at once" in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "index.json").exists()
    assert [reject["key"] for reject in rejects.read(f"{tmp_path}/out.partial")] == ["cut1.jpg", "cut2.jpg", "text.jpg"]


def test_a_larger_share_ends_what_is_there_at_once_with_the_bytes_of_an_undisturbed_import(source, tmp_path, monkeypatch):
    importer.write(source, str(tmp_path / "undisturbed"), shard_bytes=SHARD_BYTES)
    with pytest.raises(TooManyRejects):
        importer.write(source, str(tmp_path / "out"), max_rejects=0.05, shard_bytes=SHARD_BYTES)
    monkeypatch.setattr(importer, "write_shard", None)  # nothing is read or written again
    assert importer.write(source, str(tmp_path / "out"), max_rejects=0.06, shard_bytes=SHARD_BYTES) == 50
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_within_the_share_the_last_line_has_the_summary_too(source, tmp_path, capsys):
    options = ["--processes", "1", "--max-rejects", "0.06"]
    assert main(["shards", "write", str(source), str(tmp_path / "out"), *options]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    expected = f"written to {tmp_path}/out. 3 left out, listed in {tmp_path}/out/rejects.jsonl: 2 ends too early (first: cut1"
    assert expected in line
    found = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["kind"] for reject in found] == ["ends too early", "ends too early", "no image that can be decoded"]


def test_the_share_is_of_all_images_that_were_wanted_and_may_be_reached():
    left_out = [{"key": "a", "reason": "it is empty", "kind": "empty"}]
    rejects.check(left_out, 20, 0.05, "out")
    with pytest.raises(TooManyRejects, match=r"1 of 19 are \(5\.3%\): 1 empty \(first: a: it is empty\)"):
        rejects.check(left_out, 19, 0.05, "out")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_named(source, tmp_path, share):
    with pytest.raises(UserError, match="--max-rejects must be a share from 0 to 1, got"):
        importer.write(source, str(tmp_path / "out"), max_rejects=share)
    assert not list(tmp_path.glob("out*"))


def test_records_that_were_written_before_kinds_existed_are_summed_up():
    assert rejects.summary([{"key": "a", "reason": "r"}]) == "1 cannot be decoded (first: a: r)"
    assert rejects.summary([]) == ""

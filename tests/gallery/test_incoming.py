"""Images on their way into a gallery: what is seen before anything is computed, what is left out, and what is skipped."""

import json
import shutil
from pathlib import Path

import galleries
import pytest
from galleries import ids_of
from made_encoders import write_finetuning

from personmae.__main__ import main
from personmae.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER_ERROR, UserError
from personmae.gallery import edit, store
from personmae.gallery.catalog import open_gallery

SIZE = 64, 32  # of the images that the model sees, in pixels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finetuning(tmp_path_factory.mktemp("incoming") / "run", SIZE)


@pytest.fixture(autouse=True)
def _signals(restore_signals: None) -> None:
    """Programs that run in this process take signals."""


def fill(folder: Path, images: Path, good: list[str], bad: list[str]) -> Path:
    """A folder with images of these names, and files of others that are none."""
    folder.mkdir(exist_ok=True)
    for name, path in zip(good, sorted(images.glob("*.jpg")), strict=False):
        shutil.copy(path, folder / name)
    for name in bad:
        (folder / name).write_bytes(b"no image")
    return folder


def rejected(listed: Path) -> list[str]:
    return [json.loads(line)["key"] for line in listed.read_text().splitlines()]


def cameras(where: Path) -> dict[str, str]:
    rows = open_gallery(where).rows
    return dict(zip(rows["id"].to_pylist(), rows["camera"].to_pylist(), strict=True))


# --- images that cannot be read ---


def test_a_build_with_many_bad_images_takes_the_advised_share_and_computes_nothing_again(run, images, tmp_path, capsys):
    source, where = fill(tmp_path / "bad", images, ["a.jpg"], ["b.jpg", "c.jpg", "d.jpg", "e.jpg"]), tmp_path / "g"
    command = ["gallery", "build", str(source), str(where), "--model", str(run)]
    assert main(command) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "4 of 5 are (80.0%): 4 no image that can be decoded (first: b.jpg: it begins with" in error
    assert f"All are listed in {where}.rejects.jsonl. Take the rest with --max-rejects 0.8, which computes nothing" in error
    assert rejected(tmp_path / "g.rejects.jsonl") == ["b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert main(command) == EXIT_FAILED  # again, though the features are there
    seen: list[int] = []
    inputs = edit.Inputs(str(source), model=str(run), max_rejects=0.8)
    assert edit.build(inputs, where, progress=lambda done, total: seen.append(total)).num_images == 1
    assert seen == []
    assert ids_of(open_gallery(where)) == ["a.jpg"]
    assert rejected(tmp_path / "g.rejects.jsonl") == ["b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "g", "g.rejects.jsonl"]


def test_an_addition_with_many_bad_images_keeps_their_list_and_takes_the_advised_share(run, images, tmp_path, capsys):
    where = tmp_path / "my gallery"
    edit.build(edit.Inputs(str(fill(tmp_path / "good", images, ["a.jpg"], [])), model=str(run)), where)
    command = ["gallery", "add", str(where), str(fill(tmp_path / "bad", images, ["x.jpg"], ["y.jpg"]))]
    assert main(command) == EXIT_FAILED
    listed = tmp_path / "my gallery.rejects.jsonl"
    assert f"All are listed in {listed}. Take the rest with --max-rejects 0.5, or fix them" in capsys.readouterr().err
    assert rejected(listed) == ["y.jpg"]
    assert ids_of(open_gallery(where)) == ["a.jpg"]
    assert main([*command, "--max-rejects", "0.5"]) == EXIT_COMPLETE
    assert ids_of(open_gallery(where)) == ["a.jpg", "x.jpg"]
    assert main([*command, "--max-rejects", "50"]) == EXIT_USER_ERROR
    assert "--max-rejects must be a share from 0 to 1" in capsys.readouterr().err


def test_an_image_that_is_mended_is_read_again(run, images, tmp_path):
    source, where = fill(tmp_path / "bad", images, ["a.jpg"], ["b.jpg"]), tmp_path / "g"
    command = ["gallery", "build", str(source), str(where), "--model", str(run)]
    assert main(command) == EXIT_FAILED
    shutil.copy(source / "a.jpg", source / "b.jpg")
    assert main(command) == EXIT_COMPLETE
    assert ids_of(open_gallery(where)) == ["a.jpg", "b.jpg"]


def test_an_image_with_a_line_break_in_its_name_is_left_out_by_name(run, images, tmp_path, capsys):
    source, where = fill(tmp_path / "odd", images, ["a.jpg", "b\nc.jpg"], []), tmp_path / "g"
    command = ["gallery", "build", str(source), str(where), "--model", str(run), "--max-rejects", "0.5"]
    assert main(command) == EXIT_COMPLETE
    assert r"(first: b\nc.jpg: a line break is in its name: rename it)" in capsys.readouterr().err
    assert ids_of(open_gallery(where)) == ["a.jpg"]
    assert rejected(tmp_path / "g.rejects.jsonl") == ["b\nc.jpg"]


# --- what is seen before a model is read ---


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,where\na.jpg,1\n", "needs the columns id and camera"),
        ("id,time\na.jpg,soon\n", "must be a number or a date"),
        ("id,time\nz.jpg,1\n", "names none of them"),
        ("id,time\na.jpg,2026-05-31\n", "times must be written as numbers, as in the gallery"),
    ],
)
def test_a_wrong_table_is_refused_before_a_model_is_read(images, tmp_path, table, message):
    source = fill(tmp_path / "some", images, ["a.jpg"], [])
    (tmp_path / "numbers.csv").write_text("id,time\nold.jpg,7\n")
    where = tmp_path / "g"
    edit.build(edit.Inputs(str(galleries.write(tmp_path / "f.npy", ["old.jpg"])), table=tmp_path / "numbers.csv"), where)
    (tmp_path / "t.csv").write_text(table)
    inputs = edit.Inputs(str(source), model=str(tmp_path / "no_model"), table=tmp_path / "t.csv")
    with pytest.raises(UserError, match=message):
        edit.add(where, inputs)
    if "gallery" not in message:
        with pytest.raises(UserError, match=message):
            edit.build(inputs, tmp_path / "new")
        assert not (tmp_path / "new.partial").exists()


def test_a_list_that_names_an_image_twice_is_refused_before_a_model_is_read(images, tmp_path):
    fill(tmp_path / "some", images, ["a.jpg", "b.jpg"], [])
    (tmp_path / "some.txt").write_text("some/a.jpg\nsome/b.jpg\nsome/a.jpg\n")
    inputs = edit.Inputs(str(tmp_path / "some.txt"), model=str(tmp_path / "no_model"))
    with pytest.raises(UserError, match=r"some.txt has some/a.jpg more than once: leave out all but one"):
        edit.build(inputs, tmp_path / "g")


def test_another_model_than_the_gallery_s_is_refused_before_an_image_is_read(run, images, tmp_path):
    where, other = tmp_path / "g", write_finetuning(tmp_path / "other", SIZE, seed=1)
    edit.build(edit.Inputs(str(fill(tmp_path / "some", images, ["a.jpg"], [])), model=str(run)), where)
    seen: list[int] = []
    inputs = edit.Inputs(str(fill(tmp_path / "more", images, ["b.jpg"], [])), model=str(other))
    with pytest.raises(UserError, match="the model that the gallery was built with is required"):
        edit.add(where, inputs, progress=lambda done, total: seen.append(total))
    assert seen == []


# --- a table beside names ---


def test_a_table_of_a_few_images_leaves_the_cameras_of_the_others(run, images, tmp_path, capsys):
    names = [f"{number}_c{number % 3 + 1}s1.jpg" for number in range(6)]
    source, where = fill(tmp_path / "some", images, names, []), tmp_path / "g"
    (tmp_path / "t.csv").write_text(f"id,camera,time\n{names[4]},door,7\nnosuch.jpg,9,9\n")
    command = ["gallery", "build", str(source), str(where), "--model", str(run), "--table", str(tmp_path / "t.csv")]
    assert main(command) == EXIT_COMPLETE
    assert "t.csv names 1 of 6 images, and 1 row names no image, such as nosuch.jpg" in capsys.readouterr().err
    assert list(cameras(where).values()) == ["1", "2", "3", "1", "door", "3"]


# --- what a gallery has already ---


def test_a_folder_that_has_grown_adds_what_is_new_and_computes_nothing_else(run, images, tmp_path, capsys):
    names = [f"{number}.jpg" for number in range(9)]
    source, where = fill(tmp_path / "some", images, names[:6], []), tmp_path / "g"
    edit.build(edit.Inputs(str(source), model=str(run)), where)
    edit.remove(where, names[:2])
    fill(source, images, names, [])
    with pytest.raises(UserError, match=r"4 of 9 are, such as 2.jpg: leave them out by --skip-existing"):
        edit.add(where, edit.Inputs(str(source)))
    seen: list[int] = []
    inputs = edit.Inputs(str(source))
    outcome = edit.add(where, inputs, skip_existing=True, progress=lambda done, total: seen.append(total))
    assert (outcome.num_changed, outcome.skipped, outcome.passed_over, outcome.num_images) == (3, 4, 2, 7)
    assert set(seen) == {3}
    assert ids_of(open_gallery(where)) == names[2:]
    assert all(open_gallery(where).thumbnail(row) for row in range(7))
    assert json.loads((where / store.AUDIT).read_text().splitlines()[-1])["passed_over"] == 2
    assert main(["gallery", "add", str(where), str(source), "--skip-existing"]) == EXIT_COMPLETE
    out, err = capsys.readouterr()
    assert "7 of 9 images skipped: the gallery has them already" in err
    assert "0 images added, 7 that are there already are skipped, 2 that were removed earlier are passed over" in out
    assert main(["gallery", "add", str(where), str(source), "--skip-existing", "--again"]) == EXIT_COMPLETE
    assert ids_of(open_gallery(where)) == [*names[2:], *names[:2]]


def test_a_folder_that_grows_is_not_refused_for_an_image_that_stays_broken(run, images, tmp_path, capsys):
    names = [f"{number}.jpg" for number in range(20)]
    source, where = fill(tmp_path / "some", images, names, ["bad.jpg"]), tmp_path / "g"
    command = ["--model", str(run), str(source)]
    assert main(["gallery", "build", *command, str(where)]) == EXIT_COMPLETE
    for new, added in ([], 0), (["new.jpg"], 1):
        (tmp_path / "g.rejects.jsonl").unlink()
        fill(source, images, new, [])
        capsys.readouterr()
        assert main(["gallery", "add", str(where), str(source), "--skip-existing"]) == EXIT_COMPLETE
        out, err = capsys.readouterr()
        assert "1 image left out, listed in" in err
        assert out.startswith(f"{added} image")
        assert "20 that are there already are skipped" in out
        assert rejected(tmp_path / "g.rejects.jsonl") == ["bad.jpg"]
    assert ids_of(open_gallery(where)) == [*sorted(names), "new.jpg"]


def test_a_folder_without_a_single_good_image_is_refused_with_their_list(run, images, tmp_path, capsys):
    source, where = fill(tmp_path / "bad", images, [], ["a.jpg", "b.jpg"]), tmp_path / "g"
    command = ["gallery", "build", str(source), str(where), "--model", str(run), "--max-rejects", "1"]
    assert main(command) == EXIT_USER_ERROR
    assert f"All 2 of {source} were left out, listed in {where}.rejects.jsonl: 2 no image" in capsys.readouterr().err
    assert rejected(tmp_path / "g.rejects.jsonl") == ["a.jpg", "b.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "g.rejects.jsonl"]


def test_features_that_are_there_already_are_skipped_too(tmp_path):
    ids = galleries.named(20)
    where = galleries.build(tmp_path, ids[:15])
    outcome = edit.add(where, galleries.inputs(tmp_path, ids), skip_existing=True)
    assert (outcome.num_changed, outcome.skipped) == (5, 15)
    galleries.require_whole(where, ids)
    outcome = edit.add(where, galleries.inputs(tmp_path, ids), skip_existing=True)
    assert (outcome.num_changed, outcome.skipped, outcome.num_images) == (0, 20, 20)

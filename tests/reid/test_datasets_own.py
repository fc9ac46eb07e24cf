"""Data sets of the user's own: folders of identities, and tables."""

from pathlib import Path

import numpy as np
import pytest

from personmae.errors import UserError
from personmae.reid.datasets import (
    Benchmark,
    describe,
    digest,
    earlier_digest,
    load_benchmark,
    record,
    renewed_digest,
    resume_key,
    train_labels,
)

FOLDERS = {
    "train": ["anna/a_c1.jpg", "anna/b_c2.png", "10/x_c1.JPEG", "9/z_c3.jpg"],
    "query": ["carl/1_c1.jpg", "bert/1_c2.jpg"],
    "gallery": ["bert/2_c1.jpg", "carl/2_c2.jpg", "dora/1_c1.jpg"],
}
TABLES = {
    "train": "path,pid,camid\nimages/1.jpg,anna,1\nimages/2.jpg,anna,2\nimages/3.jpg,bert,1\n",
    "query": "path,pid,camid\nimages/4.jpg,carl,1\n",
    "gallery": "path,pid,camid\nimages/5.jpg,carl,2\nimages/6.jpg,dora,1\n",
}


def build_folders(root: Path, tree: dict[str, list[str]] = FOLDERS) -> Path:
    for split, names in tree.items():
        (root / split).mkdir(parents=True)
        for name in names:
            (root / split / name).parent.mkdir(exist_ok=True)
            (root / split / name).touch()
    return root


def build_tables(root: Path, tables: dict[str, str] = TABLES) -> Path:
    (root / "images").mkdir(parents=True)
    for i in range(1, 8):
        (root / "images" / f"{i}.jpg").touch()
    for split, text in tables.items():
        (root / f"{split}.csv").write_text(text)
    return root


def without_cameras(tables: dict[str, str]) -> dict[str, str]:
    return {split: "\n".join(line.rpartition(",")[0] for line in text.splitlines()) for split, text in tables.items()}


def searched(name: str, root: Path) -> Benchmark:
    """As an evaluation reads it: without training images."""
    return load_benchmark(name, root, splits=("query", "gallery"))


def refused(name: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_benchmark(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ---


def test_identity_folders_become_pids_in_the_order_of_their_names_in_all_splits_alike(tmp_path):
    benchmark = load_benchmark("folder", build_folders(tmp_path))
    # 10 < 9 < anna < bert < carl < dora
    assert [(s.pid, s.camid) for s in benchmark.train] == [(0, 1), (1, 3), (2, 1), (2, 2)]
    assert [(s.pid, s.camid) for s in benchmark.query] == [(3, 2), (4, 1)]
    assert [(s.pid, s.camid) for s in benchmark.gallery] == [(3, 1), (4, 2), (5, 1)]
    assert np.unique(train_labels(benchmark.train)).tolist() == [0, 1, 2]
    assert all(Path(s.path).is_file() for s in benchmark.train + benchmark.query + benchmark.gallery)


def test_what_lies_beside_the_splits_is_counted(tmp_path):
    build_folders(tmp_path, FOLDERS | {"val": ["bert/1_c1.jpg"]})
    (tmp_path / "stray.png").touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "query" / ".DS_Store").touch()
    note = describe(load_benchmark("folder", tmp_path)).note
    assert note.endswith("; passed over: 2 folders or images beside train, query, gallery, 1 hidden files")


def test_a_name_without_a_camera_makes_all_cameras_unknown_and_is_told(tmp_path):
    build_folders(tmp_path, FOLDERS | {"query": ["carl/1_c1.jpg", "bert/1.jpg"]})
    benchmark = load_benchmark("folder", tmp_path)
    assert {s.camid for s in benchmark.train + benchmark.query + benchmark.gallery} == {-1}
    description = describe(benchmark)
    assert not description.published
    assert "folder: a data set of your own" in description.note
    assert f"no camera is known, as {tmp_path}/query/bert/1.jpg has no _cN in its name" in description.note
    assert [line.split()[-1] for line in description.table.splitlines()[1:4]] == ["unknown"] * 3
    assert "no match" not in description.table  # with unknown cameras nothing is removed


def test_identities_with_one_image_and_queries_without_a_match_are_told_of_own_data_too(tmp_path):
    build_folders(tmp_path, FOLDERS | {"query": ["carl/1_c1.jpg", "emil/1_c2.jpg", "dora/9_c1.jpg"]})
    table = describe(load_benchmark("folder", tmp_path)).table
    assert "train: 2 ids have one image" in table
    assert "query: 2 images have no match" in table  # emil is nowhere else, dora in the query's camera alone


def test_litter_is_ignored_and_other_files_are_named(tmp_path):
    build_folders(tmp_path)
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "train" / "anna" / "Thumbs.db").touch()
    assert len(load_benchmark("folder", tmp_path).train) == 4
    (tmp_path / "train" / "anna" / "notes.txt").touch()
    assert "notes.txt is not one of .jpg" in refused("folder", tmp_path)


def test_images_outside_identity_folders_and_folders_inside_them_are_named(tmp_path):
    build_folders(tmp_path / "one")
    (tmp_path / "one" / "train" / "stray.jpg").touch()
    assert "train/stray.jpg is not the folder of an identity" in refused("folder", tmp_path / "one")
    build_folders(tmp_path / "two")
    (tmp_path / "two" / "train" / "anna" / "more").mkdir()
    assert "anna/more is not one of .jpg" in refused("folder", tmp_path / "two")


@pytest.mark.parametrize("split", FOLDERS)
def test_a_missing_or_empty_split_is_named(tmp_path, split):
    build_folders(tmp_path / "one", {name: files for name, files in FOLDERS.items() if name != split})
    assert f"one/{split} is missing. Expected {tmp_path}/one/{split}/IDENTITY/*.jpg" in refused("folder", tmp_path / "one")
    build_folders(tmp_path / "two", FOLDERS | {split: []})
    assert f"two/{split} is empty" in refused("folder", tmp_path / "two")


def test_queries_whose_identities_are_not_in_the_gallery_cannot_be_evaluated(tmp_path):
    build_folders(tmp_path, FOLDERS | {"gallery": ["emil/1.jpg"]})
    assert "has a gallery image of the same pid, so nothing can be evaluated" in refused("folder", tmp_path)


def test_a_training_image_without_a_camera_leaves_those_of_query_and_gallery_known(tmp_path):
    root = build_folders(tmp_path, FOLDERS | {"train": [*FOLDERS["train"], "anna/c.jpg"]})
    benchmark = load_benchmark("folder", root)
    assert {s.camid for s in benchmark.train} == {-1}
    assert [s.camid for s in benchmark.query + benchmark.gallery] == [2, 1, 1, 2, 1]
    assert describe(benchmark).note.endswith(f"no camera of train is known, as {root}/train/anna/c.jpg has no _cN in its name")
    assert digest(benchmark) == digest(searched("folder", root))


# --- tables ---


def test_tables_give_paths_below_the_root_or_absolute_identities_and_cameras(tmp_path):
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.touch()
    tables = TABLES | {"train": TABLES["train"] + f"{elsewhere},Zoë,7\n"}
    benchmark = load_benchmark("csv", build_tables(tmp_path / "own", tables))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(1, 1), (1, 2), (2, 1), (0, 7)]  # Z before a
    assert [(s.pid, s.camid) for s in benchmark.query + benchmark.gallery] == [(3, 1), (3, 2), (4, 1)]
    assert benchmark.train[0].path == str(tmp_path / "own" / "images" / "1.jpg")
    assert benchmark.train[-1].path == str(elsewhere)


def test_tables_of_a_spreadsheet_are_read_as_well(tmp_path):
    build_tables(tmp_path)
    text = 'path,comment,pid\r\n"images/4.jpg","hat, red",carl\r\n\r\n'
    (tmp_path / "query.csv").write_text(text, encoding="utf-8-sig", newline="")
    (tmp_path / "gallery.csv").write_text(without_cameras(TABLES)["gallery"])
    benchmark = load_benchmark("csv", tmp_path)
    assert [(s.pid, s.camid) for s in benchmark.query] == [(2, -1)]
    assert "no camera is known, as query.csv has no column camid" in describe(benchmark).note


@pytest.mark.parametrize("split", TABLES)
def test_a_missing_table_and_a_table_without_rows_are_named(tmp_path, split):
    build_tables(tmp_path)
    (tmp_path / f"{split}.csv").write_text("path,pid,camid\n")
    assert f"{split}.csv has no row" in refused("csv", tmp_path)
    (tmp_path / f"{split}.csv").unlink()
    assert f"{split}.csv is missing. train.csv, query.csv, gallery.csv are required" in refused("csv", tmp_path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("images/7.jpg,,2", "line 4, must fill path, pid and camid"),
        ("images/7.jpg,dora", "line 4, must fill path, pid and camid"),
        ("images/7.jpg,dora,2,9", "no more cells than ['path', 'pid', 'camid']"),
        ("images/7.jpg,dora,", "line 4, must fill path, pid and camid"),
        ("images/7.jpg,dora,left", "must have a whole number from 0 as camid, got 'left'"),
        ("images/7.jpg,dora,-1", "must have a whole number from 0 as camid, got '-1'"),
        ("images/8.jpg,dora,2", "images/8.jpg, which does not exist"),
        ("images/../images/6.jpg,dora,2", "images/6.jpg a second time, after line 3"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, expected):
    build_tables(tmp_path, TABLES | {"gallery": TABLES["gallery"] + row + "\n"})
    line = refused("csv", tmp_path)
    assert "gallery.csv, line 4," in line
    assert expected in line


@pytest.mark.parametrize("text", ["file,person\n1.jpg,a\n", "path;pid\n1.jpg;a\n", ""])
def test_other_columns_are_told(tmp_path, text):
    build_tables(tmp_path, TABLES | {"train": text})
    assert "train.csv needs the columns path and pid in its first line, set apart by commas. It has [" in refused(
        "csv", tmp_path
    )


def test_a_table_that_is_no_text_is_told(tmp_path):
    build_tables(tmp_path)
    (tmp_path / "train.csv").write_bytes(b"path,pid\n\xff\xfe\n")
    assert "train.csv must be a text file in UTF-8" in refused("csv", tmp_path)


def test_cameras_of_queries_alone_are_refused(tmp_path):
    build_tables(tmp_path, TABLES | {"gallery": without_cameras(TABLES)["gallery"]})
    assert "query.csv has a column camid and gallery.csv has none" in refused("csv", tmp_path)


def test_a_query_in_the_gallery_is_refused_where_its_camera_would_not_remove_it(tmp_path):
    both = TABLES | {"gallery": TABLES["gallery"] + "images/4.jpg,carl,1\n"}
    assert len(load_benchmark("csv", build_tables(tmp_path / "known", both)).gallery) == 3
    line = refused("csv", build_tables(tmp_path / "unknown", without_cameras(both)))
    assert "images/4.jpg is in query and in gallery, where it would match itself" in line
    other = TABLES | {"gallery": TABLES["gallery"] + "images/4.jpg,dora,1\n"}
    assert "is in query and in gallery" in refused("csv", build_tables(tmp_path / "other", other))


def test_people_and_images_in_train_and_test_are_told_of_own_data_too(tmp_path):
    root = build_folders(tmp_path / "folders", FOLDERS | {"train": [*FOLDERS["train"], "dora/9_c2.jpg"]})
    (line,) = [line for line in describe(load_benchmark("folder", root)).table.splitlines() if line.startswith("warning: ")]
    assert "1 person is in train and in query or gallery" in line
    assert f"(first: {root}/train/dora/9_c2.jpg and {root}/gallery/dora/1_c1.jpg)" in line
    root = build_tables(tmp_path / "tables", TABLES | {"train": TABLES["train"] + "images/6.jpg,emma,1\n"})
    (line,) = [line for line in describe(load_benchmark("csv", root)).table.splitlines() if line.startswith("warning: ")]
    assert f"1 image is in train and in query or gallery (first: {root}/images/6.jpg)" in line  # as another person


# --- digests ---

MORE_TABLES = TABLES | {"train": TABLES["train"] + "images/7.jpg,cora,3\n"}  # between carl and dora
MORE_FOLDERS = FOLDERS | {"train": [*FOLDERS["train"], "cora/1_c1.jpg"]}


def build_own(name: str, root: Path) -> Path:
    """Own data with people of train between those of the test set, and images of one byte."""
    root = build_folders(root, MORE_FOLDERS) if name == "folder" else build_tables(root, MORE_TABLES)
    for path in root.rglob("*.[jJp]*"):
        path.write_bytes(b"1")
    return root


@pytest.mark.parametrize("name", ["folder", "csv"])
def test_the_digest_of_own_data_is_the_same_with_and_without_training_images(tmp_path, name):
    root = build_own(name, tmp_path)
    whole, alone = load_benchmark(name, root), searched(name, root)
    assert [s.pid for s in whole.query] != [s.pid for s in alone.query]
    assert record(whole)["benchmark_digest"] == record(alone)["benchmark_digest"] == digest(alone)
    assert digest(alone) == earlier_digest(alone)  # what evaluations have recorded so far is still right


def test_the_digest_of_own_data_tells_other_people_apart(tmp_path):
    one = build_own("csv", tmp_path / "one")
    other = build_own("csv", tmp_path / "other")
    assert digest(searched("csv", one)) == digest(searched("csv", other))
    (other / "gallery.csv").write_text(TABLES["gallery"].replace("dora", "carl"))
    assert digest(searched("csv", one)) != digest(searched("csv", other))


def test_what_a_training_is_resumed_by_does_not_depend_on_the_new_digest(tmp_path):
    found = resume_key(load_benchmark("folder", build_own("folder", tmp_path)))
    assert found == {"data.num_images": 5, "data.num_ids": 4, "data.digest": "f801926f9735"}


@pytest.mark.parametrize("name", ["folder", "csv"])
def test_an_earlier_digest_is_renewed_where_the_data_are_as_they_were(tmp_path, name):
    root = build_own(name, tmp_path / "own")
    earlier, now = earlier_digest(load_benchmark(name, root)), digest(searched(name, root))
    assert earlier != now
    assert renewed_digest(earlier, name, root) == renewed_digest(now, name, root) == now
    assert renewed_digest(earlier, "market1501", root) == earlier
    assert renewed_digest(earlier, name, tmp_path / "gone") == earlier
    next(path for path in root.rglob("*6.jpg" if name == "csv" else "dora/*")).write_bytes(b"22")
    assert renewed_digest(earlier, name, root) == earlier

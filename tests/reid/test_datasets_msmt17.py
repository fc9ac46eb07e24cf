"""MSMT17 by its own lists: both versions, told apart, with and without list_val."""

from pathlib import Path
from typing import Any

import pytest

from personmae.errors import UserError
from personmae.reid.datasets import PUBLISHED, WITHOUT_VAL, describe, load_benchmark

V1, V2 = ("train", "test"), ("mask_train_v2", "mask_test_v2")
LISTS = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_002_12_0114noon_1234_1.jpg 1"],
    "val": ["0000/0000_001_03_0303morning_0009_0.jpg 0"],
    "query": ["0000/0000_000_01_0303morning_0015_0.jpg 0"],
    "gallery": ["0000/0000_005_14_0302afternoon_0020_2.jpg 0", "0007/0007_000_15_0303evening_0001_0.jpg 7"],
}


def build(root: Path, folders: tuple[str, str], lists: dict[str, list[str]] = LISTS, newline: str = "\n") -> Path:
    for part, lines in lists.items():
        images = root / folders[part in ("query", "gallery")]
        images.mkdir(parents=True, exist_ok=True)
        for line in lines:
            (images / line.split()[0]).parent.mkdir(exist_ok=True)
            (images / line.split()[0]).touch()
        (root / f"list_{part}.txt").write_bytes("".join(line + newline for line in lines).encode())
    return root


def refused(name: str, root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_benchmark(name, root, **options)
    return str(caught.value)


@pytest.mark.parametrize("newline", ["\n", " \r\n"])
@pytest.mark.parametrize(("name", "folders"), [("msmt17_v1", V1), ("msmt17_v2", V2)])
def test_lists_give_pid_and_the_third_field_of_a_name_the_camera(tmp_path, name, folders, newline):
    benchmark = load_benchmark(name, build(tmp_path, folders, newline=newline))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(0, 1), (1, 12), (0, 3)]
    assert [(s.pid, s.camid) for s in benchmark.query] == [(0, 1)]
    assert [(s.pid, s.camid) for s in benchmark.gallery] == [(0, 14), (7, 15)]
    assert all(Path(s.path).is_file() for s in benchmark.train + benchmark.query + benchmark.gallery)


@pytest.mark.parametrize(("name", "folders"), [("msmt17_v1", V1), ("msmt17_v2", V2)])
def test_either_version_is_taken_as_msmt17_and_named(tmp_path, name, folders):
    build(tmp_path / name.upper(), folders)
    benchmark = load_benchmark("msmt17", tmp_path)
    assert benchmark.name == name
    assert benchmark == load_benchmark(name, tmp_path / name.upper())
    assert describe(benchmark).note.startswith(
        f"{name}: {name.upper()} layout, 2 identities; train has 3 images of 2 ids, published 32,621"
    )


def test_list_val_belongs_to_training_unless_it_is_left_out(tmp_path):
    build(tmp_path, V1)
    benchmark = load_benchmark("msmt17_v1", tmp_path, train_on_val=False)
    assert [(s.pid, s.camid) for s in benchmark.train] == [(0, 1), (1, 12)]
    assert benchmark.published == WITHOUT_VAL
    assert "train has 2 images of 2 ids, published 30,248" in describe(benchmark).note
    assert "list_val is left out of training" in describe(benchmark).note
    (tmp_path / "list_val.txt").unlink()
    assert load_benchmark("msmt17_v1", tmp_path, train_on_val=False).train == benchmark.train


def test_pid_0_is_an_identity_to_train_on_and_to_search_for(tmp_path):
    table = describe(load_benchmark("msmt17_v1", build(tmp_path, V1))).table.splitlines()
    assert [line.split()[:3] for line in table[1:4]] == [["train", "3", "2"], ["query", "1", "1"], ["gallery", "2", "2"]]


def test_v2_where_v1_is_required_is_refused_and_the_other_way_round(tmp_path):
    build(tmp_path / "one", V1)
    build(tmp_path / "two", V2)
    line = refused("msmt17_v1", tmp_path / "two")
    assert f"msmt17_v1 is required, and {tmp_path / 'two'} holds msmt17_v2 (mask_train_v2/)" in line
    assert "Get MSMT17_V1, or set benchmark=msmt17_v2" in line
    assert "holds msmt17_v1 (train/)" in refused("msmt17_v2", tmp_path / "one")


def test_a_folder_called_by_the_other_version_is_refused(tmp_path):
    build(tmp_path / "MSMT17_V1", V2)
    for name in ("msmt17", "msmt17_v2"):
        assert "MSMT17_V1 is called msmt17_v1 and holds msmt17_v2 (mask_train_v2/)" in refused(name, tmp_path)


def test_both_versions_in_one_place_must_be_told_apart(tmp_path):
    build(tmp_path / "MSMT17_V1", V1)
    build(tmp_path / "MSMT17_V2", V2, LISTS | {"train": LISTS["train"][:1]})
    assert "holds both versions of MSMT17. Set benchmark to one of msmt17_v1, msmt17_v2" in refused("msmt17", tmp_path)
    assert len(load_benchmark("msmt17_v1", tmp_path).train) == 3
    assert len(load_benchmark("msmt17_v2", tmp_path).train) == 2


@pytest.mark.parametrize("part", LISTS)
def test_a_missing_list_is_named_with_what_to_get(tmp_path, part):
    build(tmp_path, V1)
    (tmp_path / f"list_{part}.txt").unlink()
    line = refused("msmt17_v1", tmp_path)
    assert (
        f"list_{part}.txt is missing. MSMT17 comes with list_train.txt, list_val.txt, list_query.txt, list_gallery.txt" in line
    )


@pytest.mark.parametrize("folder", V1)
def test_a_missing_folder_of_images_is_named(tmp_path, folder):
    build(tmp_path, V1)
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    assert f"{tmp_path / folder} is missing" in refused("msmt17_v1", tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0000/0000_000_01_0303morning_0008_0.jpg", "Got ' 0000/0000_000_01_0303morning_0008_0.jpg'"),
        ("0000/0000_000_one_0303morning_0008_0.jpg 0", "must look like '0000/0000_000_01_0303morning_0008_0.jpg 0'"),
        ("0000/0000_000_01_0303morning_0008_0.jpg zero", "Got '0000/0000_000_01_0303morning_0008_0.jpg zero'"),
        ("../0000/0000_000_01_0303morning_0008_0.jpg 0", "line 2"),
        (LISTS["query"][0], "names 0000/0000_000_01_0303morning_0015_0.jpg a second time"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, expected):
    build(tmp_path, V1)
    with (tmp_path / "list_query.txt").open("a") as file:
        file.write(line)
    message = refused("msmt17_v1", tmp_path)
    assert "list_query.txt, line 2," in message
    assert expected in message


def test_an_empty_list_is_named(tmp_path):
    build(tmp_path, V1)
    (tmp_path / "list_gallery.txt").write_text("\n")
    assert "list_gallery.txt is empty" in refused("msmt17_v1", tmp_path)


def test_images_that_are_listed_and_absent_are_counted_and_the_first_is_named(tmp_path):
    build(tmp_path, V1)
    for line in LISTS["train"][1:] + LISTS["val"]:
        (tmp_path / "train" / line.split()[0]).unlink()
    line = refused("msmt17_v1", tmp_path)
    assert f"2 of 3 images of list_train.txt and list_val.txt are not in {tmp_path / 'train'}" in line
    assert "(first: 0001/0001_002_12_0114noon_1234_1.jpg)" in line


def test_a_training_list_that_already_holds_val_is_refused_and_may_be_used_without_it(tmp_path):
    build(tmp_path, V1, LISTS | {"train": LISTS["train"] + LISTS["val"]})
    assert "list_val.txt, line 1, names 0000/0000_001_03_0303morning_0009_0.jpg a second time" in refused("msmt17", tmp_path)
    assert len(load_benchmark("msmt17", tmp_path, train_on_val=False).train) == 3


def test_nothing_at_all_says_what_is_expected(tmp_path):
    line = refused("msmt17_v2", tmp_path)
    assert f"msmt17_v2 is expected in {tmp_path} or {tmp_path / 'MSMT17_V2'} as mask_train_v2/, mask_test_v2/ and list_" in line
    assert "as train/, test/ and list_{train,val,query,gallery}.txt, but they are not there" in refused("msmt17", tmp_path)


@pytest.mark.parametrize("train", ["0000_c1_0000.jpg", "0000_002_01_0303morning_0009_0.jpg"])
def test_the_layout_of_market_is_taken_as_msmt17_of_an_unknown_version(tmp_path, train):
    tree = {"bounding_box_train": train, "query": "0000_c14_0030.jpg", "bounding_box_test": "0000_c1_0003.jpg"}
    for folder, name in tree.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    benchmark = load_benchmark("msmt17", tmp_path)
    assert [(s.pid, s.camid) for s in benchmark.train + benchmark.query] == [(0, 1), (0, 14)]
    assert benchmark.published == PUBLISHED["msmt17"]
    assert "does not show whether it is V1 or V2" in describe(benchmark).note
    assert "does not show its version: set benchmark=msmt17" in refused("msmt17_v1", tmp_path)
    assert "needs list_train.txt and list_val.txt" in refused("msmt17", tmp_path, train_on_val=False)


def test_images_on_no_list_and_other_files_are_counted(tmp_path):
    build(tmp_path, V1)
    assert load_benchmark("msmt17", tmp_path).remark == ""
    for name in (
        "train/0000/0000_009_01_0303morning_0008_0.jpg",
        "test/0000/0000_009_01_0303morning_0008_0.jpg",
        "test/0000/a.txt",
    ):
        (tmp_path / name).touch()
    expected = "passed over: 2 images on no list, 1 files of another kind"
    assert load_benchmark("msmt17", tmp_path).remark == expected
    assert load_benchmark("msmt17", tmp_path, train_on_val=False).remark == f"list_val is left out of training; {expected}"
    searched = load_benchmark("msmt17", tmp_path, splits=("query", "gallery"))
    assert searched.remark == "passed over: 1 files of another kind, 1 images on no list"


def test_lists_may_name_images_of_another_format(tmp_path):
    lists = {part: [line.replace(".jpg", ".png") for line in lines] for part, lines in LISTS.items()}
    benchmark = load_benchmark("msmt17", build(tmp_path, V2, lists))
    assert [(s.pid, s.camid) for s in benchmark.gallery] == [(0, 14), (7, 15)]


@pytest.mark.parametrize(
    ("part", "line", "first"),
    [
        ("gallery", "0007/0007_001_15_0303evening_0001_0.jpg 8", "line 3"),  # the list's own number
        ("gallery", "0007/0008_001_15_0303evening_0001_0.jpg 7", "line 3"),  # the name's
        ("train", "0002/0001_001_15_0303evening_0001_0.jpg 1", "line 3"),  # the folder's
    ],
)
def test_a_pid_that_is_not_that_of_the_folder_and_the_name_is_an_error_that_names_the_first(tmp_path, part, line, first):
    wrong = [line, line.replace("_001_15_", "_002_15_")]
    build(tmp_path, V1, LISTS | {part: LISTS[part] + wrong})
    message = refused("msmt17_v1", tmp_path)
    assert "\n" not in message
    assert f"2 of {len(LISTS[part]) + 2 + (part == 'train')} lines of list_{part}.txt" in message
    assert (
        f"give a pid that is not that of the folder and of the file name (first: {tmp_path}/list_{part}.txt, {first}: "
        in message
    )
    assert f"'{line}')" in message


def test_equal_numbers_in_train_and_test_are_not_the_same_people(tmp_path):
    assert "warning" not in describe(load_benchmark("msmt17_v1", build(tmp_path, V1))).table

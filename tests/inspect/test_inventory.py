"""What lies in a folder of benchmarks: found, named, counted, and its images opened."""

from pathlib import Path

import pytest
from PIL import Image

from personmae.errors import UserError
from personmae.inspect import inventory
from personmae.inspect.inventory import Finding
from personmae.reid.datasets import PUBLISHED

MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c3s2_000077_00.jpg"],
    "query": ["0001_c6s3_000551_00.jpg"],
    "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0001_c1s3_000552_00.jpg"],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c8_f0046999.jpg"],
    "query": ["0005_c1_f0000001.jpg"],
    "bounding_box_test": ["0005_c2_f0000002.jpg"],
}
CUHK03 = {"bounding_box_train": ["0001_c1_1.png"], "query": ["0003_c1_21.png"], "bounding_box_test": ["0003_c2_26.png"]}
RELAID = {
    "bounding_box_train": ["0000_c1_0000.jpg"],
    "query": ["0000_c14_0030.jpg"],
    "bounding_box_test": ["0000_c1_0003.jpg"],
}
MSMT17 = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg"],
    "test": ["0000/0000_000_01_0303morning_0015_0.jpg", "0000/0000_001_02_0303morning_0016_0.jpg"],
}
FOLDER = {"train": ["anna/1_c1.jpg"], "query": ["bert/1_c1.jpg"], "gallery": ["bert/2_c2.jpg"]}


def build(root: Path, tree: dict[str, list[str]]) -> Path:
    for folder, names in tree.items():
        for name in names:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 16)).save(root / folder / name)
    return root


def add_lists(root: Path) -> None:
    (train,), (query, gallery) = MSMT17["train"], MSMT17["test"]
    for part, name in {"train": train, "query": query, "gallery": gallery}.items():
        (root / f"list_{part}.txt").write_text(f"{name} 0\n")
    (root / "list_val.txt").write_text("0000/0000_001_01_0303morning_0009_0.jpg 0\n")
    Image.new("RGB", (8, 16)).save(root / "train" / "0000" / "0000_001_01_0303morning_0009_0.jpg")


def add_tables(root: Path) -> None:
    for split, (name,) in FOLDER.items():
        (root / f"{split}.csv").write_text(f"path,pid\n{split}/{name},{name[:4]}\n")


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("name", "folder", "tree"),
    [
        ("market1501", "Market-1501-v15.09.15", MARKET),
        ("market1501", "data", MARKET),
        ("occluded_duke", "Occluded_Duke", DUKE),
        ("dukemtmc", "DukeMTMC-reID", DUKE),
        ("cuhk03_np_detected", "cuhk03-np/detected", CUHK03),
        ("cuhk03_np_labeled", "cuhk03-np/labeled", CUHK03),
        ("msmt17", "msmt17", RELAID),
        ("folder", "mine", FOLDER),
    ],
)
@pytest.mark.parametrize("above", [False, True])
def test_a_benchmark_is_found_by_its_layout_at_the_folder_and_above_it(tmp_path, name, folder, tree, above):
    build(tmp_path / folder, tree)
    finding = only(inventory.find(tmp_path if above else tmp_path / folder))
    assert (finding.name, finding.root, finding.problem) == (name, tmp_path / folder, "")


@pytest.mark.parametrize(
    ("name", "folders"), [("msmt17_v1", ("train", "test")), ("msmt17_v2", ("mask_train_v2", "mask_test_v2"))]
)
def test_msmt17_is_found_with_its_version(tmp_path, name, folders):
    add_lists(build(tmp_path, MSMT17))
    for old, new in zip(MSMT17, folders, strict=True):
        (tmp_path / old).rename(tmp_path / new)
    assert only(inventory.find(tmp_path)).name == name


def test_tables_come_before_the_folders_that_they_point_into(tmp_path):
    add_tables(build(tmp_path, FOLDER))
    assert only(inventory.find(tmp_path)).name == "csv"


def test_names_that_fit_alike_are_told_apart_by_the_published_counts(tmp_path, monkeypatch):
    build(tmp_path / "Occluded_Duke", DUKE)
    assert only(inventory.find(tmp_path)).name == "occluded_duke"
    monkeypatch.setitem(PUBLISHED, "dukemtmc", {"train": (2, 1), "query": (1, 1), "gallery": (1, 1)})
    assert only(inventory.find(tmp_path)).name == "dukemtmc"


def test_all_benchmarks_below_a_folder_are_told_each_with_its_counts(tmp_path, capsys):
    build(tmp_path / "market", MARKET)
    build(tmp_path / "others" / "duke", DUKE)
    inventory.run(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [
        f"market1501 at {tmp_path}/market",
        f"dukemtmc at {tmp_path}/others/duke",
    ]
    assert [line.split() for line in lines[1:3]] == [["split", "images", "ids", "cameras"], ["train", "2", "1", "2"]]
    assert sum("every file opens as an image" in line for line in lines) == 2
    assert sum("published 12,936 images of 751 ids" in line for line in lines) == 1


def test_a_layout_without_its_lists_is_named_with_what_is_missing_after_the_others_are_told(tmp_path, capsys):
    build(tmp_path / "a", MSMT17)
    build(tmp_path / "b", MARKET)
    with pytest.raises(UserError, match=r"list_train\.txt is missing. MSMT17 comes with"):
        inventory.run(tmp_path)
    printed = capsys.readouterr().out
    assert f"msmt17 at {tmp_path}/a\n  cannot be used: {tmp_path}/a/list_train.txt is missing" in printed
    assert f"market1501 at {tmp_path}/b" in printed


def test_files_that_are_no_images_are_counted_and_the_first_three_named(tmp_path, capsys):
    build(tmp_path, MARKET)
    query = tmp_path / "query" / MARKET["query"][0]
    query.write_text("not an image")
    with pytest.raises(UserError) as caught:
        inventory.run(tmp_path)
    assert str(caught.value) == f"1 files of {tmp_path} are not images ({query}). Replace them or remove them"
    for name in MARKET["bounding_box_train"] + [MARKET["bounding_box_test"][1]]:
        next(tmp_path.glob(f"bounding_box_*/{name}")).write_bytes(b"")
    with pytest.raises(UserError, match=r"4 files of .*, \.\.\.\)") as caught:
        inventory.run(tmp_path)
    assert str(caught.value).count(".jpg") == 3
    assert "4 files do not open as images" in capsys.readouterr().out


def test_an_image_that_is_cut_short_behind_a_good_header_is_found(tmp_path):
    build(tmp_path, MARKET)
    cut = tmp_path / "query" / MARKET["query"][0]
    Image.effect_noise((64, 128), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-20])
    with Image.open(cut) as opened:
        assert opened.size == (64, 128)
    with pytest.raises(UserError, match="1 files of"):
        inventory.run(tmp_path)


def test_several_problems_are_one_line(tmp_path):
    build(tmp_path / "a", MSMT17)
    build(tmp_path / "b", MARKET | {"query": ["person.jpg"]})
    with pytest.raises(UserError, match=r"list_train\.txt is missing.*; and 1 more, see above$"):
        inventory.run(tmp_path)


def test_junk_is_not_opened_as_nothing_reads_it(tmp_path):
    build(tmp_path, MARKET)
    (tmp_path / "bounding_box_test" / "-1_c1s1_000401_03.jpg").write_text("not an image")
    inventory.run(tmp_path)


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("nowhere", "is required. .*nowhere does not exist"),
        ("file", "is required. .*file is a file"),
        ("empty", "no image below"),
    ],
)
def test_a_place_without_images_is_a_user_error(tmp_path, place, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=problem):
        inventory.run(tmp_path / place)


def test_crops_without_a_benchmark_nearby_have_their_statistics_alone(tmp_path, capsys):
    build(tmp_path / "a" / "b" / "c" / "d" / "e" / "f" / "g", MARKET)
    inventory.run(tmp_path / "a" / "b" / "c" / "d")
    out = capsys.readouterr().out
    assert f"5 images below {tmp_path}/a/b/c/d, no benchmark" in out
    assert "energy: texture" in out


def test_training_images_that_lie_in_the_test_set_under_another_name_are_told(tmp_path, capsys):
    root = build(tmp_path, MARKET)
    colours = iter(range(0, 250, 25))
    for folder, names in MARKET.items():
        for name in names:
            Image.new("RGB", (8, 16), (next(colours), 0, 0)).save(root / folder / name, quality=95)
    inventory.run(root)
    assert "byte for byte" not in capsys.readouterr().out
    train, gallery = (
        root / "bounding_box_train" / "0002_c3s2_000077_00.jpg",
        root / "bounding_box_test" / "0001_c1s3_000552_00.jpg",
    )
    train.write_bytes(gallery.read_bytes())
    inventory.run(root)
    output = f"warning: 1 training images are in query or gallery too, byte for byte (first: {train} and {gallery})"
    assert output in capsys.readouterr().out

"""A benchmark that is not what it should be ends within seconds with one line and code 78, for every program that reads it."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from programs import one_line_error, personmae

pytestmark = pytest.mark.integration
LISTS = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0"],
    "val": ["0000/0000_001_03_0303morning_0009_0.jpg 0"],
    "query": ["0000/0000_000_01_0303morning_0015_0.jpg 0"],
    "gallery": ["0000/0000_005_14_0302afternoon_0020_2.jpg 0", "0007/0007_000_15_0303evening_0001_0.jpg 7"],
}
OWN = {
    "train": ["anna/1_c1.jpg", "anna/2_c2.jpg"],
    "query": ["bert/1_c1.jpg"],
    "gallery": ["bert/2_c2.jpg", "carl/1_c1.jpg"],
}


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (32, 16, 3), dtype=np.uint8))


def msmt17(root: Path, train: str = "train", test: str = "test") -> Path:
    for part, lines in LISTS.items():
        for line in lines:
            draw(root / (test if part in ("query", "gallery") else train) / line.split()[0])
        (root / f"list_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def own(root: Path) -> Path:
    for split, names in OWN.items():
        for name in names:
            draw(root / split / name)
    return root


def tables(root: Path) -> Path:
    for split, names in OWN.items():
        rows = [f"{split}/{name},{name.split('/')[0]}" for name in names]
        (root / f"{split}.csv").write_text("\n".join(["path,pid", *rows]) + "\n")
    return root


def v2(root: Path) -> Path:
    return msmt17(root, "mask_train_v2", "mask_test_v2")


def no_list(root: Path) -> Path:
    (msmt17(root) / "list_val.txt").unlink()
    return root


def no_gallery_list(root: Path) -> Path:
    (msmt17(root) / "list_gallery.txt").unlink()
    return root


def itself(root: Path) -> Path:
    with (tables(own(root)) / "gallery.csv").open("a") as file:
        file.write("query/bert/1_c1.jpg,bert\n")
    return root


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("msmt17_v1", v2, ["msmt17_v1 is required", "holds msmt17_v2 (mask_train_v2/)", "Get MSMT17_V1"]),
        ("msmt17_v1", no_gallery_list, ["list_gallery.txt is missing", "take them from its archive"]),
        ("market1501", msmt17, ["market1501 is expected in", "bounding_box_train/", "has none of them"]),
        ("csv", own, ["query.csv is missing", "path, pid and perhaps camid"]),
        ("csv", itself, ["bert/1_c1.jpg is in query and in gallery", "Remove it from the gallery"]),
        ("msmt71", own, ["there is no benchmark 'msmt71'", "The nearest is 'msmt17'"]),
    ],
    ids=["V2 for V1", "no list", "another layout", "no tables", "a query in the gallery", "a wrong name"],
)
def test_evaluate_says_in_one_line_what_is_wrong_with_a_benchmark(
    tmp_path: Path, name: str, make: Callable[[Path], Path], expected: list[str]
) -> None:
    line = one_line_error(personmae("evaluate", "histogram", name, make(tmp_path / "data")))
    assert all(part in line for part in expected), line


def test_fine_tuning_finds_a_wrong_version_before_it_makes_its_directory(tmp_path: Path) -> None:
    settings = [f"root={v2(tmp_path / 'data')}", f"run_dir={tmp_path / 'run'}", "init=random"]
    line = one_line_error(personmae("finetune", "configs/finetune_msmt17.yaml", *settings))
    assert "msmt17_v1 is required" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "make"), [("folder", own), ("csv", lambda root: tables(own(root))), ("msmt17", msmt17)])
def test_good_data_of_the_same_kind_is_evaluated(tmp_path: Path, name: str, make: Callable[[Path], Path]) -> None:
    result = personmae("evaluate", "histogram", name, make(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert "mAP" in result.stdout.splitlines()[-1]


def test_doctor_tells_all_benchmarks_of_a_folder_and_ends_as_the_worst_of_them(tmp_path: Path) -> None:
    own(tmp_path / "mine")
    good = personmae("doctor", "--data", tmp_path)
    assert good.returncode == 0, good.stderr
    assert "folder: a data set of your own" in good.stdout
    (tmp_path / "mine" / "gallery" / "carl" / "1_c1.jpg").write_bytes(b"")
    no_list(tmp_path / "MSMT17_V1")
    result = personmae("doctor", "--data", tmp_path)
    line = one_line_error(result)
    assert "list_val.txt is missing" in line
    assert "and 1 more, see above" in line
    assert f"folder at {tmp_path}/mine" in result.stdout
    assert "1 files do not open as images" in result.stdout

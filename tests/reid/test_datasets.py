"""Benchmarks on disk: miniature trees in the real layouts."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from personmae.errors import UserError
from personmae.reid import datasets
from personmae.reid.datasets import Sample, describe, load_benchmark, market1501, occluded_duke, train_labels

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
MARKET = {
    TRAIN: ["0007_c2s1_000001_01.jpg", "0002_c1s1_000451_03.jpg", "0002_c3s2_000077_00.jpg", "-1_c1s1_000001_00.jpg"],
    QUERY: ["0003_c1s1_000001_00.jpg", "0001_c6s3_000551_00.jpg"],
    GALLERY: [
        "-1_c1s1_000401_03.jpg",
        "-1_c2s1_000401_03.jpg",
        "0000_c4s6_000001_01.jpg",
        "0003_c2s1_000001_00.jpg",
        "0001_c6s3_000552_00.jpg",
    ],
}
DUKE = {
    TRAIN: ["0001_c2_f0046182.jpg", "0001_c8_f0046999.jpg"],
    QUERY: ["0005_c1_f0000001.jpg"],
    GALLERY: ["0005_c2_f0000002.jpg", "0006_c1_f0000003.jpg"],
}


def build(root: Path, tree: dict[str, list[str]]) -> Path:
    image = np.zeros((16, 8, 3), dtype=np.uint8)
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            assert cv2.imwrite(str(root / folder / name), image)
    return root


def test_market_names_give_pid_and_camera_in_file_name_order(tmp_path):
    benchmark = market1501(build(tmp_path, MARKET))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(2, 1), (2, 3), (7, 2)]
    assert [(s.pid, s.camid) for s in benchmark.query] == [(1, 6), (3, 1)]
    assert all(Path(s.path).is_file() for s in benchmark.train + benchmark.query + benchmark.gallery)


def test_junk_is_dropped_and_distractors_stay_in_the_gallery(tmp_path):
    benchmark = market1501(build(tmp_path, MARKET))
    assert [s.pid for s in benchmark.gallery] == [0, 1, 3]
    assert benchmark.num_junk == 2


def test_occluded_duke_names_give_pid_and_camera(tmp_path):
    benchmark = occluded_duke(build(tmp_path, DUKE))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(1, 2), (1, 8)]
    assert [(s.pid, s.camid) for s in benchmark.gallery] == [(5, 2), (6, 1)]


@pytest.mark.parametrize(
    ("name", "folder", "tree"),
    [("market1501", "Market-1501-v15.09.15", MARKET), ("occluded_duke", "Occluded_Duke", DUKE)],
)
def test_the_folder_of_the_official_archive_may_be_left_out(tmp_path, name, folder, tree):
    build(tmp_path / folder, tree)
    assert load_benchmark(name, tmp_path) == load_benchmark(name, tmp_path / folder)


def test_windows_litter_and_hidden_files_are_ignored(tmp_path):
    build(tmp_path, MARKET)
    (tmp_path / TRAIN / "Thumbs.db").touch()
    (tmp_path / QUERY / ".DS_Store").touch()
    assert len(market1501(tmp_path).train) == 3


def test_labels_count_from_zero_in_the_order_of_pids():
    samples = [Sample("a", 90, 1), Sample("b", 7, 1), Sample("c", 90, 2), Sample("d", 8, 1)]
    assert train_labels(samples).tolist() == [2, 0, 2, 1]


def test_a_miniature_is_described_as_not_the_published_benchmark(tmp_path):
    description = describe(market1501(build(tmp_path, MARKET)))
    assert not description.published
    assert "train has 3 images of 2 ids, published 12,936 images of 751 ids" in description.note
    assert description.table.splitlines()[1].split() == ["train", "3", "2", "3"]
    assert description.table.splitlines()[3].split() == ["gallery", "3", "2", "3"]  # the distractor is not an identity
    assert "1 distractors" in description.table
    assert "2 junk" in description.table


def test_the_published_counts_are_recognised(tmp_path, monkeypatch):
    benchmark = occluded_duke(build(tmp_path, DUKE))
    counts = {"train": (2, 1), "query": (1, 1), "gallery": (2, 2)}
    layout = dataclasses.replace(datasets.LAYOUTS["occluded_duke"], published=counts)
    monkeypatch.setitem(datasets.LAYOUTS, "occluded_duke", layout)
    assert describe(benchmark).published


def test_an_unknown_benchmark_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="market1501, occluded_duke"):
        load_benchmark("market", tmp_path)


@pytest.mark.parametrize("folder", [TRAIN, QUERY, GALLERY])
def test_a_missing_split_is_named(tmp_path, folder):
    build(tmp_path, {name: files for name, files in MARKET.items() if name != folder})
    with pytest.raises(UserError, match=f"{folder} is missing; expected .* 0002_c1s1_000451_03.jpg"):
        market1501(tmp_path)


def test_a_missing_root_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"bounding_box_train/, query/, bounding_box_test/; .* does not exist"):
        market1501(tmp_path / "nowhere")


def test_a_root_without_any_split_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="has none of them"):
        market1501(tmp_path)


def test_an_empty_split_is_named(tmp_path):
    build(tmp_path, MARKET | {QUERY: []})
    with pytest.raises(UserError, match="query is empty"):
        market1501(tmp_path)


@pytest.mark.parametrize("name", ["0002_c1s1_000451_03.png", "0001_c2_f0046182.jpg", "person.jpg", "notes.txt"])
def test_a_file_with_another_name_is_named(tmp_path, name):
    build(tmp_path, MARKET)
    (tmp_path / TRAIN / name).touch()
    with pytest.raises(UserError, match=f"{name} is not named like"):
        market1501(tmp_path)


def test_a_training_split_of_junk_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="no identity to train on"):
        market1501(build(tmp_path, MARKET | {TRAIN: ["-1_c1s1_000001_00.jpg"]}))


@pytest.mark.parametrize("folder", [TRAIN, QUERY])
def test_distractors_are_refused_outside_the_gallery(tmp_path, folder):
    with pytest.raises(UserError, match="belongs in the gallery"):
        market1501(build(tmp_path, MARKET | {folder: ["0000_c1s1_000001_00.jpg"]}))


def test_queries_without_any_match_from_another_camera_are_refused(tmp_path):
    with pytest.raises(UserError, match="from another camera"):
        market1501(build(tmp_path, MARKET | {GALLERY: ["0003_c1s1_000009_00.jpg", "0001_c6s3_000552_00.jpg"]}))

"""Benchmarks on disk: miniature trees in the real layouts."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from personmae import config
from personmae.errors import UserError
from personmae.reid import datasets
from personmae.reid.datasets import NAMES, PUBLISHED, Benchmark, Counts, describe, load_benchmark, train_labels
from personmae.reid.samples import Sample

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
CUHK03 = {TRAIN: ["0001_c1_1.png", "0001_c2_6.png"], QUERY: ["0003_c1_21.png"], GALLERY: ["0003_c2_26.png", "0004_c1_3.png"]}
RELAID = {
    TRAIN: ["0000_c1_0000.jpg", "0000_c15_0001.jpg", "0001_c2_0000.jpg"],
    QUERY: ["0000_c14_0030.jpg"],
    GALLERY: ["0000_c1_0003.jpg", "0001_c1_0005.jpg"],
}
TREES = {
    "market1501": ("Market-1501-v15.09.15", MARKET),
    "occluded_duke": ("Occluded_Duke", DUKE),
    "dukemtmc": ("DukeMTMC-reID", DUKE),
    "cuhk03_np_detected": ("detected", CUHK03),
    "cuhk03_np_labeled": ("cuhk03-np/labeled", CUHK03),
    "msmt17": ("MSMT17", RELAID),
}


def build(root: Path, tree: dict[str, list[str]]) -> Path:
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()
    return root


def in_memory(name: str, counts: Counts, **fields: object) -> Benchmark:
    """A benchmark of so many images and identities, of which every query has a match."""
    splits = {
        split: tuple(Sample(f"{split}/{i}", 1 + i % num_ids, 1 + (split == "gallery")) for i in range(num_images))
        for split, (num_images, num_ids) in counts.items()
    }
    return Benchmark(name, "root", **splits, **{"published": PUBLISHED[name], **fields})  # type: ignore[arg-type]


def test_market_names_give_pid_and_camera_in_file_name_order(tmp_path):
    benchmark = load_benchmark("market1501", build(tmp_path, MARKET))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(2, 1), (2, 3), (7, 2)]
    assert [(s.pid, s.camid) for s in benchmark.query] == [(1, 6), (3, 1)]
    assert all(Path(s.path).is_file() for s in benchmark.train + benchmark.query + benchmark.gallery)


def test_junk_is_dropped_and_distractors_stay_in_the_gallery(tmp_path):
    benchmark = load_benchmark("market1501", build(tmp_path, MARKET))
    assert [s.pid for s in benchmark.gallery] == [0, 1, 3]
    assert benchmark.num_junk == 2


@pytest.mark.parametrize("name", ["occluded_duke", "dukemtmc"])
def test_duke_names_give_pid_and_camera(tmp_path, name):
    benchmark = load_benchmark(name, build(tmp_path, DUKE))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(1, 2), (1, 8)]
    assert [(s.pid, s.camid) for s in benchmark.gallery] == [(5, 2), (6, 1)]


@pytest.mark.parametrize("name", ["cuhk03_np_detected", "cuhk03_np_labeled"])
def test_cuhk03_names_give_pid_and_camera(tmp_path, name):
    benchmark = load_benchmark(name, build(tmp_path, CUHK03))
    assert [(s.pid, s.camid) for s in benchmark.train] == [(1, 1), (1, 2)]
    assert [(s.pid, s.camid) for s in benchmark.gallery] == [(3, 2), (4, 1)]


def test_detected_and_labeled_cuhk03_are_told_apart_by_their_folders(tmp_path):
    build(tmp_path / "cuhk03-np" / "detected", CUHK03)
    build(tmp_path / "cuhk03-np" / "labeled", CUHK03 | {TRAIN: ["0009_c1_1.png"]})
    assert len(load_benchmark("cuhk03_np_detected", tmp_path).train) == 2
    assert len(load_benchmark("cuhk03_np_labeled", tmp_path / "cuhk03-np").train) == 1


@pytest.mark.parametrize("name", TREES)
def test_the_folder_of_the_official_archive_may_be_left_out(tmp_path, name):
    folder, tree = TREES[name]
    build(tmp_path / folder, tree)
    assert load_benchmark(name, tmp_path) == load_benchmark(name, tmp_path / folder)


def test_windows_litter_and_hidden_files_are_passed_over_and_counted(tmp_path):
    build(tmp_path, MARKET)
    assert load_benchmark("market1501", tmp_path).remark == ""
    for name in (f"{TRAIN}/Thumbs.db", f"{QUERY}/.DS_Store", f"{QUERY}/._0003_c1s1_000001_00.jpg"):
        (tmp_path / name).touch()
    benchmark = load_benchmark("market1501", tmp_path)
    assert len(benchmark.train) == 3
    assert describe(benchmark).note.endswith("; passed over: 1 Thumbs.db or desktop.ini, 2 hidden files")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".JPG", ".jpeg"])
@pytest.mark.parametrize("name", TREES)
def test_a_benchmark_that_was_converted_to_another_format_is_read_alike(tmp_path, name, suffix):
    _, tree = TREES[name]
    build(tmp_path / "original", tree)
    build(tmp_path / "converted", {folder: [f"{Path(file).stem}{suffix}" for file in names] for folder, names in tree.items()})
    original, converted = (load_benchmark(name, tmp_path / folder) for folder in ("original", "converted"))
    assert datasets.count(converted) == datasets.count(original)
    for split in ("train", "query", "gallery"):
        assert [(s.pid, s.camid) for s in getattr(converted, split)] == [(s.pid, s.camid) for s in getattr(original, split)]
        assert all(Path(sample.path).is_file() for sample in getattr(converted, split))


def test_labels_count_from_zero_in_the_order_of_pids():
    samples = [Sample("a", 90, 1), Sample("b", 7, 1), Sample("c", 90, 2), Sample("d", 8, 1)]
    assert train_labels(samples).tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize(("name", "num_classes"), [("market1501", 2), ("dukemtmc", 1), ("msmt17", 2)])
def test_every_training_identity_is_one_class(tmp_path, name, num_classes):
    labels = train_labels(load_benchmark(name, build(tmp_path, TREES[name][1])).train)
    assert np.unique(labels).tolist() == list(range(num_classes))


# --- what is told ---


def test_a_miniature_is_described_as_not_the_published_benchmark(tmp_path):
    description = describe(load_benchmark("market1501", build(tmp_path, MARKET)))
    assert not description.published
    assert "train has 3 images of 2 ids, published 12,936 images of 751 ids" in description.note
    assert description.table.splitlines()[1].split() == ["train", "3", "2", "3"]
    assert description.table.splitlines()[3].split() == ["gallery", "3", "2", "3"]  # the distractor is not an identity
    assert "1 distractors" in description.table
    assert "2 junk" in description.table


def test_pid_0_of_msmt17_is_an_identity_like_others(tmp_path):
    table = describe(load_benchmark("msmt17", build(tmp_path, RELAID))).table.splitlines()
    assert [line.split() for line in table[1:4]] == [
        ["train", "3", "2", "3"],
        ["query", "1", "1", "1"],
        ["gallery", "2", "2", "1"],
    ]
    assert not any("distractors" in line for line in table)


def test_identities_with_one_image_and_queries_without_a_match_are_told(tmp_path):
    table = describe(load_benchmark("market1501", build(tmp_path, MARKET))).table
    assert "query: 1 images have no match in the gallery and are left out of the scores" in table  # pid 1 is in camera 6 alone
    assert "train: 1 ids have one image, which a batch repeats" in table  # pid 7
    rest = describe(load_benchmark("dukemtmc", build(tmp_path / "other", DUKE))).table
    assert "no match" not in rest
    assert "one image" not in rest


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("msmt17", "msmt17_v2")])  # the same numbers
def test_the_published_counts_are_recognised_and_one_image_more_is_not(name):
    benchmark = in_memory(name, PUBLISHED[name])
    assert describe(benchmark).published
    assert describe(benchmark).note == f"{name}: the counts are the published ones"
    more = dataclasses.replace(benchmark, gallery=(*benchmark.gallery, Sample("another", 1, 2)))
    assert not describe(more).published
    assert "train has" not in describe(more).note


@pytest.mark.parametrize(
    ("name", "num_images", "num_ids"),
    [
        ("market1501", 32_668 + 3_368 - 3_819, 1_501),  # the total leaves the queries out and counts the junk
        ("occluded_duke", 35_489, 1_812),
        ("dukemtmc", 36_411, 1_812),
        ("cuhk03_np_detected", 14_097, 1_467),
        ("cuhk03_np_labeled", 14_096, 1_467),
        ("msmt17_v1", 126_441, 4_101),
    ],
)
def test_the_published_counts_of_the_splits_add_up_to_the_published_totals(name, num_images, num_ids):
    counts = PUBLISHED[name]
    assert sum(images for images, _ in counts.values()) == num_images
    assert counts["train"][1] + counts["gallery"][1] == num_ids


def test_occluded_duke_with_the_counts_of_dukemtmc_is_refused(tmp_path, monkeypatch):
    build(tmp_path, DUKE)
    assert load_benchmark("occluded_duke", tmp_path).name == "occluded_duke"
    monkeypatch.setitem(PUBLISHED, "dukemtmc", {"train": (2, 1), "query": (1, 1), "gallery": (2, 2)})
    with pytest.raises(UserError, match=r"holds dukemtmc, by its counts, and not occluded_duke\. Set benchmark=dukemtmc"):
        load_benchmark("occluded_duke", tmp_path)
    assert describe(load_benchmark("dukemtmc", tmp_path)).published


def test_every_benchmark_can_be_named_in_a_configuration():
    assert get_args(config.Finetune.model_fields["benchmark"].annotation) == NAMES


# --- what is refused ---


def test_an_unknown_benchmark_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"no benchmark 'market'\. The nearest is 'market1501', of market1501, occluded_duke"):
        load_benchmark("market", tmp_path)


@pytest.mark.parametrize("folder", [TRAIN, QUERY, GALLERY])
def test_a_missing_split_is_named(tmp_path, folder):
    build(tmp_path, {name: files for name, files in MARKET.items() if name != folder})
    with pytest.raises(UserError, match=f"{folder} is missing. Expected .* 0002_c1s1_000451_03.jpg"):
        load_benchmark("market1501", tmp_path)


def test_a_missing_root_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"bounding_box_train/, query/, bounding_box_test/, but .* does not exist"):
        load_benchmark("market1501", tmp_path / "nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_a_root_that_is_missing_or_a_file_or_unreadable_is_named_with_what_is_expected_there(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0)
    for folder, problem in (("nope", "does not exist"), ("file", "is a file")):
        with pytest.raises(
            UserError, match=f"^benchmark {name} is expected in a directory as .*, but {tmp_path}/{folder} {problem}$"
        ):
            load_benchmark(name, tmp_path / folder)
    with without_root(), pytest.raises(UserError, match=f"as .*, but {tmp_path}/closed cannot be read: Permission denied$"):
        load_benchmark(name, tmp_path / "closed")


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """The block runs as an ordinary user, for whom permissions count. Folders of tests are root's own, up to the first."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_root_without_any_split_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="has none of them"):
        load_benchmark("market1501", tmp_path)


def test_an_empty_split_is_named(tmp_path):
    build(tmp_path, MARKET | {QUERY: []})
    with pytest.raises(UserError, match="query is empty"):
        load_benchmark("market1501", tmp_path)


@pytest.mark.parametrize("name", ["0002_c1s1_000451_03.gif", "0001_c2_f0046182.jpg", "person.jpg", "notes.txt"])
def test_a_file_with_another_name_is_named(tmp_path, name):
    build(tmp_path, MARKET)
    (tmp_path / TRAIN / name).touch()
    with pytest.raises(UserError, match=f"{name} is not named like"):
        load_benchmark("market1501", tmp_path)


def test_a_training_split_of_junk_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="no identity to train on"):
        load_benchmark("market1501", build(tmp_path, MARKET | {TRAIN: ["-1_c1s1_000001_00.jpg"]}))


@pytest.mark.parametrize("folder", [TRAIN, QUERY])
def test_distractors_are_refused_outside_the_gallery(tmp_path, folder):
    with pytest.raises(UserError, match="belongs in the gallery"):
        load_benchmark("market1501", build(tmp_path, MARKET | {folder: ["0000_c1s1_000001_00.jpg"]}))


def test_queries_without_any_match_from_another_camera_are_refused(tmp_path):
    with pytest.raises(UserError, match="from another camera"):
        load_benchmark(
            "market1501", build(tmp_path, MARKET | {GALLERY: ["0003_c1s1_000009_00.jpg", "0001_c6s3_000552_00.jpg"]})
        )


def test_train_on_val_is_refused_where_there_is_no_list_val(tmp_path):
    with pytest.raises(UserError, match=r"train_on_val=false is for MSMT17, .* market1501 has none"):
        load_benchmark("market1501", build(tmp_path, MARKET), train_on_val=False)


def test_names_and_published_counts_belong_together():
    assert set(PUBLISHED) == set(NAMES) - {"folder", "csv"}
    assert set(datasets.LAYOUTS) < set(NAMES)


# --- real and synthetic, this set and another ---


def test_counts_that_are_not_the_published_ones_are_titled_by_their_layout(tmp_path):
    benchmark = load_benchmark("market1501", build(tmp_path, MARKET))
    assert datasets.title(benchmark) == "Market-1501 layout, 2 identities"
    assert describe(benchmark).note.startswith("market1501: Market-1501 layout, 2 identities; train has 3 images")
    assert datasets.title(in_memory("market1501", PUBLISHED["market1501"])) == "Market-1501"
    own = Benchmark("folder", "root", (), (Sample("a", 0, 1),), (Sample("b", 0, 2),))
    assert datasets.title(own) == "own data, 1 identities"


def test_a_set_with_the_mark_is_synthetic_even_with_the_published_counts(tmp_path):
    build(tmp_path / "market1501", MARKET)
    assert not load_benchmark("market1501", tmp_path / "market1501").synthetic
    (tmp_path / "market1501" / datasets.SYNTHETIC_MARK).write_text("{}")
    assert load_benchmark("market1501", tmp_path / "market1501").synthetic
    drawn = in_memory("market1501", PUBLISHED["market1501"], synthetic=True)
    assert datasets.title(drawn) == "synthetic people, Market-1501 layout, 750 identities"
    assert describe(drawn).note == "market1501: synthetic people, Market-1501 layout, 750 identities"
    assert not describe(drawn).published


@pytest.mark.parametrize(
    ("mark", "synthetic"),
    [
        ('{"counts": {"market1501/query": 2}}', True),
        ('{"counts": {"occluded_duke/query": 2}}', False),  # a real set unpacked next to drawn ones
        ('{"counts": 3}', False),
        ("{", False),
    ],
)
def test_the_mark_beside_a_set_counts_where_it_names_the_set(tmp_path, mark, synthetic):
    build(tmp_path / "market1501", MARKET)
    (tmp_path / datasets.SYNTHETIC_MARK).write_text(mark)
    assert load_benchmark("market1501", tmp_path / "market1501").synthetic is synthetic


def filled(root: Path, tree: dict[str, list[str]], num_bytes: int = 1) -> Path:
    build(root, tree)
    for path in root.rglob("*.jpg"):
        path.write_bytes(bytes(num_bytes))
    return root


def test_the_digest_is_of_the_test_set_wherever_it_lies_and_whatever_its_layout_is_called(tmp_path):
    one = load_benchmark("dukemtmc", filled(tmp_path / "one", DUKE))
    other = load_benchmark("occluded_duke", filled(tmp_path / "two", DUKE), splits=("query", "gallery"))
    assert datasets.digest(one) == datasets.digest(other)
    assert datasets.record(one)["counts"] == {"train": [2, 1], "query": [1, 1], "gallery": [2, 2]}
    assert datasets.record(other)["counts"] == {"query": [1, 1], "gallery": [2, 2]}
    assert datasets.record(one)["benchmark_title"] == "DukeMTMC-reID layout, 2 identities"
    assert datasets.record(one)["synthetic"] is False


@pytest.mark.parametrize("change", ["names", "bytes", "splits"])
def test_the_digest_tells_sets_with_the_same_counts_apart(tmp_path, change):
    tree, num_bytes = dict(DUKE), 1
    if change == "names":
        tree[GALLERY] = ["0005_c2_f0000002.jpg", "0006_c1_f0000004.jpg"]
    if change == "splits":
        tree[QUERY], tree[GALLERY] = ["0005_c2_f0000002.jpg"], ["0005_c1_f0000001.jpg", "0006_c1_f0000003.jpg"]
    if change == "bytes":  # drawn from another seed: the names are the same
        num_bytes = 2
    one = load_benchmark("dukemtmc", filled(tmp_path / "one", DUKE))
    other = load_benchmark("dukemtmc", filled(tmp_path / "two", tree, num_bytes))
    assert datasets.count(one) == datasets.count(other)
    assert datasets.digest(one) != datasets.digest(other)


def test_an_image_that_has_gone_before_the_digest_is_named(tmp_path):
    benchmark = load_benchmark("dukemtmc", build(tmp_path, DUKE))
    gone = Path(benchmark.query[0].path)
    gone.unlink()
    with pytest.raises(UserError, match=f"cannot read {gone}: No such file"):
        datasets.digest(benchmark)


# --- people who are in train and in test ---


def test_people_shared_by_train_and_test_are_told_with_their_number_and_an_example(tmp_path):
    plain = load_benchmark("market1501", build(tmp_path / "plain", MARKET))
    assert "warning" not in describe(plain).table
    assert "shared_people" not in datasets.record(plain)
    shared = MARKET | {TRAIN: [*MARKET[TRAIN], "0003_c4s1_000001_01.jpg", "0001_c2s1_000001_01.jpg"]}
    root = build(tmp_path / "shared", shared)
    benchmark = load_benchmark("market1501", root)
    (line,) = [line for line in describe(benchmark).table.splitlines() if line.startswith("warning: ")]
    assert "warning: 2 people are in train and in query or gallery (first: " in line
    assert f"(first: {root / TRAIN}/0001_c2s1_000001_01.jpg and {root / QUERY}/0001_c6s3_000551_00.jpg)" in line
    assert datasets.record(benchmark)["shared_people"] == 2
    searched = load_benchmark("market1501", root, splits=("query", "gallery"))
    assert "warning" not in describe(searched).table  # train was not read


def test_the_layout_of_market_with_msmt17s_numbers_shares_nobody(tmp_path):
    benchmark = load_benchmark("msmt17", build(tmp_path, RELAID))
    assert {s.pid for s in benchmark.train} & {s.pid for s in benchmark.gallery}
    assert "warning" not in describe(benchmark).table

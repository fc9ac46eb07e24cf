"""Procedural pedestrians: the same bytes from the same seed, benchmarks laid out as the real ones, one detail apart."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from closeness import assert_allclose

from personmae.__main__ import main
from personmae.errors import UserError
from personmae.reid.datasets import describe, load_benchmark
from personmae.synthetic import benchmarks
from personmae.synthetic.benchmarks import write_synthetic
from personmae.synthetic.body import BACK, FRONT, LEFT, VIEWS
from personmae.synthetic.canvas import ACCENT, BAG, Canvas, Image
from personmae.synthetic.figure import Pose, draw_person
from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import Shot, SynthSettings, counts_of, plan
from personmae.synthetic.wardrobe import Identity, Item, look_alikes, sample_identity

SMALL = SynthSettings(
    seed=3,
    pool_images=300,
    pool_identities=40,
    pool_cameras=6,
    market_train_ids=5,
    market_test_ids=6,
    market_distractors=5,
    market_junk=4,
    occluded_duke_train_ids=4,
    occluded_duke_test_ids=5,
)
MARKET_NAME = re.compile(r"(-1|\d{4})_c([1-6])s1_\d{6}_\d{2}\.jpg")
DUKE_NAME = re.compile(r"(\d{4})_c([1-8])_f\d{7}\.jpg")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "out"
    steps: list[tuple[int, int]] = []
    write_synthetic(out, SMALL, num_processes=1, progress=lambda done, total: steps.append((done, total)))
    total = len(plan(SMALL))
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)
    return out


def hashes(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def named(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """(pid, camera) of every file of a folder; all must have the pattern."""
    matches = {path.name: pattern.fullmatch(path.name) for path in folder.iterdir()}
    assert matches
    assert [name for name, match in matches.items() if match is None] == []
    return [(int(match[1]), int(match[2])) for match in matches.values() if match]


def block_means(settings: SynthSettings, shot: Shot) -> list[int]:
    """Grey means of an 8 x 4 grid of the image as it is decoded from its JPEG."""
    image, quality = draw_shot(settings, shot)
    _, jpeg = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))
    grey = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)).mean(axis=2)
    return [round(cell.mean()) for band in np.array_split(grey, 8) for cell in np.array_split(band, 4, axis=1)]


def test_the_number_of_processes_changes_no_byte(written: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "two", SMALL, num_processes=2)
    assert hashes(tmp_path / "two") == hashes(written)


def test_readers_know_that_the_people_are_drawn_also_where_a_benchmark_was_copied_alone(written: Path, tmp_path: Path) -> None:
    for name, layout in (("market1501", "Market-1501"), ("occluded_duke", "Occluded-Duke")):
        copied = Path(shutil.copytree(written / name, tmp_path / name))
        for root in (written / name, copied):
            described = describe(load_benchmark(name, root))
            assert described.note.startswith(f"{name}: synthetic people, {layout} layout, ")
    earlier = Path(shutil.copytree(written, tmp_path / "earlier"))  # as sets were written before each had its own mark
    (earlier / "market1501" / "synthetic.json").unlink()
    assert load_benchmark("market1501", earlier / "market1501").synthetic


def test_shards_of_drawn_people_carry_the_mark_and_others_do_not(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["shards", "write", str(written / "pool"), str(tmp_path / "drawn"), "--processes", "1"]
    assert main(drawn) == 0
    assert ". The people are synthetic" in capsys.readouterr().out
    mark = tmp_path / "drawn" / "synthetic.json"
    assert mark.read_bytes() == (written / "synthetic.json").read_bytes()
    mark.unlink()  # as earlier shards were written
    assert main([*drawn, "--if-missing"]) == 0
    assert mark.is_file()
    assert main(["shards", "verify", str(tmp_path / "drawn")]) == 0

    real = tmp_path / "beside" / "real"  # next to drawn ones
    shutil.copytree(written / "pool", real)
    shutil.copy(written / "synthetic.json", real.parent)
    assert main(["shards", "write", str(real), str(tmp_path / "others"), "--processes", "1"]) == 0
    assert not (tmp_path / "others" / "synthetic.json").exists()


def test_another_seed_draws_other_images() -> None:
    shot = plan(SMALL)[0]
    other = dataclasses.replace(SMALL, seed=4)
    assert block_means(SMALL, shot) != block_means(other, plan(other)[0])


GOLDEN = {  # place -> grey means, row by row; a change of the drawing changes them, another machine does not
    "pool/": [
        114, 112, 99, 113, 78, 112, 68, 108, 93, 106, 57, 108, 89, 110, 36, 97,
        91, 108, 35, 102, 93, 109, 24, 106, 96, 104, 62, 102, 104, 102, 91, 95,
    ],
    "market1501/bounding_box_train/": [
        96, 106, 113, 115, 103, 120, 166, 121, 119, 89, 102, 139, 153, 99, 96, 150,
        172, 142, 145, 154, 165, 151, 177, 159, 143, 169, 180, 182, 161, 144, 141, 145,
    ],
    "market1501/query/": [
        50, 45, 89, 54, 47, 65, 98, 66, 35, 135, 121, 84, 105, 155, 161, 123,
        133, 152, 163, 129, 134, 142, 129, 126, 127, 146, 145, 133, 119, 110, 134, 122,
    ],
    "market1501/bounding_box_test/-1": [
        104, 75, 101, 93, 155, 137, 164, 150, 157, 169, 164, 224, 165, 169, 163, 226,
        163, 172, 168, 140, 162, 170, 170, 133, 161, 169, 165, 168, 165, 168, 161, 154,
    ],
    "occluded_duke/query/": [
        46, 50, 45, 37, 96, 97, 54, 78, 108, 101, 55, 97, 105, 100, 121, 106,
        105, 97, 119, 110, 107, 80, 47, 51, 104, 64, 22, 30, 103, 56, 23, 39,
    ],
}  # fmt: skip


@pytest.mark.parametrize("place", GOLDEN)
def test_images_have_the_committed_coarse_statistics(place: str) -> None:
    shot = next(shot for shot in plan(SMALL) if shot.path.startswith(place))
    assert_allclose(block_means(SMALL, shot), GOLDEN[place], atol=2)


def test_counts_are_the_files_and_the_record_comes_with_settings(written: Path) -> None:
    counts = write_synthetic(written, SMALL, num_processes=1)  # complete already: only read
    assert counts == {
        "pool": 300,
        "market1501/bounding_box_train": 40,
        "market1501/query": 24,
        "market1501/bounding_box_test": 48 + 5 + 4,
        "occluded_duke/bounding_box_train": 32,
        "occluded_duke/query": 20,
        "occluded_duke/bounding_box_test": 40,
    }
    assert {folder: len(list((written / folder).rglob("*.jpg"))) for folder in counts} == counts
    record = json.loads((written / "synthetic.json").read_text())
    assert record["counts"] == counts
    assert record["settings"] == dataclasses.asdict(SMALL)
    assert cv2.imread(str(written / "contact_sheet.png")) is not None


def test_market_names_carry_junk_and_distractors_in_the_gallery_only(written: Path) -> None:
    folders = {name: named(written / "market1501" / name, MARKET_NAME) for name in ("bounding_box_train", "query")}
    gallery = {pid for pid, _ in named(written / "market1501" / "bounding_box_test", MARKET_NAME)}
    train, query = ({pid for pid, _ in folder} for folder in folders.values())
    assert {-1, 0} <= gallery
    assert query == gallery - {-1, 0}
    assert min(train | query) > 0
    assert not train & gallery


@pytest.mark.parametrize(("benchmark", "pattern"), [("market1501", MARKET_NAME), ("occluded_duke", DUKE_NAME)])
def test_every_query_has_a_gallery_match_from_another_camera(written: Path, benchmark: str, pattern: re.Pattern[str]) -> None:
    gallery = named(written / benchmark / "bounding_box_test", pattern)
    for pid, camid in named(written / benchmark / "query", pattern):
        assert any(other == pid and seen_by != camid for other, seen_by in gallery)


def test_market_crops_are_128_by_64(written: Path) -> None:
    shapes = {np.asarray(cv2.imread(str(path))).shape for path in (written / "market1501").rglob("*.jpg")}
    assert shapes == {(128, 64, 3)}


def test_native_crops_have_the_sizes_of_detections(written: Path) -> None:
    folders = (written / "pool", written / "occluded_duke")
    shapes = np.array([np.asarray(cv2.imread(str(path))).shape for folder in folders for path in folder.rglob("*.jpg")])
    heights, widths = shapes[:, 0], shapes[:, 1]
    assert heights.min() >= 60
    assert heights.max() <= 500
    assert 110 <= np.median(heights) <= 200
    assert np.all(np.abs(widths / heights - 0.42) < 0.1)


@pytest.mark.parametrize("domain", ["summer", "winter"])
def test_look_alikes_differ_in_exactly_one_attribute(domain: str) -> None:
    names = [field.name for field in dataclasses.fields(Identity)]
    for seed in range(40):
        group = look_alikes(np.random.default_rng(seed), domain)
        differing = [
            {name for name in names if getattr(a, name) != getattr(b, name)} for a, b in itertools.combinations(group, 2)
        ]
        assert len(group) == 3
        assert differing[0] == differing[1] == differing[2]
        assert len(differing[0]) == 1


def test_occluded_queries_differ_from_their_unoccluded_rendition_more_when_more_is_hidden() -> None:
    queries = [shot for shot in plan(SMALL) if shot.path.startswith("occluded_duke/query")]
    changed: dict[float, list[float]] = {}
    for shot in queries:
        assert shot.occlusion
        seen, _ = draw_shot(SMALL, shot)
        free, _ = draw_shot(SMALL, shot._replace(occlusion=0.0))
        different = np.abs(seen.astype(int) - free.astype(int)).max(axis=2) > 20
        changed.setdefault(shot.occlusion, []).append(float(different.mean()))
    assert min(share for shares in changed.values() for share in shares) > 0.03
    mild, *_, severe = (np.mean(changed[grade]) for grade in sorted(changed))
    assert severe > mild


def label_counts(identity: Identity, view: str) -> np.ndarray:
    canvas = Canvas(256, 128)
    draw_person(canvas, identity, Pose(view, phase=0.1), x=64, top=20, scale=220)
    return np.bincount(canvas.label.ravel(), minlength=32)


def plain_identity(**details: object) -> Identity:
    base = sample_identity(np.random.default_rng(0), "summer")
    plain = {"decoration": Item("none", (0, 0, 0)), "bag": Item("none", (0, 0, 0))}
    return dataclasses.replace(base, **(plain | details))  # type: ignore[arg-type]


def test_a_chest_print_shows_from_the_front_only() -> None:
    printed = plain_identity(decoration=Item("logo", (0, 0, 255)))
    shown = {view: label_counts(printed, view)[ACCENT] > 0 for view in VIEWS}
    assert [view for view in VIEWS if shown[view]] == [FRONT]


def test_a_backpack_hides_the_back_and_shows_its_straps_in_front() -> None:
    packed = plain_identity(bag=Item("backpack", (0, 0, 255)))
    front, side, back = (label_counts(packed, view)[BAG] for view in (FRONT, LEFT, BACK))
    assert 0 < front < side < back


def test_a_side_view_is_narrower_than_a_front_view() -> None:
    standing = Pose(LEFT, phase=0.0)
    canvas = Canvas(256, 128)
    draw_person(canvas, plain_identity(), standing, x=64, top=20, scale=220)
    chest = slice(70, 90)
    side = (canvas.label[chest] > 0).sum()
    canvas = Canvas(256, 128)
    draw_person(canvas, plain_identity(), dataclasses.replace(standing, view=FRONT), x=64, top=20, scale=220)
    assert side < 0.8 * (canvas.label[chest] > 0).sum()


def test_the_second_domain_is_visibly_darker() -> None:
    shots = plan(SMALL)
    first, second = (
        np.mean([draw_shot(SMALL, shot)[0].mean() for shot in shots if shot.path.startswith(f"{name}/bounding_box_tr")])
        for name in ("market1501", "occluded_duke")
    )
    assert second < first - 15


def test_a_stopped_run_leaves_nothing_and_a_killed_one_is_restarted(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    drawn = itertools.count()

    def killed(settings: SynthSettings, shot: Shot) -> tuple[Image, int]:
        if next(drawn) == 30:
            raise KeyboardInterrupt
        return draw_shot(settings, shot)

    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "draw_shot", killed)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(out, SMALL, num_processes=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial" / "pool").mkdir(parents=True)  # as a kill leaves it
    (tmp_path / "out.partial" / "pool" / "left-over.jpg").write_bytes(b"")
    write_synthetic(out, SMALL, num_processes=1)
    assert hashes(out) == hashes(written)
    assert not (tmp_path / "out.partial").exists()


def test_other_settings_and_foreign_directories_are_user_errors(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must have seed 9. It was drawn with seed 3: choose another directory or delete it"):
        write_synthetic(written, dataclasses.replace(SMALL, seed=9), num_processes=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        write_synthetic(tmp_path, SMALL, num_processes=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"notes.txt is a file: choose another place"):
        write_synthetic(tmp_path / "notes.txt", SMALL, num_processes=1)
    with pytest.raises(UserError, match=r"a place that can be written to is required. /proc/people is none"):
        write_synthetic(Path("/proc/people"), SMALL, num_processes=1)


@pytest.mark.parametrize("wrong", [{"pool_images": 0}, {"queries_per_id": 5}, {"occluded_fraction": 1.5}])
def test_settings_out_of_range_are_user_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)  # type: ignore[arg-type]


def test_fewer_people_are_drawn_in_the_proportions_of_the_benchmarks() -> None:
    assert SynthSettings(**counts_of(300)) == SynthSettings()
    assert SynthSettings(**counts_of(30)) == SynthSettings(
        market_train_ids=30,
        market_test_ids=30,
        market_distractors=20,
        market_junk=10,
        occluded_duke_train_ids=20,
        occluded_duke_test_ids=15,
    )
    assert set(counts_of(1).values()) == {1}
    SynthSettings(**counts_of(4_999))
    with pytest.raises(UserError, match="--people must be at most 4,999, got 5,000"):
        counts_of(5_000)


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """As a terminal sends it: to the command and to the processes that draw."""
    script, said = tmp_path / "personmae", tmp_path / "said"
    script.write_text("from personmae.__main__ import console\nif __name__ == '__main__':\n    console()\n")
    command = [sys.executable, script, "synth", tmp_path / "two words" / "people", "--processes", "2"]
    with said.open("w") as stderr, subprocess.Popen(command, stderr=stderr, start_new_session=True) as process:
        try:
            while "of 29,700 images" not in said.read_text():
                assert process.poll() is None, said.read_text()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert said.read_text().splitlines()[-1].startswith("stopped: by Ctrl-C. Nothing half-written is left.")
    assert said.read_text().count("stopped:") == 1
    assert "Traceback" not in said.read_text()
    assert list((tmp_path / "two words").iterdir()) == []

"""Scores by camera, size and occlusion: the groups, what is known of drawn people, and tables of one's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from personmae.errors import UserError
from personmae.reid import breakdown, ranking
from personmae.reid.datasets import load_benchmark
from personmae.reid.transforms import decode_image
from personmae.synthetic.plan import SynthSettings, plan
from personmae.visualise import errors, occlusion
from personmae.visualise.section import NotHere


def settings_of(people: Path) -> SynthSettings:
    return SynthSettings(**json.loads((people / "synthetic.json").read_text())["settings"])


def nothing(_: str) -> None:
    pass


# --- cameras and sizes ---


def test_the_map_of_cameras_has_the_scores_of_the_queries_of_each_pair(found):
    mean_ap, rank1 = errors.by_camera_pair(found)
    cells = re.findall(r'title="(\d+) queries">([\d.]+)<', mean_ap.html)
    cameras = {sample.camid for sample in found.benchmark.query}
    assert len(cells) == len(re.findall(r'title="\d+ queries"', rank1.html)) > len(cameras)
    assert mean_ap.html.count("–") >= len(cameras)  # the diagonal
    assert all(0 <= float(score) <= 100 and int(count) > 0 for count, score in cells)
    assert f"{max(float(score) for _, score in cells):.1f} % from camera" in mean_ap.alt
    assert mean_ap.pixels.std() > 5


def test_a_score_that_several_pairs_share_names_none_of_them(found):
    pairs = breakdown.by_camera_pair(ranking.find_hits(found.similarity, found.labels), found.labels)
    values = np.where(np.isfinite(pairs.mAP), 0.0, np.nan)
    first, *others = np.argwhere(np.isfinite(values))
    values[tuple(first)] = 0.5
    words = errors._map_of_pairs(pairs, "mAP", values).alt
    cameras = f"from camera {pairs.query_cameras[first[0]]} to {pairs.gallery_cameras[first[1]]}"
    assert words == f"Map of mAP by pair of cameras: lowest 0.0 % in {len(others)} pairs, highest 50.0 % {cameras}"


def test_unknown_cameras_and_too_many_are_left_out(found, monkeypatch):
    labels = replace(found.labels, query_camids=np.full_like(found.labels.query_camids, -1))
    with pytest.raises(NotHere, match="no camera is known"):
        errors.by_camera_pair(replace(found, labels=labels))
    monkeypatch.setattr(errors, "MOST_CAMERAS", 2)
    with pytest.raises(NotHere, match="room for 2 cameras"):
        errors.by_camera_pair(found)


def test_terciles_share_the_queries_and_equal_ones_stay_together():
    groups = errors.terciles(np.arange(100, 130))
    assert [groups.count(name) for name in dict.fromkeys(groups)] == [10, 10, 10]
    assert list(dict.fromkeys(groups)) == ["up to 109 pixels", "110 to 119 pixels", "over 119 pixels"]
    lopsided = errors.terciles(np.array([5, 5, 5, 5, 7, 9]))
    assert lopsided[:4] == ["up to 5 pixels"] * 4
    assert errors.terciles(np.array([3, 8, 8, 8, 8])) == ["up to 3 pixels"] + ["over 3 pixels"] * 4


def test_images_of_one_height_say_nothing_of_sizes(found):
    with pytest.raises(NotHere, match="all queries are 128 pixels high"):
        errors.by_height(found)


def test_sizes_of_files_make_groups(found, tmp_path):
    moved = []
    for number, sample in enumerate(found.benchmark.query):
        image = cv2.resize(decode_image(sample.path), (30, 60 + 10 * (number % 3)))
        cv2.imwrite(str(path := tmp_path / f"{number}.png"), image)
        moved.append(replace(sample, path=str(path)))
    (drawing,) = errors.by_height(replace(found, benchmark=replace(found.benchmark, query=tuple(moved))))
    names = ["up to 60 pixels", "61 to 70 pixels", "over 70 pixels"]
    assert [drawing.alt.index(name) for name in names] == sorted(drawing.alt.index(name) for name in names)
    by_hand = [np.nanmean(found.ap[number::3]) for number in range(3)]
    assert re.findall(r"mAP ([\d.]+) %", drawing.alt) == [f"{100 * mean:.1f}" for mean in by_hand]


# --- what is hidden ---


def test_what_is_hidden_of_drawn_people_is_what_was_put_in_front(people):
    settings = settings_of(people)
    shots = [shot for shot in plan(settings) if shot.path.startswith("occluded_duke/query/")]
    of_grade = {grade: [s for s in shots if s.occlusion == grade] for grade in (0.25, 0.45, 0.65)}
    means = [np.mean([occlusion.hidden_share(settings, shot) for shot in some]) for some in of_grade.values()]
    assert means == sorted(means)
    assert 0.05 < means[0] < means[2] < 1
    assert occlusion.hidden_share(settings, shots[0]._replace(occlusion=0.0)) == 0


def test_queries_of_both_drawn_benchmarks_are_known(people):
    for name, hidden in (("market1501", 0.5), ("occluded_duke", 1.0)):
        benchmark = load_benchmark(name, people / name, splits=("query", "gallery"))
        shares = occlusion.of_queries(benchmark, None, nothing)
        assert shares.shape == (len(benchmark.query),)
        assert ((shares >= 0) & (shares <= 1)).all()
        assert (shares > 0).mean() <= hidden
        assert (shares > 0).any()
    assert (shares > 0.02).mean() > 0.9  # every query of the second was occluded


def test_people_that_were_not_drawn_need_a_table(found, tmp_path):
    real = replace(found.benchmark, root=str(tmp_path))
    with pytest.raises(NotHere, match="Give --table CSV"):
        occlusion.of_queries(real, None, nothing)
    (tmp_path / "synthetic.json").write_text('{"settings": {"seed": 0}, "format_version": 1}')  # other people
    with pytest.raises(NotHere, match="Give --table CSV"):
        occlusion.of_queries(real, None, nothing)


def test_a_table_names_queries_by_file_or_by_path(found, tmp_path):
    first, second, third = found.benchmark.query[:3]
    table = tmp_path / "hidden.csv"
    table.write_text(
        f"id,occlusion\n{Path(first.path).name},0.75\nquery/{Path(second.path).name},0.0\nother.jpg,1\n{Path(third.path).name},0.5\n"
    )
    shares = occlusion.of_queries(found.benchmark, table, nothing)
    assert shares[:3].tolist() == [0.75, 0.0, 0.5]
    assert np.isnan(shares[3:]).all()
    (drawing,) = errors.by_occlusion(found, table, nothing)
    assert re.search(r"50 % and more: mAP [\d.]+ %, Rank-1 [\d.]+ %, 2 queries", drawing.alt)
    assert "under 5 % hidden: mAP" in drawing.alt
    assert "not known: mAP" in drawing.alt
    assert drawing.alt.index("under 5 %") < drawing.alt.index("50 % and more") < drawing.alt.index("not known")
    assert "hidden.csv" in drawing.caption


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,hidden\na.jpg,1\n", "needs the columns id and occlusion"),
        ("id,occlusion\na.jpg,30\n", "line 2, must have a share in 0 ... 1"),
        ("id,occlusion\na.jpg,\n", "line 2, must have a share in 0 ... 1"),
        ("id,occlusion\na.jpg,nan\n", "line 2, must have a share in 0 ... 1"),
        ("id,occlusion\na.jpg,0.5\n", "None of its 1 is"),
        (None, "cannot be read"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(found, tmp_path, text, words):
    table = tmp_path / "hidden.csv"
    if text:
        table.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        occlusion.of_queries(found.benchmark, table, nothing)


def test_the_note_says_what_is_left_out_and_why(found):
    part = errors.draw(found, None, nothing)
    assert [drawing.title for drawing in part.drawings] == [
        "mAP by pair of cameras",
        "Rank-1 by pair of cameras",
        "Scores by how much of the person is hidden",
    ]
    assert "Left out: all queries are 128 pixels high" in part.note

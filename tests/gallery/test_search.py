"""Queries by ids and by several at once, filters, re-ranking, and how answers are printed and drawn."""

import io
import json
import math
from pathlib import Path

import galleries
import numpy as np
import pytest
import torch
from galleries import feature, inputs, named
from PIL import Image

from personmae.__main__ import main
from personmae.errors import EXIT_COMPLETE, EXIT_USER_ERROR, UserError
from personmae.gallery import edit, output, search, sheet
from personmae.gallery.catalog import Gallery, open_gallery
from personmae.gallery.search import Filters
from personmae.reid.rerank import k_reciprocal

IDS = [*named(9), "a0009.jpg", *named(120)[10:]]  # the tenth names no camera


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    rows = "".join(f"{name},{number % 4},{number}\n" for number, name in enumerate(IDS) if number != 9)
    (folder / "t.csv").write_text(f"id,camera,time\n{rows}{IDS[9]},,\n")
    edit.build(inputs(folder, IDS, table=folder / "t.csv"), folder / "gallery")
    return folder / "gallery"


@pytest.fixture
def gallery(where: Path) -> Gallery:
    return open_gallery(where)


def ranked(query: np.ndarray, but: set[int]) -> list[str]:
    """All ids by falling cosine, by a plain loop."""
    scores = {number: float(query @ feature(name)) for number, name in enumerate(IDS) if number not in but}
    return [IDS[number] for number in sorted(scores, key=lambda number: -scores[number])]


def ids(answer: search.Answer) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in answer.hits]


@pytest.fixture(autouse=True)
def _signals(restore_signals: None) -> None:
    """Programs that run in this process take signals."""


# --- queries ---


def test_each_id_finds_the_others_and_not_itself(gallery):
    answer = search.search(gallery, search.by_ids(gallery, IDS[:3], each=True), top=0)
    assert ids(answer) == [ranked(feature(IDS[number]), {number}) for number in range(3)]
    assert [hit.rank for hit in answer.hits[0]] == list(range(1, 120))
    assert answer.how == "exact"


def test_several_are_one_person_the_mean_of_their_features(gallery):
    (query,) = search.by_ids(gallery, IDS[:3])
    mean = np.mean([feature(name) for name in IDS[:3]], axis=0)
    np.testing.assert_allclose(query.feature.numpy(), mean / np.linalg.norm(mean), atol=1e-6)
    assert ids(search.search(gallery, [query], top=7)) == [ranked(mean, {0, 1, 2})[:7]]
    parts = [*search.by_ids(gallery, IDS[:2]), *search.by_ids(gallery, IDS[2:3])]
    one = search.joined(parts)
    assert (one.names, one.rows, one.cameras) == (query.names, query.rows, query.cameras)
    # Of two means of different numbers of images: each counts as often as it has images.
    weighted = 2 * parts[0].feature + parts[1].feature
    torch.testing.assert_close(one.feature, weighted / weighted.norm())


# --- filters ---


@pytest.mark.parametrize(
    ("filters", "keeps"),
    [
        (Filters(cameras=("1",)), lambda n: n % 4 == 1 and n != 9),
        (Filters(cameras=("1", "3")), lambda n: n % 4 in (1, 3) and n != 9),
        (Filters(since=50), lambda n: n >= 50),
        (Filters(until=50), lambda n: n <= 50 and n != 9),
        (Filters(since=20, until=20), lambda n: n == 20),
        (Filters(other_cameras=True), lambda n: n % 4 != 2 or n == 9),
        (Filters(cameras=("2",), other_cameras=True), lambda n: False),
        (Filters(since=30, cameras=("0",), other_cameras=True), lambda n: n >= 30 and n % 4 == 0),
    ],
)
def test_filters_leave_exactly_what_they_say(gallery, filters, keeps):
    answer = search.search(gallery, search.by_ids(gallery, [IDS[6]]), top=0, filters=filters)
    everything = ranked(feature(IDS[6]), {6})
    assert ids(answer) == [[name for name in everything if keeps(IDS.index(name))]]


def test_a_least_score_cuts_the_list(gallery):
    query = search.by_ids(gallery, [IDS[6]])
    hits = search.search(gallery, query, top=0, filters=Filters(min_score=0.5)).hits[0]
    assert [hit.id for hit in hits] == [n for n in ranked(feature(IDS[6]), {6}) if feature(IDS[6]) @ feature(n) >= 0.5]
    assert 0 < len(hits) < 119


# --- re-ranking ---


def test_re_ranking_orders_the_best_by_k_reciprocal_neighbours_and_leaves_the_others(gallery):
    query = search.by_ids(gallery, [IDS[6]])
    plain = ids(search.search(gallery, query, top=0))[0]
    hits = search.search(gallery, query, top=0, rerank=40).hits[0]
    features = torch.from_numpy(np.stack([feature(name) for name in plain[:40]]))
    values = k_reciprocal(torch.from_numpy(feature(IDS[6]))[None], features)(np.array([0]))[0]
    order = values.argsort(descending=True, stable=True)
    assert [hit.id for hit in hits[:40]] == [plain[place] for place in order.tolist()] != plain[:40]
    assert [hit.id for hit in hits[40:]] == plain[40:]
    assert [hit.reranked for hit in hits[:40]] == pytest.approx(values[order].tolist(), abs=1e-5)
    assert hits[40].reranked is None
    assert hits[0].score == pytest.approx(float(feature(IDS[6]) @ feature(hits[0].id)), abs=1e-6)
    assert ids(search.search(gallery, query, top=5, rerank=40))[0] == [hit.id for hit in hits[:5]]


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": Filters(cameras=("9",))}, "It has no '9'. Known are 0, 1, 2, 3"),
        ({"top": -1}, "--top must be at least 1"),
        ({"rerank": 1}, "--rerank must be at least 2"),
        ({"filters": Filters(min_score=2)}, "--min-score must be a cosine, from -1 to 1. Got 2"),
        ({"filters": Filters(min_score=math.nan)}, "--min-score must be a cosine, from -1 to 1. Got nan"),
        ({"filters": Filters(since=9, until=8)}, "--since must not be later than --until. Got 9 and 8: exchange them"),
    ],
)
def test_options_that_do_not_fit_are_one_line(gallery, options, message):
    with pytest.raises(UserError, match=message):
        search.search(gallery, search.by_ids(gallery, IDS[:1]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["."], "images are required, and . is a folder"),
        (["no.jpg"], "There is none at no.jpg"),
        (["--min-score", "2"], "--min-score must be a cosine"),
        (["--cameras", ","], "--cameras needs names of cameras"),
        (["--picture", "found"], "a picture named .png or .jpg is required. Got found: name it found.png"),
        (["--picture", "folder.png"], "folder.png is a folder: choose another"),
        (["--picture", "t.csv/x.png"], "t.csv cannot be made"),
    ],
)
def test_a_query_that_cannot_be_answered_is_refused_before_a_model_is_read(
    where, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "t.csv").write_text("")
    (tmp_path / "a.jpg").write_bytes(b"")
    assert main(["gallery", "query", str(where), "a.jpg", *options, "--model", "no_model"]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_the_folder_of_a_picture_is_made(where, tmp_path):
    picture = tmp_path / "new" / "folder" / "found.png"
    assert main(["gallery", "query", str(where), "--id", IDS[0], "--picture", str(picture)]) == EXIT_COMPLETE
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


def test_what_cannot_be_searched_for_is_one_line(gallery, tmp_path):
    with pytest.raises(UserError, match=r"ids of the gallery are required. x is not in"):
        search.by_ids(gallery, [IDS[0], "x"])
    with pytest.raises(UserError, match="something to search for is required"):
        search.search(gallery, [])
    with pytest.raises(UserError, match=rf"needs the camera of each query. That of {IDS[9]} is not known"):
        search.search(gallery, search.by_ids(gallery, [IDS[9]]), filters=Filters(other_cameras=True))
    where = galleries.build(tmp_path, named(3))
    with pytest.raises(UserError, match="times are required for --since and --until"):
        search.search(open_gallery(where), search.by_ids(open_gallery(where), named(1)), filters=Filters(since=1))
    edit.remove(where, named(3))
    with pytest.raises(UserError, match=r"is empty: add some"):
        search.search(open_gallery(where), search.by_ids(gallery, IDS[:1]))


# --- what is printed and drawn ---


def test_a_table_has_what_is_known_and_json_has_all_of_it(gallery):
    answer = search.search(gallery, search.by_ids(gallery, [IDS[8], IDS[13]], each=True), top=119)
    first, head, best, *_ = output.to_table(gallery, answer).splitlines()
    hit = answer.hits[0][0]
    assert first == IDS[8]
    assert head.split() == ["rank", "score", "camera", "time", "id"]
    assert best.split() == ["1", f"{hit.score:.4f}", hit.camera, f"{hit.time:g}", hit.id]
    record = json.loads(output.to_json(gallery, answer))
    assert [query["query"] for query in record["queries"]] == [[IDS[8]], [IDS[13]]]
    assert record["queries"][0]["found"][0] == {
        "rank": 1,
        "id": hit.id,
        "score": hit.score,
        "camera": hit.camera,
        "time": hit.time,
    }
    (unknown,) = [found for found in record["queries"][0]["found"] if found["id"] == IDS[9]]
    assert set(unknown) == {"rank", "id", "score"}
    assert set(output.to_ids(answer).splitlines()) == set(IDS)


def test_nothing_that_was_found_is_told(gallery):
    answer = search.search(gallery, search.by_ids(gallery, [IDS[6]]), filters=Filters(cameras=("2",), other_cameras=True))
    assert output.to_table(gallery, answer) == f"{IDS[6]}: nothing was found"
    assert output.to_ids(answer) == ""


def test_a_picture_shows_the_query_and_what_was_found(tmp_path, images):
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jp*g"))
    edit.build(edit.Inputs(str(galleries.write(tmp_path / "f.npy", names)), images=str(images)), tmp_path / "gallery")
    gallery = open_gallery(tmp_path / "gallery")
    answer = search.search(gallery, search.by_ids(gallery, names[:2], each=True), top=4)
    for name in ("a.png", "b.jpg"):
        sheet.write(tmp_path / name, gallery, answer)
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 5 * sheet.CELL[1]
            assert picture.size[1] > 2 * sheet.CELL[0]
            drawn = np.asarray(picture.convert("RGB")).astype(int)
    require_drawn(drawn, gallery, answer.hits[0][0].row, at=sheet.place(0, 1))
    with pytest.raises(UserError, match=r"a picture named .png or .jpg is required"):
        sheet.write(tmp_path / "a.gif", gallery, answer)


def require_drawn(drawn: np.ndarray, gallery: Gallery, row: int, at: tuple[int, int]) -> None:
    """The thumbnail of a row is in the middle of the cell whose corner (x, y) is given, upright."""
    with Image.open(io.BytesIO(gallery.thumbnail(row))) as image:
        thumbnail = np.asarray(image).astype(int)
    left, top = (
        corner + (side - size) // 2 for corner, side, size in zip(at, sheet.CELL[::-1], thumbnail.shape[1::-1], strict=True)
    )
    there = drawn[top : top + thumbnail.shape[0], left : left + thumbnail.shape[1]]
    assert np.abs(there - thumbnail).mean() < 6  # it may have gone through a JPEG once more
    assert np.abs(there - thumbnail[::-1]).mean() > 12


def test_much_that_was_found_is_drawn_in_rows_of_ten(tmp_path, images):
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jp*g"))
    edit.build(edit.Inputs(str(galleries.write(tmp_path / "f.npy", names)), images=str(images)), tmp_path / "gallery")
    gallery = open_gallery(tmp_path / "gallery")
    answer = search.search(gallery, search.by_ids(gallery, names[:2], each=True), top=23)
    picture = sheet.draw(gallery, answer)
    height = sheet._TITLE + 3 * sheet._CELL_HEIGHT
    assert picture.size == (sheet.place(0, 11)[0], sheet._GAP + 2 * height)
    drawn = np.asarray(picture).astype(int)
    for number, hits in enumerate(answer.hits):
        for hit in hits:
            row, column = divmod(hit.rank - 1, 10)
            require_drawn(drawn, gallery, hit.row, at=sheet.place(row, 1 + column, sheet._GAP + number * height))
    many = search.search(gallery, search.by_ids(gallery, names, each=True) * 8, top=1)
    with pytest.raises(UserError, match=r"a JPEG has at most 65,500 pixels a side. .*b.jpg would have .*: name it b.png"):
        sheet.write(tmp_path / "b.jpg", gallery, many)
    assert not (tmp_path / "b.jpg").exists()
    with pytest.raises(UserError, match=r"at most 2,000 images fit into one picture. 400 queries of 49 are more"):
        sheet.draw(gallery, search.search(gallery, search.by_ids(gallery, names, each=True) * 8, top=0))

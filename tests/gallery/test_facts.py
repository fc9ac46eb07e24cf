"""Cameras and times: from names, tables and columns, and what cannot be read as one."""

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from personmae.errors import UserError
from personmae.gallery import facts


@pytest.mark.parametrize(
    ("name", "camera"),
    [("0001_c2s1_000451_03.jpg", "2"), ("a/0001_c12_f3.jpg", "12"), ("x_c3/0001.jpg", ""), ("plain.jpg", ""), ("a:7", "")],
)
def test_a_camera_is_read_from_a_file_s_own_name(name, camera):
    assert facts.camera_of(name) == camera


def of_table(path: Path, ids: list[str]) -> facts.Facts:
    """What a table has of ids, over what their names have."""
    table = facts.read_table(path)
    assert table.in_words(ids)
    return table.over(ids, facts.of_names(ids))


def test_a_table_gives_cameras_and_times_by_id_in_any_order(tmp_path):
    (tmp_path / "t.csv").write_text("\ufefftime,id,camera,more\n7.5,b,door,x\n,a,,y\n", encoding="utf-8")
    found = of_table(tmp_path / "t.csv", ["a", "b", "c"])
    assert found.cameras == ["", "door", ""]
    assert np.isnan(found.times).tolist() == [True, False, True]
    assert (found.times[1], found.kind) == (7.5, facts.NUMBER)
    (tmp_path / "t.csv").write_text("id,time\nx_c4s1.jpg,2026-05-31T14:00:00+02:00\n")
    found = of_table(tmp_path / "t.csv", ["x_c4s1.jpg"])
    assert found.cameras == ["4"]
    assert found.times.tolist() == [datetime(2026, 5, 31, 12, tzinfo=UTC).timestamp()]


def test_what_a_table_does_not_have_stays_as_it_was_known(tmp_path):
    ids = ["a_c1s1.jpg", "b_c2s1.jpg", "c_c3s1.jpg", "d.jpg"]
    (tmp_path / "t.csv").write_text("id,camera,time\na_c1s1.jpg,door,5\nb_c2s1.jpg,,6\nnosuch.jpg,7,7\n")
    table = facts.read_table(tmp_path / "t.csv")
    assert table.over(ids, facts.of_names(ids)).cameras == ["door", "2", "3", ""]
    frames = facts.of_columns(None, [1, 2, 3, 4], ids, "here")
    assert table.over(ids, frames).times.tolist() == [5, 6, 3, 4]
    assert table.over(ids, frames).kind == facts.NUMBER
    (tmp_path / "t.csv").write_text("id,time\nb_c2s1.jpg,2026-05-31\n")
    dated = facts.read_table(tmp_path / "t.csv").over(ids, frames)  # no frame number becomes a date
    assert (dated.kind, np.isnan(dated.times).tolist()) == (facts.DATE, [True, False, True, True])
    (tmp_path / "t.csv").write_text("id,camera\nd.jpg,9\n")
    named = facts.read_table(tmp_path / "t.csv").over(ids, frames)
    assert (named.cameras, named.times.tolist(), named.kind) == (["1", "2", "3", "9"], [1, 2, 3, 4], facts.NUMBER)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,1\nb,2\n", "names 2 of 2 images"),
        ("a,1\n", "names 1 of 2 images"),
        ("a,1\nz,2\n", "names 1 of 2 images, and 1 row names no image, such as z"),
        ("a,1\nz,2\ny,2\n", "names 1 of 2 images, and 2 rows name no image, such as z"),
    ],
)
def test_how_much_of_a_table_is_used_is_counted(tmp_path, rows, words):
    (tmp_path / "t.csv").write_text(f"id,time\n{rows}")
    assert facts.read_table(tmp_path / "t.csv").in_words(["a", "b"]) == f"{tmp_path / 't.csv'} {words}"


def test_a_date_without_a_zone_is_utc_and_comes_back_as_it_was():
    for text in ("2026-05-31", "2026-05-31T14:00:00", "2026-05-31T14:00:00Z", "2026-05-31 16:00:00+02:00"):
        (time,), kind = facts.parse_times([text], "here")
        assert kind == facts.DATE
        day = datetime(2026, 5, 31, 0 if len(text) == 10 else 14, tzinfo=UTC)
        assert time == day.timestamp()
        assert facts.in_words(time, kind) == day.strftime("%Y-%m-%dT%H:%M:%SZ")
    for text in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"):
        (time,), kind = facts.parse_times([text], "here")
        assert facts.in_words(time, kind) == text
    assert facts.in_words(1234567.25, facts.NUMBER) == "1234567.25"
    assert facts.in_words(math.nan, None) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,time\na,soon\n", "must be a number or a date such as .* has 'soon'"),
        ("id,time\na,1\nb,2026-01-01\n", "must be all dates or all numbers"),
        ("id,time\na,nan\n", "must be a number or a date"),
        ("id,time\na,0001-01-01T00:00:00+14:00\n", "from the year 1 to 9999 in UTC .* has '0001-01-01T00:00:00"),
        ("id,time\na,9999-12-31T23:59:59-14:00\n", "from the year 1 to 9999 in UTC"),
        ("id,time\na,1\na,2\n", "line 3, names a a second time"),
        ("id,where\na,1\n", "needs the columns id and camera"),
        ("", "needs the columns id and camera"),
        ("id,time\nz,1\n", "names none of them"),
        ("id,time\n,1\n", "line 2, has no id"),
        ("id,time\n" + "a" * 200_000 + ",1\n", "cannot be read: field larger than"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        of_table(tmp_path / "t.csv", ["a", "b"])
    assert "\n" not in str(caught.value)

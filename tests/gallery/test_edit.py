"""Build, add and remove: what is in a gallery afterwards, what is not in it any more, and what is refused."""

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import galleries
import numpy as np
import pytest
import warm
from full_disk import full_disk
from galleries import build, ids_of, inputs, named, require_whole, write

from personmae.__main__ import main
from personmae.errors import EXIT_COMPLETE, Unavailable, UserError
from personmae.gallery import edit, segment, store
from personmae.gallery.catalog import open_gallery

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit, "SEGMENT_ROWS", 64)
    monkeypatch.setattr(segment, "PIECE_ROWS", 10)


def audit(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / store.AUDIT).read_text().splitlines()]


def content(where: Path) -> dict[str, bytes]:
    """All files of a gallery by their path."""
    return {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()}


# --- what is there ---


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gallery_has_every_row_of_its_features_in_their_order(tmp_path, dtype):
    ids = named(150)
    where = build(tmp_path, ids, dtype=dtype)
    require_whole(where, ids)
    gallery = open_gallery(where)
    assert [len(part) for part in gallery.segments] == [64, 64, 22]
    assert {str(part.features.dtype) for part in gallery.segments} == {dtype}
    assert [line["action"] for line in audit(where)] == ["build"]
    assert not (tmp_path / "gallery.partial").exists()


def test_features_of_any_length_are_brought_to_length_one(tmp_path):
    ids = named(20)
    edit.build(edit.Inputs(str(write(tmp_path / "f.npy", ids, scale=7.0))), tmp_path / "gallery")
    require_whole(tmp_path / "gallery", ids)


def test_what_is_added_comes_last_and_small_segments_are_joined(tmp_path):
    ids = named(100)
    where = build(tmp_path, ids[:30])
    numbers = []
    for start in range(30, 100, 2):
        outcome = edit.add(where, inputs(tmp_path, ids[start : start + 2]))
        assert (outcome.num_changed, outcome.num_images) == (2, start + 2)
        numbers.append(len(open_gallery(where).segments))
    require_whole(where, ids)
    assert max(numbers) <= 5
    assert [line["action"] for line in audit(where)] == ["build"] + 35 * ["add"]
    assert sorted(path.name for path in (where / store.SEGMENTS).iterdir()) == sorted(
        name for name, _ in store.read_manifest(where).segments
    )


def test_images_that_are_there_already_are_refused_before_a_model_is_read(tmp_path, images):
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jp*g"))
    where = tmp_path / "gallery"
    edit.build(edit.Inputs(str(write(tmp_path / "f.npy", names[:1]))), where)
    with pytest.raises(UserError, match=rf"1 of {len(names)} are, such as {names[0]}"):
        edit.add(where, edit.Inputs(str(images), model=str(tmp_path / "no_model")))


def test_what_is_removed_is_in_no_file_any_more(tmp_path, images):
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jp*g"))
    features = edit.Inputs(str(write(tmp_path / "f.npy", names)), images=str(images))
    edit.build(features, tmp_path / "gallery")
    where, gone, kept = tmp_path / "gallery", names[3:40:4], [name for name in names if name not in names[3:40:4]]
    gallery = open_gallery(where)
    traces = []
    for row in gallery.rows_of(gone).tolist():
        assert cv2.imdecode(np.frombuffer(gallery.thumbnail(row), np.uint8), cv2.IMREAD_COLOR) is not None
        traces += [gallery.thumbnail(row), gallery.features(np.array([row])).tobytes(), ids_of(gallery)[row].encode()]
    assert all(any(trace in data for data in content(where).values()) for trace in traces)
    thumbnails = {name: gallery.thumbnail(row) for row, name in enumerate(names)}
    before = set(content(where))

    outcome = edit.remove(where, gone)

    assert (outcome.num_changed, outcome.num_images) == (len(gone), len(kept))
    after = content(where)
    assert [name for name, data in after.items() for trace in traces if trace in data] == []
    gallery = open_gallery(where)
    assert ids_of(gallery) == kept
    assert {name: gallery.thumbnail(row) for row, name in enumerate(kept)} == {name: thumbnails[name] for name in kept}
    line = audit(where)[-1]
    assert (line["action"], line["num_images"]) == ("remove", len(gone))
    assert line["ids_sha256"] == [store.hash_id(name) for name in gone]
    assert before - set(after)  # segments were replaced, not changed
    assert edit.remove(where, gone).passed_over == len(gone)
    assert len(audit(where)) == 2


def test_only_segments_with_removed_rows_are_written_again(tmp_path):
    where = build(tmp_path, named(150))
    first, second, third = store.read_manifest(where).segments
    edit.remove(where, named(150)[64:66])
    now = store.read_manifest(where).segments
    assert (now[0], now[2]) == (first, third)
    assert now[1][1] == second[1] - 2
    edit.remove(where, named(150)[66:128])
    assert store.read_manifest(where).segments == [first, third]
    edit.remove(where, [*named(150)[:64], *named(150)[128:]])
    require_whole(where, [])
    edit.add(where, inputs(tmp_path, named(5, "new")))
    require_whole(where, named(5, "new"))


def test_what_was_removed_does_not_come_back_unless_it_is_asked_for(tmp_path):
    ids = named(20)
    where = build(tmp_path, ids)
    edit.remove(where, ids[5:8])
    outcome = edit.add(where, inputs(tmp_path, [*ids[5:8], "new_c1"]))
    assert (outcome.num_changed, outcome.passed_over) == (1, 3)
    assert audit(where)[-1]["passed_over"] == 3
    assert edit.add(where, inputs(tmp_path, ids[5:6])).num_changed == 0
    assert edit.add(where, inputs(tmp_path, ids[5:6]), again=True).num_changed == 1
    require_whole(where, [*ids[:5], *ids[8:], "new_c1", ids[5]])


def test_ids_with_what_other_programs_take_for_the_end_of_a_line_are_removed_by_a_list(tmp_path):
    ids = [f"a{mark}b_c1_{number}.jpg" for number, mark in enumerate("\x0b\x0c\x1c\x85\u2028\u2029")]
    where = build(tmp_path, [*ids, "rest_c1.jpg"])
    (tmp_path / "found.txt").write_bytes("".join(f"{name}\r\n" for name in ids).encode("utf-8-sig"))  # as Windows writes it
    assert main(["gallery", "remove", str(where), "--ids", str(tmp_path / "found.txt")]) == EXIT_COMPLETE
    require_whole(where, ["rest_c1.jpg"])


def test_a_gallery_that_is_open_stays_as_it_was(tmp_path):
    ids = named(100)
    where = build(tmp_path, ids)
    gallery = open_gallery(where)
    assert gallery.is_current()
    edit.remove(where, ids[:50])
    assert not gallery.is_current()
    assert ids_of(gallery) == ids
    np.testing.assert_allclose(gallery.features(np.arange(100))[7], galleries.feature(ids[7]), atol=1e-6)


def test_a_gallery_that_was_built_again_in_its_folder_is_another_one(tmp_path):
    where = build(tmp_path, named(20))
    gallery = open_gallery(where)
    shutil.rmtree(where)
    build(tmp_path, named(20, "b"))
    assert store.read_manifest(where).generation == gallery.manifest.generation
    assert not gallery.is_current()
    assert open_gallery(where).is_current()
    shutil.rmtree(where)
    assert not gallery.is_current()


def test_no_gallery_is_opened_in_parts_of_two(tmp_path, monkeypatch):
    """One is deleted and another built in its place after the manifest was read and before its segments are."""
    (tmp_path / "other").mkdir()
    where, other = build(tmp_path, named(20)), build(tmp_path / "other", named(12, "b"))
    read = segment.read

    def read_late(folder):
        if other.exists():
            shutil.rmtree(where)
            other.rename(where)
        return read(folder)

    monkeypatch.setattr(segment, "read", read_late)
    gallery = open_gallery(where)
    assert len(gallery) == 12
    require_whole(where, named(12, "b"))


# --- what is refused ---


def _damage(where: Path) -> None:
    (where / store.SEGMENTS / store.read_manifest(where).segments[0][0] / segment.FEATURES).unlink()


REFUSED: list[tuple[Callable[[Path, Path], object], str]] = [
    (lambda tmp, where: edit.build(inputs(tmp, named(3)), where), "exists: delete it or choose another"),
    (lambda tmp, where: edit.add(tmp, inputs(tmp, named(3))), "has no gallery.json: build one"),
    (lambda tmp, where: edit.add(where, inputs(tmp, ["x", *named(3)])), r"3 of 4 are, such as a0000_c1s1.jpg"),
    (lambda tmp, where: edit.add(where, inputs(tmp, ["x", "y", "x"])), "has x more than once"),
    (lambda tmp, where: edit.remove(where, ["a0001_c2s1.jpg", "x"]), r"1 of 2 are not in .*such as x: nothing was removed"),
    (lambda tmp, where: edit.add(where, edit.Inputs(str(tmp / "no.npy"))), "cannot be read as one"),
    (lambda tmp, where: edit.add(where, inputs(tmp, ["x"], table=tmp / "t.csv")), "needs the columns id and camera, time"),
    (lambda tmp, where: (_damage(where), open_gallery(where)), "is damaged, part of it cannot be read"),
    (lambda tmp, where: edit.add(where, edit.Inputs(str(tmp))), "has images: give --model RUN"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path, call, message):
    where = build(tmp_path, named(5))
    (tmp_path / "t.csv").write_text("name,where\n")
    before = content(where)
    with pytest.raises(UserError, match=message) as caught:
        call(tmp_path, where)
    assert "\n" not in str(caught.value)
    if "damaged" not in message:
        assert {name: data for name, data in content(where).items() if name != store.LOCK} == {
            name: data for name, data in before.items() if name != store.LOCK
        }
        assert [path for path in where.iterdir() if path.name.startswith(store.INCOMING)] == []


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 3), np.float32), "features of 16 numbers are required"),
        (np.ones((3, 16), np.float32), "as many ids as features"),
        (np.ones((2, 16), np.int64), "array of floats"),
        (np.array([[1.0] * 16, [np.nan] * 16], np.float32), "1 others among 2, such as second"),
        (np.array([[0.0] * 16, [1.0] * 16], np.float32), "such as first"),
        (np.ones((0, 16), np.float32), "as many ids as features"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(tmp_path, array, message):
    where = build(tmp_path, named(5))
    np.save(tmp_path / "f.npy", array)
    (tmp_path / "f.ids.txt").write_text("first\nsecond\n")
    with pytest.raises(UserError, match=message):
        edit.add(where, edit.Inputs(str(tmp_path / "f.npy")))
    require_whole(where, named(5))
    assert len(list((where / store.SEGMENTS).iterdir())) == 1  # what was begun is deleted at once


def test_features_of_another_model_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parquet(name: str, ids: list[str], digest: str) -> edit.Inputs:
        flat = pa.array(np.concatenate([galleries.feature(i) for i in ids]))
        columns = {
            "id": pa.array(ids),
            "frame": pa.array(range(len(ids))),
            "feature": pa.FixedSizeListArray.from_arrays(flat, 16),
        }
        table = pa.table(columns).replace_schema_metadata({b"personmae": json.dumps({"model": digest}).encode()})
        pq.write_table(table, tmp_path / name)
        return edit.Inputs(str(tmp_path / name))

    edit.build(parquet("a.parquet", named(30), "one"), tmp_path / "gallery")
    require_whole(tmp_path / "gallery", named(30))
    assert open_gallery(tmp_path / "gallery").rows["time"].to_pylist() == list(range(30))
    with pytest.raises(UserError, match="features of the gallery's own model are required"):
        edit.add(tmp_path / "gallery", parquet("b.parquet", named(3, "b"), "another"))
    assert edit.add(tmp_path / "gallery", parquet("c.parquet", named(3, "c"), "one")).num_images == 33


@pytest.mark.parametrize("action", ["add", "remove"])
def test_a_full_disk_is_an_error_and_the_gallery_is_as_it_was(tmp_path, action):
    where = build(tmp_path, named(90))
    more, before = inputs(tmp_path, named(40, "b")), content(where) | {store.LOCK: b""}
    with full_disk(), pytest.raises(OSError, match="File too large"):
        edit.add(where, more) if action == "add" else edit.remove(where, named(3))
    assert content(where) == before
    edit.add(where, more)
    require_whole(where, [*named(90), *named(40, "b")])


# --- several processes, and kills ---


def test_a_second_writer_waits_and_then_says_so(tmp_path):
    where = build(tmp_path, named(5))
    said: list[str] = []
    told = pytest.raises(Unavailable, match=r"has been writing .* for 0.1 s. Run this again")
    with store.writing(where), told, store.writing(where, said.append, wait_seconds=0.1):
        pass
    assert said == [f"waiting for another process that writes {where}"]


TOUCHES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def _killed_at(number: int, change: Callable[[], object], below: Path) -> bool:
    """Whether a change in a process of its own was killed at its so-manyeth touch of a file. False where it has fewer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no thread is needed in the child
        child = os.fork()
    if not child:
        left = [number]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate") and str(below) in str(
                arguments[0]
            ):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            change()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("action", ["add", "remove"])
def test_a_kill_at_any_touch_of_a_file_leaves_the_old_gallery_or_the_new_one(tmp_path, action):
    ids = named(90)
    more = inputs(tmp_path, named(7, "b"))
    new = [*ids, *named(7, "b")] if action == "add" else [*ids[:3], *ids[4:88], ids[89]]
    seen, where = [], tmp_path
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        where = build(folder, ids)
        add, remove = (lambda w=where: edit.add(w, more)), (lambda w=where: edit.remove(w, [ids[3], ids[88]]))
        change = add if action == "add" else remove
        if not _killed_at(number, change, where):
            break
        found = ids_of(open_gallery(where))
        assert found in (ids, new), number
        require_whole(where, found)
        with store.writing(where):  # the next writer puts all in order
            pass
        require_whole(where, found)
        assert [line["action"] for line in audit(where)] == ["build"] + [action] * (found == new)
        assert {path.name for path in (where / store.SEGMENTS).iterdir()} == {n for n, _ in store.read_manifest(where).segments}
        assert {path.name for path in where.iterdir()} == {store.MANIFEST, store.AUDIT, store.LOCK, store.SEGMENTS}
        seen.append(found == new)
    assert len(seen) > 10
    assert seen == sorted(seen)  # from some touch on it is the new one
    assert set(seen) == {False, True}
    require_whole(where, new)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from galleries import inputs, named
from personmae.gallery import edit
where, prefix = Path(sys.argv[1]), sys.argv[2]
edit.SEGMENT_ROWS = 64
for turn in range(8):
    batch = named(5, f"{prefix}{turn}-")
    edit.add(where, inputs(where.parent, batch))
    if turn % 2:
        edit.remove(where, batch)
"""


@pytest.mark.slow
@pytest.mark.integration
def test_two_writers_and_a_reader_at_once_see_whole_changes_alone(tmp_path):
    where = build(tmp_path, named(40))
    (tmp_path / "more").mkdir()
    writers = [warm.start(["-c", WRITER, where, prefix, Path(__file__).parent], cwd=ROOT) for prefix in "xy"]
    states = set()
    while any(writer.poll() is None for writer in writers):
        ids = ids_of(open_gallery(where))
        require_features(where)
        batches = {name.partition("-")[0] for name in ids if "-" in name}
        assert ids[:40] == named(40)
        assert len(ids) == 40 + 5 * len(batches)
        states.add(tuple(ids))
    assert [writer.wait() for writer in writers] == [0, 0]
    left = {name.partition("-")[0] for name in ids_of(open_gallery(where)) if "-" in name}
    assert left == {f"{prefix}{turn}" for prefix in "xy" for turn in (0, 2, 4, 6)}
    require_features(where)
    assert [line["action"] for line in audit(where)].count("add") == 16
    assert [line["action"] for line in audit(where)].count("remove") == 8
    assert len(states) > 2


def require_features(where: Path) -> None:
    gallery = open_gallery(where)
    expected = [galleries.feature(name) for name in ids_of(gallery)]
    np.testing.assert_allclose(gallery.features(np.arange(len(gallery))), np.stack(expected), atol=1e-6)

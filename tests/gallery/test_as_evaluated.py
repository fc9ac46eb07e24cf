"""The verbs as a user types them, on a benchmark: what is found is what ``personmae evaluate`` scores."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from made_encoders import write_finetuning
from people import draw_few_people
from PIL import Image

from personmae import evaluate
from personmae.__main__ import main
from personmae.errors import EXIT_COMPLETE, EXIT_USER_ERROR
from personmae.gallery.catalog import open_gallery

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SIZE = 64, 32  # of the images that the model sees, in pixels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning with random weights."""
    return write_finetuning(tmp_path_factory.mktemp("model") / "run", SIZE)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_few_people(tmp_path_factory.mktemp("synth")) / "market1501"


@pytest.fixture(scope="module")
def built(run: Path, benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("built") / "gallery"
    assert main(["gallery", "build", str(benchmark / "bounding_box_test"), str(where), "--model", str(run)]) == EXIT_COMPLETE
    return where


@pytest.fixture(autouse=True)
def _signals(restore_signals: None) -> None:
    """Programs that run in this process take signals."""


def of_name(name: str) -> tuple[int, int]:
    """(pid, camid) of a Market-1501 file name."""
    match = re.match(r"(-?\d+)_c(\d+)", Path(name).name)
    assert match
    return int(match[1]), int(match[2])


def scores_of(queries: list[dict[str, Any]]) -> dict[str, float]:
    """mAP, rank-1 and mINP of rank lists, by a loop over the places of each, with the field's protocol."""
    found = []
    for query in queries:
        pid, camid = of_name(query["query"][0])
        seen = [of_name(hit["id"]) for hit in query["found"]]
        kept = [other for other, camera in seen if other != -1 and (other, camera) != (pid, camid)]
        places = [place for place, other in enumerate(kept, 1) if other == pid]
        if places:
            precision = np.mean([number / place for number, place in enumerate(places, 1)])
            found.append((precision, places[0] == 1, len(places) / places[-1]))
    return dict(zip(("mAP", "rank1", "mINP"), np.mean(found, axis=0).tolist(), strict=True))


def test_what_a_query_finds_has_the_scores_of_evaluate(run, benchmark, built, tmp_path, capsys):
    evaluate.run(str(run), "market1501", str(benchmark), out=tmp_path / "out")
    expected = json.loads((tmp_path / "out" / "result.json").read_text())
    queries = sorted(map(str, (benchmark / "query").glob("*.jpg")))
    capsys.readouterr()
    assert main(["gallery", "query", str(built), *queries, "--each", "--top", "0", "--format", "json"]) == EXIT_COMPLETE
    record = json.loads(capsys.readouterr().out)
    assert len(record["queries"]) == expected["num_queries"] > 5
    assert record["num_images"] == len(list((benchmark / "bounding_box_test").glob("*.jpg")))
    ours = scores_of(record["queries"])
    assert ours == pytest.approx({name: expected[name] for name in ours}, abs=1e-9)
    assert 0.05 < ours["mAP"] < 0.999  # it is neither chance nor all


def test_a_gallery_of_extracted_features_is_the_gallery_of_their_images(run, benchmark, built, tmp_path):
    test = str(benchmark / "bounding_box_test")
    assert main(["extract", test, str(tmp_path / "f.parquet"), "--model", str(run)]) == EXIT_COMPLETE
    made = ["gallery", "build", str(tmp_path / "f.parquet"), str(tmp_path / "g"), "--images", test, "--model", str(run)]
    assert main(made) == EXIT_COMPLETE
    one, other = open_gallery(built), open_gallery(tmp_path / "g")
    assert one.rows["id"].to_pylist() == other.rows["id"].to_pylist()
    rows = np.arange(len(one))
    assert np.array_equal(one.features(rows), other.features(rows))
    assert [one.thumbnail(row) for row in rows.tolist()] == [other.thumbnail(row) for row in rows.tolist()]
    assert one.manifest.model == other.manifest.model
    assert one.manifest.model
    assert one.manifest.model["place"] == str(run)


def test_images_are_added_searched_for_drawn_and_removed(run, benchmark, built, tmp_path, capsys):
    where = str(shutil.copytree(built, tmp_path / "gallery"))
    before = len(open_gallery(where))
    assert main(["gallery", "add", where, str(benchmark / "query")]) == EXIT_COMPLETE  # the gallery knows its model
    query = sorted((benchmark / "query").glob("*.jpg"))[0]
    capsys.readouterr()
    arguments = ["gallery", "query", where, str(query), "--top", "3", "--picture", str(tmp_path / "found.png")]
    assert main(arguments) == EXIT_COMPLETE
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[::3] == ["1", query.name]  # itself, which is there now
    assert out.splitlines()[2].split()[1] == "1.0000"
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size[0] > 4 * 96
    assert main([*arguments, "--other-cameras", "--format", "ids"]) == EXIT_COMPLETE
    assert of_name(query.name)[1] not in {of_name(line)[1] for line in capsys.readouterr().out.split()}
    (tmp_path / "ids.txt").write_text("\n".join(path.name for path in (benchmark / "query").glob("*.jpg")))
    assert main(["gallery", "remove", where, "--ids", str(tmp_path / "ids.txt")]) == EXIT_COMPLETE
    assert f"images removed. {before:,} left in {where}" in capsys.readouterr().out
    assert main(["gallery", "query", where, "--id", query.name]) == EXIT_USER_ERROR
    assert f"{query.name} is not in" in capsys.readouterr().err
    assert main(["gallery", "add", where, str(benchmark / "query")]) == EXIT_COMPLETE
    assert "0 images added, " in capsys.readouterr().out


def test_a_query_of_images_needs_the_model_of_the_gallery(run, benchmark, built, tmp_path, capsys):
    other = write_finetuning(tmp_path / "other", SIZE, seed=1)
    query = str(sorted((benchmark / "query").glob("*.jpg"))[0])
    assert main(["gallery", "query", str(built), query, "--model", str(other)]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "the model that the gallery was built with is required" in error
    assert str(run) in error


def test_images_that_cannot_be_read_are_left_out_counted_and_listed(run, benchmark, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for path in sorted((benchmark / "bounding_box_test").glob("*.jpg"))[:30]:
        shutil.copy(path, folder)
    (folder / "broken_c1.jpg").write_bytes(b"no image")
    assert main(["gallery", "build", str(folder), str(tmp_path / "gallery"), "--model", str(run)]) == EXIT_COMPLETE
    out, err = capsys.readouterr()
    assert f"30 images in {tmp_path / 'gallery'}. Search: exact" in out
    assert f"1 image left out, listed in {tmp_path / 'gallery.rejects.jsonl'}" in err
    assert json.loads((tmp_path / "gallery.rejects.jsonl").read_text())["key"] == "broken_c1.jpg"
    assert "broken_c1.jpg" not in open_gallery(tmp_path / "gallery").rows["id"].to_pylist()


def test_a_build_that_is_killed_goes_on_and_nothing_half_written_has_its_name(run, benchmark, built, tmp_path):
    where, log = tmp_path / "gallery", tmp_path / "log"
    arguments = ["-m", "personmae", "gallery", "build", benchmark / "bounding_box_test", where, "--model", run]
    for _ in range(3):
        with log.open("w") as file:
            process = warm.start(arguments, stdout=file, stderr=file)
            while process.poll() is None and not (tmp_path / "gallery.partial" / "extracted.parquet.partial").exists():
                time.sleep(0.01)
            process.kill()
            process.wait()
        assert not where.exists()
    assert warm.run(arguments, timeout=300).returncode == EXIT_COMPLETE
    one, other = open_gallery(built), open_gallery(where)
    assert one.rows["id"].to_pylist() == other.rows["id"].to_pylist()
    assert np.array_equal(one.features(np.arange(len(one))), other.features(np.arange(len(one))))
    assert [path.name for path in tmp_path.iterdir() if "gallery" in path.name] == ["gallery"]

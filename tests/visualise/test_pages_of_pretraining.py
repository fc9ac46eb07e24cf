"""The page of a pre-training run: its own shards where no benchmark is given, and what is said where they are gone."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from saved_runs import save_pretraining

from personmae.__main__ import main
from personmae.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER_ERROR


@pytest.fixture
def shards(shard_dir: Path, tmp_path: Path) -> Path:
    """The session's shards, for this test alone."""
    return Path(shutil.copytree(shard_dir, tmp_path / "shards"))


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    """A pre-training on them with random weights, at step 2 of 9."""
    return save_pretraining(tmp_path / "run", shards)


def test_without_a_benchmark_its_own_images_are_looked_at_and_the_rest_says_what_to_give(run):
    assert main(["visualise", str(run), "--unfinished", "--queries", "2"]) == EXIT_COMPLETE
    out = run / "visualise"
    names = sorted(path.name for path in out.glob("*.png"))
    assert [name.partition("-")[0] for name in names] == ["attention"] * 2 + ["reconstructions"] * 2
    assert all(np.asarray(cv2.imread(str(out / name))).std() > 5 for name in names)
    text = (out / "index.html").read_text()
    assert text.count("names no benchmark: give --benchmark NAME --data ROOT") == 4
    assert "2 images of its own shards. It was not searched with, so there are no scores." in text
    assert "mAP" not in json.loads((out / "visualise.json").read_text())
    assert "synthetic people" not in text


def test_shards_of_drawn_people_are_called_so(run, shards):
    (shards / "synthetic.json").write_text("{}")
    assert main(["visualise", str(run), "--unfinished", "--queries", "1", "--sections", "attention"]) == EXIT_COMPLETE
    assert '<li class="warn">synthetic people</li>' in (run / "visualise" / "index.html").read_text()


def test_without_its_shards_nothing_is_drawn_and_the_line_says_why(run, shards, capsys):
    shutil.rmtree(shards)
    assert main(["visualise", str(run), "--unfinished"]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert f"error: nothing can be drawn: {shards} is needed by {run}" in err
    assert "nor here. Put it back. There are no images to look at. Name a benchmark" in err
    assert not (run / "visualise").exists()


def test_without_its_shards_a_benchmark_is_still_searched_and_the_exit_code_says_what_is_lost(run, shards, people, capsys):
    shutil.rmtree(shards)
    given = ["--benchmark", "market1501", "--data", str(people / "market1501"), "--sections", "reconstructions,attention"]
    assert main(["visualise", str(run), "--unfinished", *given]) == EXIT_FAILED
    assert "incomplete: the page is written without 1 section" in capsys.readouterr().err
    text = (run / "visualise" / "index.html").read_text()
    assert f"This part is left out: {shards} is needed by" in text
    assert "images of synthetic people, Market-1501 layout" in text


def test_a_run_that_is_not_finished_is_taken_only_when_that_is_said(run, capsys):
    assert main(["visualise", str(run)]) == EXIT_USER_ERROR
    assert "must be a finished run and is at step 2 of 9" in capsys.readouterr().err

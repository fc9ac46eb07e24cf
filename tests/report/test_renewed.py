"""Results whose own data had two digests, as they were written before: one table where the data are still there."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import MakeRun

from personmae.reid import datasets
from personmae.report import cross_domain
from personmae.report.compared import sentences
from personmae.report.comparison import data_notes, group_results
from personmae.report.runs import find_below, find_runs

PEOPLE = {"train": ["anna", "cora"], "query": ["bert", "dora"], "gallery": ["bert", "dora"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Own data: of four people in the order of their names, the second and the fourth are tested."""
    for split, names in PEOPLE.items():
        for name in names:
            (folder := tmp_path / "mine" / split / name).mkdir(parents=True)
            (folder / f"1_c{1 + (split == 'query')}.jpg").write_bytes(b"1")
    return tmp_path / "mine"


@pytest.fixture
def runs(root: Path, make_run: MakeRun) -> Path:
    """A fine-tuned run with the earlier digest of the data, its evaluation, and a baseline."""
    whole = datasets.load_benchmark("folder", root)
    own: dict[str, Any] = {"benchmark": "folder", "root": str(root), "benchmark_title": "own data, 2 identities"}
    earlier, now = ({"benchmark_digest": digest(whole)} for digest in (datasets.earlier_digest, datasets.digest))
    assert earlier != now
    run = make_run("runs/ft", ap=[0.5, 0.1, 0.2, 0.4], **own, **earlier)
    trained = {"benchmark": "folder", "root": str(root), **earlier}
    again = {"mAP": 0.3, "run": str(run), "checkpoint": str(run / "checkpoints" / "step-00000040"), "trained_on": trained}
    make_run("runs/again", init=None, **own, **now, **again)
    make_run("runs/histogram", init=None, ap=[0.2, 0.2, 0.1, 0.1], **own, **now)
    return run.parent


def test_they_are_one_table_without_a_matrix_where_the_data_are_still_there(runs, root):
    (group,) = group_results(found := find_runs(runs))
    assert group.digest == datasets.digest(datasets.load_benchmark("folder", root, splits=("query", "gallery")))
    assert sorted(row.name for row in group.rows) == ["ft", "histogram"]
    assert all(row.query_ap() for row in group.rows)  # which belong to the same data
    assert data_notes([group]) == []
    assert not any("Zero shot" in sentence for sentence in sentences(group, found))
    assert cross_domain.build(runs, find_below(runs, found)) is None


def test_an_evaluation_whose_run_is_not_there_is_not_called_zero_shot(runs):
    for file in (runs / "ft").iterdir():
        if file.is_file():
            file.unlink()
    (group,) = group_results(found := find_runs(runs))
    assert any(sentence.startswith("Evaluated again: again") for sentence in sentences(group, found))


def test_they_stay_apart_and_can_be_read_where_the_data_are_gone_or_have_changed(runs, root):
    digests = [json.loads((runs / name / "result.json").read_text())["benchmark_digest"] for name in ("ft", "histogram")]
    image = next((root / "query" / "bert").iterdir())
    image.write_bytes(b"22")
    assert {group.digest for group in group_results(find_runs(runs))} == set(digests)
    root.rename(root.with_name("elsewhere"))
    groups = group_results(find_runs(runs))
    assert {group.digest for group in groups} == set(digests)
    assert len(data_notes(groups)) == 1

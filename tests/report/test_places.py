"""Recorded paths are found from any folder, and after everything was moved together."""

from pathlib import Path

import pytest

from personmae.report.places import Lost, Place, printable


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Data, and a run that was started in ``tmp_path / work`` with run_dir=runs/a/pretrain."""
    for folder in ("near/runs/a/pretrain", "near/runs/a/data", "other"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("here", ["other", "near/runs/a"])
def test_a_relative_path_is_found_from_another_folder(tree: Path, monkeypatch: pytest.MonkeyPatch, here: str) -> None:
    monkeypatch.chdir(tree / here)
    directory = tree / "near/runs/a/pretrain"
    assert Place(directory, run_dir="runs/a/pretrain").find("runs/a/data") == str(tree / "near/runs/a/data")
    assert Place(directory).find("runs/a/data") == str(tree / "near/runs/a/data")  # nothing is recorded: the folders above


def test_what_lies_here_by_chance_is_not_taken_for_the_runs_own(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "other/runs/a/data").mkdir(parents=True)
    monkeypatch.chdir(tree / "other")
    found = Place(Path("../near/runs/a/pretrain"), run_dir="runs/a/pretrain").find("runs/a/data")
    assert found == str(tree / "near/runs/a/data")


def test_the_recorded_folder_leads_to_data_that_lie_beside_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "data").mkdir()
    monkeypatch.chdir(tree / "other")
    (tree / "far").mkdir()
    place = Place(tree / "far", run_dir=str(tree / "far"), cwd=str(tree / "near"))
    assert Path(place.find("../data")).resolve() == tree / "data"


def test_everything_that_was_moved_together_is_found(tree: Path) -> None:
    (tree / "near").rename(tree / "moved")
    directory = tree / "moved/runs/a/pretrain"
    absolute = Place(directory, run_dir=str(tree / "near/runs/a/pretrain"))
    relative = Place(directory, run_dir="runs/a/pretrain", cwd=str(tree / "near"))
    for place in (absolute, relative):
        assert place.find(str(tree / "near/runs/a/data")) == str(tree / "moved/runs/a/data")


def test_an_object_store_is_where_it_was(tree: Path) -> None:
    assert Place(tree / "near").find("s3://bucket/a #1") == "s3://bucket/a #1"


def test_what_is_gone_is_named_with_the_run_that_needs_it(tree: Path) -> None:
    with pytest.raises(Lost, match=r"runs/a/gone is needed by .*pretrain and is not there. .* where the run was started"):
        Place(tree / "near/runs/a/pretrain", run_dir="runs/a/pretrain").find("runs/a/gone")


def test_any_name_is_printable() -> None:
    assert printable("caf\udce9 \ud800 ü") == "caf\ufffd \ufffd ü"

"""What ``personmae evaluate`` is given: names and places that are not there, and where its result goes."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from personmae.__main__ import main


@pytest.fixture
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Own data of two people in the present folder."""
    rng = np.random.default_rng(0)
    for split, camera in (("train", 1), ("query", 1), ("gallery", 2)):
        for pid in "ab":
            (folder := tmp_path / "mine" / split / pid).mkdir(parents=True)
            image = rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)
            assert cv2.imwrite(str(folder / f"1_c{camera}.png"), image)
    monkeypatch.chdir(tmp_path)
    return "mine"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a command that ends with code 78."""
    assert main(list(arguments)) == 78
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("histogran", ". Did you mean 'histogram'?"),
        ("thumbnail+histogramm", ". Did you mean 'thumbnail+histogram'?"),
        ("randon", ". Did you mean 'random'?"),
        ("runs/finetuned", ""),
    ],
)
def test_a_name_that_is_nothing_does_not_exist_and_the_nearest_baseline_is_named(people, capsys, name, hint):
    line = error_of(capsys, "evaluate", name, "folder", people)
    assert line.startswith("error: a run, a checkpoint or one of histogram, ")
    assert line.endswith(f" is required. {name} does not exist{hint}")


def test_a_folder_without_a_checkpoint_is_told_apart_from_none(people, capsys):
    assert error_of(capsys, "evaluate", people, "folder", people).endswith("mine has none: train it first")


@pytest.mark.parametrize("benchmark", ["folder", "csv", "market1501", "msmt17"])
def test_a_benchmark_that_is_not_there_or_a_file_is_one_line_for_each_program(people, tmp_path, capsys, benchmark):
    (tmp_path / "file").touch()
    for root, problem in (("nope", "does not exist"), ("file", "is a file")):
        settings = [f"benchmark={benchmark}", f"root={root}", f"run_dir={tmp_path / 'run'}", "init=random"]
        for command in (
            ["evaluate", "histogram", benchmark, root],
            ["finetune", "configs/finetune_market1501.yaml", *settings],
            ["unsupervised", "configs/quickstart_usl.yaml", *settings],
        ):
            command[1] = str(Path(__file__).parents[1] / command[1]) if command[0] != "evaluate" else command[1]
            line = error_of(capsys, *command)
            assert line.startswith(f"error: benchmark {benchmark} is expected in a directory as ")
            assert line.endswith(f"but {root} {problem}")
    assert not (tmp_path / "run").exists()


def test_the_report_to_make_next_is_named_as_the_result_was(people, tmp_path, capsys):
    for out, report in (
        ("runs/colour one", "runs"),
        ("alone", "."),
        (".", ".."),
        ("my runs/a", "'my runs'"),
        (str(tmp_path / "b" / "c"), str(tmp_path / "b")),
    ):
        assert main(["evaluate", "histogram", "folder", people, "--out", out]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == f"next: personmae report {report}"
        assert json.loads((tmp_path / out / "result.json").read_text())["name"] == "histogram"


def test_no_folder_is_made_before_there_is_a_result(people, tmp_path, capsys):
    whole = (tmp_path / people / "gallery" / "a" / "1_c2.png").read_bytes()
    (tmp_path / people / "gallery" / "a" / "1_c2.png").write_bytes(whole[:-200])
    (tmp_path / "runs").mkdir()
    before = sorted(tmp_path.iterdir())
    for out in ("int ev", "new/int ev", "runs/int ev"):
        assert "1_c2.png" in error_of(capsys, "evaluate", "histogram", "folder", people, "--out", out)
        assert sorted(tmp_path.iterdir()) == before
        assert list((tmp_path / "runs").iterdir()) == []


def test_a_place_that_takes_no_result_is_found_before_the_data_are_read(people, tmp_path, capsys):
    shutil.rmtree(tmp_path / people)
    (tmp_path / "file").touch()
    assert "there is a file where a directory is needed" in error_of(
        capsys, "evaluate", "histogram", "folder", people, "--out", "file/out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

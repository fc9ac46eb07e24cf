"""mAP by pair of cameras as a table: means over seeds, one scale, and the extremes in words."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import MakeRun

from personmae.report import camera_pairs, report
from personmae.report.comparison import Group, group_results
from personmae.report.runs import find_runs


def pairs(first: float, second: float, cameras: tuple[int, int] = (1, 2)) -> dict[str, Any]:
    """Of two cameras: from the first to the second, and back."""
    scores = [[None, first], [second, None]]
    counts = {"num_queries": [[0, 30], [1200, 0]], "query_cameras": [*cameras], "gallery_cameras": [*cameras]}
    return {"mAP": scores, "rank1": scores, **counts}


def read(folder: Path) -> Group:
    (group,) = group_results(find_runs(folder))
    return group


def test_a_table_is_the_mean_of_its_seeds_on_one_scale_with_the_best_row_first(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(f"ft_s{seed}", mAP=0.3, overrides={"seed": seed}, camera_pairs=pairs(0.4 + 0.1 * seed, 0.1))
    make_run("better", init="pretrain", mAP=0.5, camera_pairs=pairs(0.6, 0.35))
    first, second = camera_pairs.tables_of(read(tmp_path))
    assert [table["name"] for table in (first, second)] == ["better", "ft"]
    assert second["seeds"] == "2 seeds"
    assert second["cameras"] == ["1", "2"]
    assert [[cell["text"] for cell in line["cells"]] for line in second["lines"]] == [["–", "45.0"], ["10.0", "–"]]
    assert [[cell["count"] for cell in line["cells"]] for line in second["lines"]] == [["", "30"], ["1,200", ""]]
    levels = [[cell["level"] for cell in line["cells"]] for table in (first, second) for line in table["lines"]]
    assert levels == [[0, 5], [3, 0], [0, 4], [1, 0]]  # between 10 and 60 for both
    output = "Highest from camera 1 to 2 with 45.0 %, lowest from camera 2 to 1 with 10.0 %. The mean of the 2 pairs is 27.5 %."
    assert second["words"] == output


@pytest.mark.parametrize(
    "second",
    [{}, {"camera_pairs": pairs(0.1, 0.2, (1, 3))}, {"camera_pairs": pairs(0.1, 0.2) | {"gallery_cameras": [1, 3]}}],
)
def test_seeds_without_pairs_or_with_other_cameras_have_no_table(
    make_run: MakeRun, tmp_path: Path, second: dict[str, Any]
) -> None:
    make_run("ft_s0", overrides={"seed": 0}, camera_pairs=pairs(0.4, 0.1))
    make_run("ft_s1", overrides={"seed": 1}, **second)
    group = read(tmp_path)
    assert camera_pairs.mean_of(group.rows[0]) is None
    assert camera_pairs.tables_of(group) == []


def test_data_of_one_or_no_known_camera_has_no_table(make_run: MakeRun, tmp_path: Path) -> None:
    one = {"mAP": [[0.4]], "rank1": [[0.4]], "num_queries": [[4]], "query_cameras": [-1], "gallery_cameras": [-1]}
    make_run("ft", camera_pairs=one)
    group = read(tmp_path)
    scores = camera_pairs.mean_of(group.rows[0])
    assert scores is not None
    assert np.array_equal(scores, [[0.4]])
    assert camera_pairs.tables_of(group) == []
    assert camera_pairs.camera_name(-1) == "unknown"


def test_the_page_has_the_numbers_and_their_words(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("ft", camera_pairs=pairs(0.4, 0.1))
    make_run("older", mAP=0.2, overrides={"optim": {"lr": 0.5}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "data_counts", lambda _: [])
        text = report.run(tmp_path).read_text(encoding="utf-8")
    assert re.search(r'<th scope="row">from 1</th>.*<td class="number heat-5">40.0<small>30</small></td>', text)
    assert "Highest from camera 1 to 2 with 40.0 %" in text
    assert text.count('<table class="heat"') == 1

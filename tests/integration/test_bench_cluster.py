"""The measurement of clustering on a small case."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from personmae.bench.cluster import BASELINE, OURS, ClusterBench, draw, measure, run_cluster
from personmae.errors import UserError

BENCH = ClusterBench(2500, num_pids=145, rounds=1)

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_both_ways_are_measured_and_the_record_says_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "cluster.json"
    record = run_cluster(BENCH, out)
    assert json.loads(out.read_text()) == record
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert record["feature_bytes"] == 4 * 384 * 2500
    ours, theirs = record["measured"][OURS], record["measured"][BASELINE]
    assert record["speed_ratio"] == theirs["seconds"] / ours["seconds"]
    assert record["memory_ratio"] == theirs["more_bytes"] / ours["more_bytes"]
    assert theirs["more_bytes"] > 2 * 4 * 2500**2 > ours["more_bytes"]
    assert 50e6 < ours["peak_bytes"] < 2e9
    assert record["different_labels"] == 0
    assert ours["quality"] == theirs["quality"]
    printed = capsys.readouterr().out
    assert "2,500 images" in printed
    assert f"{ours['quality']['num_outliers']:,} " in printed
    assert "0 labels differ" in printed


@pytest.mark.slow
def test_ours_alone_is_measured_where_the_baseline_is_too_large() -> None:
    record = run_cluster(replace(BENCH, baseline=False))
    assert set(record["measured"]) == {OURS}
    assert "speed_ratio" not in record


def test_both_ways_give_the_same_labels_and_there_is_something_to_find() -> None:
    ours, theirs = (measure(name, BENCH)[3] for name in (OURS, BASELINE))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.max() > 50
    assert 0 < np.count_nonzero(ours < 0) < 1500
    assert len(draw(BENCH)[1]) == 2500


def test_more_people_than_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_pids must be in 1 ... num_images = 2500. Got 2501"):
        run_cluster(replace(BENCH, num_pids=2501))

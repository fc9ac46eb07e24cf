"""The measurement of retrieval scores on a small case."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from personmae.bench.retrieval import BASELINE, BASELINE_VECTORS, OURS, PRODUCT, RetrievalBench, measure, run_retrieval
from personmae.errors import UserError

BENCH = RetrievalBench(num_query=300, num_gallery=2000, num_pids=40, dim=256, rounds=1, baseline_queries=100)

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_every_way_is_measured_and_the_record_says_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "retrieval.json"
    record = run_retrieval(BENCH, out)
    assert json.loads(out.read_text()) == record
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert record["feature_bytes"] == 4 * 256 * 2300
    measured = record["measured"]
    counts = {name: values["num_queries"] for name, values in measured.items()}
    assert counts == {PRODUCT: 300, OURS: 300, BASELINE_VECTORS: 100, BASELINE: 100}
    assert all(50e6 < values["peak_bytes"] < 4e9 for values in measured.values())
    ratios = {name: values["seconds"] / measured[OURS]["seconds"] for name, values in measured.items() if name != OURS}
    assert record["ratios"] == ratios
    assert ratios[BASELINE] > 1
    printed = capsys.readouterr().out
    assert "300 queries, 2,000 in the gallery" in printed
    assert f"{measured[OURS]['mAP']:.4f}" in printed


def test_every_way_gives_the_same_score() -> None:
    ours, vectors, loops = (measure(name, BENCH, BENCH.num_query)[2] for name in (OURS, BASELINE_VECTORS, BASELINE))
    assert ours is not None
    assert 0.1 < ours < 0.99
    assert vectors == pytest.approx(ours, abs=1e-4)
    assert loops == pytest.approx(vectors, abs=1e-12)


def test_more_usual_queries_than_queries_are_refused() -> None:
    with pytest.raises(UserError, match=r"baseline_queries must be in 1 ... num_query = 300. Got 301"):
        run_retrieval(replace(BENCH, baseline_queries=301))

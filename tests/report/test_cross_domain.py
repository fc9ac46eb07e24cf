"""Each model on each benchmark: whose results are whose, what is in-domain, and the commands of what is missing."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_runs import MakeRun

from personmae.__main__ import main
from personmae.checkpoint import portable
from personmae.config import RANDOM
from personmae.report import compared, cross_domain, report
from personmae.report.comparison import group_results
from personmae.report.runs import find_below, find_runs

DUKE = {
    "benchmark": "occluded_duke",
    "benchmark_digest": "f" * 16,
    "benchmark_title": "synthetic people, Occluded-Duke layout, 200 identities",
    "root": "/data/duke",
}
MARKET_TITLE = "synthetic people, Market-1501 layout, 300 identities"


def built(folder: Path) -> dict[str, Any] | None:
    return cross_domain.build(folder, find_below(folder, find_runs(folder)))


def evaluated(make_run: MakeRun, name: str, run: Path, **result: Any) -> Path:
    """An evaluation of a run, as ``personmae evaluate --out`` records it."""
    digest = json.loads((run / "result.json").read_text())["benchmark_digest"]
    source = {"run": str(run), "checkpoint": f"{run}/checkpoints/step-00000040", "step": 40}
    source["trained_on"] = {"benchmark": "market1501", "benchmark_digest": digest}
    folder = make_run(name, init=None, **source | result)
    record = json.loads((folder / "result.json").read_text()) | {"name": run.name, "init": RANDOM}
    (folder / "result.json").write_text(json.dumps(record))
    return folder


def cells(matrix: dict[str, Any]) -> dict[str, list[str]]:
    shown = {line["name"]: line["cells"] for line in matrix["lines"]}
    return {name: [f"{cell['text']}: {cell['notes']}" for cell in of_name] for name, of_name in shown.items()}


def test_models_stand_beside_benchmarks_and_the_diagonal_is_in_domain(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"ft_s{seed}", mAP=0.3 + 0.1 * seed, overrides={"seed": seed}) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        evaluated(make_run, f"below/deep/duke_{seed}", run, mAP=0.1 + 0.1 * seed, **DUKE)
    make_run("histogram", init=None, mAP=0.05)
    matrix = built(tmp_path)
    assert matrix
    assert matrix["columns"] == [MARKET_TITLE, DUKE["benchmark_title"]]
    assert cells(matrix) == {
        "histogram": ["5.0: ", "–: missing"],
        "ft": ["35.0: in-domain, 30.0-40.0", "15.0: zero shot, 10.0-20.0"],
    }
    assert [line["details"] for line in matrix["lines"]] == ["colour histogram", "random weights, 2 seeds"]
    make_run("white", init=None, mAP=0.05)
    white = json.loads((tmp_path / "white" / "result.json").read_text()) | {"name": "thumbnail, whiten"}
    (tmp_path / "white" / "result.json").write_text(json.dumps(white))
    command, other = (built(tmp_path) or {})["commands"]
    assert other.startswith("personmae evaluate thumbnail occluded_duke /data/duke --per-camera whiten --out ")
    out = tmp_path / "histogram_on_occluded_duke"
    assert command == f"personmae evaluate histogram occluded_duke /data/duke --out {out}"


def test_what_is_missing_of_each_seed_is_a_command_that_is_taken(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(f"ft_s{seed}", mAP=0.3, overrides={"seed": seed}) for seed in (0, 1)]
    make_run("duke_ft", mAP=0.2, **DUKE)
    evaluated(make_run, "zero", runs[0], mAP=0.1, **DUKE)
    matrix = built(tmp_path)
    assert matrix
    assert cells(matrix) == {
        "duke_ft": ["20.0: in-domain", "–: missing"],
        "ft": ["10.0: zero shot, one seed", "30.0: in-domain, 30.0-30.0"],
    }
    assert sorted(matrix["commands"]) == [
        f"personmae evaluate {tmp_path}/duke_ft market1501 gone --out {tmp_path}/duke_ft_on_market1501",
        f"personmae evaluate {runs[1]} occluded_duke /data/duke --out {tmp_path}/ft_s1_on_occluded_duke",
    ]
    (tmp_path / "elsewhere").mkdir()
    _, verb, _, *rest = shlex.split(matrix["commands"][0])
    assert main([verb, str(tmp_path / "elsewhere"), *rest]) == 78  # parsed, and the benchmark is not there
    assert "is expected in" in capsys.readouterr().err


def test_a_run_that_was_moved_is_known_by_its_name_and_one_elsewhere_is_not(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("runs/ft", mAP=0.3)
    evaluated(make_run, "runs/zero", run, mAP=0.1, **DUKE)
    (tmp_path / "runs").rename(tmp_path / "moved")
    matrix = built(tmp_path / "moved")
    assert matrix
    assert list(cells(matrix)) == ["ft"]
    make_run("runs/ft", mAP=0.5)  # another run is at the recorded place
    assert [run.evaluated for run in find_runs(tmp_path / "moved")] == [None, None]


def test_a_copy_is_known_by_its_checkpoint_while_the_original_is_still_there(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("runs/ft", mAP=0.3)
    (saved,) = portable.folders(run)
    (saved / portable.MANIFEST).write_text("{}")
    evaluated(make_run, "runs/zero", run, mAP=0.1, digest=portable.digest(saved), **DUKE)
    evaluated(make_run, "runs/other", run, mAP=0.1, digest="of another", **DUKE)
    shutil.copytree(tmp_path / "runs", tmp_path / "copied")
    known = {run.name: run.evaluated.directory if run.evaluated else None for run in find_runs(tmp_path / "copied")}
    assert known == {"ft": None, "other": None, "zero": tmp_path / "copied" / "ft"}


def test_a_model_that_is_not_here_says_itself_what_it_was_trained_on(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("ft", mAP=0.3)
    gone = make_run("gone", mAP=0.3)
    evaluated(make_run, "zero", gone, mAP=0.1, digest="abc", **DUKE)
    (gone / "result.json").unlink()
    (gone / "run.json").unlink()
    matrix = built(tmp_path)
    assert matrix
    assert cells(matrix) == {"ft": ["30.0: in-domain", "–: missing"], "gone": ["–: missing", "10.0: zero shot"]}
    assert {line["name"]: line["details"] for line in matrix["lines"]} == {"ft": "random weights, one seed", "gone": ""}
    (command,) = matrix["commands"]  # where the other one is nobody knows
    assert command.startswith(f"personmae evaluate {tmp_path}/ft occluded_duke /data/duke ")


def test_one_benchmark_is_no_matrix_and_re_ranked_frozen_or_unfinished_results_are_not_in_it(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("ft", mAP=0.3)
    assert built(tmp_path) is None
    evaluated(make_run, "reranked", run, rerank="aqe", **DUKE)
    make_run("probe", init=None, probe={"rows": {"mAP": 0.1, "rank1": 0.1}}, **DUKE)
    make_run("unfinished", step=20, **DUKE)
    assert built(tmp_path) is None


def test_an_evaluation_on_its_own_data_is_the_same_row_and_lends_it_its_latency(make_run: MakeRun, tmp_path: Path) -> None:
    latency = {"milliseconds": 5.04, "images_per_second": 310.0, "batch_size": 32, "precision": "fp32", "device": "cpu"}
    latency |= {"threads": 2, "hardware": {"cpu": "a processor"}}
    run = make_run("ft", mAP=0.3)
    evaluated(make_run, "again", run, mAP=0.30004, latency=latency)
    (group,) = group_results(find_runs(tmp_path))
    (row,) = group.rows
    assert (row.name, row.mean("mAP")) == ("ft", 0.3)
    assert row.latency is not None
    assert str(row.latency) == "a processor, 2 threads, fp32, batches of 32"
    evaluated(make_run, "other", run, mAP=0.25)  # does not agree, so it is shown
    (group,) = group_results(runs := find_runs(tmp_path))
    assert len(group.rows) == 2
    assert "Evaluated again: random weights (one seed), with nothing to compare it with." in compared.sentences(group, runs)


@pytest.mark.parametrize("other", ["a processor", "another one"])
def test_times_of_different_machines_are_told_apart(make_run: MakeRun, tmp_path: Path, other: str) -> None:
    measured = {"milliseconds": 5.04, "images_per_second": 310.0, "batch_size": 32, "precision": "fp32", "device": "cpu"}
    for name, cpu in (("ft", "a processor"), ("second", other)):
        latency = measured | {"threads": 2, "hardware": {"cpu": cpu}}
        make_run(name, mAP=0.3, latency=latency, overrides={"optim": {"lr": 0.1 if name == "ft" else 0.2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "data_counts", lambda _: [])
        text = report.run(tmp_path).read_text(encoding="utf-8")
    assert text.count('<td class="number">5.0 <small>310 images/s') == 2
    assert (
        "cannot be compared. A: a processor, 2 threads, fp32, batches of 32. B: another one, 2 threads, fp32, batches of 32."
        in text
    ) == (other == "another one")
    assert ("All on a processor, 2 threads, fp32, batches of 32." in text) == (other == "a processor")
    assert (", on B</small>" in text) == (other == "another one")

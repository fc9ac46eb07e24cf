"""The sentences above a table: what stands beside what, and over how many seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import MakeRun, write_training

from personmae import config
from personmae.report import compared, sections, weights
from personmae.report.comparison import group_results
from personmae.report.pairs import summarise
from personmae.report.runs import find_runs


def pretraining(folder: Path, name: str, **fields: Any) -> str:
    settings = config.Pretrain.model_validate({"run_dir": str(folder / name), "data": {"shards": "shards"}} | fields)
    write_training(folder / name, settings, step=60, total=60)
    return str(folder / name)


def rename(folder: Path, name: str, init: str) -> None:
    """Have a record called so, as an evaluation calls it by what it is of."""
    record = json.loads((folder / "result.json").read_text()) | {"name": name, "init": init}
    (folder / "result.json").write_text(json.dumps(record))


def said(folder: Path) -> list[str]:
    runs = find_runs(folder)
    (group,) = group_results(runs)
    return compared.sentences(group, runs)


MAE: dict[str, Any] = {"regions": {"max_shift": 0}, "loss": {"feature_weight": 0.0}}


def test_weights_and_seeds_of_all_that_is_compared_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(3):
        ours, mae = (pretraining(tmp_path, f"{n}_s{seed}", seed=seed, **f) for n, f in (("pretrain", {}), ("mae", MAE)))
        for name, init, score in (("ft", ours, 0.2), ("mae_ft", mae, 0.4), ("random_ft", "random", 0.1)):
            make_run(f"{name}_s{seed}", init=init, mAP=score + seed / 100, overrides={"seed": seed})
    make_run("histogram", init=None, mAP=0.05)
    assert said(tmp_path) == [
        "Fine-tuned: PersonMAE (3 seeds) compared with random weights (3 seeds), MAE-like (3 seeds) and colour histogram."
    ]


def test_the_headline_is_about_the_method_though_an_mae_like_run_has_more(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("random_ft", mAP=0.1)
    make_run("mae_ft", init=pretraining(tmp_path, "mae", **MAE), mAP=0.4)
    alone = summarise(runs := find_runs(tmp_path), group_results(runs))
    assert "fine-tuning from MAE-like pre-training reaches 40.0 %" in alone
    make_run("ft", init=pretraining(tmp_path, "pretrain"), mAP=0.2)
    both = summarise(runs := find_runs(tmp_path), group_results(runs))
    assert "fine-tuning from PersonMAE pre-training reaches 20.0 %" in both
    assert "More than both: mae_ft, 40.0 %" in both


def test_one_seed_is_said_to_be_one_and_a_run_alone_to_be_alone(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("ft", init=pretraining(tmp_path, "pretrain"), mAP=0.2)
    assert said(tmp_path) == ["Fine-tuned: PersonMAE (one seed), with nothing to compare it with."]
    make_run("histogram", init=None, mAP=0.05)
    assert said(tmp_path) == ["Fine-tuned: PersonMAE (one seed) compared with colour histogram."]


def test_rows_of_the_same_weights_are_told_apart_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    start = pretraining(tmp_path, "pretrain")
    make_run("slow", init=start, mAP=0.2)
    make_run("fast", init=start, mAP=0.3, overrides={"optim": {"lr": 0.5}})
    assert said(tmp_path) == ["Fine-tuned: PersonMAE (fast, one seed) compared with PersonMAE (slow, one seed)."]


def test_what_is_unfinished_or_re_ranked_is_named_and_not_compared(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("ft", init=pretraining(tmp_path, "pretrain"), mAP=0.2)
    make_run("random_ft", step=30, mAP=0.1)
    make_run("reranked", init=None, rerank="aqe", mAP=0.3)
    assert said(tmp_path) == [
        "Fine-tuned: PersonMAE (one seed), with nothing to compare it with.",
        "Shown, but compared with nothing: reranked (re-ranked), random_ft (unfinished).",
    ]


def test_baselines_alone_are_said_to_be_alone(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("histogram", init=None)
    make_run("thumbnail", init=None)
    assert said(tmp_path) == ["Nothing trained here is in this table: colour histogram and thumbnail."]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "PersonMAE"),
        (MAE, "MAE-like"),
        ({"regions": {"max_shift": 0}}, "PersonMAE without shift"),
        ({"loss": {"feature_weight": 0.0}}, "PersonMAE without feature loss"),
    ],
)
def test_a_pre_training_is_called_by_what_it_has_of_the_method(fields: dict[str, Any], expected: str) -> None:
    settings = config.Pretrain.model_validate({"run_dir": "pretrain", "data": {"shards": "shards"}} | fields)
    assert weights.pretrained_as(settings) == expected


def test_frozen_features_of_several_seeds_are_one_row_and_are_compared_with_their_like(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for seed in range(3):
        where = pretraining(tmp_path, f"pretrain_s{seed}", seed=seed)
        source = {"checkpoint": f"{where}/checkpoints/step-00000060", "step": 60}
        frozen = make_run(f"frozen_{seed}", init=None, mAP=0.1 + seed / 100, **source)
        rename(frozen, f"pretrain_s{seed}", f"{where}, mean of its tokens")
        control = make_run(f"control_{seed}", init=None, mAP=0.05, random={"size": "micro", "seed": seed})
        rename(control, "random", f"random micro, seed {seed}, mean of its tokens")
    other = make_run("other_control", init=None, mAP=0.05, random={"size": "micro", "seed": 0})
    rename(other, "random", "random micro, seed 0, middle rows of its tokens")  # read in another way
    make_run("ft", init=str(tmp_path / "pretrain_s0"), mAP=0.3)
    assert said(tmp_path) == [
        "Frozen features: PersonMAE (3 seeds) compared with random weights (random, 3 seeds) and random weights (random (2), "
        "one seed).",
        "Fine-tuned: PersonMAE (one seed), with nothing to compare it with.",
    ]
    (group,) = group_results(find_runs(tmp_path))
    assert sorted(row.name for row in group.rows) == ["ft", "pretrain", "random", "random (2)"]


def test_an_evaluation_of_unknown_training_is_not_called_frozen(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(2):  # as older records have it: the run is elsewhere, and no word of what it was trained on
        evaluated = make_run(f"transfer_{seed}", init=None, mAP=0.1 + seed / 100, checkpoint="elsewhere/step-00000060", step=60)
        rename(evaluated, f"source_{seed}", "elsewhere/pretrain")
    assert said(tmp_path) == ["Trained elsewhere: source_1 compared with source_0."]


def test_three_seeds_have_an_interval_by_students_t(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, score in enumerate((0.204, 0.217, 0.224)):
        make_run(f"three_s{seed}", mAP=score, overrides={"seed": seed})
        if seed < 2:
            make_run(f"two_s{seed}", mAP=score, overrides={"seed": seed, "optim": {"lr": 0.5}})
        make_run(f"again_{seed}", mAP=score, overrides={"optim": {"lr": 0.25}})  # of one seed
    (group,) = group_results(find_runs(tmp_path))
    rows = {row.name: row for row in group.rows}
    deviation = ((0.011**2 + 0.002**2 + 0.009**2) / 2) ** 0.5  # around 0.215
    assert rows["three"].half_width("mAP") == pytest.approx(4.302653 * deviation / 3**0.5, rel=1e-6)
    assert rows["two"].half_width("mAP") is rows["again"].half_width("mAP") is None
    shown = {row["name"]: row["interval"] for row in sections.table_of(group)["rows"]}
    assert shown == {"three": "± 2.5", "two": "", "again": ""}

"""What a report puts side by side: the same data, told by its digest, and seeds as one row."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from made_runs import UNTOLD, MakeRun, write_training

from personmae import config
from personmae.report import sections
from personmae.report.comparison import Group, data_notes, distinct, group_results
from personmae.report.pairs import compare_queries, compare_settings, find_pairs, summarise
from personmae.report.report import draw_cmc
from personmae.report.runs import RunFolder, find_runs

REAL = {"benchmark_digest": "e" * 16, "benchmark_title": "Market-1501", "synthetic": False}


def read(folder: Path) -> tuple[list[RunFolder], list[Group]]:
    runs = find_runs(folder)
    return runs, group_results(runs)


def headline(folder: Path) -> str:
    return summarise(*read(folder))


def test_drawn_people_and_the_number_of_seeds_stand_in_the_headline(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.111)
    make_run("finetune_personmae", init="pretrain", mAP=0.215)
    assert headline(tmp_path) == (
        "On synthetic people, Market-1501 layout, 300 identities, fine-tuning from the weights pretrain reaches "
        "21.5 % mAP, from random weights 11.1 % mAP, one seed each: 10.4 points more."
    )
    assert ("one seed", True) in sections.tags(*read(tmp_path))
    assert ("synthetic people, Market-1501 layout, 300 identities", True) in sections.tags(*read(tmp_path))


def test_the_published_set_is_called_by_its_name_and_is_no_warning(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.1, **REAL)
    make_run("finetune_personmae", init="pretrain", mAP=0.2, **REAL)
    assert headline(tmp_path).startswith("On Market-1501, fine-tuning")
    assert ("Market-1501", False) in sections.tags(*read(tmp_path))


def test_runs_that_differ_by_their_seed_are_one_row(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, score in enumerate((0.204, 0.217, 0.224)):
        make_run(f"finetune_personmae_s{seed}", init="pretrain", mAP=score, overrides={"seed": seed})
    make_run("finetune_personmae_lr", init="pretrain", mAP=0.3, overrides={"optim": {"lr": 0.5}})
    _, (group,) = read(tmp_path)
    output = {row.name: row.in_words("mAP") for row in group.rows}
    assert output == {"finetune_personmae": "21.5 (20.4-22.4, 3 seeds)", "finetune_personmae_lr": "30.0 (one seed)"}
    shown = sections.table_of(group)["rows"]
    (folded,) = [row for row in shown if row["name"] == "finetune_personmae"]
    assert folded["scores"][0] == {"text": "21.5", "spread": "20.4-22.4, 3 seeds", "best": False}
    assert folded["details"] == "seeds 0, 1, 2"


def test_rows_whose_runs_begin_alike_keep_names_and_curves_of_their_own(make_run: MakeRun, tmp_path: Path) -> None:
    """Both rows of two were called ft, and the CMC curve of one was drawn over by the other's."""
    for number in range(1, 5):
        make_run(f"ft-{number}", mAP=number / 10, overrides={"seed": number % 2, "optim": {"lr": 0.1 * ((number + 1) // 2)}})
    make_run("ft", mAP=0.6, overrides={"optim": {"lr": 0.5}})
    for folder in ("c", "d"):
        record = make_run(folder, mAP=0.5, init=None) / "result.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"name": "colour"}))
    _, (group,) = read(tmp_path)
    assert sorted(row.name for row in group.rows) == ["colour", "colour (2)", "ft", "ft-1, ft-2", "ft-3, ft-4"]
    ((_, drawing),) = draw_cmc([group])
    assert all(f"{row.name}: " in drawing for row in group.rows)


def test_a_number_behind_a_name_is_taken_by_no_other() -> None:
    assert distinct(["a", "a", "a (2)", "b", "a"]) == ["a", "a (3)", "a (2)", "b", "a (4)"]


def test_runs_whose_auto_came_to_another_precision_are_not_one_row(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, used in enumerate(("bf16", "bf16", "fp32")):
        make_run(f"finetune_{used}_s{seed}", mAP=0.2, overrides={"seed": seed}, identity={"train.precision": used})
    make_run("finetune_personmae", init="pretrain", mAP=0.3, identity={"train.precision": "fp32"})
    _, (group,) = read(tmp_path)
    assert [len(row.runs) for row in group.rows] == [2, 1, 1]
    (differing,) = compare_settings([group])
    assert "train.precision (fp32 / bf16)" in differing
    assert "auto" not in differing


def test_several_seeds_stand_in_the_headline(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.1)
    for seed, score in enumerate((0.2, 0.3)):
        make_run(f"finetune_personmae_s{seed}", init="pretrain", mAP=score, overrides={"seed": seed})
    assert "reaches 25.0 % mAP (20.0-30.0, 2 seeds), from random weights 10.0 % mAP (one seed): 15.0 points more" in headline(
        tmp_path
    )
    assert ("one seed", True) in sections.tags(*read(tmp_path))  # of one side


def test_the_same_seed_twice_is_not_called_two_seeds(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("finetune_a", "finetune_b"):
        make_run(name, mAP=0.1)
    _, (group,) = read(tmp_path)
    assert group.rows[0].in_words("mAP") == "10.0 (10.0-10.0, 2 runs of one seed)"


@pytest.mark.parametrize("alike", [True, False])
def test_seeds_with_an_encoder_each_are_one_row_where_the_encoders_are_of_one_recipe(
    make_run: MakeRun, tmp_path: Path, alike: bool
) -> None:
    for seed in (0, 1):
        shards = "shards" if alike else f"shards_{seed}"
        fields = {"run_dir": f"pretrain_{seed}", "seed": seed, "data": {"shards": shards}}
        write_training(tmp_path / f"pretrain_{seed}", config.Pretrain.model_validate(fields), step=60, total=60)
        make_run(f"finetune_{seed}", init=str(tmp_path / f"pretrain_{seed}"), mAP=0.2, overrides={"seed": seed})
    _, (group,) = read(tmp_path)
    assert [row.seeds for row in group.rows] == ([[0, 1]] if alike else [[0], [1]])


def test_adaptations_of_runs_that_differ_by_their_encoder_are_not_one_row(make_run: MakeRun, tmp_path: Path) -> None:
    """Both sources are fine-tuned by one recipe, and were taken for two seeds of one start."""
    fields = {"run_dir": "pretrain", "data": {"shards": "shards"}}
    write_training(tmp_path / "pretrain", config.Pretrain.model_validate(fields), step=60, total=60)
    for seed, init in enumerate((str(tmp_path / "pretrain"), "random")):
        source = make_run(f"source_{seed}", init=init, overrides={"seed": seed})
        folder = make_run(f"uda_{seed}", mAP=0.2)
        settings = {"run_dir": str(folder), "root": "gone", "init": str(source), "seed": seed}
        text = config.dump_yaml(config.Unsupervised.model_validate(settings))
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    _, (group,) = read(tmp_path)
    assert sorted(row.name for row in group.rows) == ["source_0", "source_1", "uda_0", "uda_1"]


def test_other_data_in_the_same_layout_is_another_table_and_never_compared(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3, **REAL)
    make_run("finetune_personmae", init="pretrain", mAP=0.432)
    runs, groups = read(tmp_path)
    assert len(groups) == 2
    assert [find_pairs(group) for group in groups] == [[], []]
    assert "points more" not in summarise(runs, groups)
    (note,) = data_notes(groups)
    assert note.startswith("2 tables here are in the layout market1501.")
    assert "no number of one is compared" in note
    assert not any(score["best"] for group in groups for row in sections.table_of(group)["rows"] for score in row["scores"])


def test_the_same_data_in_two_folders_is_one_table(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3, root="/here")
    make_run("finetune_personmae", init="pretrain", mAP=0.4, root="/there")
    assert "10.0 points more" in headline(tmp_path)


def test_records_without_a_digest_say_unknown_and_stay_apart(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3, **UNTOLD)
    make_run("finetune_old", init="pretrain", mAP=0.4, **UNTOLD)
    make_run("finetune_new", init="pretrain", mAP=0.5)
    runs, groups = read(tmp_path)
    assert [len(group.rows) for group in groups] == [2, 1]
    assert "On market1501 layout, data unknown, fine-tuning" in summarise(runs, groups)
    assert "More than both" not in summarise(runs, groups)  # the third is of other data
    assert "whether their rows are of the same images is unknown" in data_notes(groups)[0]
    assert ("market1501 layout, data unknown", True) in sections.tags(runs, groups)


def test_a_run_that_is_not_finished_says_so_and_is_not_compared(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3)
    make_run("finetune_personmae", init="pretrain", mAP=0.9, step=30)
    runs, groups = read(tmp_path)
    output = summarise(runs, groups)
    assert "points more" not in output
    assert "best so far is finetune_random" in output
    assert output.endswith("Not finished: finetune_personmae (step 30 of 40).")
    (shown,) = [row for row in sections.table_of(groups[0])["rows"] if row["unfinished"]]
    assert shown["unfinished"] == "step 30 of 40"
    assert not any(score["best"] for score in shown["scores"])
    why, command = sections.next_steps(runs, groups)[0]
    assert why == "Let finetune_personmae go on where it was, at step 30 of 40:"
    assert command == "personmae finetune a.yaml"


def test_an_unfinished_pretraining_is_the_headline_and_the_next_command(tmp_path: Path) -> None:
    settings = config.Pretrain.model_validate({"run_dir": "pretrain", "data": {"shards": "shards"}})
    write_training(tmp_path / "pretrain", settings, step=30, total=60, session={"cwd": "/some where"})
    runs, groups = read(tmp_path)
    assert summarise(runs, groups) == "Not finished: pretrain (step 30 of 60)."
    assert sections.next_steps(runs, groups)[0][1] == "cd '/some where' && personmae finetune a.yaml"
    assert sections.stages(runs)[0]["state"] == "unfinished, step 30 of 60"


def test_an_evaluation_of_an_unfinished_checkpoint_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    trained = make_run("finetune", step=30)
    saved = next((trained / "checkpoints").iterdir())
    make_run("evaluated", init=None, checkpoint=str(saved), step=30)
    (tmp_path / "evaluated" / "result.json").write_text(
        (tmp_path / "evaluated" / "result.json").read_text().replace('"seconds"', '"step": 30, "seconds"')
    )
    runs, _ = read(tmp_path)
    assert {run.name: run.unfinished for run in runs} == {"evaluated": "step 30 of 40", "finetune": "step 30 of 40"}
    make_run("output", init=None, unfinished="step 3 of 4")
    make_run("histogram", init=None)
    assert {run.name: run.unfinished for run in read(tmp_path)[0][:3]} == {
        "evaluated": "step 30 of 40",
        "histogram": "",
        "output": "step 3 of 4",
    }


def test_queries_are_counted_one_by_one(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", ap=[0.1, None, 0.5, 0.5, 0.2], num_queries=5)
    make_run("finetune_personmae", init="pretrain", ap=[0.3, None, 0.4, 0.5, 0.9], num_queries=5)
    make_run("histogram", init=None, ap=[0.2, None, 0.1, 0.1, 0.1], num_queries=5)
    _, (group,) = read(tmp_path)
    output = {(q.ours.name, q.theirs.name): str(q) for q in compare_queries(group)}
    assert output == {
        ("finetune_random", "histogram"): "of 4 queries, better in 3, worse in 1, the same in 0",
        ("finetune_personmae", "finetune_random"): "of 4 queries, better in 2, worse in 1, the same in 1",
        ("finetune_personmae", "histogram"): "of 4 queries, better in 4, worse in 0, the same in 0",
    }
    assert ("better by AP in", "2", "of 4 queries, worse in 1") in sections.facts([group])


def test_seeds_are_compared_by_the_mean_of_each_query(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", ap=[0.3, 0.3, 0.3, 0.3])
    for seed, ap in enumerate(([0.1, 0.9, 0.3, 0.2], [0.1, 0.1, 0.3, 0.6])):
        make_run(f"finetune_{seed}", init="pretrain", ap=ap, overrides={"seed": seed})
    _, (group,) = read(tmp_path)
    (queries,) = compare_queries(group)
    assert (queries.better, queries.worse, queries.total) == (2, 1, 4)


@pytest.mark.parametrize("spoiled", [{"ap": [0.1, 0.1, 0.1, 0.1]}, {"benchmark_digest": "f" * 16}])
def test_queries_of_another_evaluation_are_not_used(make_run: MakeRun, tmp_path: Path, spoiled: dict[str, Any]) -> None:
    make_run("finetune_random", ap=[0.3, 0.3, 0.3, 0.3])
    path = make_run("finetune_personmae", init="pretrain", ap=[0.4, 0.4, 0.4, 0.4]) / "queries.json"
    assert len(compare_queries(read(tmp_path)[1][0])) == 1
    path.write_text(json.dumps(json.loads(path.read_text()) | spoiled))
    assert compare_queries(read(tmp_path)[1][0]) == []


def test_a_re_ranked_result_is_shown_and_not_compared(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3)
    make_run("finetune_personmae", init="pretrain", mAP=0.4)
    make_run("reranked", init=None, mAP=0.9, rerank="k_reciprocal")
    _, (group,) = read(tmp_path)
    assert "More than both" not in headline(tmp_path)
    shown = {row["name"]: row for row in sections.table_of(group)["rows"]}
    assert shown["reranked"]["details"] == "re-ranked: k_reciprocal"
    assert shown["finetune_personmae"]["scores"][0]["best"]


def test_a_whitened_result_is_shown_and_not_compared(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3)
    make_run("finetune_personmae", init="pretrain", mAP=0.4)
    make_run("whitened", init=None, mAP=0.9, whiten={"dim": 64, "shrinkage": 0.3})
    _, (group,) = read(tmp_path)
    assert "More than both" not in headline(tmp_path)
    shown = {row["name"]: row for row in sections.table_of(group)["rows"]}
    assert shown["whitened"]["details"] == "features whitened per camera"
    assert shown["finetune_personmae"]["scores"][0]["best"]


def test_settings_that_differ_are_named_but_seeds_of_several_are_not(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune_random", mAP=0.3, overrides={"optim": {"lr": 0.25}})
    make_run("finetune_personmae", init="pretrain", mAP=0.4)
    assert compare_settings(read(tmp_path)[1]) == [
        "Settings in which finetune_personmae and finetune_random differ: init (pretrain / random), optim.lr (0.005 / 0.25)."
    ]


def test_what_is_missing_is_the_next_command(make_run: MakeRun, tmp_path: Path) -> None:
    random = make_run("finetune_random", mAP=0.3)
    fields = {"run_dir": "pretrain", "data": {"shards": "shards"}}
    write_training(tmp_path / "pretrain", config.Pretrain.model_validate(fields), step=60, total=60)
    assert sections.next_steps(*read(tmp_path)) == [
        (
            "Fine-tune from pretrain:",
            f"personmae finetune {random}/config.yaml init={tmp_path}/pretrain run_dir={tmp_path}/finetune_personmae",
        )
    ]
    make_run("finetune_personmae", init="pretrain", mAP=0.4)
    seeds = [command for _, command in sections.next_steps(*read(tmp_path))]
    assert seeds == [
        f"personmae finetune {tmp_path}/{name}/config.yaml seed=1 run_dir={tmp_path}/{name}_seed1"
        for name in ("finetune_personmae", "finetune_random")
    ]
    for name, init in (("finetune_random_seed1", "random"), ("finetune_personmae_seed1", "pretrain")):
        make_run(name, init=init, mAP=0.3, overrides={"seed": 1})
    ((why, command),) = sections.next_steps(*read(tmp_path))
    assert why == "See what it does on another benchmark:"
    assert command.startswith(f"personmae evaluate {tmp_path}/finetune_personmae")


def test_numbers_that_were_not_finite_are_read_and_told(tmp_path: Path) -> None:
    settings = config.Pretrain.model_validate({"run_dir": "pretrain", "data": {"shards": "shards"}})
    write_training(tmp_path / "pretrain", settings, step=60, total=60)
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(
        '{"step": 30, "loss": NaN, "images_per_second": 64.0}\n{"step": 60, "loss": null, "images_per_second": null}\n'
    )
    runs, groups = read(tmp_path)
    assert [math.isnan(record["loss"]) for record in runs[0].records] == [True, True]
    assert "loss of nan" in summarise(runs, groups)
    assert sections.stages(runs)[0]["rate"] == "64"


def test_durations_are_of_the_steps_the_evaluation_and_the_sessions(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("finetune", seconds=20.0)  # 40 steps of 16 x 16 images at 64 images/s
    make_run("output", session={"seconds": 4000.0, "started": "2026-01-01T10:00:00+00:00", "host": "a-host"})
    first, second = sections.stages(read(tmp_path)[0])
    assert (first["training"], first["evaluation"], first["whole"]) == ("2 min 40 s", "20.0 s", "3 min 00 s")
    assert (second["whole"], second["started"]) == ("1 h 06 min", "2026-01-01 10:00 on a-host")
    assert sections.totals(read(tmp_path)[0])["training"] == "5 min 20 s"
    assert sections.duration(None) == "–"
    assert sections.duration(183_600) == "2 d 3 h"


def test_names_that_are_no_utf8_are_read_and_shown(make_run: MakeRun, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    make_run("finetune_random", mAP=0.3, root=odd)
    path = make_run("finetune_personmae", init="pretrain", mAP=0.4) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init": f"/runs/{odd}"}))
    runs, (group,) = read(tmp_path)
    assert {row.name for row in group.rows} == {"finetune_random", "finetune_personmae"}
    assert runs[0].result is not None
    assert runs[0].result.root == odd
    assert {row.started for row in group.rows} == {"random weights", "/runs/caf\ufffd"}
    "".join([summarise(runs, [group]), *compare_settings([group]), str(sections.settings_of(runs[1]))]).encode()

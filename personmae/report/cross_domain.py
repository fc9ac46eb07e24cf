"""Each model on each benchmark: how one that was trained on A does on B, which it has never seen.

Models are fine-tuned runs, runs without labels, and baselines without weights. Their results are all those below the folder.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from personmae import config
from personmae.report.compared import describe
from personmae.report.comparison import Group, Row, distinct, group_results, recipe_of
from personmae.report.places import printable
from personmae.report.records import Result
from personmae.report.repeats import data_of, how_of, without_repeats
from personmae.report.runs import RunFolder

Data = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Model:
    """Runs of one recipe or a baseline, what was measured of them on each set, and the sets that they were trained on."""

    row: Row
    measured: dict[Data, list[RunFolder]]
    own: frozenset[Data]
    labels: bool


def build(run_dir: Path, runs: Sequence[RunFolder]) -> dict[str, Any] | None:
    """The matrix for the page, in per cent, with a command for each number that is missing. None for a single set."""
    titles = {data_of(group.rows[0].first): group for group in group_results(runs)}
    models = find_models(runs)
    own_first = dict.fromkeys([*(data for model in models for data in sorted(model.own)), *titles])
    columns = [data for data in own_first if any(data in model.measured for model in models)]
    if len(columns) < 2 or not any(model.own for model in models):
        return None
    names = distinct([model.row.name for model in models])
    return {
        "columns": [titles[data].title for data in columns],
        "lines": [
            {
                "name": name,
                "details": _details(model, runs),
                "cells": [_cell(model, data) for data in columns],
            }
            for name, model in zip(names, models, strict=True)
        ],
        "commands": [printable(c) for model in models for data in columns for c in _missing(run_dir, model, titles[data])],
    }


def find_models(runs: Sequence[RunFolder]) -> list[Model]:
    """Models by recipe, in the order of the runs: what was evaluated belongs to the runs that were trained."""
    found: dict[Any, list[RunFolder]] = {}
    for run in without_repeats(runs):
        if _counts(run):
            found.setdefault(_model_key(run, runs), []).append(run)
    places = {str(run.directory): place for place, run in enumerate(runs)}
    ordered = sorted(found.values(), key=lambda measured: min(places[str(run.trained.directory)] for run in measured))
    return [_model(measured) for measured in ordered]


def _counts(run: RunFolder) -> bool:
    """Whether a result is a finished one of a model with a head, or of a baseline, compared as tables compare."""
    result = run.result
    if result is None or run.unfinished or result.rerank != "none" or result.probe or result.random:
        return False
    if run.trained.settings is None:
        return result.trained_on is not None or not result.checkpoint
    return not isinstance(run.trained.settings, config.Pretrain) and not (run.evaluated and how_of(run))


def _model_key(run: RunFolder, runs: Sequence[RunFolder]) -> Any:
    assert run.result
    if run.trained.settings:
        return recipe_of(run.trained, runs)
    return run.result.digest or (run.result.name, run.result.init)


def _model(measured: Sequence[RunFolder]) -> Model:
    by_data: dict[Data, list[RunFolder]] = {}
    for run in measured:
        assert run.result
        by_data.setdefault(data_of(run.result), []).append(run)
    trained = {str(run.trained.directory): run.trained for run in measured}
    of_one = list(trained.values()) if measured[0].trained.settings else list(measured[:1])
    labels = not any(isinstance(run.trained.settings, config.Unsupervised) for run in measured)
    return Model(Row(tuple(_with_result(run, measured) for run in of_one)), by_data, frozenset(_own(measured)), labels)


def _with_result(run: RunFolder, measured: Sequence[RunFolder]) -> RunFolder:
    """A run with a result to be named by: an evaluation's where its own is gone."""
    if run.result:
        return run
    result = next(other.result for other in measured if other.trained is run and other.result)
    return replace(run, result=result.model_copy(update={"name": run.name}))


def _own(measured: Sequence[RunFolder]) -> Iterator[Data]:
    """The sets that belong to what the model was trained on."""
    for run in measured:
        if run.trained.settings and run.trained.result:
            yield data_of(run.trained.result)
        elif run.result and run.result.trained_on and run.result.trained_on.benchmark_digest:
            yield "", run.result.trained_on.benchmark_digest


def _details(model: Model, runs: Sequence[RunFolder]) -> str:
    weights = describe(model.row, runs)
    parts = (weights if weights != model.row.name else "", model.row.seeds_in_words)
    return printable(", ".join(part for part in parts if part))


def _cell(model: Model, data: Data) -> dict[str, Any]:
    """The mean mAP and Rank-1 of a model on a set, and whether it was trained on people of that set."""
    found = model.measured.get(data, [])
    own = data in model.own
    kind = "in-domain" if own else ("zero shot" if model.row.runs[0].settings or model.own else "")
    if not found:
        return {"text": "–", "rank1": "", "notes": "missing", "own": own}
    row = Row(tuple(found))
    fewer = row.seeds_in_words if len(found) < len(model.row.runs) else ""
    notes = [kind + ("" if model.labels or not own else " without labels"), row.spread("mAP"), fewer]
    notes = [note for note in notes if note]
    return {
        "text": f"{100 * row.mean('mAP'):.1f}",
        "rank1": f"{100 * row.mean('rank1'):.1f}",
        "notes": ", ".join(notes),
        "own": own,
    }


def _missing(run_dir: Path, model: Model, group: Group) -> Iterator[str]:
    """The commands that would fill a cell, one for each run of the model that was not measured there."""
    first = group.rows[0].first
    done = {str(run.trained.directory) for run in model.measured.get(data_of(first), [])}
    if not model.row.runs[0].settings:
        if not done and not model.own:
            baseline, _, how = model.row.first.name.partition(", ")  # "thumbnail, whiten"
            options = ["--per-camera", how] if how else []
            yield _command(run_dir, baseline, first, model.row.first.name, *options)
        return
    for run in model.row.runs:
        if str(run.directory) not in done:
            yield _command(run_dir, str(run.directory), first, run.name)


def _command(run_dir: Path, where: str, on: Result, name: str, *options: str) -> str:
    out = run_dir / f"{name}_on_{on.benchmark}"
    return shlex.join(["personmae", "evaluate", where, on.benchmark, on.root, *options, "--out", str(out)])

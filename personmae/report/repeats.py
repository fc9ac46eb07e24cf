"""Measurements that were made twice: an evaluation of a run that has its own result, or the same evaluation again.

A table shows each once. A repetition lends the first what that lacks, such as a latency or what older records have not.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from personmae.report.records import Result
from personmae.report.runs import RunFolder

_LENT = ("latency", "camera_pairs")
_SAME = 1e-4  # of two mAPs: the last digits depend on the machine


def data_of(result: Result) -> tuple[str, str]:
    """What two results of the same data have in common: the digest or, in older records, layout and folder."""
    return ("", result.benchmark_digest) if result.benchmark_digest else (result.benchmark, result.root)


def how_of(run: RunFolder) -> str:
    """How the features of an evaluated model were taken, in the words of its record: what stands behind weights and seed."""
    if run.result is None or run.settings is not None:
        return ""
    weights = 2 if run.result.random else 1  # "random micro, seed 0, mean of its tokens", "runs/pretrain, mean of its tokens"
    return ", ".join(run.result.init.split(", ")[weights:])


def without_repeats(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs in their order, each measurement once. A run's own result comes before its evaluations."""
    kept: dict[Any, list[RunFolder]] = {}
    for run in sorted(runs, key=lambda run: run.settings is None):
        same = kept.setdefault(_measured(run), [])
        place = next((i for i, other in enumerate(same) if _agree(other, run)), len(same))
        same[place:] = [_completed(same[place], run), *same[place + 1 :]] if place < len(same) else [run]
    places = {str(run.directory): place for place, run in enumerate(runs)}
    found = [run for same in kept.values() for run in same]
    return sorted(found, key=lambda run: places[str(run.directory)])


def _measured(run: RunFolder) -> Any:
    """What measurements of one model on one set have in common, or the folder where the model is not known."""
    result = run.result
    if result is None or run.trained.settings is None:
        return str(run.directory)
    ranked = result.rerank, result.whiten is not None, bool(result.probe)
    return str(run.trained.directory), data_of(result), *ranked, how_of(run), run.unfinished


def _agree(one: RunFolder, other: RunFolder) -> bool:
    return one.result is not None and other.result is not None and abs(one.result.mAP - other.result.mAP) < _SAME


def _completed(run: RunFolder, again: RunFolder) -> RunFolder:
    """A run with the parts of its result that another measurement of it has alone."""
    assert run.result
    lacking = {name: getattr(again.result, name) for name in _LENT if getattr(run.result, name) is None}
    return replace(run, result=run.result.model_copy(update=lacking))

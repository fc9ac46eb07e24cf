"""Which results may be in one table, and what stands in a row of it.

Results belong together when they are of the same data, by its digest and not by the name of its layout. Runs that differ
in nothing but their seed are one row. An unfinished run is shown but never compared.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from personmae import config
from personmae.config import RANDOM
from personmae.report.places import printable
from personmae.report.records import Latency, Result
from personmae.report.repeats import data_of, how_of, without_repeats
from personmae.report.runs import RunFolder
from personmae.report.weights import Known, known_settings, started_from

SCORES = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}
_NOT_THE_RECIPE = ("seed", "run_dir", "root", "init", "checkpoint.", "metrics.", "data.cache_dir", "train.log_every")
_PRECISION = "train.precision"
_MOST_NAMES = 3  # that stand side by side


@dataclass(frozen=True, slots=True)
class Row:
    """Runs with results on the same data that differ in nothing but their seed. Usually it is one run."""

    runs: tuple[RunFolder, ...]
    label: str = ""  # where its own name is another row's too

    @property
    def results(self) -> list[Result]:
        return [run.result for run in self.runs if run.result]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def name(self) -> str:
        """The run's name, or what the names have in common."""
        if self.label:
            return self.label
        names = [result.name for result in self.results]
        if len(names) == 1:
            return printable(names[0])
        heads, _, tails = zip(*(name.partition(", ") for name in names), strict=True)  # "pretrain_s0, rows" of a probe
        common = re.sub(r"[-_. ]*(seed|s)?[-_. \d]*$", "", _common_start(heads))
        kind = f", {tails[0]}" if len(set(tails)) == 1 and tails[0] else ""
        return printable(common + kind if common else f"{names[0]} and {len(names) - 1} more")

    @property
    def seeds(self) -> list[int]:
        """One for each run, or for each run that was evaluated. Empty where nothing was trained here or drawn."""
        return [run.seed for run in self.runs if run.seed is not None]

    @property
    def seeds_in_words(self) -> str:
        seeds = self.seeds
        if not seeds:
            return ""
        if len(seeds) == 1:
            return "one seed"
        distinct = len(set(seeds))
        words = "one seed" if distinct == 1 else f"{distinct} seeds"
        return words if distinct == len(seeds) else f"{len(seeds)} runs of {words}"

    @property
    def started(self) -> str:
        """What it started from, in words."""
        starts = {result.init for result in self.results}
        if starts == {RANDOM} or (len(starts) > 1 and all(result.random for result in self.results)):
            return "random weights"
        return printable(self.first.init) if len(starts) == 1 else f"{len(starts)} encoders of one recipe"

    @property
    def unfinished(self) -> str:
        """How far those are that are not finished, in words."""
        if len(self.runs) == 1:
            return self.runs[0].unfinished
        return "; ".join(f"{run.name} at {run.unfinished}" for run in self.runs if run.unfinished)

    @property
    def from_random(self) -> bool:
        return self.runs[0].from_random

    @property
    def is_finetuning(self) -> bool:
        return isinstance(self.runs[0].settings, config.Finetune)

    def mean(self, score: str) -> float:
        return sum(getattr(result, score) for result in self.results) / len(self.results)

    def spread(self, score: str) -> str:
        """Lowest and highest in per cent where there are several runs: "20.4-22.4"."""
        values = sorted(100 * getattr(result, score) for result in self.results)
        return f"{values[0]:.1f}-{values[-1]:.1f}" if len(values) > 1 else ""

    def half_width(self, score: str) -> float | None:
        """Half of the 95 % interval of the mean by Student's t, in [0, 1]. None for fewer than three seeds."""
        values = [getattr(result, score) for result in self.results]
        if len(set(self.seeds)) < 3 or len(set(self.seeds)) < len(values):
            return None
        return float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5)

    @property
    def untrained(self) -> bool:
        """Whether it is a baseline without any weights."""
        first = self.runs[0]
        return first.settings is None and not (self.first.checkpoint or self.first.random)

    @property
    def latency(self) -> Latency | None:
        """The first that was measured of its runs."""
        return next((result.latency for result in self.results if result.latency), None)

    def in_words(self, score: str) -> str:
        """Such as "21.5 (20.4-22.4, 3 seeds)" or "21.5 (one seed)", in per cent."""
        notes = ", ".join(part for part in (self.spread(score), self.seeds_in_words) if part)
        return f"{100 * self.mean(score):.1f}" + (f" ({notes})" if notes else "")

    def cmc(self) -> list[float]:
        """Mean over the runs of the share of queries with a match among the first k. Empty where a record lacks it."""
        curves = [result.cmc for result in self.results]
        return np.mean(curves, axis=0).tolist() if len({len(curve) for curve in curves}) == 1 and curves[0] else []

    def query_ap(self) -> list[float | None] | None:
        """Mean over the runs of the AP of each query. None where a run has none that belongs to its result."""
        found = [_own_ap(run) for run in self.runs]
        if not found or any(ap is None for ap in found) or len({len(ap) for ap in found if ap is not None}) > 1:
            return None
        return [_mean(values) for values in zip(*(ap for ap in found if ap is not None), strict=True)]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of the same data. ``digest`` is None where the records have none."""

    rows: tuple[Row, ...]

    @property
    def digest(self) -> str | None:
        return self.rows[0].first.benchmark_digest

    @property
    def synthetic(self) -> bool | None:
        return self.rows[0].first.synthetic

    @property
    def title(self) -> str:
        """Which people, and how many where it is not the published set, by the record that saw most of the data."""
        results = [result for row in self.rows for result in row.results]
        fullest = max(results, key=lambda result: len(result.counts))
        return printable(fullest.benchmark_title or f"{fullest.benchmark} layout, data unknown")

    def is_best(self, row: Row, score: str) -> bool:
        """Whether no other row that can be compared with it has more, and there is one."""
        rivals = [other for other in self.rows if comparable(row, other)]
        return len(rivals) > 1 and row in rivals and row.mean(score) == max(other.mean(score) for other in rivals)


def comparable(one: Row, other: Row) -> bool:
    """Whether both are finished and ranked alike. A row is comparable with itself."""
    return not one.unfinished and not other.unfinished and ranked(one) == ranked(other)


def ranked(row: Row) -> tuple[str, bool]:
    """How the results were ranked, apart from the features."""
    return row.first.rerank, row.first.whiten is not None


def group_results(runs: Sequence[RunFolder]) -> list[Group]:
    """Tables by data: one for each digest or, without a digest, for each layout and folder."""
    groups: dict[tuple[str, str], dict[Any, list[RunFolder]]] = {}
    for run in without_repeats(runs):
        if run.result:
            groups.setdefault(data_of(run.result), {}).setdefault(recipe_of(run, runs), []).append(run)
    return [Group(_named([Row(tuple(same)) for same in recipes.values()])) for recipes in groups.values()]


def distinct(names: Sequence[str]) -> list[str]:
    """The names with a number behind each that was there before: ``a``, ``a (2)``."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        found.append(name if name not in found else next(other for other in numbered if other not in [*found, *names]))
    return found


def _named(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with names of their own: ``ft-1, ft-2`` and ``ft-3, ft-4`` have ``ft`` in common."""
    names = [row.name for row in rows]
    whole = [_in_full(row) if names.count(row.name) > 1 else row.name for row in rows]
    return tuple(replace(row, label=name) for row, name in zip(rows, distinct(whole), strict=True))


def _common_start(texts: Sequence[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _in_full(row: Row) -> str:
    """The names of its runs, or the first and the last where there are many."""
    names = list(dict.fromkeys(result.name for result in row.results))
    return printable(", ".join(names) if len(names) <= _MOST_NAMES else f"{names[0]} to {names[-1]}")


def data_notes(groups: Sequence[Group]) -> list[str]:
    """Notes on the data, which a reader needs before comparing tables."""
    notes = []
    for group in groups:
        if group.digest is None:
            notes.append(
                f"{group.title}: these results are from before data had a digest, so whether their rows are of the same "
                "images is unknown, and whether the people are drawn too. Evaluate again to know."
            )
    layouts = [group.rows[0].first.benchmark for group in groups]
    for layout in dict.fromkeys(layouts):
        if layouts.count(layout) > 1:
            notes.append(
                f"{layouts.count(layout)} tables here are in the layout {layout}. Their data are not known to be the same, so "
                "no number of one is compared with a number of another."
            )
    return notes


def recipe_of(run: RunFolder, runs: Sequence[RunFolder]) -> Any:
    """What runs of different seeds have in common, or a run's own folder where nothing can be compared.

    Evaluations of runs have the recipe of those, and how their features were taken.
    """
    of, result = run.trained, run.result
    if result and result.random:
        drawn = sorted((key, value) for key, value in result.random.items() if key != "seed")
        return "random", repr(drawn), how_of(run), result.rerank, bool(result.probe)
    if of.settings is None or result is None:
        return str(run.directory)
    flat = {key: value for key, value in flat_of(of).items() if not key.startswith(_NOT_THE_RECIPE)}
    data = of.result.identity.get("data.digest") or printable(of.result.root) if of.result else ""
    how = () if run is of else (how_of(run), result.rerank, bool(result.probe), result.step if run.unfinished else None)
    start = _start(of, of.settings.init, known_settings(runs))
    return (
        type(of.settings).__name__,
        repr(sorted(flat.items())),
        data,
        start,
        bool(run.unfinished),
        how,
    )


def _start(run: RunFolder, init: str, known: Known) -> str:
    """The recipe of what a run started from where that can be read, for each seed may have an encoder of its own.

    What that started from is a part of it: domain adaptation begins with a fine-tuned run.
    """
    if init == RANDOM:
        return init
    settings = started_from(run, init, known)
    if settings is None:
        return init
    flat = config.flatten(settings.model_dump(mode="json"))
    recipe = sorted((key, value) for key, value in flat.items() if not key.startswith(_NOT_THE_RECIPE))
    return repr((recipe, _start(run, settings.init, known)))


def flat_of(run: RunFolder) -> dict[str, Any]:
    """Settings by key, with the precision that ``auto`` chose where the result has it."""
    flat = config.flatten(run.settings.model_dump(mode="json")) if run.settings else {}
    used = run.result.identity.get(_PRECISION) if run.result else None
    return flat | {_PRECISION: used} if flat and used else flat


def _own_ap(run: RunFolder) -> list[float | None] | None:
    """APs that belong to the run's result: of the same data, with the same mean."""
    if run.result is None or run.queries is None or run.queries.benchmark_digest != run.result.benchmark_digest:
        return None
    valid = [ap for ap in run.queries.ap if ap is not None]
    belongs = len(valid) == run.result.num_valid and valid and abs(float(np.mean(valid)) - run.result.mAP) < 1e-4
    return run.queries.ap if belongs else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None

"""Pre-trained beside random: the two fine-tunings of a table, the headline about them, and where they differ."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personmae import config
from personmae.report.comparison import Group, Row, comparable, flat_of, ranked
from personmae.report.places import printable
from personmae.report.runs import RunFolder
from personmae.report.weights import MAE_LIKE, pretrained_as, started_from

_EQUAL = 1e-6  # APs are recorded with six digits


@dataclass(frozen=True, slots=True)
class Queries:
    """How two rows of one table differ query by query: in how many the first has the higher AP, the lower, the same."""

    ours: Row
    theirs: Row
    total: int
    better: int
    worse: int

    def __str__(self) -> str:
        same = self.total - self.better - self.worse
        return f"of {self.total:,} queries, better in {self.better:,}, worse in {self.worse:,}, the same in {same:,}"


def find_pairs(group: Group) -> list[tuple[Row, Row]]:
    """The (pre-trained, random) fine-tuning of one table, the best mAP of each kind. Empty where one is missing.

    MAE-like pre-training stands there only where there is no other.
    """
    rows = [row for row in group.rows if row.is_finetuning and not row.unfinished and ranked(row) == ("none", False)]
    kinds = [[row for row in rows if row.from_random is random] for random in (False, True)]
    if not all(kinds):
        return []
    return [(max(kinds[0], key=lambda row: (not start_of(row).startswith(MAE_LIKE), _by_map(row))), max(kinds[1], key=_by_map))]


def start_of(row: Row) -> str:
    """What fine-tunings began with: the method of a pre-training, or the name of the weights where that cannot be read."""
    run = row.runs[0]
    assert isinstance(run.settings, config.Finetune)
    start = started_from(run, run.settings.init, {})
    is_known = isinstance(start, config.Pretrain)
    return f"{pretrained_as(start)} pre-training" if is_known else f"the weights {printable(Path(run.settings.init).name)}"


def compare_queries(group: Group) -> list[Queries]:
    """Each trained row next to the random start of its table, and next to the best row without training."""
    references = [pair[1] for pair in find_pairs(group)]
    baselines = [row for row in group.rows if row.untrained and not row.unfinished]
    references += [max(baselines, key=_by_map)] if baselines else []
    pairs = itertools.product([row for row in group.rows if row.runs[0].settings], references)
    found = [_compare(ours, theirs) for ours, theirs in pairs if ours != theirs and comparable(ours, theirs)]
    return [queries for queries in found if queries]


def summarise(runs: Sequence[RunFolder], groups: Sequence[Group]) -> str:
    """The headline: pre-trained against random in mAP points, by data, or the state of the runs."""
    sentences = [sentence for group in groups for sentence in _summarise_pair(group)]
    if not sentences and (ready := [group for group in groups if any(not row.unfinished for row in group.rows)]):
        for group in ready:
            best = max((row for row in group.rows if not row.unfinished), key=_by_map)
            sentences.append(f"{_on(group)}, best so far is {best.name} with {_percent(best)}.")
        sentences.append("There is no pair to compare yet.")
    unfinished = [f"{run.name} ({run.unfinished})" for run in runs if run.unfinished and (run.records or run.result)]
    if unfinished:
        sentences.append(f"Not finished: {printable(', '.join(unfinished))}.")
    if not sentences and (trained := [run for run in runs if run.records]):
        last = trained[0].records[-1]
        sentences.append(
            f"{printable(trained[0].name)} is at step {last['step']:.0f} with a loss of {last.get('loss', float('nan')):.3f}. "
            "Nothing is evaluated yet."
        )
    return " ".join(sentences) or "Nothing is trained or evaluated yet."


def compare_settings(groups: Sequence[Group]) -> list[str]:
    """For each pair of the headline, every setting in which the two rows differ."""
    sentences = []
    for ours, theirs in (pair for group in groups for pair in find_pairs(group)):
        one, other = (flat_of(row.runs[0]) for row in (ours, theirs))
        several = len(ours.runs) > 1 or len(theirs.runs) > 1
        keys = one.keys() - ({"run_dir", "seed"} if several else {"run_dir"})
        differing = [f"{key} ({one[key]} / {other.get(key)})" for key in one if key in keys and one[key] != other.get(key)]
        sentences.append(printable(f"Settings in which {ours.name} and {theirs.name} differ: {', '.join(differing)}."))
    return sentences


def _by_map(row: Row) -> float:
    return row.mean("mAP")


def _on(group: Group) -> str:
    return f"On {group.title}"


def _percent(row: Row) -> str:
    """Such as "21.5 % mAP (20.4-22.4, 3 seeds)"."""
    number, space, rest = row.in_words("mAP").partition(" ")
    return f"{number} % mAP{space}{rest}"


def _summarise_pair(group: Group) -> list[str]:
    sentences = []
    for ours, theirs in find_pairs(group):
        one, other, each = _percent(ours), _percent(theirs), ""
        if (ours.seeds_in_words, theirs.seeds_in_words) == ("one seed", "one seed"):
            one, other, each = (*(text.removesuffix(" (one seed)") for text in (one, other)), ", one seed each")
        sentences.append(
            f"{_on(group)}, fine-tuning from {start_of(ours)} reaches {one}, from random "
            f"weights {other}{each}: {difference(ours, theirs)}."
        )
        best = max((row for row in group.rows if comparable(row, ours)), key=_by_map)
        if best.mean("mAP") > max(ours.mean("mAP"), theirs.mean("mAP")):
            sentences.append(f"More than both: {best.name}, {_percent(best)}.")
    return sentences


def difference(ours: Row, theirs: Row) -> str:
    """Of two mAPs, in points."""
    points = round(100 * ours.mean("mAP"), 1) - round(100 * theirs.mean("mAP"), 1)
    if abs(points) < 0.05:
        return "no difference"
    return f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"


def _compare(ours: Row, theirs: Row) -> Queries | None:
    one, other = ours.query_ap(), theirs.query_ap()
    if one is None or other is None or len(one) != len(other):
        return None
    gains = np.array([a - b for a, b in zip(one, other, strict=True) if a is not None and b is not None])
    return Queries(ours, theirs, len(gains), int((gains > _EQUAL).sum()), int((gains < -_EQUAL).sum()))

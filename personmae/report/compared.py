"""What stands beside what in a table, over how many seeds, in sentences.

Like is compared with like: fine-tuned runs with fine-tuned ones, frozen features with frozen ones. Baselines stand beside all.
"""

from collections.abc import Sequence

from personmae import config
from personmae.report.comparison import Group, Row, comparable
from personmae.report.places import printable
from personmae.report.repeats import how_of
from personmae.report.runs import RunFolder
from personmae.report.weights import FULL, known_settings, weights_of

_BASELINES = {
    "histogram": "colour histogram",
    "thumbnail": "thumbnail",
    "thumbnail+histogram": "thumbnail with colour histogram",
}


def sentences(group: Group, runs: Sequence[RunFolder]) -> list[str]:
    """One for each kind of row, such as "Fine-tuned: PersonMAE (3 seeds) compared with random weights (3 seeds)"."""
    rows: dict[str, list[Row]] = {}
    for row in group.rows:
        rows.setdefault(kind_of(row), []).append(row)
    baselines = rows.pop("", [])
    found = [_sentence(kind, of_kind, baselines, runs) for kind, of_kind in rows.items()]
    if not rows and baselines:
        found = [f"Nothing trained here is in this table: {_listed([_counted(row, baselines, runs) for row in baselines])}."]
    if apart := [row for row in group.rows if row.unfinished or row.first.rerank != "none"]:
        reasons = [f"{row.name} ({'unfinished' if row.unfinished else 're-ranked'})" for row in apart]
        found.append(f"Shown, but compared with nothing: {', '.join(reasons)}.")
    return [printable(sentence) for sentence in found]


def kind_of(row: Row) -> str:
    """How a row came about, as a sentence begins. Empty for a baseline without weights."""
    run = row.runs[0]
    trained, first = run.trained.settings, row.first
    if row.untrained:
        return ""
    if first.probe:
        return "Frozen, read by the probe"
    if isinstance(run.settings, config.Finetune):
        return "Fine-tuned"
    if isinstance(run.settings, config.Unsupervised):
        return "Trained without labels"
    if isinstance(trained, config.Finetune | config.Unsupervised) or first.trained_on:
        own = run.trained.result
        digest = first.trained_on.benchmark_digest if first.trained_on else own and own.benchmark_digest
        return "Evaluated again" if digest == first.benchmark_digest else "Zero shot, trained on other data"
    known = first.random or how_of(run) or isinstance(trained, config.Pretrain)
    return "Frozen features" if known else "Trained elsewhere"  # older records do not say on what


def describe(row: Row, runs: Sequence[RunFolder]) -> str:
    """What a row's weights are: "PersonMAE", "MAE-like", "random weights", a baseline's name, or where they came from."""
    run = row.runs[0].trained
    if row.untrained:
        return _BASELINES.get(row.first.name, row.name)
    if row.first.random:
        return "random weights"
    if run.settings is None:
        return row.name
    return weights_of(run, run.settings, known_settings(runs))


def _sentence(kind: str, rows: Sequence[Row], baselines: Sequence[Row], runs: Sequence[RunFolder]) -> str:
    ready = [row for row in rows if not row.unfinished and row.first.rerank == "none"]
    if not ready:
        return f"{kind}: nothing is finished yet."
    first = max(ready, key=lambda row: (describe(row, runs).startswith(FULL), row.mean("mAP")))
    others = [row for row in (*ready, *baselines) if row is not first and comparable(row, first)]
    if not others:
        return f"{kind}: {_counted(first, [], runs)}, with nothing to compare it with."
    beside = [_counted(row, (first, *others), runs) for row in others]
    return f"{kind}: {_counted(first, others, runs)} compared with {_listed(beside)}."


def _counted(row: Row, beside: Sequence[Row], runs: Sequence[RunFolder]) -> str:
    """A row's weights and seeds, with its name where another row has such weights."""
    words = describe(row, runs)
    same = [other for other in beside if other is not row and describe(other, runs) == words]
    notes = [row.name] if same and row.name != words else []
    notes += [row.seeds_in_words] if row.seeds_in_words else []
    return words + (f" ({', '.join(notes)})" if notes else "")


def _listed(parts: Sequence[str]) -> str:
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else "".join(parts)

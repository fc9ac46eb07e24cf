"""Parts of a report as text for its template: tables, labels, durations, and what to run next."""

import math
import shlex
import statistics
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from personmae import config
from personmae.config import RANDOM
from personmae.reid.cluster_quality import follows_cameras
from personmae.report.comparison import SCORES, Group, Row
from personmae.report.pairs import compare_queries, difference, find_pairs, start_of
from personmae.report.places import printable
from personmae.report.repeats import how_of
from personmae.report.runs import RunFolder

NextStep = tuple[str, str]  # why, and the command to type


def table_of(group: Group) -> dict[str, Any]:
    """One table of results, in per cent, with its comparison query by query."""
    machines = machines_of(group)
    return {
        "title": group.title,
        "rows": [_row(group, row, machines) for row in group.rows],
        "machines": machines,
        "intervals": any(row.half_width("mAP") is not None for row in group.rows),
        "frozen": [_frozen(row) for row in group.rows if row.first.probe],
        "queries": compare_queries(group),
    }


def _frozen(row: Row) -> dict[str, str]:
    """A probe of frozen features, mAP and Rank-1 of both readings in per cent, means over seeds."""

    def scores(reading: str) -> str:
        found = [result.probe[reading] for result in row.results if reading in result.probe]
        return " / ".join(f"{100 * statistics.fmean(getattr(each, name) for each in found):.1f}" for name in ("mAP", "rank1"))

    name = row.name.removesuffix(", rows") + (f" ({row.seeds_in_words})" if len(row.runs) > 1 else "")
    return {"name": name, "started": row.started.partition(", frozen")[0]} | {each: scores(each) for each in row.first.probe}


def machines_of(group: Group) -> dict[str, str]:
    """On what models were timed, by a letter: times of different machines are not compared."""
    kinds = dict.fromkeys(printable(row.latency) for row in group.rows if row.latency)
    return {kind: chr(ord("A") + place) for place, kind in enumerate(kinds)}


def _latency(row: Row, machines: dict[str, str]) -> dict[str, str]:
    """Milliseconds of one image, the rate of a batch, and on which machine where there are several."""
    found = row.latency
    if found is None:
        return {"text": "–", "notes": ""}
    rate = f"{found.images_per_second:,.0f} images/s"
    on = f"on {machines[printable(found)]}" if len(machines) > 1 else ""
    return {"text": f"{found.milliseconds:.1f}", "notes": ", ".join(note for note in (rate, on) if note)}


def _row(group: Group, row: Row, machines: dict[str, str]) -> dict[str, Any]:
    first, half_width = row.first, row.half_width("mAP")
    of_all = f" of {first.num_queries:,}" if first.num_valid != first.num_queries else ""
    return {
        "name": row.name,
        "unfinished": printable(row.unfinished),
        "details": _details(row),
        "scores": [
            {"text": f"{100 * row.mean(score):.1f}", "spread": _spread(row, score), "best": group.is_best(row, score)}
            for score in SCORES
        ],
        "interval": f"± {100 * half_width:.1f}" if half_width is not None else "",
        "latency": _latency(row, machines),
        "started": row.started,
        "queries": f"{first.num_valid:,}{of_all}",
        "gallery": f"{first.num_gallery:,}",
    }


def _spread(row: Row, score: str) -> str:
    """Beside mAP the number of seeds too: "20.4-22.4, 3 seeds"."""
    parts = (row.spread(score), row.seeds_in_words if score == "mAP" else "")
    return ", ".join(part for part in parts if part)


def _details(row: Row) -> str:
    """Details beyond its name: the seeds, and anything unusual."""
    notes = []
    if len(row.runs) > 1:
        notes.append(f"seeds {', '.join(map(str, row.seeds))}")
        notes += [how] if (how := how_of(row.runs[0])) else []
    if row.first.rerank != "none":
        notes.append(f"re-ranked: {row.first.rerank}")
    if row.first.whiten:
        notes.append("features whitened per camera")
    if len(commits := {run.info.get("commit") for run in row.runs}) > 1:
        notes.append(f"from {len(commits)} commits")
    return printable("; ".join(notes))


def tags(runs: Sequence[RunFolder], groups: Sequence[Group]) -> list[tuple[str, bool]]:
    """What a reader must know before any number, and whether it is a warning."""
    found: list[tuple[str, bool]] = [(group.title, group.synthetic is not False) for group in groups]
    if pairs := [pair for group in groups for pair in find_pairs(group)]:
        fewest = min(len(set(row.seeds)) for pair in pairs for row in pair)
        found.append(("one seed" if fewest == 1 else f"{fewest} seeds", fewest == 1))
    if any(_follows_cameras(run) for run in runs):
        found.append(("clusters follow cameras", True))
    if any(run.unfinished for run in runs):
        found.append(("unfinished", True))
    return found


def _follows_cameras(run: RunFolder) -> bool:
    """Whether the last clusters of an unsupervised training follow cameras. Older runs have no record of it."""
    last = run.clusters[-1] if run.clusters else {}
    return follows_cameras(last.get("ami_cameras"), last.get("one_camera_share"))


def facts(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """The headline's numbers, (label, value, detail), where one table has a pair to compare."""
    pairs = [(group, *pair) for group in groups for pair in find_pairs(group)]
    if len(pairs) != 1:
        return []
    group, ours, theirs = pairs[0]
    found = [
        (f"mAP from {start_of(ours)}", f"{100 * ours.mean('mAP'):.1f} %", _spread(ours, "mAP")),
        ("mAP from random weights", f"{100 * theirs.mean('mAP'):.1f} %", _spread(theirs, "mAP")),
        ("mAP, pre-trained beside random", difference(ours, theirs), ""),
    ]
    for queries in compare_queries(group):
        if (queries.ours, queries.theirs) == (ours, theirs):
            detail = f"of {queries.total:,} queries, worse in {queries.worse:,}"
            found.append(("better by AP in", f"{queries.better:,}", detail))
    return found


# --- how long it took -----------------------------------------------------------------------------------------------


def stages(runs: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Each run: what it is, how far it is, and its durations."""
    return [
        {
            "name": printable(run.name),
            "kind": run.kind,
            "state": f"unfinished, {run.unfinished}" if run.unfinished else "finished",
            "unfinished": run.unfinished,
            "started": _sessions(run),
            "rate": _rate(run),
            "training": duration(run.train_seconds),
            "evaluation": duration(run.result.seconds if run.result else None),
            "whole": duration(run.seconds),
        }
        for run in runs
    ]


def totals(runs: Sequence[RunFolder]) -> dict[str, str]:
    """Durations of all runs together."""

    def together(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return duration(math.fsum(known) if known else None)

    return {
        "training": together([run.train_seconds for run in runs]),
        "evaluation": together([run.result.seconds if run.result else None for run in runs]),
        "whole": together([run.seconds for run in runs]),
    }


def duration(seconds: float | None) -> str:
    """In words: "8.2 s", "4 min 05 s", "3 h 20 min", "2 d 4 h". A dash where it is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _rate(run: RunFolder) -> str:
    rates = [record["images_per_second"] for record in run.records if record.get("images_per_second", 0) > 0]
    return f"{statistics.median(rates):,.0f}" if rates else "–"


def _sessions(run: RunFolder) -> str:
    """When it was started, and how often."""
    if not run.sessions or "started" not in run.sessions[0]:
        return ""
    first, count = run.sessions[0], len(run.sessions)
    when = datetime.fromisoformat(first["started"]).strftime("%Y-%m-%d %H:%M")
    return printable(f"{when} on {first.get('host', 'an unknown host')}" + (f", {count} sessions" if count > 1 else ""))


# --- settings -------------------------------------------------------------------------------------------------------


def settings_of(run: RunFolder) -> dict[str, Any]:
    """A run's set-up for the page."""
    evaluated = ""
    if run.result:
        evaluated = f"Evaluated in {duration(run.result.seconds)} at commit {run.result.commit or 'unknown'}."
        if run.result.benchmark_digest:
            evaluated += f" Digest of its data: {run.result.benchmark_digest}."
    return {
        "name": printable(run.name),
        "unfinished": run.unfinished,
        "facts": [(name, printable(value)) for name, value in _facts(run)],
        "evaluated": evaluated,
        "config_yaml": printable(run.config_yaml),
    }


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    info, facts = run.info, []
    if command := info.get("command"):
        facts.append(("command", command if isinstance(command, str) else shlex.join(command)))
    if run.sessions and (cwd := run.sessions[-1].get("cwd")):
        facts.append(("folder", cwd))
    if "commit" in info:
        facts.append(("commit", info["commit"] or "not in a checkout"))
    facts += [(label, info[name]) for name, label in (("seed", "seed"), ("config_hash", "configuration")) if name in info]
    if hardware := info.get("hardware"):
        memory = f"{hardware.get('memory_bytes', 0) / 2**30:.0f} GiB"
        gpus = ", ".join(hardware.get("gpus") or []) or "no GPU"
        facts.append(("hardware", f"{hardware.get('cpu')}, {hardware.get('cores')} cores, {memory}, {gpus}"))
    if versions := info.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return facts


# --- what to run next -----------------------------------------------------------------------------------------------


def next_steps(runs: Sequence[RunFolder], groups: Sequence[Group]) -> list[NextStep]:
    """What is missing between these runs and a comparison that holds, each with a command."""
    steps = [_go_on(run) for run in runs if run.unfinished and run.settings]
    encoders = [run for run in runs if isinstance(run.settings, config.Pretrain) and not run.unfinished]
    tuned = [run for run in runs if isinstance(run.settings, config.Finetune) and not run.unfinished]
    if any(isinstance(run.settings, config.Pretrain) and run.unfinished for run in runs):
        return steps
    if not encoders and not tuned:
        steps.append(("Nothing is pre-trained here yet. Write shards and pre-train:", "personmae pretrain CONFIG"))
    elif all(run.from_random for run in tuned) and encoders:
        command = _finetune(tuned, str(encoders[0].directory), "finetune_personmae")
        steps.append((f"Fine-tune from {encoders[0].name}:", command))
    elif tuned and not any(run.from_random for run in tuned):
        command = _finetune(tuned, RANDOM, "finetune_random")
        steps.append(("Fine-tune from random weights, to have something to compare with:", command))
    for ours, theirs in (pair for group in groups for pair in find_pairs(group)):
        few = min((ours, theirs), key=lambda row: len(set(row.seeds)))
        if len(set(few.seeds)) == 1:
            steps += [_another_seed(row.runs[0]) for row in (ours, theirs) if len(set(row.seeds)) == 1]
    if not steps:
        trained = [row for group in groups for row in group.rows if row.runs[0].settings]
        best = max(trained, key=lambda row: row.mean("mAP"), default=None)
        where = shlex.quote(str(best.runs[0].directory)) if best else "RUN"
        steps.append(("See what it does on another benchmark:", f"personmae evaluate {where} BENCHMARK ROOT --out DIR"))
    return [(printable(why), printable(command)) for why, command in steps]


def _go_on(run: RunFolder) -> NextStep:
    why, command = f"Let {run.name} go on where it was, at {run.unfinished}:", run.info.get("command")
    if isinstance(command, str):
        cwd = run.sessions[-1].get("cwd") if run.sessions else None
        return why, (f"cd {shlex.quote(cwd)} && " if cwd else "") + command
    verb = {config.Pretrain: "pretrain", config.Finetune: "finetune"}.get(type(run.settings), "unsupervised")  # pyright: ignore[reportArgumentType]
    config_file = shlex.quote(str(run.directory / "config.yaml"))
    where = f"run_dir={run.directory}"
    return why, f"personmae {verb} {config_file} {shlex.quote(where)}"


def _finetune(tuned: Sequence[RunFolder], init: str, name: str) -> str:
    if not tuned:
        return f"personmae finetune CONFIG {shlex.quote(f'init={init}')} root=DATA"
    like = tuned[0].directory
    overrides = [f"init={init}", f"run_dir={like.parent / name}"]
    return shlex.join(["personmae", "finetune", str(like / "config.yaml"), *overrides])


def _another_seed(run: RunFolder) -> NextStep:
    seed = run.settings.seed + 1 if run.settings else 1
    verb = "finetune" if isinstance(run.settings, config.Finetune) else "unsupervised"
    overrides = [f"seed={seed}", f"run_dir={run.directory.parent / f'{run.name}_seed{seed}'}"]
    command = shlex.join(["personmae", verb, str(run.directory / "config.yaml"), *overrides])
    return f"One seed of {run.name} may be luck. Another one becomes part of its row:", command

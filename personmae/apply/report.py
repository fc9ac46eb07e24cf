"""``personmae report RUN``: one self-contained HTML page of what a directory of runs holds, and a figure for a README.

What is not there yet is left out of the page, with a sentence that says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from rich.console import Console
from rich.table import Table

from personmae import config, files
from personmae.apply import pictures
from personmae.apply.runs import RANDOM, RankList, Result, Run, find_runs
from personmae.data.decode import BadImage
from personmae.errors import UserError
from personmae.reid.datasets import describe, load_benchmark

SCORES = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}
LOSSES = {"loss", "pixel_loss", "feature_loss"}
CHARTS = (  # of the runs of a kind: a title, and the fields of metrics.jsonl by the words for them
    (config.Pretrain, "pre-training: loss, total and pixel", {"loss": "total", "pixel_loss": "pixel"}),
    (config.Pretrain, "pre-training: feature loss", {"feature_loss": ""}),
    (config.Pretrain, "pre-training: images per second", {"images_per_second": ""}),
    (config.Finetune, "fine-tuning: loss", {"loss": ""}),
    (config.Finetune, "fine-tuning: accuracy on its batches", {"accuracy": ""}),
    (config.Unsupervised, "without labels: loss", {"loss": ""}),
)
NUM_GROUPS = 8  # pictures of Figure 3
NUM_QUERIES = 6  # rank lists on the page
FIGURE_GROUPS, FIGURE_QUERIES = 4, 3  # of these in figure.png
THUMBNAIL = (128, 64)  # (height, width) of a picture in a rank list
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, or why it is not there."""

    content: Any = None
    missing: str = ""


def run(run_dir: Path) -> Path:
    """Write ``report.html`` and ``figure.png`` into ``run_dir``, print the table; returns the page's path.

    Raises:
        UserError: the directory holds nothing of ours, or a file in it is damaged.
    """
    runs = find_runs(run_dir)
    results = [run.result for run in runs if run.result]
    if results:
        print_table(results)
    pretrainings = [run for run in runs if isinstance(run.settings, config.Pretrain)]
    regions = [(run.name, attempt(lambda run=run: predict(run))) for run in pretrainings]
    rank_lists = attempt(lambda: draw_rank_lists(runs))
    summary = summarise(runs)
    page = run_dir / "report.html"
    files.replace(
        page,
        render(
            title=f"PersonMAE: {run_dir.resolve().name}",
            summary=summary,
            table=table_rows(results),
            scores=SCORES,
            comparison=compare_settings(runs),
            charts=draw_charts(runs),
            footnote=pictures.FOOTNOTE,
            regions=[(name, Section(embed_groups(s.content), s.missing)) for name, s in regions],
            rank_lists=Section(embed_rows(rank_lists.content or {}), rank_lists.missing),
            runs=runs,
            data=[(what, attempt(count)) for what, count in data_counts(runs)],
        ),
    )
    groups = next((s.content for _, s in regions if s.content), [])[:FIGURE_GROUPS]
    lists = {name: rows[:FIGURE_QUERIES] for name, rows in (rank_lists.content or {}).items()}
    if groups or lists:
        pictures.write_figure(run_dir / "figure.png", groups, lists, title=summary)
        print(run_dir / "figure.png")
    print(page)
    return page


def attempt(build: Callable[[], T]) -> Section:
    """What ``build`` returns, or the sentence of the error that a missing piece gives."""
    try:
        return Section(build())
    except (UserError, BadImage, OSError) as error:
        return Section(missing=str(error))


# --- numbers --------------------------------------------------------------------------------------------------------


def table_rows(results: list[Result]) -> list[dict[str, Any]]:
    """Results as text in per cent; ``best`` names a row's scores that no other row of its benchmark beats."""
    rows = []
    for result in results:
        rivals = [other for other in results if other.benchmark == result.benchmark]
        best = [s for s in SCORES if len(rivals) > 1 and getattr(result, s) == max(getattr(r, s) for r in rivals)]
        scores = {score: f"{100 * getattr(result, score):.1f}" for score in SCORES}
        rows.append({"result": result, "scores": scores, "best": best, "started": started_from(result)})
    return rows


def started_from(result: Result) -> str:
    """What a row started from, in words."""
    return "random weights" if result.init == RANDOM else result.init


def print_table(results: list[Result]) -> None:
    """The table on the terminal, the best of each benchmark bold."""
    table = Table("result", "started from", "benchmark", *(f"{label} %" for label in SCORES.values()), "queries")
    for row in table_rows(results):
        scores = [f"[bold]{text}[/]" if name in row["best"] else text for name, text in row["scores"].items()]
        result: Result = row["result"]
        table.add_row(result.name, row["started"], result.benchmark, *scores, f"{result.num_valid:,}")
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)


def find_pairs(runs: list[Run]) -> list[tuple[Run, Run]]:
    """(pre-trained, random) fine-tuning runs of each benchmark; the best mAP of each kind where there are several."""
    pairs = []
    done = [(run, run.result) for run in runs if isinstance(run.settings, config.Finetune) and run.result]
    for benchmark in dict.fromkeys(result.benchmark for _, result in done):
        best: dict[bool, tuple[Run, Result]] = {}
        for run, result in done:
            kind = run.from_random
            if result.benchmark == benchmark and (kind not in best or result.mAP > best[kind][1].mAP):
                best[kind] = run, result
        if len(best) == 2:
            pairs.append((best[False][0], best[True][0]))
    return pairs


def summarise(runs: list[Run]) -> str:
    """The headline: pre-trained against random in mAP points, or how far things are."""
    sentences = []
    for pretrained, random in find_pairs(runs):
        ours, theirs = pretrained.result, random.result
        assert ours is not None
        assert theirs is not None
        sentences.append(
            f"On {ours.benchmark}, fine-tuning from PersonMAE pre-training reaches {100 * ours.mAP:.1f} % mAP, from random "
            f"weights {100 * theirs.mAP:.1f} %: {_difference(ours.mAP, theirs.mAP)}."
        )
        rivals = [run.result for run in runs if run.result and run.result.benchmark == ours.benchmark]
        best = max(rivals, key=lambda result: result.mAP)
        if best.mAP > max(ours.mAP, theirs.mAP):
            sentences.append(f"More than both: {best.name}, {100 * best.mAP:.1f} %.")
    if sentences:
        return " ".join(sentences)
    if measured := [run.result for run in runs if run.result]:
        best = max(measured, key=lambda result: result.mAP)
        return f"Best so far: {best.name}, {100 * best.mAP:.1f} % mAP on {best.benchmark}; there is no pair to compare yet."
    if trained := [run for run in runs if run.records]:
        last = trained[0].records[-1]
        return f"{trained[0].name} is at step {last['step']:.0f} with a loss of {last['loss']:.3f}; nothing is evaluated yet."
    return "Nothing is trained or evaluated yet."


def _difference(ours: float, theirs: float) -> str:
    points = round(100 * ours, 1) - round(100 * theirs, 1)
    if abs(points) < 0.05:
        return "no difference"
    return f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"


def compare_settings(runs: list[Run]) -> list[str]:
    """For each pair of the headline, every setting in which the two runs differ."""
    sentences = []
    for pretrained, random in find_pairs(runs):
        ours, theirs = (config.flatten(run.settings.model_dump()) if run.settings else {} for run in (pretrained, random))
        differing = [
            f"{key} ({ours[key]} / {theirs[key]})" for key in ours if key != "run_dir" and ours[key] != theirs.get(key)
        ]
        sentences.append(f"Settings in which {pretrained.name} and {random.name} differ: {', '.join(differing)}.")
    return sentences


def data_counts(runs: list[Run]) -> list[tuple[str, Callable[[], str]]]:
    """Each data set that the runs name, once, and how to count it."""
    counts: dict[str, Callable[[], str]] = {}
    for run in runs:
        if isinstance(run.settings, config.Pretrain):
            counts[f"pre-training: {run.settings.data.shards}"] = lambda run=run: count_shards(run)
        if result := run.result:
            what = f"{result.benchmark}: {result.root}"
            counts[what] = lambda result=result: count_benchmark(result.benchmark, result.root)
    return list(counts.items())


def count_shards(run: Run) -> str:
    """Samples, shards and bytes of a pre-training run's data."""
    assert isinstance(run.settings, config.Pretrain)
    with pictures.open_shards(run.settings, run.directory) as shards:
        num_bytes = sum(shard.num_bytes for shard in shards.shards)
        return f"{len(shards):,} pictures in {len(shards.shards)} shards, {num_bytes / 2**20:,.1f} MiB"


def count_benchmark(name: str, root: str) -> str:
    """Pictures, identities and cameras of each split, and whether these are the published numbers."""
    description = describe(load_benchmark(name, root))
    return f"{description.table}\n{description.note}"


# --- pictures -------------------------------------------------------------------------------------------------------


def draw_charts(runs: list[Run]) -> list[tuple[str, str]]:
    """(title, image address) of every chart there is data for; runs of a kind share a chart."""
    charts = []
    for kind, title, fields in CHARTS:
        chosen = [run for run in runs if isinstance(run.settings, kind)]
        curves = {}
        for run in chosen:
            for field, label in fields.items():
                points = [(record["step"], record[field]) for record in run.records if field in record]
                if points:
                    name = f"{run.name} {label}" if len(chosen) > 1 else label
                    curves[name.strip() or run.name] = tuple(zip(*points, strict=True))
        if curves:
            charts.append((title, pictures.draw_chart(title, curves, from_zero=not fields.keys() & LOSSES)))
    return charts


def predict(run: Run) -> list[list[pictures.Picture]]:
    """Groups of Figure 3 from the newest checkpoint of a pre-training run."""
    assert isinstance(run.settings, config.Pretrain)
    drawn = pictures.reconstruct_run(run.settings, run.directory, NUM_GROUPS)
    return [[images[i].numpy() for images in drawn] for i in range(len(drawn.region_a))]


def draw_rank_lists(runs: list[Run]) -> dict[str, list[pictures.Row]]:
    """Rows of pictures by name: the pre-trained and the random run for the same queries, or whatever has rank lists.

    Raises:
        UserError: no run has rank lists, or their pictures are gone.
    """
    pairs = [pair for pair in find_pairs(runs) if all(run.rank_lists for run in pair)]
    chosen = list(pairs[0]) if pairs else [run for run in runs if run.rank_lists][-1:]
    if not chosen:
        raise UserError("no run has a rank_lists.json yet; fine-tuning and 'personmae evaluate --out' write one")
    by_query = [{e.query: e for e in run.rank_lists.entries} for run in chosen if run.rank_lists]
    queries = [query for query in by_query[0] if all(query in entries for entries in by_query)][:NUM_QUERIES]
    roots = [Path(run.rank_lists.root) for run in chosen if run.rank_lists]
    return {
        _label(run): [_row(root, entries[query]) for query in queries]
        for run, root, entries in zip(chosen, roots, by_query, strict=True)
    }


def _label(run: Run) -> str:
    return run.result.name if run.result else run.name


def _row(root: Path, entry: RankList) -> pictures.Row:
    query, *found = (pictures.read_thumbnail(_find(root, path), THUMBNAIL) for path in (entry.query, *entry.gallery))
    return [(query, None), *zip(found, entry.correct, strict=True)]


def _find(root: Path, path: str) -> Path:
    """A path as it stands, or below ``root`` where it is relative to that."""
    return Path(path) if Path(path).is_file() else root / path


# --- the page -------------------------------------------------------------------------------------------------------


def embed_groups(groups: list[list[pictures.Picture]] | None) -> list[list[str]]:
    """Image addresses for groups of pictures."""
    return [[pictures.data_uri(picture) for picture in group] for group in groups or []]


def embed_rows(rank_lists: dict[str, list[pictures.Row]]) -> list[list[tuple[str, list[tuple[str, bool | None]]]]]:
    """For each query, (name, [(image address, correct)]) of every run: what is compared stands together."""
    named = [
        [(name, [(pictures.data_uri(pictures.framed(p, ok), ".jpg"), ok) for p, ok in row]) for row in rows]
        for name, rows in rank_lists.items()
    ]
    return [list(lines) for lines in zip(*named, strict=True)]


def render(**context: Any) -> str:
    """Fill the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)

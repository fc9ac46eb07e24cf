"""``personmae report RUN``: one self-contained HTML page about a directory of runs, and a figure for a README.

A part that is not there yet is left out of the page, with a sentence that says why. Where a run names something that is
gone, the terminal says so too and the exit code is 1.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personmae import config
from personmae.checkpoint import portable
from personmae.data.decode import BadImage
from personmae.errors import Incomplete, Unavailable, UserError
from personmae.inspect import hiding
from personmae.model.inputs import RegionSpec
from personmae.monitor import progress
from personmae.monitor.progress import counted
from personmae.reid.datasets import describe, load_benchmark
from personmae.report import camera_pairs, charts, compared, cross_domain, figures, rank_lists, sections
from personmae.report.comparison import SCORES, Group, data_notes, distinct, group_results
from personmae.report.pairs import compare_settings, find_pairs, summarise
from personmae.report.places import Place, printable
from personmae.report.records import Result
from personmae.report.runs import RunFolder, find_below, find_runs, pretraining_of
from personmae.synthetic.benchmarks import read_mark
from personmae.system import files

LOSSES = {"loss", "pixel_loss", "feature_loss", "identity_loss"}
CHARTS = (  # of the runs of a kind: a title, and the fields of metrics.jsonl by the words for them
    (
        config.Pretrain,
        "pre-training: loss, total and pixel",
        {
            "loss": "total",
            "pixel_loss": "pixel",
            "floor_position": "floor of the pixel loss: positions alone",
            "floor_hue": "floor: mean hue too",
        },
    ),
    (config.Pretrain, "pre-training: feature loss", {"feature_loss": ""}),
    (config.Pretrain, "pre-training: mAP of frozen rows", {"probe_rows_map": "no labels", "probe_lda_map": "LDA"}),
    (config.Pretrain, "pre-training: identity loss", {"identity_loss": ""}),
    (config.Pretrain, "pre-training: images per second", {"images_per_second": ""}),
    (config.Finetune, "fine-tuning: loss", {"loss": ""}),
    (config.Finetune, "fine-tuning: accuracy on its batches", {"accuracy": ""}),
    (config.Unsupervised, "without labels: loss", {"loss": ""}),
)
CLUSTER_CHARTS = (  # the same of clusters.jsonl; older runs have nmi of all these scores
    (config.Unsupervised, "clusters, and images in none", {"num_clusters": "clusters", "num_outliers": "in none"}),
    (
        config.Unsupervised,
        "clusters and people",
        {
            "ami_people": "adjusted mutual information",
            "pair_precision": "pair precision",
            "recall_across_cameras": "recall across cameras",
            "nmi": "NMI, not adjusted for chance",
        },
    ),
    (
        config.Unsupervised,
        "clusters and cameras",
        {"ami_cameras": "adjusted mutual information", "one_camera_share": "clusters of one camera"},
    ),
)
NUM_GROUPS = 8  # images of Figure 3
FIGURE_GROUPS, FIGURE_QUERIES = 4, 3  # of these in figure.png
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, or why it is missing. ``lost``: it is missing because something is not where the runs recorded it."""

    content: Any = None
    missing: str = ""
    lost: bool = False


def run(run_dir: Path) -> Path:
    """Write ``report.html`` and ``figure.png`` into ``run_dir`` and print the tables. Returns the page's path.

    Raises:
        UserError: the directory holds nothing of ours, or a file in it is damaged.
        Incomplete: both are written, and a part is left out because something that a run names is gone.
    """
    runs = find_runs(run_dir)
    began = time.monotonic()
    progress.log(f"report: drawing curves, images and rank lists of {len(runs)} runs ...")
    groups = group_results(runs)
    summary = summarise(runs, groups)
    print_tables(groups, runs)
    regions = [(r, attempt(lambda r=r: predict(r))) for r in runs if isinstance(r.settings, config.Pretrain)]
    title, lists = find_rank_lists(runs, groups)
    data = [(printable(what), attempt(count)) for what, count in data_counts(runs)]
    steps = sections.next_steps(runs, groups)
    page = run_dir / "report.html"
    text = render(
        title=printable(f"PersonMAE: {run_dir.resolve().name}"),
        light=charts.LIGHT,
        dark=charts.DARK,
        tags=sections.tags(runs, groups),
        summary=summary,
        facts=sections.facts(groups),
        notes=data_notes(groups),
        tables=[sections.table_of(group) | beside(group, runs) for group in groups],
        matrix=cross_domain.build(run_dir, find_below(run_dir, runs)),
        scores=SCORES,
        comparison=compare_settings(groups),
        cmc=draw_cmc(groups),
        charts=draw_charts(runs),
        stages=sections.stages(runs),
        totals=sections.totals(runs),
        regions=[region_of(r, section) for r, section in regions],
        region_words=figures.REGION_WORDS,
        rank_lists={
            "title": title,
            "content": rank_lists.embed(lists.content or {}),
            "missing": lists.missing,
        },
        settings=[sections.settings_of(r) for r in runs],
        data=data,
        next_steps=steps,
    )
    files.replace(page, text)
    shown = next((s.content for _, s in regions if s.content), [])[:FIGURE_GROUPS]
    rows_shown = {name: rows[:FIGURE_QUERIES] for name, rows in (lists.content or {}).items()}
    if shown or rows_shown:
        figures.write_figure(run_dir / "figure.png", shown, rows_shown, title=summary)
        print(printable(run_dir / "figure.png"))
    print(printable(page))
    progress.log(f"report: done in {progress.duration(time.monotonic() - began)}. Open the page in a browser")
    for why, command in steps:
        print(f"next: {why} {command}")
    complain([section for _, section in (*regions, ("", lists), *data)])
    return page


def complain(parts: Sequence[Section]) -> None:
    """Tell on the terminal what the page had to leave out.

    Raises:
        Incomplete: something was lost.
    """
    lost = list(dict.fromkeys(section.missing for section in parts if section.lost))
    for reason in lost:
        print(printable(f"left out: {reason}"), file=sys.stderr, flush=True)
    if lost:
        raise Incomplete(f"the page is written without {len(lost)} of its parts, because what the runs name cannot be read")


def attempt(build: Callable[[], T]) -> Section:
    """What ``build`` returns, or the sentence of the error that a missing piece gives."""
    try:
        return Section(build())
    except figures.NotYet as early:
        return Section(missing=printable(early))
    except (UserError, Unavailable, BadImage, OSError) as error:
        return Section(missing=printable(error), lost=True)


# --- numbers --------------------------------------------------------------------------------------------------------


def beside(group: Group, runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What stands next to a table: what is compared in it, and its numbers by cameras."""
    return {"compared": compared.sentences(group, runs), "pairs": camera_pairs.tables_of(group)}


def print_tables(groups: Sequence[Group], runs: Sequence[RunFolder]) -> None:
    """A table for each data set on the terminal, the best of each bold, and what is compared in it."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    for note in data_notes(groups):
        console.print(note, markup=False)
    for group in groups:
        shown = sections.table_of(group)
        labels = (f"{label} %" for label in SCORES.values())
        table = Table("result", "started from", *labels, "queries", title=escape(group.title), title_justify="left")
        for row in shown["rows"]:
            table.add_row(*_cells(row))
        console.print(table)
        for sentence in compared.sentences(group, runs):
            console.print(sentence, markup=False, highlight=False)
        for row in shown["frozen"]:
            line = f"{row['name']}, frozen, mAP / Rank-1 %: rows {row['rows']}, LDA {row['lda']}"
            console.print(line, markup=False, highlight=False)
        for queries in shown["queries"]:
            console.print(f"{queries.ours.name} beside {queries.theirs.name}: {queries}", markup=False, highlight=False)


def _cells(row: dict[str, Any]) -> list[str]:
    scores = []
    for score in row["scores"]:
        text = f"{score['text']} ({score['spread']})" if score["spread"] else score["text"]
        scores.append(f"[bold]{text}[/]" if score["best"] else text)
    name = row["name"] + (f" (unfinished: {row['unfinished']})" if row["unfinished"] else "")
    return [escape(name), escape(row["started"]), *scores, row["queries"]]


def data_counts(runs: Sequence[RunFolder]) -> list[tuple[str, Callable[[], str]]]:
    """Each data set that the runs name, once, and how to count it. Sets with one digest are the same, wherever they are."""
    counts: dict[str, tuple[str, Callable[[], str]]] = {}
    for run in runs:
        if isinstance(run.settings, config.Pretrain):
            what = f"pre-training: {run.settings.data.shards}"
            counts[what] = what, lambda run=run: count_shards(run)
        if result := run.result:
            what = f"{result.benchmark_title or result.benchmark}: {result.root}"
            count = what, lambda run=run, result=result: count_benchmark(result, run.place)
            counts.setdefault(result.benchmark_digest or what, count)
    return list(counts.values())


def count_shards(run: RunFolder) -> str:
    """Samples, shards and bytes of a pre-training run's data."""
    with figures.open_shards(pretraining_of(run), run.directory) as shards:
        num_bytes = sum(shard.num_bytes for shard in shards.shards)
        return f"{counted(len(shards), 'image')} in {counted(len(shards.shards), 'shard')}, {num_bytes / 2**20:,.1f} MiB"


def count_benchmark(result: Result, place: Place) -> str:
    """Images, identities and cameras of each split, next to the published numbers. Without the data, the recorded ones."""
    try:
        description = describe(load_benchmark(result.benchmark, place.find(result.root)))
    except UserError:
        if not result.counts:
            raise
        recorded = [f"{split:<8} {images:>7,} images {ids:>6,} ids" for split, (images, ids) in result.counts.items()]
        return "\n".join([*recorded, f"as they were at the evaluation. {result.root} cannot be read now"])
    return f"{description.table}\n{description.note}"


# --- curves ---------------------------------------------------------------------------------------------------------


def draw_charts(runs: Sequence[RunFolder]) -> list[tuple[str, Markup]]:
    """(title, drawing) of every chart there is data for. Runs of a kind share a chart."""
    return [*_drawn(CHARTS, runs, "records"), *_drawn(CLUSTER_CHARTS, runs, "clusters")]


def _drawn(
    wanted: Sequence[tuple[type, str, dict[str, str]]], runs: Sequence[RunFolder], source: Literal["records", "clusters"]
) -> list[tuple[str, Markup]]:
    """Those of one file of each run."""
    drawn = []
    for kind, title, fields in wanted:
        chosen = [run for run in runs if isinstance(run.settings, kind)]
        curves = {}
        for run, run_name in zip(chosen, distinct([run.name for run in chosen]), strict=True):
            for field, label in fields.items():
                points = [(record["step"], record[field]) for record in getattr(run, source) if field in record]
                if points:
                    name = f"{run_name} {label}" if len(chosen) > 1 else label
                    curves[name.strip() or run_name] = tuple(zip(*points, strict=True))
        if curves:
            below = any(value < 0 for _, values in curves.values() for value in values)
            from_zero = not below and not fields.keys() & LOSSES
            drawn.append((title, Markup(charts.draw_chart(title, curves, from_zero=from_zero))))
    return drawn


def draw_cmc(groups: Sequence[Group]) -> list[tuple[str, Markup]]:
    """(title, drawing) of the CMC curves of each table whose records have them."""
    drawn = []
    for group in groups:
        curves = {row.name: (range(1, len(cmc) + 1), cmc) for row in group.rows if (cmc := row.cmc())}
        if curves:
            title = f"CMC, queries with a match among the first k: {group.title}"
            drawn.append((title, Markup(charts.draw_chart(title, curves, x_label="k", from_zero=True, percent=True))))
    return drawn


# --- images -------------------------------------------------------------------------------------------------------


def predict(run: RunFolder) -> list[list[figures.Pixels]]:
    """Groups of Figure 3 from the newest checkpoint of a pre-training run."""
    if not portable.folders(run.directory):
        raise figures.NotYet(f"{run.directory} has no checkpoint yet, so there is nothing to predict with")
    drawn = figures.reconstruct_run(pretraining_of(run), run.directory, NUM_GROUPS)
    return [[images[i].numpy() for images in drawn] for i in range(len(drawn.region_a))]


def region_of(run: RunFolder, section: Section) -> dict[str, Any]:
    """Figure 3 of a run for the template, with what its masks hide."""
    mark = read_mark(pretraining_of(run).data.shards) if section.content else None
    return {
        "name": printable(run.name),
        "unfinished": run.unfinished,
        "missing": section.missing,
        "groups": embed_groups(section.content),
        "synthetic": mark is not None,
        "hiding": hiding_of(run, mark),
    }


def hiding_of(run: RunFolder, mark: bytes | None) -> dict[str, str]:
    """How often a run's masks hide each patch, as an image and in words. For drawn people, the visible share of figures too."""
    settings = run.settings
    assert isinstance(settings, config.Pretrain)
    spec = RegionSpec(**settings.region_arguments())
    shares, seen = hiding.hiding_map(spec, settings.seed), hiding.seen_of_drawn(spec, settings.seed, mark)
    return {
        "address": figures.data_uri(figures.draw_map(shares)),
        "words": hiding.describe_map(shares),
        "seen": hiding.describe_seen(seen) if seen is not None else "",
    }


def find_rank_lists(runs: Sequence[RunFolder], groups: Sequence[Group]) -> tuple[str, Section]:
    """Which data they are of, and rows of images by name: the pre-trained and the random run for the same queries, or
    whatever has rank lists."""
    for group in groups:
        for ours, theirs in find_pairs(group):
            pair = [next((run for run in row.runs if run.rank_lists), None) for row in (ours, theirs)]
            if pair[0] and pair[1]:
                chosen = [pair[0], pair[1]]
                return group.title, attempt(lambda chosen=chosen: rank_lists.draw(chosen))
    chosen = [run for run in runs if run.rank_lists][-1:]
    of_row = ((group.title, run.directory) for group in groups for row in group.rows for run in row.runs)
    title = next((title for title, directory in of_row if chosen and chosen[0].directory == directory), "")
    return title, attempt(lambda: rank_lists.draw(chosen))


# --- the page -------------------------------------------------------------------------------------------------------


def embed_groups(groups: list[list[figures.Pixels]] | None) -> list[list[str]]:
    """Image addresses for groups of images."""
    return [[figures.data_uri(image) for image in group] for group in groups or []]


def render(**context: Any) -> str:
    """Fill the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)

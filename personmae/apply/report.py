"""``personmae report RUN``: one self-contained HTML page of what a directory of runs holds, and a figure for a README.

A run is known by its files: ``config.yaml``, ``metrics.jsonl`` and checkpoints of a program, ``result.json`` of an
evaluation. What is not there yet is left out of the page, with a sentence that says why.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from personmae import config, metrics
from personmae.apply import pictures
from personmae.data.decode import BadImage
from personmae.errors import UserError
from personmae.reid.datasets import describe, load_benchmark

SCORES = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}
RANDOM = "random"
LOSSES = {"loss", "pixel_loss", "feature_loss"}
CHARTS = (  # of the runs of a kind: a title, and the fields of metrics.jsonl by the words for them
    (config.Pretrain, "pre-training: loss, total and pixel", {"loss": "total", "pixel_loss": "pixel"}),
    (config.Pretrain, "pre-training: feature loss", {"feature_loss": ""}),
    (config.Pretrain, "pre-training: images per second", {"images_per_second": ""}),
    (config.Finetune, "fine-tuning: loss", {"loss": ""}),
    (config.Finetune, "fine-tuning: accuracy on its batches", {"accuracy": ""}),
)
NUM_GROUPS = 8  # pictures of Figure 3
NUM_QUERIES = 6  # rank lists on the page
FIGURE_GROUPS, FIGURE_QUERIES = 4, 3  # of these in figure.png
THUMBNAIL = (128, 64)  # (height, width) of a picture in a rank list
T = TypeVar("T")


class Result(BaseModel):
    """What ``finetune`` and ``evaluate`` measured; scores in [0, 1]."""

    name: str
    init: str
    benchmark: str
    root: str
    mAP: float  # noqa: N815 - the field's name for it
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815
    num_queries: int
    num_valid: int
    num_gallery: int
    seconds: float
    commit: str | None = None


class RankList(BaseModel):
    """One query and its nearest gallery pictures; paths as they stand, or relative to ``RankLists.root``."""

    query: str
    gallery: list[str]
    correct: list[bool]


class RankLists(BaseModel):
    root: str
    entries: list[RankList]


@dataclass(frozen=True, slots=True)
class Run:
    """What one directory holds; an attribute is empty where its file is not there."""

    name: str
    directory: Path
    settings: config.Pretrain | config.Finetune | None
    config_yaml: str
    info: dict[str, Any]
    records: list[dict[str, float]]
    result: Result | None
    rank_lists: RankLists | None

    @property
    def from_random(self) -> bool:
        """Whether it is a fine-tuning from random weights."""
        return isinstance(self.settings, config.Finetune) and self.settings.init == RANDOM


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
    page.write_text(
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
        )
    )
    groups = next((s.content for _, s in regions if s.content), [])[:FIGURE_GROUPS]
    lists = {name: rows[:FIGURE_QUERIES] for name, rows in (rank_lists.content or {}).items()}
    if groups or lists:
        pictures.write_figure(run_dir / "figure.png", groups, lists, title=summary)
        print(run_dir / "figure.png")
    print(page)
    return page


def find_runs(run_dir: Path) -> list[Run]:
    """The directory itself and those directly in it, as far as they hold something to report.

    Raises:
        UserError: there is no such directory, or nothing to report in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"a directory with runs is required; {run_dir} is not a directory")
    folders = [run_dir, *sorted(entry for entry in run_dir.iterdir() if entry.is_dir())]
    runs = [read_run(folder) for folder in folders if any((folder / n).is_file() for n in ("run.json", "result.json"))]
    if not runs:
        raise UserError(
            f"a directory with runs (run.json) or results (result.json), or one of them, is required; {run_dir} holds "
            "neither: give the directory that 'personmae pretrain', 'finetune' or 'evaluate --out' wrote to"
        )
    kinds = (config.Pretrain, type(None), config.Finetune)  # the order of rows: baselines, then random, then pre-trained
    return sorted(runs, key=lambda run: (kinds.index(type(run.settings)), not run.from_random, run.name))


def read_run(directory: Path) -> Run:
    """Everything a report needs of one directory."""
    path = directory / "config.yaml"
    try:
        info, records = json.loads(_text(directory / "run.json") or "{}"), metrics.read_records(directory)
    except ValueError as error:
        raise UserError(f"run.json and metrics.jsonl of {directory} must be JSON; {error}; repair or remove them") from error
    return Run(
        name=directory.resolve().name,
        directory=directory,
        settings=read_settings(path) if path.is_file() else None,
        config_yaml=_text(path),
        info=info,
        records=records,
        result=_parse(Result, directory / "result.json"),
        rank_lists=_parse(RankLists, directory / "rank_lists.json"),
    )


def read_settings(path: Path) -> config.Pretrain | config.Finetune:
    """The configuration of a run; only fine-tuning has ``init``."""
    fields = yaml.safe_load(path.read_text())
    return config.load(config.Finetune if "init" in fields else config.Pretrain, path)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parse(kind: type[ModelT], path: Path) -> ModelT | None:
    try:
        return kind.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} must be what 'personmae evaluate --out' writes; {where}: {first['msg']}; evaluate again"
        ) from error


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
        ours, theirs = (dict(_flatten(run.settings)) for run in (pretrained, random))
        differing = [
            f"{key} ({ours[key]} / {theirs[key]})" for key in ours if key != "run_dir" and ours[key] != theirs.get(key)
        ]
        sentences.append(f"Settings in which {pretrained.name} and {random.name} differ: {', '.join(differing)}.")
    return sentences


def _flatten(settings: config.Section | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings or ():
        if isinstance(value, config.Section):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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

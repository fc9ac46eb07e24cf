"""The rank lists of a report: what each run found for the same queries, as rows of images."""

from collections.abc import Sequence
from pathlib import Path

from personmae.report import figures
from personmae.report.comparison import distinct
from personmae.report.places import Lost, printable
from personmae.report.records import RankList
from personmae.report.runs import RunFolder

NUM_QUERIES = 6  # on the page
THUMBNAIL = (128, 64)  # (height, width) of an image


def draw(chosen: Sequence[RunFolder]) -> dict[str, list[figures.Row]]:
    """Rows of images by the runs' names, for queries that all of them have.

    Raises:
        UserError: no run has rank lists, or their images are gone.
    """
    if not chosen:
        raise figures.NotYet("no run has a rank_lists.json yet. Fine-tuning and 'personmae evaluate --out' write one")
    by_query = [{_below_root(run, e.query): e for e in run.rank_lists.entries} for run in chosen if run.rank_lists]
    queries = [query for query in by_query[0] if all(query in entries for entries in by_query)][:NUM_QUERIES]
    return {
        label: [_draw_row(run, entries[query]) for query in queries]
        for label, run, entries in zip(distinct([_label(run) for run in chosen]), chosen, by_query, strict=True)
    }


def _label(run: RunFolder) -> str:
    name = run.result.name if run.result else run.name
    return printable(f"{name} (unfinished)" if run.unfinished else name)


def _below_root(run: RunFolder, path: str) -> str:
    """A path relative to the benchmark's root, since two runs may have named the root differently."""
    root = run.rank_lists.root if run.rank_lists else ""
    return path.removeprefix(root).lstrip("/")


def _draw_row(run: RunFolder, entry: RankList) -> figures.Row:
    query, *found = (figures.read_thumbnail(_find(run, path), THUMBNAIL) for path in (entry.query, *entry.gallery))
    return [(query, None), *zip(found, entry.correct, strict=True)]


def _find(run: RunFolder, path: str) -> Path:
    """An image below the benchmark's root, wherever that is now, or by its own path."""
    assert run.rank_lists
    root, below = run.rank_lists.root, _below_root(run, path)
    try:
        found = Path(run.place.find(root)) / below
        return found if found.is_file() else Path(run.place.find(path))
    except Lost:
        return Path(run.place.find(path))


def embed(drawn: dict[str, list[figures.Row]]) -> list[list[tuple[str, list[tuple[str, bool | None]]]]]:
    """For each query, (name, [(image address, correct)]) of every run, so that compared lists are next to each other."""
    named = [
        [(name, [(figures.data_uri(figures.framed(p, ok), ".jpg"), ok) for p, ok in row]) for row in rows]
        for name, rows in drawn.items()
    ]
    return [list(lines) for lines in zip(*named, strict=True)]

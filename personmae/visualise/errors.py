"""Where a model errs: its scores by pair of cameras, by the size of a query, and by how much of a person is hidden."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.figure import Figure

from personmae import dist
from personmae.errors import UserError
from personmae.reid import breakdown
from personmae.reid.breakdown import CameraPairs, GroupScores
from personmae.reid.ranking import find_hits
from personmae.reid.samples import UNKNOWN_CAMID
from personmae.reid.transforms import decode_image
from personmae.visualise import ink, occlusion
from personmae.visualise.search import Search
from personmae.visualise.section import Drawing, NotHere, Part, capital

MOST_CAMERAS: Final = 16  # of a map of pairs: a page has no room for more
_SHARES: Final = (  # a group ends below its bound
    (0.05, "under 5 % hidden"),
    (0.25, "5 % to under 25 %"),
    (0.5, "25 % to under 50 %"),
    (1.01, "50 % and more"),
)
_NOTE: Final = """Scores are means over queries, so those of few queries are uncertain. The number of queries stands with each.
A pair of cameras counts the matches of the second camera alone, as the code of Market-1501 does. The diagonal is empty, since
images of a query's own person from its own camera do not count."""


def draw(found: Search, table: Path | None, log: Callable[[str], None]) -> Part:
    """Each breakdown that can be made of these images. The note says which cannot, and why."""
    drawings: list[Drawing] = []
    reasons: list[str] = []
    for build in (by_camera_pair, by_height, lambda found: by_occlusion(found, table, log)):
        try:
            drawings += build(found)
        except NotHere as reason:
            reasons.append(str(reason))
    if not drawings:
        raise NotHere(". ".join(capital(reason) for reason in reasons))
    return Part(" ".join([_NOTE, *(f"Left out: {reason}." for reason in reasons)]), drawings)


# --- cameras ---------------------------------------------------------------------------------------------------------


def by_camera_pair(found: Search) -> list[Drawing]:
    """mAP and Rank-1 of each pair of cameras as two maps.

    Raises:
        NotHere: cameras are not known, or they are too many for a map.
    """
    pairs = breakdown.by_camera_pair(find_hits(found.similarity, found.labels), found.labels)
    if UNKNOWN_CAMID in pairs.query_cameras or UNKNOWN_CAMID in pairs.gallery_cameras:
        raise NotHere("no camera is known of these images, so there are no pairs of cameras")
    if (most := max(pairs.mAP.shape)) > MOST_CAMERAS:
        raise NotHere(f"a map of pairs has room for {MOST_CAMERAS} cameras, and these images are of {most}")
    return [_map_of_pairs(pairs, "mAP", pairs.mAP), _map_of_pairs(pairs, "Rank-1", pairs.rank1)]


def _map_of_pairs(pairs: CameraPairs, score: str, values: Float[np.ndarray, "C D"]) -> Drawing:
    words = ", ".join(
        f"{name} {100 * value:.1f} % {_where(pairs, np.argwhere(values == value))}"
        for name, value in (("lowest", np.nanmin(values)), ("highest", np.nanmax(values)))
    )
    title, counts = f"{score} by pair of cameras", pairs.num_queries[np.isfinite(values)]
    return Drawing(
        title,
        f"In per cent, a row for each camera of a query. {capital(words)}. "
        f"Means over {counts.min():,} to {counts.max():,} queries.",
        f"Map of {title}: {words}",
        ink.to_pixels(lambda: _heat_map(pairs, score, values)),
        _table_of_pairs(pairs, score, values),
    )


def _where(pairs: CameraPairs, cells: Int[np.ndarray, "n 2"]) -> str:
    """The pair of cameras with a score, or how many have it."""
    if len(cells) > 1:
        return f"in {len(cells)} pairs"
    return f"from camera {pairs.query_cameras[cells[0, 0]]} to {pairs.gallery_cameras[cells[0, 1]]}"


def _heat_map(pairs: CameraPairs, score: str, values: Float[np.ndarray, "C D"]) -> Figure:
    rows, columns = values.shape
    figure = Figure(figsize=(1.6 + 0.62 * columns, 1.1 + 0.46 * rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=max(2 * float(np.nanmax(values)), 1e-9), aspect="auto")
    for row, column in np.ndindex(rows, columns):
        text = f"{100 * values[row, column]:.1f}" if np.isfinite(values[row, column]) else "–"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=ink.COLOURS["--ink"])
    axes.set_xticks(range(columns), [str(camera) for camera in pairs.gallery_cameras])
    axes.set_yticks(range(rows), [str(camera) for camera in pairs.query_cameras])
    axes.set_xlabel("camera of the match")
    axes.set_ylabel("camera of the query")
    axes.set_title(f"{score}, %", fontsize=10.5, loc="left")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _table_of_pairs(pairs: CameraPairs, score: str, values: Float[np.ndarray, "C D"]) -> Markup:
    """The map as a table, each cell the darker the higher its score beside the highest."""
    most = max(float(np.nanmax(values)), 1e-9)
    head = Markup("").join(Markup('<th scope="col" class="number">{}</th>').format(int(c)) for c in pairs.gallery_cameras)
    lines = []
    for row, camera in enumerate(pairs.query_cameras.tolist()):
        cells = Markup("").join(
            _cell(value, most, int(count)) for value, count in zip(values[row], pairs.num_queries[row], strict=True)
        )
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(camera, cells))
    label = f"{score} in per cent by pair of cameras"
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="pairs">'
        "<caption>rows: camera of the query, columns: camera of the match</caption>"
        "<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    ).format(label=label, head=head, body=Markup("").join(lines))


def _cell(value: float, most: float, count: int) -> Markup:
    if not np.isfinite(value):
        return Markup('<td class="number none" title="no query">–</td>')
    return Markup('<td class="number" style="--share: {:.3f}" title="{} queries">{:.1f}</td>').format(
        value / most, count, 100 * value
    )


# --- groups of queries -----------------------------------------------------------------------------------------------


def by_height(found: Search) -> list[Drawing]:
    """The scores of three groups of queries, by the height of their image files.

    Raises:
        NotHere: all have one height.
        UserError: an image cannot be read.
    """
    with ThreadPoolExecutor(dist.usable_cores()) as pool:
        heights = np.array(list(pool.map(lambda sample: decode_image(sample.path).shape[0], found.benchmark.query)))
    if heights.min() == heights.max():
        raise NotHere(f"all queries are {heights[0]} pixels high, so sizes say nothing")
    groups = terciles(heights)
    caption = "Heights of image files in pixels, before they are resized for the model. A third of the queries each."
    return [_bars("Scores by height of the query", caption, found, groups)]


def terciles(values: np.ndarray) -> list[str]:
    """The group of each value: up to the first tercile, between both, above the second. Equal values share a group.

    There are two values at least.
    """
    below = values[values < values.max()]
    low, high = (min(bound, below.max()) for bound in np.quantile(values, [1 / 3, 2 / 3], method="lower").tolist())
    names = [f"up to {low:g} pixels", f"{low + 1:g} to {high:g} pixels", f"over {high:g} pixels"]
    return [names[0] if value <= low else names[1] if value <= high else names[2] for value in values.tolist()]


def by_occlusion(found: Search, table: Path | None, log: Callable[[str], None]) -> list[Drawing]:
    """The scores of queries by how much of their person is hidden.

    Raises:
        NotHere: that is not known.
        UserError: the table cannot be read.
    """
    shares = occlusion.of_queries(found.benchmark, table, log)
    groups = [next((name for bound, name in _SHARES if share < bound), "not known") for share in shares.tolist()]
    source = f"As {table.name} has it." if table else "The people are drawn, so each was drawn again without what is in front."
    return [_bars("Scores by how much of the person is hidden", source, found, groups)]


def _bars(title: str, caption: str, found: Search, groups: Sequence[str]) -> Drawing:
    order = {name: place for place, name in enumerate([name for _, name in _SHARES])}
    scored = breakdown.by_group(find_hits(found.similarity, found.labels), groups)
    scores = {name: scored[name] for name in sorted(scored, key=lambda n: (order.get(n, len(order)), _first_number(n)))}
    scores = {name: score for name, score in scores.items() if score.num_valid}
    if not scores:
        raise UserError(f"{title}: no query with a match is in any group. Check what --table says of them")
    words = ". ".join(
        f"{name}: mAP {100 * s.mAP:.1f} %, Rank-1 {100 * s.rank1:.1f} %, {s.num_valid:,} queries" for name, s in scores.items()
    )
    return Drawing(
        title, caption, f"{title}. {words}", ink.to_pixels(lambda: _bar_chart(scores)), _table_of_bars(title, scores)
    )


def _first_number(name: str) -> float:
    """ "up to" comes before "from", and a group between by its lower bound."""
    digits = "".join(letter for letter in name.split(" to ")[0] if letter.isdecimal())
    return -1.0 if name.startswith("up to") else float(digits or "inf")


def _bar_chart(scores: Mapping[str, GroupScores]) -> Figure:
    figure = Figure(figsize=(6.4, 0.8 + 0.62 * len(scores)), layout="constrained")
    axes = figure.subplots()
    middle = np.arange(len(scores))[::-1]
    for offset, (label, colour, values) in enumerate(
        (
            ("mAP", ink.COLOURS["--curve-0"], [s.mAP for s in scores.values()]),
            ("Rank-1", ink.COLOURS["--curve-2"], [s.rank1 for s in scores.values()]),
        )
    ):
        bars = axes.barh(middle + 0.2 - 0.4 * offset, [100 * v for v in values], height=0.36, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8.5, color=ink.COLOURS["--muted"])
    axes.set_yticks(middle, [f"{name}\n{s.num_valid:,} queries" for name, s in scores.items()], fontsize=9)
    axes.set_xlim(0, 108)
    axes.set_xlabel("%")
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure


def _table_of_bars(title: str, scores: Mapping[str, GroupScores]) -> Markup:
    lines = Markup("").join(
        Markup('<tr><th scope="row">{}<small>{:,} queries</small></th>{}{}</tr>').format(
            name, s.num_valid, _bar(s.mAP), _bar(s.rank1)
        )
        for name, s in scores.items()
    )
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="bars">'
        '<thead><tr><th scope="col">queries</th><th scope="col">mAP %</th><th scope="col">Rank-1 %</th></tr></thead>'
        "<tbody>{lines}</tbody></table></div>"
    ).format(title=title, lines=lines)


def _bar(value: float) -> Markup:
    return Markup('<td><span class="bar" style="--share: {:.3f}"></span>{:.1f}</td>').format(value, 100 * value)

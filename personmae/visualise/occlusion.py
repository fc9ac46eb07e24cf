"""How much of each query's person is hidden, where that is known: from a table, or for people that were drawn here."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from personmae.errors import UserError
from personmae.monitor.progress import EVERY_SECONDS, Pace
from personmae.reid.datasets import SYNTHETIC_MARK, Benchmark, Sample
from personmae.synthetic.benchmarks import FORMAT_VERSION
from personmae.synthetic.image import draw_silhouette
from personmae.synthetic.plan import Shot, SynthSettings, plan
from personmae.visualise.section import NotHere

_SPLITS: Final = ("market1501", "occluded_duke")
_FULL: Final = 255  # of a silhouette's pixel


def of_queries(benchmark: Benchmark, table: Path | None, log: Callable[[str], None]) -> Float[np.ndarray, " Q"]:
    """The hidden share of each query's person, in 0 ... 1. NaN where it is not known.

    Raises:
        NotHere: it is not known of these images.
        UserError: the table cannot be read, or knows none of the queries.
    """
    if table:
        return _from_table(table, benchmark)
    shots = _shots_of(benchmark)
    if shots is None:
        raise NotHere(
            "how much of a person is hidden is not known of these images. Give --table CSV, with the columns id and occlusion, "
            "a share in 0 ... 1"
        )
    return _of_drawn(*shots, benchmark.query, log)


def _from_table(path: Path, benchmark: Benchmark) -> Float[np.ndarray, " Q"]:
    """By the path of an image below the benchmark's root, or by its file name."""
    shares = read_table(path)
    names = [(os.path.relpath(s.path, benchmark.root), os.path.basename(s.path)) for s in benchmark.query]
    found = np.array([next((shares[name] for name in both if name in shares), np.nan) for both in names])
    if not np.isfinite(found).any():
        below, name = names[0]
        raise UserError(
            f"the ids of {path} must be names of queries, such as {name} or {below}. None of its {len(shares):,} is"
        )
    return found


def read_table(path: Path) -> dict[str, float]:
    """The hidden share of images by id.

    Raises:
        UserError: it is no CSV file with the columns id and occlusion, or an occlusion is no share in 0 ... 1.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a CSV file in UTF-8 is required as --table. {path} cannot be read: {error}") from error
    if not {"id", "occlusion"} <= set(reader.fieldnames or []):
        raise UserError(f"{path} needs the columns id and occlusion in its first line. It has {list(reader.fieldnames or [])}")
    return {cells["id"]: _share(cells["occlusion"], f"{path}, line {reader.line_num},") for cells in reader}


def _share(text: str | None, where: str) -> float:
    try:
        share = float(text or "")
    except ValueError:
        share = np.nan
    if not 0 <= share <= 1:
        raise UserError(f"{where} must have a share in 0 ... 1 as occlusion, of the person that is hidden. Got {text!r}")
    return share


# --- drawn people ----------------------------------------------------------------------------------------------------


def _shots_of(benchmark: Benchmark) -> tuple[SynthSettings, dict[str, Shot]] | None:
    """How the benchmark was drawn, and its shots by file name. None where it was not drawn, or by another version."""
    record = _read_mark(Path(benchmark.root))
    try:
        settings = SynthSettings(**record["settings"])
    except (KeyError, TypeError, UserError):
        return None
    if record.get("format_version") != FORMAT_VERSION:
        return None
    queries = {os.path.basename(sample.path) for sample in benchmark.query}
    for split in _SPLITS:
        shots = {os.path.basename(shot.path): shot for shot in plan(settings) if shot.path.startswith(f"{split}/query/")}
        if queries <= shots.keys():
            return settings, shots
    return None


def _read_mark(root: Path) -> dict[str, Any]:
    """The mark of drawn people in a benchmark or beside it, or nothing."""
    for folder in (root, root.resolve().parent):
        try:
            return json.loads((folder / SYNTHETIC_MARK).read_bytes())
        except (OSError, ValueError):
            continue
    return {}


def _of_drawn(
    settings: SynthSettings, shots: dict[str, Shot], queries: Sequence[Sample], log: Callable[[str], None]
) -> Float[np.ndarray, " Q"]:
    """Each figure is drawn again as a silhouette, with what is in front of it and without."""
    pace, shares = Pace(0), []
    log(f"drawing {len(queries):,} queries again, to see what is hidden ...")
    for number, query in enumerate(queries):
        if pace.seconds_since_mark >= EVERY_SECONDS:
            pace.mark(number)
            log(f"drawing again: {number:,} of {len(queries):,}")
        shares.append(hidden_share(settings, shots[os.path.basename(query.path)]))
    return np.array(shares)


def hidden_share(settings: SynthSettings, shot: Shot) -> float:
    """The share of a drawn person's pixels that something in front hides. NaN where the image shows nobody."""
    whole = draw_silhouette(settings, shot._replace(occlusion=0.0)).sum(dtype=np.int64)
    seen = draw_silhouette(settings, shot).sum(dtype=np.int64)
    return float(1 - seen / whole) if whole >= _FULL else np.nan

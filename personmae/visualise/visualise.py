"""``personmae visualise RUN``: what a model sees and finds, as PNGs and one self-contained HTML page.

A section that cannot be drawn is left out of the page, with a sentence that says why. Where something is gone that it needs,
the terminal says so too and the exit code is 1.
"""

import difflib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from personmae.checkpoint import portable
from personmae.errors import Incomplete, UserError
from personmae.monitor import environment, progress
from personmae.monitor.progress import counted
from personmae.reid import datasets, retrieval
from personmae.reid.datasets import Benchmark, describe
from personmae.report.places import printable
from personmae.visualise import embedding, errors, images, occlusion, page, place, ranks, search, sources
from personmae.visualise.search import Search
from personmae.visualise.section import TITLES, NotHere, Part, Section, Subject, attempt, capital
from personmae.weights.encoder import Encoder
from personmae.weights.loading import load_for_command

_OF_A_BENCHMARK = ("correspondence", "ranks", "map", "errors")
_SAME = 5e-4  # mAP that is recorded and computed again, at most so far apart


@dataclass(frozen=True, slots=True)
class Options:
    """What is drawn of a run.

    ``benchmark`` and ``data`` are for weights that recorded none, or another one. ``queries`` is how many images and queries
    of each kind are drawn. ``table`` has the hidden share of queries. ``per_camera`` is as in ``personmae evaluate``.
    """

    benchmark: str | None = None
    data: str | None = None
    sections: tuple[str, ...] = tuple(TITLES)
    queries: int = 5
    seed: int = 0
    table: Path | None = None
    per_camera: retrieval.PerCamera | None = None
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What sections are drawn from: a model and images, and a search or the reason why there is none."""

    where: str
    encoder: Encoder
    benchmark: Benchmark | None
    subject: Subject
    found: Search | None
    reason: str
    options: Options


def run(where: str, options: Options, *, out: Path | None = None) -> Path:
    """Draw the sections, write them into ``out``, and return the page's path. ``out`` is WHERE/visualise by default.

    Raises:
        UserError: the model or the data cannot be read, an option does not fit, or nothing at all can be drawn.
        Incomplete: the page is written, and a part is left out because something is gone.
        OSError: ``out`` cannot be written to. Found before anything is computed.
    """
    began = time.monotonic()
    target = _target(where, options, out)
    with place.new_folder(target) as folder:
        work = _prepare(where, options)
        sections = [_section(name, work) for name in TITLES if name in options.sections]
        _require_something(sections)
        page.write(folder, sections, **_context(work))
        facts = {"run": where, "sections": [s.name for s in sections if s.part], "seed": options.seed}
        place.write_record(folder, **facts, **(_scores(work.found) if work.found else {}))
    written = target / place.PAGE
    print(printable(written))
    progress.log(f"visualise: done in {progress.duration(time.monotonic() - began)}. Open the page in a browser")
    _complain(sections)
    return written


def _target(where: str, options: Options, out: Path | None) -> Path:
    """The folder to write, with everything checked that needs no model."""
    _require_sections(options.sections)
    if (options.benchmark is None) != (options.data is None):
        raise UserError("--benchmark and --data belong together: the benchmark's name and its directory. Give both")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be a whole number from 0 to {2**32 - 1:,}. Got {options.seed}")
    if options.table:
        occlusion.read_table(options.table)
    if out is None and not os.path.lexists(where):
        raise UserError(f"a run, a checkpoint, a folder of weights or a file of them is required. {where} does not exist")
    if out is None and not Path(where).is_dir():
        raise UserError(f"--out DIR is required where the weights are not a folder. {where} is none: give one")
    if out is None and portable.run_of(Path(where).resolve()) != Path(where).resolve():
        raise UserError(
            f"--out DIR is required for a checkpoint, since nothing is added to its folder. {where} is one: give one"
        )
    return (out or Path(where) / "visualise").absolute()


def _require_sections(sections: Sequence[str]) -> None:
    """Raise a UserError with the nearest name where one is mistyped, or where there is none."""
    unknown = next((name for name in sections if name not in TITLES), None)
    if sections and unknown is None:
        return
    near = difflib.get_close_matches(unknown or "", TITLES, n=1)
    got = (repr(unknown) if unknown else "none") + (f". Did you mean {near[0]!r}?" if near else "")
    raise UserError(f"--sections takes {', '.join(TITLES)}, with commas between them. Got {got}")


def _prepare(where: str, options: Options) -> Work:
    """Load the model, find its data, and search it where a section asks for that."""
    encoder = load_for_command(where, progress.log, unfinished=options.unfinished)
    benchmark, reason = sources.find_benchmark(where, encoder, options.benchmark, options.data)
    found = None
    if benchmark:
        print(_counts(benchmark), flush=True)
    if benchmark and options.table and "errors" in options.sections:
        occlusion.of_queries(benchmark, options.table, progress.log)  # ids that fit nothing are found before hours of work
    if benchmark and set(options.sections) & set(_OF_A_BENCHMARK):
        found = search.search(benchmark, encoder, per_camera=options.per_camera, log=progress.log)
        print(f"mAP {100 * found.record['mAP']:.1f} %, Rank-1 {100 * found.record['rank1']:.1f} %", flush=True)
    images = sources.to_look_at(encoder, found or benchmark, options.queries, options.seed)
    pairs = sources.to_compare(found, options.queries, options.seed) if found else ()
    return Work(where, encoder, benchmark, Subject(where, encoder, images, pairs, options.seed), found, reason, options)


def _section(name: str, work: Work) -> Section:
    progress.log(f"visualise: {TITLES[name].lower()} ...")
    return attempt(name, partial(_draw, name, work))


def _draw(name: str, work: Work) -> Part:
    """One section.

    Raises:
        NotHere: it needs a benchmark, and there is none.
    """
    options, found = work.options, work.found
    if found is None and name in _OF_A_BENCHMARK:
        raise NotHere(work.reason)
    of_search: dict[str, Callable[[Search], Part]] = {
        "ranks": lambda found: ranks.draw(found, options.queries, options.seed),
        "map": lambda found: embedding.draw(found, options.seed, progress.log),
        "errors": lambda found: errors.draw(found, options.table, progress.log),
    }
    if name in of_search:
        assert found
        return of_search[name](found)
    return getattr(images, name)(work.subject)


def _require_something(sections: Sequence[Section]) -> None:
    """Raise a UserError with the reasons where no section has a picture."""
    if not any(section.drawings for section in sections):
        first, *others = dict.fromkeys(section.missing for section in sections if section.missing)
        raise UserError(". ".join((f"nothing can be drawn: {first}", *map(capital, others))))


def _complain(sections: Sequence[Section]) -> None:
    """Tell on the terminal what the page had to leave out.

    Raises:
        Incomplete: something was lost.
    """
    for reason in dict.fromkeys(section.missing for section in sections if section.missing):
        names = ", ".join(section.name for section in sections if section.missing == reason)
        print(printable(f"left out, {names}: {reason}"), file=sys.stderr, flush=True)
    if num_lost := sum(section.lost for section in sections):
        raise Incomplete(f"the page is written without {counted(num_lost, 'section')}, which could not be drawn")


# --- words of the page ---


def _context(work: Work) -> dict[str, Any]:
    """Everything on the page but its sections."""
    name, found = printable(Path(work.where).resolve().name), work.found
    return {
        "title": f"PersonMAE: what {name} sees",
        "tags": _tags(work),
        "summary": _summary(name, work),
        "facts": _facts(found) if found else [],
        "made": [(label, printable(value)) for label, value in _made(work)],
        "counts": _counts(work.benchmark) if work.benchmark else "",
    }


def _tags(work: Work) -> list[tuple[str, bool]]:
    tags = [(datasets.title(work.benchmark), work.benchmark.synthetic)] if work.benchmark else []
    if not work.benchmark and sources.are_drawn(work.encoder):
        tags.append(("synthetic people", True))
    if work.found and work.encoder.config["kind"] == "encoder":
        tags.append(("frozen features, no head", True))
    return tags


def _summary(name: str, work: Work) -> str:
    """What the model is worth on these images, and whether its own record agrees."""
    if not work.found:
        images = (
            f"images of {datasets.title(work.benchmark)}"
            if work.benchmark
            else f"{counted(len(work.subject.images), 'image')} of its own shards"
        )
        return f"What {name} makes of {images}. It was not searched with, so there are no scores."
    record = work.found.record
    scores = f"mAP {100 * record['mAP']:.1f} % and Rank-1 {100 * record['rank1']:.1f} %"
    how = search.in_words(work.encoder, work.options.per_camera)
    return f"On {record['benchmark_title']}, {name} reaches {scores} with {how}.{_beside_record(work)}"


def _beside_record(work: Work) -> str:
    recorded = sources.recorded(work.where, work.encoder)
    assert work.found
    ours = work.found.record
    if not recorded or recorded.get("benchmark_digest") != ours["benchmark_digest"]:
        return ""
    if abs(recorded["mAP"] - ours["mAP"]) < _SAME:
        return " This is the mAP of its result.json."
    return f" Its result.json has mAP {100 * recorded['mAP']:.1f} %: it was evaluated with other weights or options."


def _scores(found: Search) -> dict[str, Any]:
    return {name: found.record[name] for name in ("benchmark", "benchmark_digest", "mAP", "rank1", "num_valid", "num_gallery")}


def _facts(found: Search) -> list[tuple[str, str, str]]:
    record = found.record
    of_all = f"of {record['num_queries']:,}, the others have no match" if record["num_valid"] != record["num_queries"] else ""
    return [
        ("mAP", f"{100 * record['mAP']:.1f} %", ""),
        ("Rank-1", f"{100 * record['rank1']:.1f} %", ""),
        ("queries", f"{record['num_valid']:,}", of_all),
        ("gallery images", f"{record['num_gallery']:,}", ""),
    ]


def _made(work: Work) -> list[tuple[str, str]]:
    config, options = work.encoder.config, work.options
    height, width = config["size"]
    facts = [
        ("command", shlex.join(["personmae", *sys.argv[1:]]))
        if os.path.basename(sys.argv[0]) == "personmae"
        else ("run", work.where),
        ("weights", str(config["source"])),
        ("features", search.in_words(work.encoder, options.per_camera)),
        ("images", f"{height} x {width} pixels for the model"),
        ("seed", str(options.seed)),
        ("commit", environment.git_commit() or "not in a checkout"),
    ]
    return facts + ([("digest of the data", work.found.record["benchmark_digest"])] if work.found else [])


def _counts(benchmark: Benchmark) -> str:
    described = describe(benchmark)
    return printable(f"{described.table}\n{described.note}")

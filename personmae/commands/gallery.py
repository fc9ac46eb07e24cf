"""``personmae gallery``: people's images that can be searched."""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from personmae.commands.arguments import Parser, Progress, add_max_rejects, add_unfinished, counting, place
from personmae.errors import UserError
from personmae.monitor.progress import counted, ending, log_to_stderr

_BUILD = """\
SRC is a file of 'personmae extract' (.parquet or .npy), or images: a folder, a bucket, tars, a list. Images need --model.
OUT is a new folder with the features, a small JPEG of each image, and the record of who changed it. Images that cannot be
read are left out and listed in OUT.rejects.jsonl.

Cameras are read from names such as 0001_c2s1_000451.jpg. --table is a CSV file with the columns id and camera, time, or both.
Where it has no camera for an image, the name's counts. A time is a number or a date.

The search is exact. --index faiss makes it approximate, and prints what it misses.
"""
_QUERY = """\
Several images, or ids with --id, are taken as one person. --each searches for each of them alone.
What is printed is a table, JSON, or ids alone. A score is the cosine of two features, at most 1.
"""
_ADD = """\
SRC is what 'gallery build' takes. Ids must be new, unless --skip-existing leaves out those that the gallery has. Those that
were removed earlier are passed over and counted, unless --again is given. Neither is computed. A query that runs at the same
time sees the gallery before the change or after it. Images that cannot be read are listed in GALLERY.rejects.jsonl.
"""
_REMOVE = """\
Removes images for good: features, ids, thumbnails and places in the index are in no file of the gallery afterwards.
audit.jsonl gets a line with the time, the account and hashes of the ids. Copies elsewhere and backups are not touched.
"""


def add_gallery(verbs: argparse._SubParsersAction) -> None:
    group = verbs.add_parser("gallery", help="search people's images: build, query, add, remove")
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    _add_build(actions)
    _add_query(actions)
    _add_add(actions)
    _add_remove(actions)


def _add_build(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("build", help="features or images -> a gallery", description=_BUILD)
    _add_source(verb)
    verb.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    _add_inputs(verb)
    verb.add_argument(
        "--index", choices=["exact", "faiss"], default="exact", help="faiss needs 'personmae[gallery]' (default exact)"
    )
    verb.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="of features on the disk (default float32)"
    )
    verb.set_defaults(run=_build)


def _add_source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", type=place, metavar="SRC", help="features, or where the images are")


def _add_inputs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", type=place, metavar="RUN", help="a run, a checkpoint, or an exported folder, for images")
    verb.add_argument("--images", type=place, metavar="SRC", help="the images of a file of features, for thumbnails")
    verb.add_argument("--table", type=Path, metavar="CSV", help="cameras and times by id")
    verb.add_argument("--column", metavar="NAME", help="the column of images in MDS shards and parquet files")
    verb.add_argument("--no-thumbnails", action="store_true", help="keep no small images")
    add_max_rejects(verb)
    add_unfinished(verb)


def _inputs(args: argparse.Namespace) -> Any:
    from personmae.gallery.edit import Inputs

    names = ("model", "images", "table", "column", "unfinished", "max_rejects")
    return Inputs(args.source, thumbnails=not args.no_thumbnails, **{name: vars(args)[name] for name in names})


def _build(args: argparse.Namespace) -> None:
    began = time.monotonic()
    with Progress("gallery", "images") as progress:
        from personmae.gallery import catalog, edit, search

        outcome = edit.build(_inputs(args), args.out, index=args.index, dtype=args.dtype, progress=progress, log=_log("build"))
    how = search.in_words(catalog.open_gallery(args.out))
    print(f"{counted(outcome.num_images, 'image')} in {args.out}. Search: {how}")
    following = f"personmae gallery query {shlex.quote(str(args.out))} IMAGE --picture found.png"
    log_to_stderr(ending("gallery build", time.monotonic() - began, f"the gallery is in {args.out}", following))


def _log(action: str) -> Any:
    return lambda line: log_to_stderr(f"gallery {action}: {line}")


def _add_gallery_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gallery", type=Path, metavar="GALLERY", help="what 'gallery build' made")


def _add_query(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("query", help="who looks like this", description=_QUERY)
    _add_gallery_argument(verb)
    verb.add_argument("images", nargs="*", type=place, metavar="IMAGE", help="images of one person")
    verb.add_argument("--id", nargs="+", default=[], metavar="ID", help="images of the gallery, by their ids")
    verb.add_argument("--each", action="store_true", help="search for each image and id alone")
    verb.add_argument("--top", type=int, default=10, metavar="K", help="how many to find, 0 for all (default 10)")
    verb.add_argument("--cameras", metavar="A,B", help="only of these cameras")
    verb.add_argument("--other-cameras", action="store_true", help="not of the cameras that saw the query")
    verb.add_argument("--since", metavar="TIME", help="from this time on, a number or a date as in the gallery")
    verb.add_argument("--until", metavar="TIME", help="up to this time")
    verb.add_argument("--min-score", type=float, metavar="X", help="only with a cosine of at least X")
    verb.add_argument("--rerank", type=counting, metavar="N", help="order the best N by k-reciprocal re-ranking")
    verb.add_argument("--exact", action="store_true", help="do not use the index")
    verb.add_argument("--format", choices=["table", "json", "ids"], default="table", help="what is printed (default table)")
    verb.add_argument("--picture", type=Path, metavar="FILE", help="also draw what was found, into a .png or .jpg")
    verb.add_argument("--model", type=place, metavar="RUN", help="for images (default: what the gallery was built with)")
    add_unfinished(verb)
    verb.set_defaults(run=_query)


def _query(args: argparse.Namespace) -> None:
    from personmae.gallery import catalog, output, search, sheet

    gallery = catalog.open_gallery(args.gallery)
    filters = _filters(args, gallery)
    search.require_sound(gallery, filters, args.top, args.rerank)
    _require_files(args.images)
    if args.picture:
        sheet.require_place(args.picture)
    answer = search.search(
        gallery,
        _queries(args, gallery),
        top=args.top,
        filters=filters,
        rerank=args.rerank,
        only_exact=args.exact,
        log=_log("query"),
    )
    if args.format == "table":
        print(output.to_table(gallery, answer))
        print(f"\n{counted(len(gallery), 'image')}, search: {answer.how}")
    else:
        print(output.to_json(gallery, answer) if args.format == "json" else output.to_ids(answer))
    if args.picture:
        sheet.write(args.picture, gallery, answer)


def _require_files(images: list[str]) -> None:
    """Raise a UserError for what is no file, before a model is read."""
    for image in images:
        if Path(image).is_dir():
            raise UserError(f"images are required, and {image} is a folder: give its files. With --each each is searched for")
        if not Path(image).is_file():
            raise UserError(f"a file with an image is required. There is none at {image}")


def _queries(args: argparse.Namespace, gallery: Any) -> list[Any]:
    from personmae.gallery import search
    from personmae.weights.loading import load_for_command

    found = search.by_ids(gallery, args.id, each=args.each) if args.id else []
    if args.images:
        model = args.model or (gallery.manifest.model or {}).get("place")
        if model is None:
            raise UserError(f"a model is required to search for images. {args.gallery} does not name its own: give --model RUN")
        encoder = load_for_command(model, _log("query"), unfinished=args.unfinished)
        found += search.by_images(gallery, encoder, args.images, each=args.each)
    return found if args.each or len(found) < 2 else [search.joined(found)]


def _filters(args: argparse.Namespace, gallery: Any) -> Any:
    from personmae.gallery import facts, search

    cameras = tuple(filter(None, map(str.strip, (args.cameras or "").split(","))))
    if args.cameras is not None and not cameras:
        raise UserError(f"--cameras needs names of cameras, set apart by commas. Got {args.cameras!r}")
    since, until = (_time(vars(args)[name], f"--{name}", gallery, facts) for name in ("since", "until"))
    return search.Filters(cameras, since, until, args.other_cameras, args.min_score)


def _time(text: str | None, option: str, gallery: Any, facts: Any) -> float | None:
    """A time of an option in seconds."""
    if text is None:
        return None
    (value,), kind = facts.parse_times([text], option)
    if gallery.manifest.times not in (kind, None):
        raise UserError(f"{option} must be a {gallery.manifest.times}, as times are in {gallery.folder}. Got {text}")
    return float(value)


def _add_add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("add", help="more images for a gallery", description=_ADD)
    _add_gallery_argument(verb)
    _add_source(verb)
    _add_inputs(verb)
    verb.add_argument("--skip-existing", action="store_true", help="leave out what the gallery has, and add the rest")
    verb.add_argument("--again", action="store_true", help="also add what was removed earlier")
    verb.set_defaults(run=_add)


def _add(args: argparse.Namespace) -> None:
    with Progress("gallery", "images") as progress:
        from personmae.gallery import catalog, edit, search

        wanted: Any = {"again": args.again, "skip_existing": args.skip_existing}
        outcome = edit.add(args.gallery, _inputs(args), **wanted, progress=progress, log=_log("add"))
    skipped = f", {outcome.skipped:,} that are there already are skipped" if outcome.skipped else ""
    passed_over = f", {outcome.passed_over:,} that were removed earlier are passed over" if outcome.passed_over else ""
    how = search.in_words(catalog.open_gallery(args.gallery))
    print(
        f"{counted(outcome.num_changed, 'image')} added{skipped}{passed_over}. {outcome.num_images:,} in {args.gallery}. "
        f"Search: {how}"
    )


def _add_remove(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("remove", help="remove images for good", description=_REMOVE)
    _add_gallery_argument(verb)
    verb.add_argument("id", nargs="*", metavar="ID", help="as 'gallery query' prints them")
    verb.add_argument("--ids", type=Path, metavar="FILE", help="a file with one id a line")
    verb.set_defaults(run=_remove)


def _remove(args: argparse.Namespace) -> None:
    from personmae.gallery import edit, store

    ids = [*args.id, *(_lines(args.ids) if args.ids else [])]
    if not ids:
        raise UserError("ids to remove are required, as 'personmae gallery query' prints them: give some, or --ids FILE")
    outcome = edit.remove(args.gallery, ids, log=_log("remove"))
    before = f", {outcome.passed_over:,} had been removed earlier" if outcome.passed_over else ""
    print(
        f"{counted(outcome.num_changed, 'image')} removed{before}. {outcome.num_images:,} left in {args.gallery}. "
        f"The record is in {args.gallery / store.AUDIT}"
    )


def _lines(path: Path) -> list[str]:
    from personmae.system import files

    try:
        return [line for line in files.lines(path, "utf-8-sig") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a text file with one id a line is required as --ids. {path} cannot be read: {error}") from error

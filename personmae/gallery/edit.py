"""What changes a gallery: build, add and remove. Each is whole or has not happened.

A change writes new segments beside the old ones and then replaces the manifest. Segments hold at most ``SEGMENT_ROWS`` rows,
so that a removal copies little. Small ones are joined when rows are added, so that there are never many.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Int

from personmae.data import rejects
from personmae.errors import UserError
from personmae.gallery import approximate, segment, sources, store
from personmae.gallery.catalog import Gallery, open_gallery, open_gallery_of
from personmae.gallery.segment import Piece
from personmae.gallery.sources import Source
from personmae.gallery.store import Log, Manifest, audit_line, commit
from personmae.monitor.progress import counted
from personmae.weights import extract
from personmae.weights.extract_images import open_images
from personmae.weights.loading import load_for_command
from personmae.weights.staging import partial_folder, partial_of, put_in_place, require_free

SEGMENT_ROWS: Final = 1 << 17
_EXTRACTED, _PLAN = "extracted.parquet", "extracted.json"
Progress = Callable[[int, int], None]
IndexKind = Literal["exact", "faiss"]


@dataclass(frozen=True)
class Inputs:
    """Where rows come from, and what goes with them.

    ``where`` is a file of features or a place of images. Images need a ``model``. ``images`` are for thumbnails of features.
    ``table`` has cameras and times.
    """

    where: str
    model: str | None = None
    images: str | None = None
    table: Path | None = None
    column: str | None = None
    thumbnails: bool = True
    unfinished: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a change did. ``passed_over`` ids were removed earlier and are not added again."""

    num_changed: int
    num_images: int
    index: dict[str, Any] | None = None
    passed_over: int = 0


# --- build ---


def build(
    inputs: Inputs,
    out: Path,
    *,
    index: IndexKind = "exact",
    dtype: Literal["float32", "float16"] = "float32",
    progress: Progress = lambda done, total: None,
    log: Log = lambda line: None,
) -> Outcome:
    """Make a gallery in a new folder. Killed, the same call goes on with the features that were computed.

    Raises:
        UserError: there are no features, they do not fit each other, ``out`` exists, or FAISS is wanted and not installed.
        Stopped: images were being extracted, and what is finished is kept.
        OSError: it cannot be written.
    """
    require_free(out)
    if index == "faiss":
        approximate.load()
    with partial_folder(out, keep=True) as folder:
        source = _source(inputs, folder, out, None, progress, log)
        made = folder / "gallery"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        manifest = Manifest(source.dim, dtype, times=source.facts.kind, model=source.model)
        manifest = _append(made, manifest, source, np.ones(len(source.ids), bool))
        manifest = replace(manifest, last=audit_line("build", num_images=len(source.ids), generation=manifest.generation))
        store.write_manifest(made, manifest)
        if index == "faiss":
            gallery = open_gallery(made)
            manifest = replace(manifest, index=_put_index(approximate.build(gallery), gallery, manifest.generation))
            store.write_manifest(made, manifest)
        store.settle(made)
        put_in_place(made, out)
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(len(source.ids), len(source.ids), manifest.index)


# --- add ---


def add(
    where: Path,
    inputs: Inputs,
    *,
    again: bool = False,
    progress: Progress = lambda done, total: None,
    log: Log = lambda line: None,
) -> Outcome:
    """Add rows to a gallery. Ids that were removed from it earlier are passed over, unless ``again``.

    Raises:
        UserError: an id is there already, or features are of another model or length.
        Unavailable: another process writes for too long.
        OSError: it cannot be written.
    """
    model = (store.read_manifest(where).model or {}).get("place")
    with store.incoming(where) as folder:
        source = _source(inputs, folder, where, model, progress, log)
        with store.writing(where, log):
            gallery = open_gallery(where)
            _require_fitting(gallery, source)
            removed = set() if again else store.removed_ids(where)
            keep = np.array([store.hash_id(name) not in removed for name in source.ids])
            if not keep.any():
                return Outcome(0, len(gallery), gallery.manifest.index, len(keep))
            manifest = _append(where, gallery.manifest, source, keep)
            manifest = replace(manifest, index=_index_with_new(gallery, manifest))
            known = {"num_images": int(keep.sum()), "passed_over": int((~keep).sum()), "generation": manifest.generation}
            commit(where, replace(manifest, last=audit_line("add", **known)))
    return Outcome(int(keep.sum()), manifest.num_rows, manifest.index, int((~keep).sum()))


def _require_fitting(gallery: Gallery, source: Source) -> None:
    """Raise a UserError where rows cannot be compared with those of a gallery, or are in it."""
    ours, theirs = gallery.manifest, source.model
    if source.dim != ours.dim:
        raise UserError(f"features of {ours.dim} numbers are required. {source.path} has {source.dim}: use the same model")
    if theirs and ours.model and theirs["digest"] != ours.model["digest"]:
        place = ours.model["place"] or "it was built with"
        raise UserError(f"features of the gallery's own model are required. {source.path} has another's: use {place}")
    if source.facts.kind and ours.times and source.facts.kind != ours.times:
        raise UserError(f"times must be written as {ours.times}s, as in the gallery. Those of {source.path} are not")
    _require_new(gallery, source.ids)


def _require_new(gallery: Gallery, ids: list[str]) -> None:
    """Raise a UserError where ids are in a gallery already."""
    there = gallery.rows_of(ids) >= 0
    if there.any():
        raise UserError(
            f"ids that are not in the gallery are required. {int(there.sum()):,} of {len(there):,} are, such as "
            f"{ids[int(there.argmax())]}: leave them out, or remove them first"
        )


def _append(where: Path, manifest: Manifest, source: Source, keep: Bool[np.ndarray, " N"]) -> Manifest:
    """Write the rows to keep as new segments, with small ones at the end joined to them. Returns the manifest to commit."""
    total, segments, joined = int(keep.sum()), list(manifest.segments), []
    while segments and segments[-1][1] <= 2 * total and segments[-1][1] + total <= SEGMENT_ROWS:
        name, rows = segments.pop()
        joined.insert(0, segment.read(where / store.SEGMENTS / name))
        total += rows
    pieces = Pieces(
        piece for part in (*(old.pieces() for old in joined), _new(source, keep, manifest.next_key)) for piece in part
    )
    for start in range(0, total, SEGMENT_ROWS):
        num_rows, name = min(SEGMENT_ROWS, total - start), manifest.next_segment(start // SEGMENT_ROWS)
        _write(where, manifest, name, pieces.take(num_rows), num_rows)
        segments.append((name, num_rows))
    return replace(
        manifest,
        segments=segments,
        generation=manifest.generation + 1,
        next_key=manifest.next_key + int(keep.sum()),
        times=manifest.times or source.facts.kind,
        model=manifest.model or source.model,
    )


def _new(source: Source, keep: Bool[np.ndarray, " N"], next_key: int) -> Iterator[Piece]:
    """The rows of a source as pieces, with keys from ``next_key`` on."""
    for rows, features in source.blocks():
        numbers = np.flatnonzero(keep[rows])
        ids = [source.ids[rows.start + number] for number in numbers]
        if not ids:
            continue
        cameras = [source.facts.cameras[rows.start + number] for number in numbers]
        thumbnails = source.images.thumbnails(ids) if source.images else [b""] * len(ids)
        keys = np.arange(next_key, next_key + len(ids))
        yield Piece(keys, ids, cameras, source.facts.times[rows][numbers], thumbnails, features[numbers])
        next_key += len(ids)


class Pieces:
    """Pieces that are taken by numbers of rows."""

    def __init__(self, pieces: Iterable[Piece]):
        self._pieces, self._rest = iter(pieces), None

    def take(self, num_rows: int) -> Iterator[Piece]:
        """The next rows."""
        while num_rows:
            piece = self._rest or next(self._pieces)
            head = piece.part(slice(num_rows))
            self._rest = piece.part(slice(num_rows, None)) if len(piece.ids) > num_rows else None
            num_rows -= len(head.ids)
            yield head


def _write(where: Path, manifest: Manifest, name: str, pieces: Iterable[Piece], num_rows: int) -> None:
    segment.write(where / store.SEGMENTS / name, pieces, num_rows=num_rows, dim=manifest.dim, dtype=manifest.dtype)


# --- remove ---


def remove(where: Path, ids: Sequence[str], *, log: Log = lambda line: None) -> Outcome:
    """Remove rows for good: their features, ids, thumbnails and places in the index are no longer in any file.

    The audit gets a line with hashes of the ids. Ids that were removed earlier are no error.

    Raises:
        UserError: an id is not there and never was. Nothing is removed.
        Unavailable: another process writes for too long.
        OSError: something could not be written or deleted. The next writer deletes it.
    """
    wanted = list(dict.fromkeys(ids))
    with store.writing(where, log):
        gallery = open_gallery(where)
        rows = gallery.rows_of(wanted)
        _require_known(gallery, wanted, rows)
        there = rows[rows >= 0]
        if not len(there):
            return Outcome(0, len(gallery), gallery.manifest.index, len(wanted))
        manifest = _without(gallery, there)
        manifest = replace(manifest, index=_index_without(gallery, manifest, there, log))
        hashes = [store.hash_id(name) for name, row in zip(wanted, rows, strict=True) if row >= 0]
        known = {"num_images": len(there), "ids_sha256": hashes, "generation": manifest.generation}
        commit(where, replace(manifest, last=audit_line("remove", **known)))
    return Outcome(len(there), manifest.num_rows, manifest.index, len(wanted) - len(there))


def _require_known(gallery: Gallery, ids: list[str], rows: Int[np.ndarray, " n"]) -> None:
    """Raise a UserError where an id is not in the gallery and was not removed from it."""
    removed = store.removed_ids(gallery.folder)
    unknown = [name for name, row in zip(ids, rows, strict=True) if row < 0 and store.hash_id(name) not in removed]
    if unknown:
        raise UserError(
            f"ids of the gallery are required. {len(unknown):,} of {len(ids):,} are not in {gallery.folder}, such as "
            f"{unknown[0]}: nothing was removed. 'personmae gallery query' prints ids"
        )


def _without(gallery: Gallery, rows: Int[np.ndarray, " n"]) -> Manifest:
    """Write the segments that rows are in again without them. Returns the manifest to commit."""
    manifest, segments = gallery.manifest, []
    keep = np.ones(len(gallery), bool)
    keep[rows] = False
    for number, part in enumerate(gallery.segments):
        kept = keep[gallery.starts[number] : gallery.starts[number + 1]]
        if kept.all():
            segments.append((part.name, len(part)))
        elif kept.any():
            name = manifest.next_segment(number)
            _write(gallery.folder, manifest, name, part.pieces(kept), int(kept.sum()))
            segments.append((name, int(kept.sum())))
    return replace(manifest, segments=segments, generation=manifest.generation + 1)


# --- the index ---


def _put_index(index: Any, gallery: Gallery, generation: int) -> dict[str, Any]:
    """Write an index beside the segments. Returns what the manifest says of it, with its measured recall."""
    name = f"index-{generation:06}.faiss"
    approximate.write(index, gallery.folder / name)
    return {"file": name, "kind": approximate.kind(index.nlist), **approximate.measure(index, gallery)}


def _index_with_new(before: Gallery, manifest: Manifest) -> dict[str, Any] | None:
    """The index of a gallery with the rows that a manifest has beyond it."""
    if before.manifest.index is None:
        return None
    index = approximate.read(before.folder / before.manifest.index["file"], to_change=True)
    gallery = open_gallery_of(before.folder, manifest)
    approximate.add(index, gallery, before.manifest.next_key)
    return _put_index(index, gallery, manifest.generation)


def _index_without(before: Gallery, manifest: Manifest, rows: Int[np.ndarray, " n"], log: Log) -> dict[str, Any] | None:
    """The index of a gallery without some rows. There is none where FAISS is not installed: it would still hold them."""
    if before.manifest.index is None or not manifest.num_rows:
        return None
    if not approximate.is_there():
        log("the index is deleted, since faiss is not installed to remove from it. The search is exact from now on")
        return None
    index = approximate.read(before.folder / before.manifest.index["file"], to_change=True)
    approximate.remove(index, before.rows["key"].to_numpy()[rows])
    return _put_index(index, open_gallery_of(before.folder, manifest), manifest.generation)


# --- where rows come from ---


def _source(inputs: Inputs, folder: Path, gallery: Path, model: str | None, progress: Progress, log: Log) -> Source:
    """The rows to add: a file of features as it is, or features of images, computed into ``folder``."""
    if sources.is_features(inputs.where):
        images = inputs.images if inputs.thumbnails else None
        found = sources.open_features(Path(inputs.where), table=inputs.table, images=images, column=inputs.column)
        return replace(found, model=found.model and found.model | {"place": _place(inputs.model)})
    if (inputs.model or model) is None:
        raise UserError(f"a model is required for the features of images. {inputs.where} has images: give --model RUN")
    if inputs.images:
        raise UserError(f"--images are for a file of features. {inputs.where} has images itself: leave it out")
    inputs = replace(inputs, model=inputs.model or model)
    features = _extracted(inputs, folder, gallery, progress, log)
    images = inputs.where if inputs.thumbnails else None
    found = sources.open_features(features, table=inputs.table, images=images, column=inputs.column)
    return replace(found, model=found.model and found.model | {"place": _place(inputs.model)})


def _place(model: str | None) -> str | None:
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _extracted(inputs: Inputs, folder: Path, gallery: Path, progress: Progress, log: Log) -> Path:
    """Features of images in ``folder``. Those of an earlier call of the same images and model are taken."""
    features, plan, model = folder / _EXTRACTED, folder / _PLAN, str(inputs.model)
    images = open_images(inputs.where, column=inputs.column)
    if gallery.exists():  # seen again when the features are there, for others may add in the meantime
        _require_new(open_gallery(gallery), images.ids)
    encoder = load_for_command(model, log, unfinished=inputs.unfinished)
    record = json.dumps([images.digest(), extract.digest(encoder)])
    if plan.exists() and plan.read_text(encoding="utf-8") == record:
        return features
    if not (features.exists() and partial_of(features).exists()):
        features.unlink(missing_ok=True)
    outcome = extract.run(
        inputs.where,
        features,
        model=model,
        column=inputs.column,
        unfinished=inputs.unfinished,
        progress=progress,
        log=lambda line: None,  # the model has said all that it has to say
    )
    if outcome.rejects:
        listed = extract.rejects_beside(gallery)
        extract.rejects_beside(features).replace(listed)
        number = counted(len(outcome.rejects), "image")
        log(f"{number} left out, listed in {listed}: {rejects.summary(outcome.rejects)}")
    plan.write_text(record, encoding="utf-8")
    return features

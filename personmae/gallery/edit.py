"""What changes a gallery: build, add and remove. Each is whole or has not happened.

A change writes new segments beside the old ones and then replaces the manifest. Segments hold at most ``SEGMENT_ROWS`` rows,
so that a removal copies little. Small ones are joined when rows are added, so that there are never many.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Int

from personmae.errors import UserError
from personmae.gallery import approximate, incoming, segment, store
from personmae.gallery.catalog import Gallery, open_gallery, open_gallery_of
from personmae.gallery.incoming import Inputs, Progress, Target
from personmae.gallery.segment import Piece
from personmae.gallery.sources import Source
from personmae.gallery.store import Log, Manifest, audit_line, commit
from personmae.weights.staging import partial_folder, put_in_place, require_free

SEGMENT_ROWS: Final = 1 << 17
IndexKind = Literal["exact", "faiss"]


@dataclass(frozen=True)
class Outcome:
    """What a change did. ``passed_over`` ids were removed earlier and are not added again. ``skipped`` ones are there."""

    num_changed: int
    num_images: int
    index: dict[str, Any] | None = None
    passed_over: int = 0
    skipped: int = 0


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
        TooManyRejects: too many images cannot be read. What is computed stays.
        Stopped: images were being extracted, and what is finished is kept.
        OSError: it cannot be written.
    """
    require_free(out)
    if index == "faiss":
        approximate.load()
    with partial_folder(out, keep=True) as folder:
        source = incoming.receive(inputs, folder, Target(out), progress, log).source
        assert source  # all of them are new
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
    skip_existing: bool = False,
    progress: Progress = lambda done, total: None,
    log: Log = lambda line: None,
) -> Outcome:
    """Add rows to a gallery. Ids that were removed from it earlier are passed over, unless ``again``.

    Raises:
        UserError: an id is there already and not to be skipped, or features are of another model or length.
        TooManyRejects: too many images cannot be read.
        Unavailable: another process writes for too long.
        OSError: it cannot be written.
    """
    store.read_manifest(where)  # before a folder is made in it
    target = Target(where, again, skip_existing)
    with store.incoming(where) as folder:
        found = incoming.receive(inputs, folder, target, progress, log)
        with store.writing(where, log):
            gallery = open_gallery(where)
            _require_fitting(gallery, found.source)
            keep, num_there, num_removed = target.choose(gallery, found.source.ids if found.source else [])
            num_there, num_removed = num_there + found.num_there, num_removed + found.num_removed
            if not found.source or not keep.any():
                return Outcome(0, len(gallery), gallery.manifest.index, num_removed, num_there)
            manifest = _append(where, gallery.manifest, found.source, keep)
            manifest = replace(manifest, index=_index_with_new(gallery, manifest))
            known = {"num_images": int(keep.sum()), "passed_over": num_removed, "generation": manifest.generation}
            commit(where, replace(manifest, last=audit_line("add", **known)))
    return Outcome(int(keep.sum()), manifest.num_rows, manifest.index, num_removed, num_there)


def _require_fitting(gallery: Gallery, source: Source | None) -> None:
    """Raise a UserError where rows cannot be compared with those of a gallery."""
    if source is None:
        return
    ours, theirs = gallery.manifest, source.model
    if source.dim != ours.dim:
        raise UserError(f"features of {ours.dim} numbers are required. {source.path} has {source.dim}: use the same model")
    if theirs and ours.model and theirs["digest"] != ours.model["digest"]:
        place = ours.model["place"] or "it was built with"
        raise UserError(f"features of the gallery's own model are required. {source.path} has another's: use {place}")
    incoming.require_kind(gallery, source.facts.kind, str(source.path))


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

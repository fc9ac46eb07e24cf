"""Rows on their way into a gallery: a file of features as it is, or images, whose features are computed first.

All that can be known without computing is looked at before: the table, the ids, the model.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool

from personmae.data import rejects
from personmae.data.rejects import Reject
from personmae.errors import UserError
from personmae.gallery import facts, search, sources, store
from personmae.gallery.catalog import Gallery, open_gallery
from personmae.gallery.facts import Table
from personmae.gallery.sources import Pictures, Source
from personmae.gallery.store import Log
from personmae.monitor.progress import counted
from personmae.system import files
from personmae.weights import extract
from personmae.weights.encoder import Encoder
from personmae.weights.extract import NothingReadable
from personmae.weights.extract_images import Images, open_images
from personmae.weights.loading import load_for_command
from personmae.weights.staging import partial_of

_EXTRACTED, _PLAN = "extracted.parquet", "extracted.json"
_ALL: Final = 1.0  # of the images may be left out while features are computed: how many may be is asked afterwards
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inputs:
    """Where rows come from, and what goes with them.

    ``where`` is a file of features or a place of images. Images need a ``model``. ``images`` are for thumbnails of features.
    ``table`` has cameras and times. At most the share ``max_rejects`` of the images may be left out as unreadable.
    """

    where: str
    model: str | None = None
    images: str | None = None
    table: Path | None = None
    column: str | None = None
    thumbnails: bool = True
    unfinished: bool = False
    max_rejects: float = 0.05


class Choice(NamedTuple):
    """Which of some ids are added. The others are in the gallery already, or were removed from it earlier."""

    keep: Bool[np.ndarray, " N"]
    num_there: int
    num_removed: int


@dataclass(frozen=True)
class Target:
    """Where rows go: a gallery, or a place where there will be one.

    ``skip_existing`` ids that are in it. What was removed from it earlier is added ``again``.
    """

    where: Path
    again: bool = False
    skip_existing: bool = False

    def now(self) -> Gallery | None:
        """The gallery as it is, if there is one yet."""
        return open_gallery(self.where) if self.where.exists() else None

    def choose(self, gallery: Gallery | None, ids: Sequence[str]) -> Choice:
        """Which ids are added to a state of the gallery.

        Raises:
            UserError: some are there already, and are not to be skipped.
        """
        if gallery is None:
            return Choice(np.ones(len(ids), bool), 0, 0)
        there = gallery.rows_of(ids) >= 0
        if there.any() and not self.skip_existing:
            raise UserError(
                f"ids that are not in the gallery are required. {int(there.sum()):,} of {len(there):,} are, such as "
                f"{ids[int(there.argmax())]}: leave them out by --skip-existing, or remove them first"
            )
        removed = set() if self.again else store.removed_ids(self.where)
        is_removed = np.array([store.hash_id(name) in removed for name in ids], bool)
        return Choice(~there & ~is_removed, int(there.sum()), int((is_removed & ~there).sum()))


class Incoming(NamedTuple):
    """Rows, or None where no image is left to compute. The numbers are of images that were left out before that."""

    source: Source | None
    num_there: int = 0
    num_removed: int = 0


def receive(inputs: Inputs, folder: Path, target: Target, progress: Progress, log: Log) -> Incoming:
    """The rows for a gallery. Features of images are computed into ``folder``.

    Raises:
        UserError: there are none, or the table, the ids or the model do not go with them or with the gallery.
        TooManyRejects: too many images cannot be read.
        Stopped: images were being extracted.
    """
    rejects.check_share(inputs.max_rejects)
    table, gallery = facts.read_table(inputs.table) if inputs.table else None, target.now()
    if gallery is not None and table:
        require_kind(gallery, table.facts.kind, str(table.path))
    if sources.is_features(inputs.where):
        return Incoming(_of_features(inputs, table, log))
    inputs = _with_model(inputs, gallery)
    images = _images(inputs, table, log)
    keep, num_there, num_removed = target.choose(gallery, images.ids)  # again when the features are there: others may add
    if num_there:
        log(f"{num_there:,} of {counted(len(keep), 'image')} skipped: the gallery has them already")
    chosen = images.part(np.flatnonzero(keep).tolist())
    features, left_out = _computed(inputs, chosen, folder, gallery, progress, log) if chosen.ids else (None, [])
    if left_out:
        _answer_for(left_out, len(keep), inputs, target, log)
    if features is None:
        return Incoming(None, num_there, num_removed)
    found = sources.open_features(features, table=table)
    found = replace(found, images=Pictures(chosen) if inputs.thumbnails else None)
    return Incoming(_from(found, inputs.model), num_there, num_removed)


def _with_model(inputs: Inputs, gallery: Gallery | None) -> Inputs:
    """What images need: a model, by default the gallery's own."""
    known = (gallery.manifest.model or {}) if gallery is not None else {}
    model = inputs.model or known.get("place")
    if model is None:
        raise UserError(f"a model is required for the features of images. {inputs.where} has images: give --model RUN")
    if inputs.images:
        raise UserError(f"--images are for a file of features. {inputs.where} has images itself: leave it out")
    return replace(inputs, model=model)


def _computed(
    inputs: Inputs, images: Images, folder: Path, gallery: Gallery | None, progress: Progress, log: Log
) -> tuple[Path | None, list[Reject]]:
    """Features by a model that is the gallery's, None where no image can be read, and the images that were left out."""
    encoder = load_for_command(str(inputs.model), log, unfinished=inputs.unfinished)
    if gallery is not None:
        search.require_model(gallery, encoder)
    try:
        features = _extracted(inputs, images, encoder, folder, progress)
    except NothingReadable as error:
        return None, error.rejects
    listed = extract.rejects_beside(features)
    return features, [json.loads(line) for line in files.whole_lines(listed)]


def _answer_for(left_out: list[Reject], num_images: int, inputs: Inputs, target: Target, log: Log) -> None:
    """List what was left out beside the gallery.

    The share is one of all images of the source. So a folder that grows is not refused for what is broken in it.

    Raises:
        UserError: it is all of them.
        TooManyRejects: it is more than the share that may be.
    """
    listed, words = extract.rejects_beside(target.where), rejects.summary(left_out)
    files.replace(listed, "".join(f"{json.dumps(reject)}\n" for reject in left_out))
    if len(left_out) == num_images:
        raise UserError(
            f"images that can be decoded are required. All {num_images:,} of {inputs.where} were left out, listed in {listed}: "
            f"{words}"
        )
    otherwise = f"{'' if target.where.exists() else ', which computes nothing again'}, or fix them and run this again"
    rejects.check_listed(left_out, num_images, inputs.max_rejects, str(listed), otherwise)
    log(f"{counted(len(left_out), 'image')} left out, listed in {listed}: {words}")


def _of_features(inputs: Inputs, table: Table | None, log: Log) -> Source:
    found = sources.open_features(Path(inputs.where), table=table)
    if table:
        log(table.in_words(found.ids))
    if inputs.images and inputs.thumbnails:
        pictures = Pictures(open_images(inputs.images, column=inputs.column))
        pictures.require_some(found.ids)
        found = replace(found, images=pictures)
    return _from(found, inputs.model)


def _from(source: Source, model: str | None) -> Source:
    """A source whose model has its place."""
    place = str(Path(model).resolve()) if model and Path(model).exists() else model
    return replace(source, model=source.model and source.model | {"place": place})


def _images(inputs: Inputs, table: Table | None, log: Log) -> Images:
    """The images to compute, each of which has a name of its own."""
    images = open_images(inputs.where, column=inputs.column)
    sources.require_different(images.ids, inputs.where)
    if table:
        log(table.in_words(images.ids))
    return images


def require_kind(gallery: Gallery, kind: str | None, where: str) -> None:
    """Raise a UserError where times are of another kind than the gallery's."""
    ours = gallery.manifest.times
    if kind and ours and kind != ours:
        raise UserError(f"times must be written as {ours}s, as in the gallery. Those of {where} are not")


def _extracted(inputs: Inputs, images: Images, encoder: Encoder, folder: Path, progress: Progress) -> Path:
    """Features of images in ``folder``. Those of an earlier call of the same images and model are taken."""
    features, plan = folder / _EXTRACTED, folder / _PLAN
    record = json.dumps([images.digest(), extract.digest(encoder)])
    if plan.exists() and plan.read_text(encoding="utf-8") == record:
        return features
    if not (features.exists() and partial_of(features).exists()):
        features.unlink(missing_ok=True)
        extract.rejects_beside(features).unlink(missing_ok=True)
    extract.run(
        images,
        features,
        model=str(inputs.model),
        max_rejects=_ALL,
        unfinished=inputs.unfinished,
        progress=progress,
        log=lambda line: None,  # the model has said all that it has to say
    )
    plan.write_text(record, encoding="utf-8")
    return features

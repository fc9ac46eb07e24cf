"""What the page can be asked, without HTTP: the gallery, a search, a comparison, a reconstruction. Nothing is kept.

Torch is imported with the first search, so that the page itself is there at once.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from personmae import images
from personmae.errors import UserError
from personmae.gallery import facts
from personmae.images import Pixels
from personmae.serve import asked
from personmae.serve.limits import Limits, Refusal
from personmae.serve.models import Models
from personmae.serve.watched import View, Watched, hide

_SHOWN: Final = 768  # pixels of the longer side of an image that is sent back
Files = list[bytes]


@dataclass(frozen=True)
class Service:
    """A gallery, models and limits."""

    watched: Watched
    models: Models
    limits: Limits

    def state(self) -> dict[str, Any]:
        """What there is at present."""
        view, models = self.watched.now(), self.models
        pretrained = models.pretrained.value if models.pretrained.state == "ready" else None
        return {
            "num_images": len(view.gallery),
            "cameras": view.cameras,
            "times": view.span(),
            "generation": view.gallery.manifest.generation,
            "encoder": models.encoder.state,
            "pretrained": models.pretrained.state,
            "grid": list(pretrained.grid) if pretrained else None,
            "size": list(pretrained.spec.img_size) if pretrained else None,
        }

    def rows(self, page: int, camera: str, part_of_id: str) -> dict[str, Any]:
        """A page of the gallery's rows."""
        found, total = self.watched.now().page(page, camera, part_of_id)
        return {"rows": [row._asdict() for row in found], "total": total}

    def thumbnail(self, key: int) -> bytes:
        """The small JPEG of a row.

        Raises:
            Refusal: the row is not there, or the gallery keeps no such image.
        """
        view = self.watched.now()
        if jpeg := view.gallery.thumbnail(view.row_of(key)):
            return jpeg
        raise Refusal(404, "the gallery keeps no small copy of that image")

    def search(self, asked_for: asked.Search, files: Files) -> dict[str, Any]:
        """What ``personmae gallery query`` finds for these images.

        Raises:
            Refusal: an image cannot be used, or an option does not go with the gallery.
        """
        view = self.watched.now()
        if len(asked_for.images) > self.limits.images:
            raise Refusal(422, f"at most {self.limits.images} images are taken as one person: leave some out")
        queries = _queries(self, view, asked_for.images, files)
        try:
            return _answer(view, queries, asked_for)
        except UserError as error:
            raise Refusal(422, hide(error, self.watched.folder)) from error

    def compare(self, asked_for: asked.Comparison, files: Files) -> dict[str, Any]:
        """Both images, and the patches of them that match. Places are (x, y), shares of an image's width and height.

        Raises:
            Refusal: an image cannot be used, or the model is not there.
        """
        encoder, view = self.models.encoder.get(), self.watched.now()
        from personmae.explain import correspondence, tokens

        first, second = self._pixels(view, asked_for.query, files), _stored(view, asked_for.key, asked_for.id)
        found, grid = correspondence.match(encoder, first, second), tokens.grid_of(encoder)
        return {
            "first": _as_jpeg(first),
            "second": _as_jpeg(second),
            "words": correspondence.in_words(found),
            "row": view.describe(np.array([view.row_of(asked_for.key)]))[0]._asdict(),
            "matches": [
                {
                    "first": grid.centre(one.first)[::-1],
                    "second": grid.centre(one.second)[::-1],
                    "similarity": one.similarity,
                    "colour": correspondence.COLOURS[number % len(correspondence.COLOURS)],
                }
                for number, one in enumerate(found)
            ],
        }

    def reconstruct(self, asked_for: asked.Reconstruction, files: Files) -> dict[str, Any]:
        """Figure 3 of one image with the visitor's mask.

        Raises:
            Refusal: the image or the mask cannot be used, or the model is not there.
        """
        pretrained, view = self.models.pretrained.get(), self.watched.now()
        from personmae.explain import reconstruction

        mask, (rows, columns) = asked_for.mask, pretrained.grid
        if len(mask) != rows or any(len(line) != columns for line in mask):
            raise Refusal(422, f"a mask of {rows} x {columns} patches is required: load the page again")
        try:
            found = reconstruction.reconstruct(pretrained, self._pixels(view, asked_for.image, files), np.array(mask, np.bool_))
        except UserError as error:
            raise Refusal(422, str(error)) from error
        parts = ("region_a", "masked", "prediction", "region_b")
        return {name: _as_png(getattr(found, name)) for name in parts} | {"words": found.in_words}

    def _pixels(self, view: View, image: asked.Image, files: Files) -> Pixels:
        if image.key is not None:
            return _stored(view, image.key, image.id)
        return asked.pixels(image, files, self.limits)


def _queries(service: Service, view: View, wanted: Sequence[asked.Image], files: Files) -> list[Any]:
    """One query of all images, made as ``personmae gallery query`` makes it."""
    uploads = _of_uploads(service, view, [image for image in wanted if image.key is None], files)
    from personmae.gallery import search

    rows = np.array([view.row_of(image.key, image.id) for image in wanted if image.key is not None], np.int64)
    queries = search.by_ids(view.gallery, view.gallery.rows["id"].take(rows).to_pylist()) if len(rows) else []
    queries += uploads
    return queries if len(queries) == 1 else [search.joined(queries)]


def _of_uploads(service: Service, view: View, wanted: Sequence[asked.Image], files: Files) -> list[Any]:
    """A query of all uploads, or none. One image after the other is decoded, for their pixels would fill the memory."""
    if not wanted:
        return []
    encoder = service.models.encoder.get()
    _require_model(view, encoder)
    import torch

    from personmae.gallery import search

    found = []
    for image in wanted:
        pixels = asked.pixels(image, files, service.limits)
        try:
            found += search.by_images(view.gallery, encoder, [pixels])
        except UserError as error:
            raise Refusal(422, str(error)) from error
    features = torch.stack([query.feature for query in found])
    return search.together(["upload"] * len(found), features, [-1] * len(found), [""] * len(found))


def _require_model(view: View, encoder: Any) -> None:
    """Raise a Refusal where the gallery was built again with another model. Where that lies is not told to visitors."""
    from personmae.gallery import search

    try:
        search.require_model(view.gallery, encoder)
    except UserError as error:
        raise Refusal(
            409, "uploads cannot be compared with this gallery, which now is of another model: start the server again"
        ) from error


def _answer(view: View, queries: list[Any], asked_for: asked.Search) -> dict[str, Any]:
    from personmae.gallery import search

    filters = search.Filters(
        tuple(_known_cameras(view, asked_for.cameras)),
        _time(view, asked_for.since, "from"),
        _time(view, asked_for.until, "until"),
        asked_for.other_cameras,
    )
    if asked_for.other_cameras and not queries[0].cameras:
        raise Refusal(422, "the camera of an uploaded image is not known: do not ask for other cameras alone")
    found = search.search(view.gallery, queries, top=asked_for.top, filters=filters, rerank=asked_for.rerank)
    hits = found.hits[0]
    rows = view.describe(np.array([hit.row for hit in hits], np.int64))
    return {
        "how": found.how,
        "num_images": len(view.gallery),
        "hits": [
            {**row._asdict(), "rank": hit.rank, "score": hit.score, "reranked": hit.reranked}
            for hit, row in zip(hits, rows, strict=True)
        ],
    }


def _known_cameras(view: View, names: Sequence[str]) -> Sequence[str]:
    if unknown := next((name for name in names if name not in view.cameras), None):
        raise Refusal(422, f"the gallery has no camera {unknown!r} any more: load the page again")
    return names


def _time(view: View, text: str, what: str) -> float | None:
    """A time in seconds, written as those of the gallery are."""
    kind = view.gallery.manifest.times
    if not text.strip():
        return None
    try:
        (value,), found = facts.parse_times([text.strip()], f"'{what}'")
    except UserError as error:
        raise Refusal(422, str(error)) from error
    if kind not in (found, None):
        raise Refusal(422, f"the time '{what}' must be a {kind}, as the times of the gallery are")
    return float(value)


def _stored(view: View, key: int, name: str | None) -> Pixels:
    """The small copy that a gallery keeps of an image."""
    jpeg = view.gallery.thumbnail(view.row_of(key, name))
    if not jpeg:
        raise Refusal(404, "the gallery keeps no small copy of that image, so its patches cannot be compared")
    return images.decode(jpeg).pixels


def _shrunk(pixels: Pixels) -> Pixels:
    """An image whose longer side has at most so many pixels as a page shows."""
    import cv2

    scale = _SHOWN / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA), np.uint8)


def _as_jpeg(pixels: Pixels) -> str:
    return _as_url(images.encode(_shrunk(pixels)), "jpeg")


def _as_png(pixels: Pixels) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return _as_url(content.getvalue(), "png")


def _as_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

"""An answer as one picture: each query, and beside it what was found from best to worst, in rows of ten."""

import io
import math
import os
from pathlib import Path
from typing import Final

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from personmae import images
from personmae.errors import UserError
from personmae.gallery import facts, sources
from personmae.gallery.catalog import Gallery
from personmae.gallery.output import title
from personmae.gallery.search import Answer, Hit, Query
from personmae.system import files

FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
CELL: Final = sources.THUMBNAIL  # (height, width) in pixels
MOST_CELLS: Final = 2000
ROW: Final = 10  # images that were found
_GAP, _LINE, _TITLE, _FONT = 12, 15, 19, 11
_COLUMN: Final = 126  # pixels, in which a date with its time has room
_CELL_HEIGHT: Final = CELL[0] + 3 * _LINE + _GAP
_WHITE, _INK, _FAINT, _EMPTY, _QUERY = "#ffffff", "#1a1a1a", "#5f6368", "#e8eaed", "#1a5fb4"


def write(path: Path, gallery: Gallery, answer: Answer) -> None:
    """Write a PNG or JPEG of an answer.

    Raises:
        UserError: the file has another suffix or cannot have this name, or there is too much for one picture.
        OSError: it cannot be written.
    """
    require_place(path)
    content, sheet, kind = io.BytesIO(), draw(gallery, answer), FORMATS[path.suffix.lower()]
    if kind == "JPEG" and sheet.height > images.LONGEST_SIDE:
        raise UserError(
            f"a JPEG has at most {images.LONGEST_SIDE:,} pixels a side. {path} would have {sheet.height:,}: "
            f"name it {path.stem}.png"
        )
    sheet.save(content, kind, **({"quality": 92} if kind == "JPEG" else {}))
    files.replace(path, content.getvalue())


def require_place(path: Path) -> None:
    """Make the folder of a picture. So what cannot be written is seen before the search.

    Raises:
        UserError: a picture cannot have this name, or its folder cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"a picture named .png or .jpg is required. Got {path}: name it {path.stem}.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"a folder for the picture is required. {path.parent} cannot be made: {error.strerror}. Choose another"
        ) from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        wrong = "is a folder" if path.is_dir() else "is in a folder that cannot be written to"
        raise UserError(f"a place for the picture is required. {path} {wrong}: choose another")


def draw(gallery: Gallery, answer: Answer) -> Image.Image:
    """The picture of an answer.

    Raises:
        UserError: there is too much for one picture.
    """
    most = max(len(hits) for hits in answer.hits)
    if (1 + most) * len(answer.hits) > MOST_CELLS:
        raise UserError(
            f"at most {MOST_CELLS:,} images fit into one picture. {len(answer.hits):,} queries of "
            f"{most:,} are more: give a smaller --top"
        )
    heights = [_TITLE + max(1, math.ceil(len(hits) / ROW)) * _CELL_HEIGHT for hits in answer.hits]
    width = (1 + min(most, ROW)) * (_COLUMN + _GAP) + _GAP
    sheet, top = Image.new("RGB", (width, _GAP + sum(heights)), _WHITE), _GAP
    canvas, font = ImageDraw.Draw(sheet), _font()
    for query, hits, height in zip(answer.queries, answer.hits, heights, strict=True):
        _write_text(canvas, font, (_GAP, top), title(query), sheet.width - 2 * _GAP, _INK)
        _draw_query(sheet, canvas, gallery, query, place(0, 0, top), font)
        for number, hit in enumerate(hits):
            _draw_hit(sheet, canvas, gallery, hit, place(number // ROW, 1 + number % ROW, top), font)
        top += height
    return sheet


def place(row: int, column: int, top: int = _GAP) -> tuple[int, int]:
    """The left upper corner (x, y) of a cell, in pixels. The query, whose title is at ``top``, is in column 0."""
    return _GAP + column * (_COLUMN + _GAP), top + _TITLE + row * _CELL_HEIGHT


def _draw_query(
    sheet: Image.Image,
    canvas: ImageDraw.ImageDraw,
    gallery: Gallery,
    query: Query,
    at: tuple[int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """The first image of a query, in a frame."""
    jpeg = gallery.thumbnail(query.rows[0]) if query.rows else _from_file(query.names[0])
    _paste(sheet, canvas, jpeg, at)
    canvas.rectangle((at[0] - 2, at[1] - 2, at[0] + CELL[1] + 1, at[1] + CELL[0] + 1), outline=_QUERY, width=2)
    more = f"query, {len(query.names)} images" if len(query.names) > 1 else "query"
    _write_text(canvas, font, (at[0], at[1] + CELL[0] + 3), more, _COLUMN, _QUERY)


def _draw_hit(
    sheet: Image.Image,
    canvas: ImageDraw.ImageDraw,
    gallery: Gallery,
    hit: Hit,
    at: tuple[int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    _paste(sheet, canvas, gallery.thumbnail(hit.row), at)
    score = f"{hit.rank}   {hit.score:.3f}" + (f"   cam {hit.camera}" if hit.camera else "")
    when = facts.in_words(hit.time, gallery.manifest.times).replace("T", " ").removesuffix("Z")
    for number, (text, colour) in enumerate([(score, _INK), (hit.id, _FAINT), (when, _FAINT)]):
        _write_text(canvas, font, (at[0], at[1] + CELL[0] + 3 + number * _LINE), text, _COLUMN, colour)


def _paste(sheet: Image.Image, canvas: ImageDraw.ImageDraw, jpeg: bytes, at: tuple[int, int]) -> None:
    """An image in the middle of its cell, or an empty cell."""
    canvas.rectangle((at[0], at[1], at[0] + CELL[1] - 1, at[1] + CELL[0] - 1), fill=_EMPTY)
    if jpeg:
        image = Image.fromarray(images.decode(jpeg).pixels)
        sheet.paste(image, (at[0] + (CELL[1] - image.width) // 2, at[1] + (CELL[0] - image.height) // 2))


def _from_file(name: str) -> bytes:
    """A thumbnail of a query's own file."""
    path = Path(name)
    if not path.is_file():
        return b""
    from personmae.reid.transforms import decode_image

    return sources.thumbnail(decode_image(name))


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which has the letters of most languages."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _FONT)


def _write_text(
    canvas: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, at: tuple[int, int], text: str, width: int, colour: str
) -> None:
    """A line of text, its beginning left out where it is too long: the end of a path says more."""
    shown = text
    while shown and canvas.textlength(shown if shown == text else f"…{shown}", font=font) > width:
        shown = shown[1:]
    canvas.text(at, shown if shown == text else f"…{shown}", font=font, fill=colour)

"""Requests as the page sends them: a form with the field ``request``, in JSON, and the files ``image`` in their order."""

from typing import Annotated, Final, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from personmae.serve import uploads
from personmae.serve.limits import Limits, Refusal
from personmae.serve.uploads import Box

_MOST_TEXT: Final = 262_144  # bytes of the field: a mask of 256 x 256 has room
LARGEST_KEY: Final = 1 << 62
Key = Annotated[int, Field(ge=0, le=LARGEST_KEY)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Area(_Asked):
    """A box as the page has it."""

    left: Share
    top: Share
    right: Share
    bottom: Share

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.left >= self.right or self.top >= self.bottom:
            raise ValueError("left must be less than right, and top less than bottom")
        return self


class Image(_Asked):
    """An image of the gallery by its ``key``, or an ``upload`` by its place in the form, of which a ``box`` may count.

    ``id`` is what the image with the key has to be called still.
    """

    key: Key | None = None
    id: str | None = None
    upload: Annotated[int, Field(ge=0)] | None = None
    box: Area | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.key is None) == (self.upload is None):
            raise ValueError("an image of the gallery or an upload is required")
        return self


class Search(_Asked):
    """Images of one person, and how to search for it. ``rerank`` is how many of the best are ordered again."""

    images: Annotated[list[Image], Field(min_length=1)]
    top: Annotated[int, Field(ge=1, le=200)] = 20
    cameras: Annotated[list[str], Field(max_length=1000)] = []
    other_cameras: bool = False
    since: str = ""
    until: str = ""
    rerank: Annotated[int, Field(ge=2, le=500)] | None = None


class Comparison(_Asked):
    """A query beside an image of the gallery."""

    query: Image
    key: Key
    id: str | None = None


class Reconstruction(_Asked):
    """An image, and which of its patches are hidden, row by row."""

    image: Image
    mask: Annotated[list[Annotated[list[bool], Field(max_length=256)]], Field(min_length=1, max_length=256)]


Kind = TypeVar("Kind", bound=_Asked)


class _InMemory(MultiPartParser):
    """Starlette's parser, which would write a file of more than 1 MB to the disk."""

    spool_max_size = 1 << 40


async def read(request: Request, kind: type[Kind], limits: Limits) -> tuple[Kind, list[bytes]]:
    """What is asked, and the bytes of all uploads. Names of files are not looked at.

    Raises:
        Refusal: 400, it is no such form, or 422, something in it is out of range.
    """
    form = await _form(request, limits)
    text, files = form.get("request"), form.getlist("image")
    if not isinstance(text, str) or not all(isinstance(file, UploadFile) for file in files):
        raise Refusal(400, "a form with the field 'request' and files 'image' is required")
    contents = [await file.read() for file in files if isinstance(file, UploadFile)]
    await form.close()
    return _validated(kind, text), contents


async def _form(request: Request, limits: Limits) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "a form of the kind multipart/form-data is required")
    parser = _InMemory(request.headers, request.stream(), max_files=limits.images, max_fields=1, max_part_size=_MOST_TEXT)
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"the form cannot be read: {error.message} At most {limits.images} images are taken") from error
    except (FormParserError, UnicodeError) as error:  # the second where the form names an encoding that cannot be
        raise Refusal(400, f"the form cannot be read: {error}") from error


def _validated(kind: type[Kind], text: str) -> Kind:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(422, f"{where or 'the request'}: {first['msg'].removeprefix('Value error, ')}") from error


def pixels(image: Image, files: list[bytes], limits: Limits) -> uploads.Pixels:
    """The part of an upload that counts.

    Raises:
        Refusal: it was not sent, or is no image.
    """
    if image.upload is None or image.upload >= len(files):
        raise Refusal(422, "an uploaded image is named that was not sent: choose it again")
    box = None if image.box is None else Box(image.box.left, image.box.top, image.box.right, image.box.bottom)
    return uploads.cropped(uploads.decode(files[image.upload], limits), box)

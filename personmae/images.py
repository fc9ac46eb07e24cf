"""One rule for every reader of images: from the bytes of a file to upright RGB pixels.

The content decides what a file is, never its name. JPEGs go to a fast decoder. Everything that it refuses goes to Pillow:
other formats, unusual JPEGs, and warnings that change no pixel. Both refuse truncated files.
Pixels are turned by the EXIF orientation. Alpha is dropped, palettes are looked up, and grey becomes three equal channels.
Of 16 bits a channel the upper 8 count, and of several frames the first.
"""

import functools
import io
from typing import Final, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
Size = tuple[int, int]  # (height, width) in pixels

SUFFIXES: Final = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".webp",
)  # by which files are found; what they are is seen when they are read
QUALITY: Final = 95  # of images that are encoded as JPEG, without chroma subsampling
LONGEST_SIDE: Final = 65_500  # libjpeg's bound, and a uint16 holds it
MOST_PIXELS: Final = 1 << 27  # a few bytes can claim to be an image that fills the memory

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # none runs a program
_EXIF = b"Exif\0\0"
_APP0, _APP1, _APP15, _COMMENT = 0xE0, 0xE1, 0xEF, 0xFE  # second bytes of markers; the first is 0xFF
_NO_IMAGE, _ENDS_EARLY, _TOO_LARGE = "no image that can be decoded", "ends too early", "too large"  # kinds
AS_STORED, _TRANSPOSED = 1, 5  # EXIF orientations; from the second on height and width are exchanged


class BadImage(ValueError):  # noqa: N818 - names what it is
    """Bytes that do not decode to a whole image. ``kind`` is the reason in few words, alike for all of one kind."""

    def __init__(self, reason: str, kind: str = _NO_IMAGE):
        super().__init__(reason)
        self.kind = kind


class Decoded(NamedTuple):
    """An upright image, and whether its bytes are a JPEG that the fast decoder takes without a complaint."""

    pixels: Pixels
    fast: bool


def decode(data: bytes) -> Decoded:
    """The whole image that a file holds, upright.

    Raises:
        BadImage: the bytes are not an image, end too early, or claim to be too large a one.
    """
    if not data:
        raise BadImage("it is empty", "empty")
    if data[:2] != _JPEG:
        return Decoded(_by_pillow(data), fast=False)
    try:
        _check_size(*map(int, simplejpeg.decode_jpeg_header(data)[:2]))
        return Decoded(turned(simplejpeg.decode_jpeg(data, strict=True), orientation(data)), fast=True)
    except BadImage:
        raise
    except (ValueError, LookupError) as error:  # a KeyError for a subsampling that has no name
        if "premature end" in str(error).lower():  # libjpeg's words; an end put behind a truncated file does not help
            raise BadImage(f"it ends early: {error}", _ENDS_EARLY) from error
    return Decoded(turned(_by_pillow(data), orientation(data)), fast=False)


def encode(pixels: Pixels) -> bytes:
    """A JPEG of quality 95 without chroma subsampling."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=QUALITY, colorsubsampling="444")


def upright_size(jpeg: bytes | memoryview) -> Size:
    """Height and width of a JPEG after its EXIF orientation. Nothing is decoded.

    Raises:
        ValueError: the bytes do not begin as a JPEG that the fast decoder takes.
    """
    height, width = map(int, simplejpeg.decode_jpeg_header(jpeg)[:2])
    return turned_size((height, width), orientation(jpeg))


def orientation(jpeg: bytes | memoryview) -> int:
    """The EXIF orientation of a JPEG, from 1 to 8. It is 1 where there is none or it cannot be read.

    Only the segments before the first table are read, where EXIF must be. A JPEG without EXIF has one or none.
    """
    place, end = 2, len(jpeg) - 4
    while place < end and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker == _APP1 and jpeg[place + 4 : place + 10] == _EXIF:
            return _read_orientation(bytes(jpeg[place + 4 : place + 2 + (jpeg[place + 2] << 8 | jpeg[place + 3])]))
        if not _APP0 <= marker <= _APP15 and marker != _COMMENT:
            break
        place += 2 + (jpeg[place + 2] << 8 | jpeg[place + 3])
    return AS_STORED


def turned_size(size: Size, orientation: int) -> Size:
    """The size that ``turned`` gives to an image of this size, and back."""
    return (size[1], size[0]) if orientation >= _TRANSPOSED else size


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """A view of an image, turned by its EXIF orientation."""
    if orientation >= _TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    down, right = _STEPS[orientation]
    return pixels[::down, ::right]


# For each orientation, how rows and columns are walked, after the exchange of both from 5 on.
_STEPS = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}


def _read_orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        return _valid(exif.get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's readers raise errors of a dozen kinds; a damaged tag turns nothing
        return AS_STORED


def _valid(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and orientation in _STEPS else AS_STORED


def is_cut_short(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end. Some decoders fill it up with grey."""
    if data.startswith(_PNG):
        return b"IEND" not in data
    if not data.startswith(_JPEG):
        return False
    place = 2
    # Up to the start of the scan: a thumbnail, which has an end of its own, is passed over.
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        filled = data[place + 1 : place + 2] == b"\xff"
        place += 1 if filled else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data.find(b"\xff\xd9", place) < 0


def _by_pillow(data: bytes) -> Pixels:
    """An image of any known kind: a JPEG as it is stored, others upright.

    Raises:
        BadImage: as ``decode``.
    """
    if is_cut_short(data):
        raise BadImage("it ends early", _ENDS_EARLY)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_size(image.height, image.width)
            pixels = rgb(image)
            is_jpeg = data[:2] == _JPEG
            return pixels if is_jpeg else turned(pixels, _valid(image.getexif().get(ExifTags.Base.Orientation)))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"it begins with {data[:8]!r}, as no image does that is known") from error
    except Image.DecompressionBombError as error:
        raise BadImage(str(error), _TOO_LARGE) from error
    except Exception as error:  # Pillow's readers raise errors of a dozen kinds for damaged bytes
        kind = _ENDS_EARLY if "truncated" in str(error) else _NO_IMAGE
        raise BadImage(f"it cannot be decoded: {error}", kind) from error


@functools.cache
def _formats() -> list[str]:
    """Those formats that this Pillow can open."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def rgb(image: Image.Image) -> Pixels:
    """The pixels of an image that Pillow has opened, as they are stored.

    Raises:
        BadImage: its pixels are numbers without a known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits of grey
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadImage("its pixels are numbers without a known range", "pixels without a known range")
    if "transparency" in image.info:  # Pillow warns where it has to leave some kinds of it out
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _check_size(height: int, width: int) -> None:
    if max(height, width) > LONGEST_SIDE or height * width > MOST_PIXELS:
        limits = f"{LONGEST_SIDE:,} a side and {MOST_PIXELS:,} in all"
        raise BadImage(f"it has {height:,} x {width:,} pixels, and at most {limits} are read", _TOO_LARGE)

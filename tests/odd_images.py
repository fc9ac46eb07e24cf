"""Image files as the wide world has them: usual and unusual, whole and broken, in every format that is taken."""

import io
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import Image

HEIGHT, WIDTH = 46, 30
_EXIF_ORIENTATION = 0x0112


def pixels(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth RGB image whose eight orientations all differ."""
    down, right = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (255 * np.stack([down, right, (down * right) ** 0.5], axis=-1)).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(kind: str, orientation: int, **options) -> bytes:
    """An image file with an EXIF orientation."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = orientation
    return saved(Image.fromarray(pixels()), kind, exif=exif, **options)


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment behind its first bytes."""
    return jpeg[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


def before(jpeg: bytes, marker: bytes, content: bytes) -> bytes:
    """A JPEG with bytes that belong nowhere before a marker."""
    place = jpeg.index(marker)
    return jpeg[:place] + content + jpeg[place:]


def sampled(factors: Sequence[tuple[int, int]], height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """A baseline JPEG with any sampling factors (horizontal, vertical): blocks of one value each, which fall by one."""
    out = b"\xff\xd8" + b"\xff\xdb" + b"\0\x43\0" + bytes([8] * 64)  # all steps are 8, so a DC of n is a change by n
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    parts = b"".join(bytes([number + 1, h << 4 | v, 0]) for number, (h, v) in enumerate(factors))
    out += b"\xff\xc0" + (8 + 3 * len(factors)).to_bytes(2, "big") + b"\x08" + size + bytes([len(factors)]) + parts
    dc, ac = bytes([0, 0, 0, 12] + [0] * 12) + bytes(range(12)), bytes([1] + [0] * 15) + b"\0"
    for kind, table in ((0x00, dc), (0x10, ac)):
        out += b"\xff\xc4" + (3 + len(table)).to_bytes(2, "big") + bytes([kind]) + table
    scan = b"".join(bytes([number + 1, 0]) for number in range(len(factors)))
    out += b"\xff\xda" + (6 + 2 * len(factors)).to_bytes(2, "big") + bytes([len(factors)]) + scan + b"\0\x3f\0"
    across, down = 8 * max(h for h, _ in factors), 8 * max(v for _, v in factors)
    num_mcus = -(-width // across) * -(-height // down)
    # Of a block: category 1 (code 0001) and the bit 0, which is a difference of -1; then the end of block (code 0).
    bits = "000100" * (num_mcus * sum(h * v for h, v in factors))
    bits += "1" * (-len(bits) % 8)
    return out + bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0") + b"\xff\xd9"


def whole() -> dict[str, bytes]:
    """Files by name that must be taken."""
    return {**_usual_jpegs(), **_unusual_jpegs(), **_other_formats()}


def _usual_jpegs() -> dict[str, bytes]:
    image = Image.fromarray(pixels())
    found = {
        f"subsampling {name}": simplejpeg.encode_jpeg(pixels(), 95, colorsubsampling=name)
        for name in ("444", "422", "420", "440", "411")
    }
    found |= {f"{h}x{w}": saved(Image.fromarray(pixels(h, w)), "JPEG") for h, w in ((1, 1), (1, 40), (40, 1), (7, 5))}
    found |= {f"EXIF orientation {n}": oriented("JPEG", n) for n in range(10)}
    return found | {
        "grey": saved(image.convert("L"), "JPEG"),
        "progressive": saved(image, "JPEG", progressive=True),
        "restart markers": saved(image, "JPEG", restart_marker_blocks=1),
        "RGB": saved(image, "JPEG", keep_rgb=True),
        "profile": saved(image, "JPEG", icc_profile=bytes(200_000)),
        "comment": saved(image, "JPEG", comment=b"x" * 60_000),
        "MPO": saved(image, "MPO", save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_90)]),
        "CMYK": saved(image.convert("CMYK"), "JPEG"),
    }


def _unusual_jpegs() -> dict[str, bytes]:
    jpeg = saved(Image.fromarray(pixels()), "JPEG", quality=95)
    cmyk = saved(Image.fromarray(pixels()).convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"Adobe") + 11
    thumbnail = saved(Image.fromarray(pixels(8, 8)), "JPEG")
    tiff = b"Exif\0\0II*\0\x08\0\0\0"
    found = {
        f"sampling factors {factors}": sampled(factors)
        for factors in (
            ((4, 2), (1, 1), (1, 1)),
            ((1, 4), (1, 1), (1, 1)),
            ((2, 2), (2, 1), (1, 2)),
            ((1, 1), (2, 2), (2, 2)),
            ((2, 1), (2, 1), (2, 1)),
            ((3, 1), (1, 1), (1, 1)),
            ((2, 2),),
        )
    }
    return found | {
        "YCCK": cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :],
        "unknown transform": with_segment(jpeg[:2] + jpeg[20:], 0xEE, b"Adobe\0\x64\0\0\0\0\x07"),
        "unknown JFIF": jpeg[:11] + b"\x05" + jpeg[12:],
        "filled": before(jpeg, b"\xff\xdb", b"\xff\xff\xff"),
        "stray bytes": before(jpeg, b"\xff\xdb", b"\0\0\0"),
        "stray bytes at the end": jpeg[:-2] + b"\0\x12\x34" + jpeg[-2:],
        "trailing garbage": jpeg + b"garbage" * 99,
        "trailing image": jpeg + thumbnail,
        "thumbnail": with_segment(jpeg, 0xE1, b"Exif\0\0" + thumbnail),
        "JFIF thumbnail": with_segment(jpeg[:2] + jpeg[20:], 0xE0, b"JFIF\0\1\2\0\0\1\0\1\4\4" + bytes(48)),
        "huge EXIF": with_segment(jpeg, 0xE1, tiff + bytes(65_000)),
        "EXIF of nothing": with_segment(jpeg, 0xE1, b"Exif\0\0"),
        "EXIF cut short": with_segment(jpeg, 0xE1, tiff + b"\x01\0\x12\x01"),
        "EXIF of another kind": with_segment(jpeg, 0xE1, b"Exif\0\0neither of both"),
    }


def _other_formats() -> dict[str, bytes]:
    image = Image.fromarray(pixels())
    clear = image.copy()
    clear.putalpha(Image.fromarray(pixels()[..., 0]))
    palette = image.quantize(60)
    deep = pixels().astype(np.uint16) << 8 | 0x55
    grey = Image.fromarray(deep[..., 0])
    other = image.transpose(Image.Transpose.ROTATE_180)
    return {
        **{f"PNG {mode}": saved(image.convert(mode), "PNG") for mode in ("RGB", "L", "1", "LA")},
        **{f"PNG orientation {n}": oriented("PNG", n) for n in range(1, 9)},
        **{f"WebP orientation {n}": oriented("WEBP", n, lossless=True) for n in range(1, 9)},
        "PNG alpha": saved(clear, "PNG"),
        "PNG palette": saved(palette, "PNG"),
        "PNG palette, one clear": saved(palette, "PNG", transparency=3),
        "PNG palette, many clear": saved(palette, "PNG", transparency=bytes(range(60))),
        "PNG one clear colour": saved(image, "PNG", transparency=(1, 2, 3)),
        "PNG grey, one clear": saved(image.convert("L"), "PNG", transparency=3),
        "PNG 16 bits": cv2.imencode(".png", deep[..., ::-1])[1].tobytes(),
        "PNG 16 bits, alpha": cv2.imencode(".png", np.dstack([deep[..., ::-1], deep[..., :1]]))[1].tobytes(),
        "PNG 16 bits, grey": saved(grey, "PNG"),
        "PNG profile": saved(image, "PNG", icc_profile=bytes(500)),
        "PNG animated": saved(image, "PNG", save_all=True, append_images=[other]),
        "WebP": saved(image, "WEBP", quality=95),
        "WebP alpha": saved(clear, "WEBP", lossless=True, exact=True),
        "WebP animated": saved(image, "WEBP", save_all=True, append_images=[other], lossless=True),
        **{f"BMP {mode}": saved(image.convert(mode), "BMP") for mode in ("RGB", "L", "1")},
        "BMP palette": saved(palette, "BMP"),
        "BMP alpha": saved(clear, "BMP"),
        "GIF": saved(palette, "GIF"),
        "TIFF": saved(image, "TIFF"),
        "TIFF 16 bits, grey": saved(grey, "TIFF"),
        "PPM": saved(image, "PPM"),
    }


def broken() -> dict[str, bytes]:
    """Files by name that must be refused."""
    image = Image.fromarray(pixels())
    jpeg = saved(image, "JPEG", quality=95)
    scan = jpeg.index(b"\xff\xda") + 40
    cut = {
        "JPEG": (jpeg, scan),
        "progressive JPEG": (saved(image, "JPEG", progressive=True), scan),
        "PNG": ((png := saved(image, "PNG")), len(png) // 2),
        "PNG without its end": (png, len(png) - 12),
        "WebP": ((webp := saved(image, "WEBP")), len(webp) // 2),
        "BMP": ((bmp := saved(image, "BMP")), len(bmp) // 2),
        "JPEG with its thumbnail": (with_segment(jpeg, 0xE1, b"Exif\0\0" + jpeg), len(jpeg) + scan),
        "JPEG without its end": (jpeg, len(jpeg) - 2),
        "JPEG, its head": (jpeg, 30),
        "JPEG, its mark": (jpeg, 2),
        "odd JPEG": ((odd := sampled(((4, 2), (1, 1), (1, 1)))), len(odd) - 4),
    }
    return {
        **{f"cut {name}": data[:length] for name, (data, length) in cut.items()},
        "cut JPEG with an end": jpeg[:scan] + b"\xff\xd9",
        "JPEG and zeros": jpeg[:scan] + bytes(1000),
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"hello, I am a text",
        "page": b"<!DOCTYPE html><html></html>",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "TIFF of floats": saved(Image.fromarray(pixels()[..., 0].astype(np.float32)), "TIFF"),
        "enormous JPEG": jpeg.replace(HEIGHT.to_bytes(2, "big") + WIDTH.to_bytes(2, "big"), b"\xea\x60\xea\x60", 1),
    }


def named() -> Iterator[tuple[str, str, bytes, bool]]:
    """(name, file name, content, whether it must be taken); every file is called .jpg, whatever it is."""
    every = [(name, data, True) for name, data in whole().items()] + [(name, data, False) for name, data in broken().items()]
    for number, (name, data, taken) in enumerate(every):
        yield name, f"{number:03}.jpg", data, taken

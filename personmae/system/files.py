"""Small files that a run keeps: replaced whole, cut at a line, and always valid JSON."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """JSON that every reader takes: a number that is not finite becomes null. ``options`` are those of ``json.dumps``."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # NaN or an infinity is in it
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def replace(path: Path, content: str | bytes) -> None:
    """Make ``content`` the file's, by a file beside it that takes its name: a kill or a full disk leaves the old one whole.

    A link is followed. A device or a pipe, such as ``/dev/stdout``, is written to.

    Raises:
        OSError: it cannot be written. ``path`` is as it was.
    """
    path, content = path.resolve(), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # a stop too
        partial.unlink(missing_ok=True)
        raise


def lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """Lines of a text, ended by a line feed with or without a carriage return. What names of files may hold ends none.

    ``str.splitlines`` also cuts at a form feed, U+2028 and six others.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    text = path.read_bytes().decode(encoding).removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a file. A last one that a kill cut off is left out, and a missing file has none."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1].splitlines()


def cut_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """End a JSONL file before the first record that is not to be kept, and before a line that was cut off.

    What stays is not touched, so nothing of it can be lost. Lines that are no record stay too.
    """
    if not path.exists():
        return
    content, offset = path.read_bytes(), 0
    while end := content.find(b"\n", offset) + 1:  # not splitlines(), which takes a carriage return off as well
        if not _keeps(content[offset:end], keep):
            break
        offset = end
    os.truncate(path, offset)


def _keeps(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(json.loads(line))
    except (ValueError, TypeError, KeyError):
        return True

"""Keys that have a new name: the old one is taken for one more release, and the new one is printed once.

Each file and each override gets the names of today before it is merged. So what comes later wins, whichever name it has.
"""

import functools
import os
import sys
from typing import Any, Final

from personmae.errors import UserError

RENAMED: Final = {  # dotted keys of any program; the section stays the same
    "checkpoint.store": "checkpoint.upload_to",
    "train.cutter": "train.crop_backend",
}


def key_of_today(key: str) -> str:
    """The name of today of a dotted key."""
    new = RENAMED.get(key, key)
    if new != key:
        print_new_name(key, new)
    return new


def rename(values: dict[str, Any], where: str) -> None:
    """Rename old keys of nested values in place. They come from ``where``.

    Raises:
        UserError: a key is there under both names.
    """
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        found: Any = values
        for section in sections:
            found = found.get(section) if isinstance(found, dict) else None
        if not isinstance(found, dict) or name not in found:
            continue
        new_name = new.rpartition(".")[2]
        if new_name in found:
            raise UserError(f"{old} is called {new} now, and {where} sets both: leave out {old}")
        found[new_name] = found.pop(name)
        print_new_name(old, new)


@functools.cache
def print_new_name(old: str, new: str) -> None:
    """Once in a run, on stderr: a configuration may be printed on the other stream."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {old} is called {new} now", file=sys.stderr, flush=True)

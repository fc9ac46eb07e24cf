"""Where recorded paths are now: a run records paths as it saw them, and a report may be written from another folder.

A relative path was relative to the folder in which the run was started. ``run.json`` names that folder. Otherwise it is the
path of the run without the ``run_dir`` that the run was given.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from personmae.errors import UserError

_SURROGATES = re.compile(r"[\ud800-\udfff]")


class Lost(UserError):  # noqa: N818 - the rest can be written
    """Something a run names is not where it was. The rest of a report can be written."""


@dataclass(frozen=True, slots=True)
class Place:
    """A run's folder as it is now, the ``run_dir`` it was given, and the folder it was started in. Empty where unknown."""

    directory: Path
    run_dir: str = ""
    cwd: str = ""

    def find(self, path: str) -> str:
        """A recorded path as it can be opened now. Locations in an object store stay unchanged.

        Raises:
            Lost: it is neither there nor at any other place that the record suggests.
        """
        if "://" in path:
            return path
        for candidate in self._candidates(Path(path).expanduser()):
            if candidate.exists():
                return str(candidate)
        hint = "" if Path(path).is_absolute() else ", or run this where the run was started"
        raise Lost(
            f"{path} is needed by {self.directory} and is not there. It is neither below the folder where the run was started, "
            f"nor next to the run, nor here. Put it back{hint}"
        )

    def _candidates(self, path: Path) -> Iterator[Path]:
        here = self.directory.resolve()
        given = Path(self.cwd) / self.run_dir if self.run_dir else None
        if path.is_absolute():
            yield path
            if given and given.is_absolute():  # all of it was moved together
                yield Path(os.path.normpath(here / os.path.relpath(path, given)))
            return
        if started := self._started_in(here):
            yield started / path
        if self.cwd:
            yield Path(self.cwd) / path
        yield from (folder / path for folder in (here, *here.parents))
        yield Path.cwd() / path

    def _started_in(self, here: Path) -> Path | None:
        """The run's path without its ``run_dir`` at the end, or None where that does not fit."""
        parts = Path(os.path.normpath(self.run_dir)).parts if self.run_dir else ()
        fits = parts and not Path(self.run_dir).is_absolute() and here.parts[-len(parts) :] == parts
        return Path(*here.parts[: -len(parts)]) if fits else None


def printable(text: object) -> str:
    """Text that every terminal and file takes: bytes of a file name that are no UTF-8 become a replacement character."""
    return _SURROGATES.sub("\ufffd", str(text))

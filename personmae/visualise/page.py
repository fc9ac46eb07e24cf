"""The page and its pictures: one HTML file that needs nothing else, and a PNG of each drawing."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from personmae.report import charts
from personmae.system import files
from personmae.visualise import ink
from personmae.visualise.place import PAGE
from personmae.visualise.section import Section


def write(folder: Path, sections: Sequence[Section], **context: Any) -> None:
    """Write the PNGs and then the page. ``context`` is the rest of what the template needs.

    What is missing comes last, so that a page begins with pictures.

    Raises:
        OSError: one cannot be written.
    """
    sections = sorted(sections, key=lambda section: section.part is None)
    names = file_names(sections)
    shown = [
        {
            "name": section.name,
            "title": section.title,
            "note": section.part.note if section.part else "",
            "missing": section.missing,
            "drawings": [_shown(drawing, name) for drawing, name in zip(section.drawings, own, strict=True)],
        }
        for section, own in zip(sections, names, strict=True)
    ]
    for section, own in zip(sections, names, strict=True):
        for drawing, name in zip(section.drawings, own, strict=True):
            files.replace(folder / name, ink.to_png(drawing.pixels))
    files.replace(folder / PAGE, render(sections=shown, light=charts.LIGHT, dark=charts.DARK, **context))


def _shown(drawing: Any, name: str) -> dict[str, Any]:
    """A drawing for the template: pixels become an address, unless there is something better for a page."""
    address = "" if drawing.html else ink.data_uri(drawing.pixels)
    height, width = drawing.pixels.shape[:2]
    return {
        "title": drawing.title,
        "caption": drawing.caption,
        "alt": drawing.alt,
        "html": drawing.html,
        "address": address,
        "width": width,
        "height": height,
        "file": name,
    }


def file_names(sections: Sequence[Section]) -> list[list[str]]:
    """A name for the PNG of each drawing, by section and title. Equal ones are numbered."""
    seen: dict[str, int] = {}
    named = []
    for section in sections:
        own = []
        for drawing in section.drawings:
            title = re.sub(r"\S*/|\.\w+\b", "", drawing.title.lower())  # an image's name without folders and suffix
            words = re.sub(r"[^a-z0-9]+", "-", title).strip("-")[:60]
            stem = f"{section.name}-{words}".strip("-")
            seen[stem] = seen.get(stem, 0) + 1
            own.append(f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png")
        named.append(own)
    return named


def render(**context: Any) -> str:
    """Fill the template. Its style is the report's, and some of its own."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "report"], encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("visualise.html.j2").render(context)

"""Curves that differ for every reader, in light and dark, and the same in words."""

import itertools
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from personmae.report import charts, report

# Machado, Oliveira, Fernandes 2009: linear RGB as people without one kind of cone see it.
VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    low, high = sorted(float(linear(colour) @ TO_XYZ[1]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ rgb / [0.9505, 1, 1.089], 0))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def variables(mode: str) -> dict[str, str]:
    """The colours of the style sheet, as the page has them in light or dark."""
    sheet = Path(report.__file__).with_name("report.css.j2").read_text(encoding="utf-8")
    light, dark = sheet.split("@media (prefers-color-scheme: dark)")
    return dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", light if mode == "light" else dark.split("* {")[0]))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("palette", [charts.LIGHT, charts.DARK])
def test_colours_are_told_apart_with_any_colour_vision(palette: tuple[str, ...], vision: str) -> None:
    seen = [lab(np.clip(VISION[vision] @ linear(colour), 0, 1)) for colour in palette]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize(("mode", "palette"), [("light", charts.LIGHT), ("dark", charts.DARK)])
def test_curves_and_words_stand_out_from_their_ground(mode: str, palette: tuple[str, ...]) -> None:
    page = variables(mode)
    grounds = ("--paper", "--card")
    assert min(contrast(colour, page[ground]) for colour in palette for ground in grounds) >= 3  # WCAG 1.4.11
    words = [(ink, ground) for ink in ("--ink", "--muted", "--accent", "--good") for ground in grounds]
    words += [("--warn-ink", "--warn-paper"), ("--accent", "--tag-paper"), ("--ink", "--tag-paper")]
    words += [("--ink", f"--heat-{level}") for level in "abcde"]
    assert {pair: contrast(*(page[name] for name in pair)) >= 4.5 for pair in words} == dict.fromkeys(words, True)


def test_twenty_curves_all_differ() -> None:
    svg = charts.draw_chart("many", {f"run {i}": ([1, 2], [i, i]) for i in range(20)})
    strokes = re.findall(r'style="(fill: none; [^"]*stroke: var\(--curve-\d\)[^"]*)"', svg)
    assert len(set(strokes)) == 20
    assert {strokes.count(stroke) for stroke in strokes} == {2}  # the curve and its line in the legend


def test_a_chart_takes_its_colours_from_the_page_and_leaves_the_page_alone() -> None:
    first, second = (charts.draw_chart(title, {"a": ([1], [1.0]), "b": ([1, 2], [1, 2])}) for title in ("one", "two"))
    for svg in (first, second):
        assert ET.fromstring(svg).get("role") == "img"
        assert not re.search(r"(?:fill|stroke): #", svg)
        assert "<style" not in svg
        assert not re.search(r'="(?:http(?!://www\.w3\.org/)|//)', svg)
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in (first, second)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) == set(own)


def test_a_chart_is_told_in_words_and_gaps_are_counted() -> None:
    curves = {"loss": ([1, 2, 3, 4], [5.0, math.nan, 9.0, 1.5]), "": ([1], [math.nan])}
    svg = charts.draw_chart('loss of "a" <b>', curves)
    output = (
        'Chart of loss of "a" <b>. loss: 5 at 1 to 1.5 at 4, between 1.5 and 9, 1 values are not finite. '
        "the curve: no finite number."
    )
    assert ET.fromstring(svg).get("aria-label") == output
    assert (
        charts.describe("x", {"a": ([1], [0.25])}, percent=True)
        == "Chart of x in per cent. a: 25 at 1 to 25 at 1, between 25 and 25."
    )

"""Curves as inline SVG that takes its colours from the page, so that one drawing works in light and dark.

Colours are names of the page's CSS variables. Each curve has its own colour and dashes: five colours that people with any
colour vision can tell apart, times four kinds of line, so that twenty curves all differ.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from personmae.report.places import printable

LIGHT: Final = ("#0d3b9e", "#e8590c", "#139a80", "#5b1130", "#9d6bff")
DARK: Final = ("#4f86f0", "#ffb454", "#5eead4", "#e8505b", "#e0c8ff")
DASHES: Final = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
STAND_INS: Final = {"--ink": "#010101", "--muted": "#010102", "--line": "#010103"} | {
    f"--curve-{i}": f"#0101{16 + i:02x}" for i in range(len(LIGHT))
}
STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.5,
    "svg.fonttype": "none",  # words stay words
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": STAND_INS["--ink"],
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), STAND_INS["--muted"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), STAND_INS["--line"]),
}
Curve = tuple[Sequence[float], Sequence[float]]  # x and y; NaN leaves a gap


def draw_chart(
    title: str, curves: Mapping[str, Curve], *, x_label: str = "step", from_zero: bool = False, percent: bool = False
) -> str:
    """An ``<svg>`` of curves by name, with a description for screen readers. The page writes the title."""
    legend_rows = math.ceil(len(curves) / 2) if len(curves) > 1 else 0
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.8, 2.7 + 0.19 * legend_rows), layout="constrained")
        axes = figure.subplots()
        for i, (name, (x, y)) in enumerate(curves.items()):
            axes.plot(x, [100 * v for v in y] if percent else y, label=printable(name), **line_style(i, len(x)))
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.9, linewidth=0.6)
        axes.tick_params(length=0)
        if percent:
            axes.yaxis.set_major_formatter("{x:.0f} %")
        if from_zero:
            axes.set_ylim(bottom=0)
        if legend_rows:
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8.5, handlelength=2.6)
        return to_svg(figure, describe(title, curves, percent=percent))


def to_svg(figure: Figure, words: str) -> str:
    """A figure in the colours of ``STAND_INS`` as an ``<svg>`` that takes the page's. Called within its style.

    ``words`` describe it to screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_the_page(buffer.getvalue(), words)


def line_style(i: int, num_points: int) -> dict[str, Any]:
    """Colour and dashes of the i-th curve. A single point is drawn as one."""
    return {
        "color": STAND_INS[f"--curve-{i % len(LIGHT)}"],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 1.5,
        "marker": "." if num_points == 1 else "",
    }


def describe(title: str, curves: Mapping[str, Curve], *, percent: bool = False) -> str:
    """A chart in words: where each curve begins and ends, and its extremes."""
    sentences = []
    for name, (x, y) in curves.items():
        known = [(at, 100 * value if percent else value) for at, value in zip(x, y, strict=True) if math.isfinite(value)]
        label = name or "the curve"
        if not known:
            sentences.append(f"{label}: no finite number")
            continue
        (first_x, first_y), (last_x, last_y) = known[0], known[-1]
        low, high = min(value for _, value in known), max(value for _, value in known)
        gaps = len(y) - len(known)
        sentences.append(
            f"{label}: {first_y:.3g} at {first_x:g} to {last_y:.3g} at {last_x:g}, between {low:.3g} and {high:.3g}"
            + (f", {gaps} values are not finite" if gaps else "")
        )
    return printable(f"Chart of {title}{' in per cent' if percent else ''}. {'. '.join(sentences)}.")


def _for_the_page(svg: str, words: str) -> str:
    """Only the element itself: sized by the page, named, without ids that another chart has too, coloured by variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', _opening(words), svg, count=1)
    svg = re.sub(r' id="[A-Za-z.]+(?:3d|2d)?_\d+"', "", svg)
    for variable, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    return re.sub(r" font-family: [^;\"]*;", "", svg)


def _opening(words: str) -> str:
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\\", "\\\\")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'viewBox="\1" role="img" aria-label="{label}">'
    )

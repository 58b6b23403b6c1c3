"""A matplotlib figure as inline SVG whose colours and font are the page's own.

A figure is drawn in stand-in colours that no reader sees; each becomes a CSS variable of the page, so one
drawing serves light and dark mode and print.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#0a0b01"
MUTED = "#0a0b02"
GRID = "#0a0b03"
HEAT = "#0a0b04"
SERIES = tuple(f"#0a0b1{i}" for i in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", HEAT: "--heat"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.parse_math": False,  # a task name may hold a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 13,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 13,
    "legend.frameon": False,
}


def figure(width: float, height: float) -> Any:
    """An empty transparent figure of `width` x `height` CSS pixels at full size."""
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width / 72, height / 72), layout="constrained")
    made.patch.set_alpha(0)
    return made


def drawing() -> Any:
    """The context in which to fill a figure, so that its text and axes take the page's style."""
    return matplotlib.rc_context(_STYLE)


def inline_svg(drawn: Any, name: str, title: str, description: str) -> Markup:
    """The figure as an `<svg>` element that screen readers announce by `title` and `description`.

    `name` must differ between the figures of one page: it keeps the ids inside them apart.
    """
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(drawn).print_svg(text, metadata=metadata)
    return Markup(_labelled(_themed(text.getvalue()), name, title, description))


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # "axes_1" would repeat in every figure of the page
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", _font, svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def _labelled(svg: str, name: str, title: str, description: str) -> str:
    opening = re.search(r"<svg[^>]*>", svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', svg)
    if opening is None or box is None:
        raise ValueError("matplotlib wrote an SVG without a view box")
    head = (
        f'<svg {box.group(0)} class="plot" style="max-width: {box.group(1)}px" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    return head + svg[opening.end() :]

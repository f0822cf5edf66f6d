"""Small inline SVG by matplotlib. Colours are CSS variables, so that one drawing serves the light and the dark page."""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

from matplotlib.figure import Figure

# Stand-ins that occur nowhere else in a drawing, and the page's CSS variables that take their places.
INK, FAINT = "#010203", "#040506"
SERIES = ("#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718", "#191a1b", "#1c1d1e", "#1f2021")
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {colour: f"var(--series-{index + 1})" for index, colour in enumerate(SERIES)}

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "bbopd",  # the same run gives the same bytes
    "text.parse_math": False,  # names of tasks may hold a $
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.transparent": True,
}


def to_svg(figure: Figure, title: str) -> str:
    """The bare element: scales with the page, takes its colours, and its ids clash with no other drawing's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    svg = f'<svg role="img" aria-label="{escape(title)}" {view_box[0]}>' + svg[svg.index(">") + 1 :]
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg

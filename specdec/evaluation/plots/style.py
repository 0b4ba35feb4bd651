"""How every plot looks: colours, marks, legends, and the way to an SVG data URI (one file, nothing to fetch)."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.tree import Tree

PANEL = (5.6, 3.7)  # inches; two panels fill a row of the page
WIDE = (11.5, 3.6)

# Okabe and Ito's colours, told apart with every kind of colour vision; marks and line styles differ too.
BASELINE = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ("-", (0, (6, 1.5)), "-.", (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
INK, MUTED, FAINT = "#3b4048", "#5b616b", "#c3c8cf"
STYLE = {
    "figure.figsize": PANEL,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # an arm may be called anything, dollars included
    "svg.hashsalt": "specdec",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """What a drawing says besides its lines: ``text`` instead of it, ``note`` under it, ``arms`` that it shows."""

    text: str
    note: str = ""
    arms: Sequence[str] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One drawn plot; ``wide`` ones take a whole row of the page."""

    title: str
    uri: str
    text: str
    note: str
    wide: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketch:
    """A plot that may be drawn: ``draw(figure, data)`` gives None when there is nothing to show."""

    title: str
    draw: Callable[[Any, Any], Caption | None]
    wide: bool = False


def render(sketch: Sketch, data: Any, result: Tree) -> Plot | None:
    """Draw a sketch of ``data``; ``result`` tells which arms are synthetic. None when it has nothing to show."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE if sketch.wide else PANEL, layout="constrained")
        FigureCanvasSVG(figure)
        caption = sketch.draw(figure, data)
        if caption is None:
            return None
        uri = _data_uri(figure)
    synthetic = words.synthetic_note(result, list(caption.arms))
    return Plot(
        title=sketch.title,
        uri=uri,
        text=f"{caption.text} {synthetic}".strip(),
        note=f"{caption.note} {synthetic}".strip(),
        wide=sketch.wide,
    )


def _data_uri(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def look(result: Tree, arm: str) -> dict[str, Any]:
    """Colour, mark and line style of an arm: the same in every plot."""
    names = tree.arm_names(result)
    place = names.index(arm) - 1 if arm in names else 0
    if place < 0:
        return {"color": BASELINE, "marker": "s", "linestyle": "--"}
    return {"color": COLOURS[place % 6], "marker": MARKERS[place % 6], "linestyle": LINES[place // 6 % 6]}


def label(name: str) -> str:
    """A name for a legend or an axis: one line, not too long, and never hidden for a leading underscore."""
    line = " ".join(str(name).split()) or words.NOTHING
    line = line if len(line) <= 44 else line[:43] + "…"
    return f" {line}" if line.startswith("_") else line


def arm_label(result: Tree, arm: str) -> str:
    """An arm in a legend."""
    return label(words.arm_label(result, arm))


def legend(figure: Any, axes: Any) -> None:
    """One legend above the axes, in as many columns as its names leave room for; none for a single series."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) < 2:
        return
    figure.legend(
        handles, names, loc="outside upper left", ncols=_legend_columns(names, 13 * figure.get_figwidth()),
        handlelength=2.6, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def _legend_columns(names: Sequence[str], room: float) -> int:
    """The most columns that ``room`` characters hold; matplotlib fills them one after the other."""
    for columns in range(len(names), 1, -1):
        rows, longer = divmod(len(names), columns)
        starts = [column * rows + min(column, longer) for column in range(columns + 1)]
        widest = [max(map(len, names[start:end])) + 6 for start, end in itertools.pairwise(starts)]
        if sum(widest) <= room:
            return columns
    return 1


def plain_ticks(axis: Any, values: Sequence[float], show: Callable[[float], str] = words.plain) -> None:
    """Ticks at exactly these values, without minor ones: what a logarithmic axis needs to stay readable."""
    from matplotlib.ticker import NullLocator

    axis.set_ticks(list(values), [show(value) for value in values])
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from at most ``low`` to at least ``high``; only tens when that would crowd the axis."""
    tens = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    wide = high / low > 200
    return [step * 10.0**ten for ten in tens for step in ((1,) if wide else (1, 2, 5))]


def error_bars(medians: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]]:
    """``[below, above]`` of each median as matplotlib wants them; 0 where there is no interval."""
    pairs = [
        (max(0.0, value - interval[0]), max(0.0, interval[1] - value)) if interval else (0.0, 0.0)
        for value, interval in zip(medians, intervals, strict=True)
    ]
    return [[below for below, _ in pairs], [above for _, above in pairs]]

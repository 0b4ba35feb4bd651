"""Several runs in one plot."""

from __future__ import annotations

from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.acceptance import position_panels
from specdec.evaluation.plots.speed import forest
from specdec.evaluation.plots.style import COLOURS, LINES, MARKERS, Caption, Plot, Sketch, render
from specdec.evaluation.tree import Tree, dig

Runs = list[tuple[str, Tree]]


def draw_run_plots(runs: Runs) -> list[Plot]:
    """Speed-up and acceptance by position, one series a run; a plot without data does not appear."""
    sketches = (
        Sketch(title="Speed-up by run", draw=_draw_speedups, wide=True),
        Sketch(title="Draft tokens accepted, by position", draw=_draw_positions, wide=True),
    )
    plots = (render(sketch, runs, {}) for sketch in sketches)
    return [plot for plot in plots if plot is not None]


def run_label(name: str, result: Tree) -> str:
    """A run's name; one whose acceptance was dictated says so."""
    arm = next(iter(tree.others(result)), None)
    return f"{name} (synthetic)" if tree.is_synthetic(result, arm) else name


def _note(runs: Runs) -> str:
    names = [name for name, result in runs if run_label(name, result) != name]
    return f"{', '.join(names)} has {words.SYNTHETIC}." if names else ""


def _draw_speedups(figure: Any, runs: Runs) -> Caption | None:
    lines = []
    for name, result in runs:
        ratio, interval = (dig(result, "summary", key) for key in ("speedup_median", "speedup_ci95"))
        if ratio is not None:
            lines.append((run_label(name, result), {"run": (ratio, interval)}))
    if not lines:
        return None
    forest(
        figure, lines, [("run", "run", {"color": COLOURS[0], "marker": "o"})], "speed-up against the run's own baseline"
    )
    texts = [f"{name} {words.times(values['run'][0])}" for name, values in lines]
    return Caption(
        text="speed-up: " + ", ".join(texts), note=" ".join(filter(None, ["Median with 95% interval.", _note(runs)]))
    )


def _draw_positions(figure: Any, runs: Runs) -> Caption | None:
    series = []
    for place, (name, result) in enumerate(runs):
        rates, conditional = (dig(result, "summary", key) for key in ("per_position_rates", "conditional_rates"))
        if rates and any(rates):
            style = {"color": COLOURS[place % 6], "marker": MARKERS[place % 6], "linestyle": LINES[place // 6 % 6]}
            series.append((run_label(name, result), style, rates, conditional))
    if not series:
        return None
    position_panels(figure, series)
    texts = [f"{name}: {words.rates(rates)}" for name, _, rates, _ in series]
    return Caption(text="acceptance by position: " + "; ".join(texts), note=_note(runs))

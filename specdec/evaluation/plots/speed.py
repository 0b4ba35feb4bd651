"""Speed-up: by suite, by condition, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.style import (
    BASELINE,
    FAINT,
    INK,
    MUTED,
    PANEL,
    Caption,
    arm_label,
    error_bars,
    label,
    legend,
    look,
)
from specdec.evaluation.tree import Tree, dig

# One line of a forest plot: (its name, {series: (median, interval)}).
Line = tuple[str, dict[str, tuple[float, list[float] | None]]]


def forest(
    figure: Any, lines: Sequence[Line], series: Sequence[tuple[str, str, dict[str, Any]]], axis_label: str
) -> None:
    """Medians with their intervals, one row a line, each series at its own height; 1 is marked.

    ``series`` gives (key in the lines, label, look).
    """
    least = PANEL[1] if figure.get_figwidth() == PANEL[0] else 1.8  # as high as its neighbour
    figure.set_figheight(max(least, _height(len(lines), len(series))))
    axes = figure.add_subplot()
    axes.axvline(1, color=BASELINE, linewidth=1.2, linestyle="--")
    step = 0.74 / len(series)
    for place, (key, name, style) in enumerate(series):
        found = [(row, *values[key]) for row, (_, values) in enumerate(lines) if key in values]
        heights = [row + (place - (len(series) - 1) / 2) * step for row, _, _ in found]
        medians, intervals = [median for _, median, _ in found], [interval for _, _, interval in found]
        axes.errorbar(
            medians, heights, xerr=error_bars(medians, intervals), fmt=style["marker"], color=style["color"],
            markersize=6, linewidth=2, capsize=3, label=label(name),
        )  # fmt: skip
        for height, median, interval in zip(heights, medians, intervals, strict=True):
            end = max(median, interval[1]) if interval else median
            axes.annotate(
                words.times(median), (end, height), textcoords="offset points", xytext=(7, 0), va="center",
                color=style["color"], fontsize=8.5,
            )  # fmt: skip
    _frame(axes, lines, axis_label)
    legend(figure, axes)


def _height(num_lines: int, num_series: int) -> float:
    return 1.15 + num_lines * (0.2 + 0.22 * num_series)


def _frame(axes: Any, lines: Sequence[Line], axis_label: str) -> None:
    ends = [1.0] + [end for _, values in lines for median, ci in values.values() for end in (median, *(ci or []))]
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) or 0.1
    axes.set(xlabel=axis_label, xlim=(low - pad, high + 3.4 * pad), ylim=(len(lines) - 0.45, -0.55))
    axes.set_yticks(range(len(lines)), [label(name) for name, _ in lines])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    for border in range(len(lines) - 1):
        axes.axhline(border + 0.5, color="#eef0f2", linewidth=0.8, zorder=0)


def _line(name: str, comparisons: Tree | None) -> Line:
    return name, {
        arm: (pair["speedup_median"], pair.get("speedup_ci95"))
        for arm, pair in (comparisons or {}).items()
        if pair and pair.get("speedup_median") is not None
    }


def _draw_lines(figure: Any, result: Tree, lines: list[Line], note: str) -> Caption | None:
    lines = [line for line in lines if line[1]]
    arms = [arm for arm in tree.others(result) if any(arm in values for _, values in lines)]
    if not arms:
        return None
    axis_label = f"speed-up: TPOT of {label(tree.baseline(result) or '')} / TPOT of the arm"
    forest(figure, lines, [(arm, words.arm_label(result, arm), look(result, arm)) for arm in arms], axis_label)
    texts = [f"{name} {arm} {words.times(value[0])}" for name, values in lines for arm, value in values.items()]
    return Caption(text="speed-up: " + ", ".join(texts), arms=arms, note=note)


def draw_by_suite(figure: Any, result: Tree) -> Caption | None:
    """First cell: each suite, and all of them when there are several."""
    cell = tree.first_cell(result)
    suites = cell.get("suites") or {}
    lines = [_line(suite, dig(facts, "comparisons")) for suite, facts in suites.items()]
    if len(suites) != 1:
        lines.append(_line("all suites", cell.get("comparisons")))
    return _draw_lines(figure, result, lines, "Median over tasks, 95% interval (bootstrap over blocks of tasks).")


def draw_by_condition(figure: Any, result: Tree) -> Caption | None:
    """Every cell, when there are several."""
    cells = tree.cells(result)
    if len(cells) < 2:
        return None
    lines = [_line(str(cell.get("name")), cell.get("comparisons")) for cell in cells]
    return _draw_lines(figure, result, lines, "All suites together.")


def draw_by_task(figure: Any, result: Tree) -> Caption | None:
    """First cell: the tasks of each arm, sorted by their speed-up."""
    comparisons = tree.first_cell(result).get("comparisons") or {}
    ratios = {arm: sorted((dig(comparisons, arm, "speedup_by_task") or {}).values()) for arm in tree.others(result)}
    ratios = {arm: values for arm, values in ratios.items() if values}
    if not ratios:
        return None
    num_suites = len(tree.first_cell(result).get("suites") or {})
    beside = _height(num_suites + (num_suites != 1), len(ratios))  # the plot by suite
    figure.set_figheight(min(max(PANEL[1], beside), 1.5 * PANEL[1]))
    axes = figure.add_subplot()
    axes.axhline(1, color=BASELINE, linewidth=1.2, linestyle="--")
    for arm, values in ratios.items():
        style = look(result, arm)
        places = [(rank + 0.5) / len(values) for rank in range(len(values))]
        if len(ratios) == 1:
            axes.vlines(places, 1, values, color=FAINT, linewidth=1.2)
        size = 5 if len(values) <= 60 else 2.5
        axes.plot(places, values, style["marker"], color=style["color"], markersize=size, label=arm_label(result, arm))
    axes.set(xlabel="tasks, smallest speed-up first", ylabel="speed-up", xlim=(0, 1))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"], color=MUTED)
    axes.margins(y=0.1)
    legend(figure, axes)
    texts = [
        f"{arm}: {len(values)} tasks from {words.times(values[0])} to {words.times(values[-1])}"
        for arm, values in ratios.items()
    ]
    return Caption(text="speed-up of each task: " + "; ".join(texts), arms=list(ratios))

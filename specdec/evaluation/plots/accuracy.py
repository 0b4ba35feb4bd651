"""Accuracy against the output tokens spent: test-time scaling."""

from __future__ import annotations

from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.style import Caption, arm_label, error_bars, label, legend, log_ticks, look, plain_ticks
from specdec.evaluation.tree import Tree

MAX_SUITES = 4


def draw_scaling(figure: Any, data: tuple[Tree, list[Tree]]) -> Caption | None:
    """A panel a suite, for cells that differ in their thinking budget or number of samples alone."""
    result, sweep = data
    names = [cell.get("name") for cell in sweep]
    rows = [row for row in tree.accuracy_rows(result) if row.get("mean_output_tokens") and row.get("cell") in names]
    if len({row.get("cell") for row in rows}) < 2:
        return None
    suites = list(dict.fromkeys(row.get("suite") for row in rows))
    grid = figure.subplots(1, min(len(suites), MAX_SUITES), sharey=True, squeeze=False)[0]
    for axes, suite in zip(grid, suites, strict=False):
        mine = [row for row in rows if row.get("suite") == suite]
        for arm in tree.arm_names(result):
            _curves(axes, result, arm, [row for row in mine if row.get("arm") == arm])
        spent = [_spent(row, key) for row in mine for key in ("pass_at_1", "maj_at_n") if row.get(key) is not None]
        low, high = min(spent), max(spent)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, [tick for tick in log_ticks(low, high) if low * 0.8 <= tick <= high * 1.2])
        axes.set(title=label(str(suite)), xlabel="output tokens a question", xlim=(low * 0.8, high * 1.25))
    low, high = grid[0].get_ylim()
    grid[0].set(ylabel="accuracy", ylim=(max(0.0, low), min(1.02, high)))
    grid[0].yaxis.set_major_formatter(lambda value, _: f"{words.count(100 * value)}%")
    legend(figure, grid[0])
    texts = [
        f"{row.get('suite')} {row.get('arm')} {words.count(row['mean_output_tokens'])} tokens "
        f"{words.percent(row['pass_at_1'])}"
        for row in rows
    ]
    arms = [arm for arm in tree.arm_names(result) if any(row.get("arm") == arm for row in rows)]
    hidden = len(suites) - MAX_SUITES
    more = f" {hidden} more suites are in the table." if hidden > 0 else ""
    voted = any(row.get("maj_at_n") is not None for row in rows)
    vote = " Hollow and dotted: majority vote, which spends the tokens of all its samples." if voted else ""
    note = f"Bars: 95% intervals.{vote}{more}"
    return Caption(text="accuracy: " + ", ".join(texts), arms=arms, note=note)


def _spent(row: Tree, key: str) -> float:
    """Output tokens one question took: a vote needs all its samples."""
    return row["mean_output_tokens"] * ((row.get("num_samples") or 1) if key == "maj_at_n" else 1)


def _curves(axes: Any, result: Tree, arm: str, rows: list[Tree]) -> None:
    style = look(result, arm)
    for key, change in (("pass_at_1", {}), ("maj_at_n", {"fillstyle": "none", "linestyle": ":"})):
        name = arm_label(result, arm) if key == "pass_at_1" else None
        found = [row for row in rows if row.get(key) is not None]
        found.sort(key=lambda row: _spent(row, key))
        if found:
            values = [row[key] for row in found]
            bars = error_bars(values, [row.get(f"{key}_ci95") for row in found])
            axes.errorbar(
                [_spent(row, key) for row in found], values, yerr=bars, **(style | change), linewidth=1.8,
                elinewidth=1, capsize=3, markersize=6, label=name,
            )  # fmt: skip

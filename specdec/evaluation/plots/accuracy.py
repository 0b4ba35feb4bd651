"""Accuracy against what an answer costs: test-time scaling, with and without speculation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.style import Caption, arm_label, error_bars, label, legend, log_ticks, look, plain_ticks
from specdec.evaluation.tree import Tree

MAX_SUITES = 4
PRICED_QUESTIONS = 1000  # one alone costs too little to read

Spent = Callable[[Tree, int], float]  # by a row and its number of answers


def draw_scaling(figure: Any, data: tuple[Tree, list[Tree]]) -> Caption | None:
    """A panel a suite, for cells that differ in their thinking budget or number of samples alone."""
    result, sweep = data
    budgets = {cell.get("name"): cell.get("thinking_budget") for cell in sweep}
    rows = [row for row in tree.accuracy_rows(result) if row.get("sec_per_answer") and row.get("cell") in budgets]
    if len({row.get("cell") for row in rows}) < 2:
        return None
    spent, axis_label = _cost_of(result)
    suites = list(dict.fromkeys(row.get("suite") for row in rows))
    grid = figure.subplots(1, min(len(suites), MAX_SUITES), sharey=True, squeeze=False)[0]
    for axes, suite in zip(grid, suites, strict=False):
        mine = [row for row in rows if row.get("suite") == suite]
        for arm in tree.arm_names(result):
            _curves(axes, result, arm, [row for row in mine if row.get("arm") == arm], budgets, spent)
        costs = [spent(row, count) for row in mine for count in (1, _num_votes(row))]
        low, high = min(costs), max(costs)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, [tick for tick in log_ticks(low, high) if low * 0.8 <= tick <= high * 1.2])
        axes.set(title=label(str(suite)), xlabel=axis_label, xlim=(low * 0.7, high * 1.4))
    low, high = grid[0].get_ylim()
    grid[0].set(ylabel="accuracy", ylim=(max(0.0, low), min(1.02, high)))
    grid[0].yaxis.set_major_formatter(lambda value, _: f"{words.count(100 * value)}%")
    legend(figure, grid[0])
    texts = [
        f"{row.get('suite')} {row.get('cell')} {row.get('arm')} {words.seconds(row['sec_per_answer'])} an answer "
        f"{words.percent(row['pass_at_1'])}"
        for row in rows
    ]
    arms = [arm for arm in tree.arm_names(result) if any(row.get("arm") == arm for row in rows)]
    note = _note(rows, budgets, len(suites) - MAX_SUITES)
    where = f"{words.sampling(sweep[0])}, {words.load(sweep[0])}"
    return Caption(text="accuracy: " + ", ".join(texts), arms=arms, note=f"{note} {where[:1].upper()}{where[1:]}.")


def _note(rows: list[Tree], budgets: dict[Any, Any], num_hidden: int) -> str:
    parts = ["Further left: cheaper. Bars: 95% intervals."]
    if len(set(budgets.values())) > 1:
        parts.append("The numbers are thinking budgets.")
    if any(_num_votes(row) > 1 for row in rows):
        parts.append("Hollow and dotted: majority vote, which costs all of its samples.")
    if num_hidden > 0:
        parts.append(f"{num_hidden} more suites are in the table.")
    return " ".join(parts)


def _cost_of(result: Tree) -> tuple[Spent, str]:
    """What answers cost, in money where there is a price, and the axis's label."""
    price = result.get("price_per_hour")
    if price:
        factor = price / 3600 * PRICED_QUESTIONS
        return lambda row, count: factor * row["sec_per_answer"] * count, f"cost of {PRICED_QUESTIONS:,} questions"
    return lambda row, count: row["sec_per_answer"] * count, "machine seconds a question"


def _num_votes(row: Tree) -> int:
    return row.get("num_samples") or 1 if row.get("maj_at_n") is not None else 1


def _curves(axes: Any, result: Tree, arm: str, rows: list[Tree], budgets: dict[Any, Any], spent: Spent) -> None:
    """Single answers joined over the budgets; from each of them, its votes joined over the number of samples."""
    style, by_budget = look(result, arm), defaultdict(list)
    for row in sorted(rows, key=lambda row: row.get("num_samples") or 1):
        by_budget[budgets[row.get("cell")]].append(row)
    singles = sorted((same[-1] for same in by_budget.values()), key=lambda row: spent(row, 1))  # of the most samples
    if not singles:
        return
    _line(axes, [(spent(row, 1), row, "pass_at_1") for row in singles], style, arm_label(result, arm))
    for budget, same in by_budget.items():
        votes = [(spent(row, _num_votes(row)), row, "maj_at_n") for row in same if _num_votes(row) > 1]
        if votes:
            start, end = (spent(same[-1], 1), same[-1]["pass_at_1"]), (votes[0][0], votes[0][1]["maj_at_n"])
            axes.plot(*zip(start, end, strict=True), color=style["color"], linestyle=":", linewidth=1.2)
            _line(axes, votes, style | {"fillstyle": "none", "linestyle": ":"}, None)
        if len(by_budget) > 1 and budget is not None and arm == tree.baseline(result):
            axes.annotate(
                words.count(budget), (spent(same[-1], 1), same[-1]["pass_at_1"]), textcoords="offset points",
                xytext=(4, -11), fontsize=8, color=style["color"],
            )  # fmt: skip


def _line(axes: Any, points: list[tuple[float, Tree, str]], style: dict[str, Any], name: str | None) -> None:
    values = [row[key] for _, row, key in points]
    bars = error_bars(values, [row.get(f"{key}_ci95") for _, row, key in points])
    axes.errorbar(
        [x for x, *_ in points], values, yerr=bars, **style, linewidth=1.8, elinewidth=1, capsize=2, markersize=6,
        ecolor=(style["color"], 0.4), label=name,
    )  # fmt: skip

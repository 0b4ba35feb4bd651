"""Latency and output length of single requests, in the first cell."""

from __future__ import annotations

import statistics
from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.style import Caption, arm_label, legend, log_ticks, look, plain_ticks
from specdec.evaluation.tree import Tree

FIGURES = {
    "ttft_sec": "time to first token",
    "ttfvt_sec": "to first visible token",
    "tpot_sec": "time per output token",
    "e2e_sec": "end to end",
}
LOG_RANGE = 30  # a wider range of values than this gets a logarithmic axis


def _values(result: Tree, key: str) -> dict[str, list[float]]:
    """By arm, what its requests of the first cell measured, sorted."""
    cell = tree.first_cell(result).get("name")
    by_arm = {
        arm: sorted(row[key] for row in tree.good_requests(result, cell, arm) if row.get(key) is not None)
        for arm in tree.arm_names(result)
    }
    return {arm: values for arm, values in by_arm.items() if values}


def draw_cdfs(figure: Any, result: Tree) -> Caption | None:
    """A panel a figure: share of requests that were at least as fast, the further left the faster."""
    panels = {key: values for key in FIGURES if (values := _values(result, key))}
    if panels.get("ttfvt_sec") == panels.get("ttft_sec"):
        panels.pop("ttfvt_sec", None)  # nothing is hidden, so the first token is the first visible one
    if not panels:
        return None
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    texts = []
    for axes, (key, by_arm) in zip(grid, panels.items(), strict=True):
        texts.append(f"{FIGURES[key]} {_panel(axes, result, key, by_arm)}")
    grid[0].set(ylabel="share of requests", ylim=(0, 1.02))
    grid[0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    legend(figure, max(grid, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    arms = list(dict.fromkeys(arm for by_arm in panels.values() for arm in by_arm))
    note = "The further left, the faster; dots are medians."
    return Caption(text="medians: " + "; ".join(texts), arms=arms, note=note)


def _panel(axes: Any, result: Tree, key: str, by_arm: dict[str, list[float]]) -> str:
    everything = [value for values in by_arm.values() for value in values]
    scale, unit = (1, "s") if max(everything) >= 2 else (1e3, "ms")
    texts = []
    for arm, values in by_arm.items():
        style, median = look(result, arm), statistics.median(values)
        scaled = [scale * value for value in values]
        axes.ecdf(scaled, color=style["color"], linestyle=style["linestyle"], linewidth=2, label=arm_label(result, arm))
        axes.plot(scale * median, 0.5, style["marker"], color=style["color"], markersize=6)
        texts.append(f"{arm} {words.seconds(median)}")
    positive = [scale * value for value in everything if value > 0]
    if positive and max(positive) > LOG_RANGE * min(positive):
        low, high = min(positive), max(positive)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, [tick for tick in log_ticks(low, high) if low * 0.8 <= tick <= high * 1.2])
    else:
        axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.set(xlabel=unit, title=FIGURES[key])
    return ", ".join(texts)


def draw_output_lengths(figure: Any, result: Tree) -> Caption | None:
    """How long the outputs were: the arms should agree, else their speed is not of the same work."""
    by_arm = _values(result, "num_output_tokens")
    if not by_arm:
        return None
    axes = figure.add_subplot()
    longest = max(values[-1] for values in by_arm.values())
    shortest = min(values[0] for values in by_arm.values())
    bins = [shortest - 0.5, longest + 0.5] if longest - shortest < 2 else 12
    axes.hist(
        list(by_arm.values()), bins=bins, range=(shortest, max(longest, shortest + 1)),
        weights=[[1 / len(values)] * len(values) for values in by_arm.values()],
        color=[look(result, arm)["color"] for arm in by_arm], label=[arm_label(result, arm) for arm in by_arm],
        rwidth=0.88,
    )  # fmt: skip
    axes.set(xlabel="output tokens", ylabel="share of requests")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda share, _: f"{words.plain(round(100 * share, 3))}%")
    axes.grid(False, axis="x")
    legend(figure, axes)
    texts = [f"{arm} median {words.count(statistics.median(values))}" for arm, values in by_arm.items()]
    return Caption(text="output tokens: " + ", ".join(texts), arms=list(by_arm))

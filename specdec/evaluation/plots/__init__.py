"""The report's plots, drawn by matplotlib from the result tree; a plot without data does not appear."""

from __future__ import annotations

from typing import Any

from specdec.evaluation import tree
from specdec.evaluation.plots import acceptance, accuracy, latency, load, speed
from specdec.evaluation.plots.style import Plot, Sketch, render
from specdec.evaluation.tree import Tree

BY_SUITE = Sketch(title="Speed-up by suite", draw=speed.draw_by_suite)
BY_TASK = Sketch(title="Speed-up of each task", draw=speed.draw_by_task)
BY_CONDITION = Sketch(title="Speed-up by condition", draw=speed.draw_by_condition, wide=True)
FRONTIER = Sketch(title="Throughput against speed for one user", draw=load.draw_frontier)
BY_LOAD = Sketch(title="Speed-up under load", draw=load.draw_speedup_by_load)
PREDICTION = Sketch(title="Predicted and measured speed-up", draw=load.draw_prediction)
BY_POSITION = Sketch(title="Draft tokens accepted, by position", draw=acceptance.draw_by_position, wide=True)
ALONG_OUTPUT = Sketch(title="Acceptance length along the output", draw=acceptance.draw_along_output)
BY_SPAN = Sketch(title="Acceptance length in thinking and answer", draw=acceptance.draw_by_span)
WIDTHS = Sketch(title="Draft width K, and fallback to plain decode", draw=acceptance.draw_widths, wide=True)
CDFS = Sketch(title="Latency, request by request", draw=latency.draw_cdfs, wide=True)
LENGTHS = Sketch(title="Output length", draw=latency.draw_output_lengths)
SCALING = Sketch(title="Accuracy against cost", draw=accuracy.draw_scaling, wide=True)


def draw_plots(result: Tree) -> list[Plot]:
    """Each plot that has data, in the report's order."""
    whole = (BY_SUITE, BY_TASK, BY_CONDITION), (PREDICTION, LENGTHS, BY_POSITION, ALONG_OUTPUT, BY_SPAN, WIDTHS, CDFS)
    plan: list[tuple[Sketch, Any]] = [
        *((sketch, result) for sketch in whole[0]),
        *((sketch, (result, sweep)) for sweep in tree.sweeps(result) for sketch in (FRONTIER, BY_LOAD)),
        *((sketch, result) for sketch in whole[1]),
        *((SCALING, (result, sweep)) for sweep in tree.budget_sweeps(result)),
    ]
    drawn = (render(sketch, data, result) for sketch, data in plan)
    return [plot for plot in drawn if plot is not None]

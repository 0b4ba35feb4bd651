"""Under load: throughput against speed for one user, speed-up against concurrency, and the cost model's prediction."""

from __future__ import annotations

from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.style import (
    BASELINE,
    INK,
    MUTED,
    Caption,
    arm_label,
    error_bars,
    legend,
    look,
    plain_ticks,
)
from specdec.evaluation.tree import Tree, dig

RATIO_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12)


def _points(sweep: list[Tree], arm: str) -> list[tuple[float, float, float]]:
    """``(load, tokens/s of one user, tokens/s of all)`` of each cell that knows both."""
    found = []
    for cell in sweep:
        tpot, throughput = dig(cell, "arms", arm, "tpot_sec", "p50"), dig(cell, "arms", arm, "throughput_tok_per_sec")
        if tpot and throughput:
            found.append((tree.load_of(cell) or 0.0, 1 / tpot, throughput))
    return found


def draw_frontier(figure: Any, data: tuple[Tree, list[Tree]]) -> Caption | None:
    """Throughput of all against speed for one, one line an arm; up and to the right is better."""
    result, sweep = data
    lines = {arm: points for arm in tree.arm_names(result) if len(points := _points(sweep, arm)) > 1}
    if not lines:
        return None
    figure.set_figheight(4.3)
    axes = figure.add_subplot()
    for number, (arm, points) in enumerate(lines.items()):
        style = look(result, arm)
        axes.plot(
            [x for _, x, _ in points], [y for *_, y in points], **style, linewidth=2, label=arm_label(result, arm)
        )
        # Lines that cross keep their labels apart: below the baseline's, above the next one's, none on the rest.
        for load, x, y in points if number < 2 else []:
            axes.annotate(
                words.plain(load), (x, y), textcoords="offset points", xytext=(-5, -12) if number == 0 else (5, 5),
                ha="right" if number == 0 else "left", fontsize=8, color=style["color"],
            )  # fmt: skip
    axes.set(xlabel="tokens / s for one user (1 / median TPOT)", ylabel="tokens / s of all")
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=0)
    legend(figure, axes)
    note = f"Points carry the {_load_name(sweep)}; up and to the right is better. {_condition(sweep)}"
    texts = [f"{arm} up to {words.significant(max(y for *_, y in points))} tokens/s" for arm, points in lines.items()]
    return Caption(text="throughput against speed for one user: " + ", ".join(texts), arms=list(lines), note=note)


def _condition(sweep: list[Tree]) -> str:
    """What the cells of the sweep share, as a sentence."""
    text = words.condition(sweep[0])
    return f"{text[:1].upper()}{text[1:]}."


def _load_name(sweep: list[Tree]) -> str:
    return "request rate (1/s)" if any(cell.get("rate") is not None for cell in sweep) else "concurrency"


def draw_speedup_by_load(figure: Any, data: tuple[Tree, list[Tree]]) -> Caption | None:
    """Speed-up with its interval over the sweep; dashed above it the ceiling, were every draft accepted."""
    result, sweep = data
    figure.set_figheight(4.3)
    axes = figure.add_subplot()
    axes.axhline(1, color=BASELINE, linewidth=1.2, linestyle="--")
    even = _break_even(result, sweep)
    shown, texts = [], []
    for arm in tree.others(result):
        pairs = [(cell, dig(cell, "comparisons", arm) or {}) for cell in sweep]
        pairs = [(cell, pair) for cell, pair in pairs if pair.get("speedup_median") is not None]
        if len(pairs) < 2:
            continue
        style, loads = look(result, arm), [tree.load_of(cell) or 0.0 for cell, _ in pairs]
        medians = [pair["speedup_median"] for _, pair in pairs]
        bars = error_bars(medians, [pair.get("speedup_ci95") for _, pair in pairs])
        name = arm_label(result, arm)
        if arm in even:
            name += f", breaks even at {words.plain(even[arm])}"
        axes.errorbar(loads, medians, yerr=bars, **style, linewidth=2, capsize=3, label=name)
        _ceiling(axes, result, arm, sweep)
        shown.append(arm)
        texts.append(f"{arm} from {words.times(medians[0])} to {words.times(medians[-1])}")
    if not shown:
        return None
    loads = sorted({load for cell in sweep if (load := tree.load_of(cell))})
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, loads)
    axes.set(xlabel=_load_name(sweep), ylabel="speed-up")
    _ratio_axis(axes)
    for arm in shown:
        if arm in even:  # down to the axis, where the load is read
            axes.vlines(even[arm], axes.get_ylim()[0], 1, look(result, arm)["color"], (0, (2, 2)), linewidth=1.2)
    legend(figure, axes)
    note = f"Below 1 speculation loses. Dotted: the ceiling, were every draft token accepted. {_condition(sweep)}"
    return Caption(text="speed-up over the load: " + ", ".join(texts), arms=shown, note=note)


def _ratio_axis(axes: Any) -> None:
    """Twice as fast lies as far above 1 as half as fast lies below; ceilings leave room for what was measured."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    low, high = min(low, 0.8), max(high, 1.25)
    plain_ticks(axes.yaxis, [tick for tick in RATIO_TICKS if low <= tick <= high], lambda tick: f"{words.plain(tick)}×")
    axes.set_ylim(low, high)


def _ceiling(axes: Any, result: Tree, arm: str, sweep: list[Tree]) -> None:
    points = sorted(
        (point["concurrency"], point["ceiling_speedup"])
        for point in result.get("cost_model") or []
        if point.get("arm") == arm and point.get("ceiling_speedup") is not None and _belongs(point, sweep)
    )
    if len(points) > 1:
        axes.plot(*zip(*points, strict=True), color=look(result, arm)["color"], linewidth=1.2, linestyle=":")


def _belongs(point: Tree, sweep: list[Tree]) -> bool:
    """Whether a cost point speaks of one of these closed-loop cells."""
    return any(cell.get("rate") is None and cell.get("name") == point.get("cell") for cell in sweep)


def _break_even(result: Tree, sweep: list[Tree]) -> dict[str, float]:
    """By arm, the concurrency above which it loses, where the sweep found one."""
    groups = {point.get("cell_group") for point in result.get("cost_model") or [] if _belongs(point, sweep)}
    # One sweep alone needs no name to be told from others.
    return {
        entry["arm"]: entry["concurrency"]
        for entry in result.get("break_even") or []
        if entry.get("concurrency") and (len(tree.sweeps(result)) == 1 or entry.get("cell_group") in groups)
    }


def draw_prediction(figure: Any, result: Tree) -> Caption | None:
    """Measured against predicted speed-up; on the diagonal the cost model is right."""
    points = [
        point
        for point in result.get("cost_model") or []
        if point.get("predicted_speedup") is not None and point.get("measured_speedup") is not None
    ]
    if not points:
        return None
    axes = figure.add_subplot()
    ends = [point[key] for point in points for key in ("predicted_speedup", "measured_speedup")]
    pad = 0.12 * (max(ends) - min(ends)) or 0.1
    limits = (min(*ends, 1.0) - pad, max(*ends, 1.0) + pad)
    axes.plot(limits, limits, color=MUTED, linewidth=1, linestyle="--")
    arms = list(dict.fromkeys(point.get("arm") for point in points))
    for arm in arms:
        mine = [point for point in points if point.get("arm") == arm]
        style = look(result, arm)
        axes.plot(
            [point["predicted_speedup"] for point in mine], [point["measured_speedup"] for point in mine],
            style["marker"], color=style["color"], markersize=7, label=arm_label(result, arm),
            fillstyle="none" if tree.is_synthetic(result, arm) else "full",
        )  # fmt: skip
    if len(points) <= 12:
        for point in points:
            axes.annotate(
                f"c{words.count(point.get('concurrency'))}", (point["predicted_speedup"], point["measured_speedup"]),
                textcoords="offset points", xytext=(7, -4), fontsize=8, color=INK,
            )  # fmt: skip
    axes.set(xlabel="predicted speed-up", ylabel="measured speed-up", xlim=limits, ylim=limits)
    legend(figure, axes)
    texts = [
        f"{point.get('arm')} concurrency {words.count(point.get('concurrency'))}: "
        f"{words.times(point['predicted_speedup'])} predicted, {words.times(point['measured_speedup'])} measured"
        for point in points
    ]
    note = "Prediction: tokens a step × the baseline's engine step / the arm's engine step."
    return Caption(text="; ".join(texts), arms=arms, note=note)

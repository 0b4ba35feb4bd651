"""The plots of the report, drawn by matplotlib, as SVG in data URIs: one file, nothing to fetch."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable
from typing import Any

from specdec.evaluation.arms import PLAIN, SPEC
from specdec.evaluation.measure import GREEDY

# Okabe and Ito's colours, told apart with every kind of colour vision; line styles and hatches differ too.
COLOURS = {PLAIN: "#D55E00", SPEC: "#0072B2", "trained": "#56B4E9"}
LABELS = {PLAIN: "plain", SPEC: "speculative"}
BAR_EDGE: dict[str, Any] = {"edgecolor": "white", "linewidth": 0}
STYLE = {
    "figure.figsize": (5.6, 3.5),
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3b4048",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "legend.frameon": False,
    "svg.hashsalt": "specdec",
}


def draw_plots(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """``(title, data URI, alternative text)`` of each plot that has data, for the greedy mode."""
    mode = result["modes"].get(GREEDY)
    if mode is None:
        return []
    plots: list[tuple[str, Callable[..., str | None]]] = [
        ("Time per output token, request by request", _tpot_curves),
        ("Speed-up of each prompt", _speedup_bars),
        ("Draft tokens accepted, by position", _acceptance_bars),
        ("Output tokens per second", _throughput_bars),
    ]
    drawn = []
    for title, draw in plots:
        uri, text = _figure(draw, result, mode)
        if uri is not None:
            drawn.append((title, uri, text))
    return drawn


def _figure(draw: Callable[..., str | None], result: dict[str, Any], mode: dict[str, Any]) -> tuple[str | None, str]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        text = draw(figure.add_subplot(), result, mode)
        if text is None:
            return None, ""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", text


def _tpot_curves(axes, result: dict[str, Any], mode: dict[str, Any]) -> str | None:
    """Share of requests that were at least as fast: two curves, the further left the faster."""
    medians = []
    for arm, line in ((PLAIN, "--"), (SPEC, "-")):
        values = sorted(
            1e3 * row["tpot_sec"]
            for row in result["requests"]
            if row["mode"] == GREEDY and row["arm"] == arm and row["tpot_sec"] is not None
        )
        if not values:
            return None
        axes.ecdf(values, color=COLOURS[arm], linestyle=line, linewidth=2.2, label=LABELS[arm])
        medians.append(statistics.median(values))
        axes.plot(medians[-1], 0.5, "o", color=COLOURS[arm], markersize=6)
        axes.annotate(
            f"{medians[-1]:.1f}", (medians[-1], 0.5), textcoords="offset points", xytext=(6, -11), color=COLOURS[arm]
        )
    axes.set(xlabel="TPOT (ms per output token)", ylabel="share of requests", ylim=(0, 1.02))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return f"ECDF of TPOT: median {medians[0]:.1f} ms plain, {medians[1]:.1f} ms speculative"


def _speedup_bars(axes, result: dict[str, Any], mode: dict[str, Any]) -> str | None:
    """Prompts sorted by speed-up, with the median and its interval across."""
    ratios = sorted(mode["speedup_by_prompt"].values())
    if not ratios:
        return None
    ranks = range(1, len(ratios) + 1)
    median, interval = mode["speedup_median"], mode["speedup_ci95"]
    if interval:
        axes.axhspan(*interval, color=COLOURS[SPEC], alpha=0.15, linewidth=0, label="95% interval of the median")
    axes.axhline(median, color=COLOURS[SPEC], linewidth=1.8, label=f"median {median:.2f}×")
    axes.axhline(1, color="#5b616b", linewidth=1, linestyle=":", label="plain = 1")
    axes.vlines(ranks, 1, ratios, color="#c3c8cf", linewidth=1.2)
    axes.plot(ranks, ratios, "o", color=COLOURS[SPEC], markersize=5 if len(ratios) <= 60 else 2.5)
    low, high = min(1, *ratios), max(1, *ratios)
    pad = 0.12 * (high - low) or 0.1
    axes.set(xlabel="prompts, smallest speed-up first", ylabel="speed-up (plain / speculative)")
    axes.set_ylim(low - pad, high + 2.5 * pad)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", ncols=3, fontsize=8, columnspacing=1.2, handlelength=1.6)
    return f"speed-up of {len(ratios)} prompts, median {median:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}"


def _acceptance_bars(axes, result: dict[str, Any], mode: dict[str, Any]) -> str | None:
    served = mode["per_position_rates"]
    trained = mode["trained_per_position_rates"] or []
    if not served or None in served:
        return None
    series = [("served", served, COLOURS[SPEC], "")]
    if trained and None not in trained:
        series.append(("measured by training", trained, COLOURS["trained"], "//"))
    width = 0.8 / len(series)
    for number, (label, rates, colour, hatch) in enumerate(series):
        places = [i + (number - (len(series) - 1) / 2) * width for i in range(len(rates))]
        bars = axes.bar(places, rates, 0.92 * width, color=colour, hatch=hatch, **BAR_EDGE, label=label)
        axes.bar_label(bars, labels=[f"{rate:.2f}" for rate in rates], padding=2, fontsize=8.5)
    axes.set(xlabel="draft position", ylabel="accepted / drafted")
    axes.set_ylim(0, min(1.12, 1.25 * max(served + trained) + 0.02))
    axes.set_xticks(range(len(served)), [str(i + 1) for i in range(len(served))])
    axes.grid(False, axis="x")
    if len(series) > 1:
        axes.legend(loc="upper right")
    return "acceptance by position: " + ", ".join(f"{i + 1}: {rate:.2f}" for i, rate in enumerate(served))


def _throughput_bars(axes, result: dict[str, Any], mode: dict[str, Any]) -> str | None:
    """Both arms, each mode."""
    names = [
        name
        for name, figures in result["modes"].items()
        if all(figures["arms"][arm]["throughput_tok_per_sec"] for arm in (PLAIN, SPEC))
    ]
    if not names:
        return None
    texts = []
    for number, (arm, hatch) in enumerate(((PLAIN, "//"), (SPEC, ""))):
        values = [result["modes"][name]["arms"][arm]["throughput_tok_per_sec"] for name in names]
        places = [i + (number - 0.5) * 0.4 for i in range(len(names))]
        bars = axes.bar(places, values, 0.37, color=COLOURS[arm], hatch=hatch, **BAR_EDGE, label=LABELS[arm])
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8.5)
        texts += [f"{LABELS[arm]} {name} {value:.1f}" for name, value in zip(names, values, strict=True)]
    axes.set(ylabel="tokens / s (one arm busy)", xlim=(-0.7, len(names) - 0.3))
    axes.set_ylim(0, 1.25 * axes.dataLim.y1)
    axes.set_xticks(range(len(names)), names)
    axes.grid(False, axis="x")
    axes.legend(loc="upper right", ncols=2)
    return "output tokens per second: " + ", ".join(texts)

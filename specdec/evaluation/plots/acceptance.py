"""Acceptance: by draft position, along the output, by span, and the draft widths that were used."""

from __future__ import annotations

from typing import Any

from specdec.evaluation import tree, words
from specdec.evaluation.plots.style import FAINT, INK, Caption, arm_label, label, legend, look
from specdec.evaluation.tree import Tree, dig

MAX_WIDTH_ROWS = 14


def _acceptance(cell: Tree, arm: str) -> Tree:
    return dig(cell, "arms", arm, "acceptance") or {}


def _of_first_cell(result: Tree, key: str) -> dict[str, Any]:
    """By arm, one value of the first cell's acceptance; arms without it are left out."""
    cell = tree.first_cell(result)
    values = {arm: _acceptance(cell, arm).get(key) for arm in tree.arm_names(result)}
    return {arm: value for arm, value in values.items() if value}


def draw_by_position(figure: Any, result: Tree) -> Caption | None:
    """Left: accepted of the drafted; right: accepted of those whose predecessors all were."""
    served = {arm: rates for arm, rates in _of_first_cell(result, "per_position_rates").items() if any(rates)}
    if not served:
        return None
    conditional = _of_first_cell(result, "conditional_rates")
    series = [(arm_label(result, arm), look(result, arm), rates, conditional.get(arm)) for arm, rates in served.items()]
    trained = dig(result, "summary", "trained_per_position_rates")
    if trained:
        style = look(result, next(iter(tree.others(result)), "")) | {"marker": "x", "linestyle": ":"}
        series.append(("measured by training", style, trained, None))
    position_panels(figure, series)
    texts = [f"{arm}: {words.rates(rates)}" for arm, rates in served.items()]
    return Caption(text="acceptance by position: " + "; ".join(texts), arms=list(served))


def position_panels(figure: Any, series: list[tuple[str, dict[str, Any], list[Any], list[Any] | None]]) -> None:
    """Two panels on one scale. ``series`` gives (label, look, rates, conditional rates or None)."""
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("accepted / drafted", "accepted / all before it accepted")
    longest = 1
    for axes, title, column in zip(panels, titles, (2, 3), strict=True):
        for line in series:
            points = [(i + 1, rate) for i, rate in enumerate(line[column] or []) if rate is not None]
            longest = max([longest, *(place for place, _ in points)])
            axes.plot(
                [place for place, _ in points], [rate for _, rate in points], **line[1], linewidth=2, markersize=6,
                label=label(line[0]),
            )  # fmt: skip
            for place, rate in points if len(series) == 1 else []:
                axes.annotate(
                    words.number(rate, 2), (place, rate), textcoords="offset points", xytext=(0, 8), ha="center",
                    fontsize=8.5, color=line[1]["color"],
                )  # fmt: skip
        axes.set(title=title, xlabel="draft position", ylim=(0, 1.02), xlim=(0.6, longest + 0.4))
        axes.set_xticks(range(1, longest + 1))
    panels[0].set_ylabel("share of draft tokens")
    legend(figure, panels[0])


def draw_along_output(figure: Any, result: Tree) -> Caption | None:
    """Acceptance length by where in the output the draft began."""
    by_arm = {
        arm: [bucket for bucket in buckets if bucket.get("acceptance_length") is not None]
        for arm, buckets in _of_first_cell(result, "by_output_position").items()
    }
    by_arm = {arm: buckets for arm, buckets in by_arm.items() if buckets}
    if not by_arm:
        return None
    axes = figure.add_subplot()
    starts = sorted({bucket["start"] for buckets in by_arm.values() for bucket in buckets})
    for arm, buckets in by_arm.items():
        places = [starts.index(bucket["start"]) for bucket in buckets]
        lengths = [bucket["acceptance_length"] for bucket in buckets]
        axes.plot(places, lengths, **look(result, arm), linewidth=2, markersize=6, label=arm_label(result, arm))
    axes.set(xlabel="output position, from token", ylabel="acceptance length τ")
    axes.set_xticks(range(len(starts)), [words.count(start) for start in starts])
    axes.margins(y=0.12)
    axes.set_ylim(bottom=1)
    legend(figure, axes)
    texts = [f"{arm} {', '.join(_bucket(bucket) for bucket in buckets)}" for arm, buckets in by_arm.items()]
    return Caption(text="acceptance length along the output: " + "; ".join(texts), arms=list(by_arm))


def _bucket(bucket: Tree) -> str:
    end = words.count(bucket.get("end")) if bucket.get("end") is not None else "on"
    return f"{words.count(bucket['start'])} to {end}: {words.number(bucket['acceptance_length'], 2)}"


def draw_by_span(figure: Any, result: Tree) -> Caption | None:
    """Thinking against answer."""
    by_arm = {
        arm: {
            span: length
            for span in ("think", "answer")
            if (length := dig(spans, span, "acceptance_length")) is not None
        }
        for arm, spans in _of_first_cell(result, "by_span").items()
    }
    by_arm = {arm: lengths for arm, lengths in by_arm.items() if lengths}
    spans = [span for span in ("think", "answer") if any(span in lengths for lengths in by_arm.values())]
    if not spans:
        return None
    axes = figure.add_subplot()
    width = 0.8 / len(by_arm)
    for place, (arm, lengths) in enumerate(by_arm.items()):
        style = look(result, arm)
        found = [span for span in spans if span in lengths]
        places = [spans.index(span) + (place - (len(by_arm) - 1) / 2) * width for span in found]
        bars = axes.bar(
            places, [lengths[span] for span in found], 0.92 * width, color=style["color"], label=arm_label(result, arm)
        )
        axes.bar_label(bars, [words.number(lengths[span], 2) for span in found], padding=2, fontsize=8.5)
    axes.set(ylabel="acceptance length τ", xlim=(-0.6, len(spans) - 0.4))
    axes.set_ylim(0, 1.15 * max(length for lengths in by_arm.values() for length in lengths.values()))
    axes.axhline(1, color=FAINT, linewidth=1)
    axes.set_xticks(range(len(spans)), [{"think": "thinking", "answer": "answer"}[span] for span in spans], color=INK)
    axes.grid(False, axis="x")
    legend(figure, axes)
    texts = [f"{arm} {span} {words.number(lengths[span], 2)}" for arm, lengths in by_arm.items() for span in lengths]
    return Caption(text="acceptance length by span: " + ", ".join(texts), arms=list(by_arm), note="1 is plain decode.")


def draw_widths(figure: Any, result: Tree) -> Caption | None:
    """Share of steps by draft width, a row for each condition and arm; only when the width changed or was 0."""
    rows = []
    for cell in tree.cells(result):
        for arm in tree.arm_names(result):
            histogram = _acceptance(cell, arm).get("draft_width_histogram") or {}
            counts = {int(width): drafts for width, drafts in histogram.items() if drafts}
            if counts:
                rows.append((cell, arm, counts))
    if not any(len(counts) > 1 or 0 in counts for _, _, counts in rows):
        return None
    num_rows, rows = len(rows), _whole_cells(rows)
    hidden = num_rows - len(rows)
    _width_bars(figure, result, rows)
    texts = [
        f"{cell.get('name')} {arm} plain decode {words.percent(_acceptance(cell, arm).get('fallback_share'))}"
        for cell, arm, _ in rows
    ]
    note = f"{hidden} more rows are in result.json." if hidden > 0 else ""
    return Caption(
        text="draft widths: " + ", ".join(texts), arms=list(dict.fromkeys(arm for _, arm, _ in rows)), note=note
    )


def _whole_cells(rows: list[tuple[Tree, str, dict[int, int]]]) -> list[tuple[Tree, str, dict[int, int]]]:
    """As many rows as there is room for, without the first arms of a cell that does not fit."""
    if len(rows) <= MAX_WIDTH_ROWS:
        return rows
    torn = rows[MAX_WIDTH_ROWS][0]
    return [row for row in rows[:MAX_WIDTH_ROWS] if row[0] is not torn] or rows[:MAX_WIDTH_ROWS]


def _width_bars(figure: Any, result: Tree, rows: list[tuple[Tree, str, dict[int, int]]]) -> None:
    import matplotlib

    figure.set_figheight(1.2 + 0.36 * len(rows))
    axes = figure.add_subplot()
    widths = sorted({width for _, _, counts in rows for width in counts})
    shades = matplotlib.colormaps["viridis_r"]
    lefts = [0.0] * len(rows)
    for width in widths:
        shares = [counts.get(width, 0) / sum(counts.values()) for _, _, counts in rows]
        # Plain decode stands apart from the scale of widths, as it does in what it costs.
        colour = "#d9dce1" if width == 0 else shades(0.12 + 0.8 * width / max(widths))
        name = "K = 0: plain decode" if width == 0 else f"K = {width}"
        axes.barh(
            range(len(rows)), shares, 0.66, left=lefts, color=colour, edgecolor="white", linewidth=0.6, label=name
        )
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    for row, (cell, arm, _) in enumerate(rows):
        fallback = words.percent(_acceptance(cell, arm).get("fallback_share"))
        axes.annotate(
            f"{fallback} plain" if fallback != words.NOTHING else "", (1, row), textcoords="offset points",
            xytext=(6, 0), va="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axes.set(xlabel="share of engine steps", xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_yticks(
        range(len(rows)), [label(f"{cell.get('name')}: {words.arm_label(result, arm)}") for cell, arm, _ in rows]
    )
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(False, axis="y")
    legend(figure, axes)

"""``report.html``: one self-contained page, drawn from the result tree alone."""

from __future__ import annotations

from typing import Any

from specdec.evaluation import page, sentences, tables, tree, words
from specdec.evaluation.plots import draw_plots
from specdec.evaluation.tree import Tree, dig

MAX_ERROR_EXAMPLES = 5
METHOD = (
    "The same tasks went to every arm in one run. Block by block the arms took turns, in random order, never at the "
    "same time; warm-up requests are not counted, and no request could reuse another's prefix cache. Tokens are the "
    "server's own count (usage), never chunks.",
    "TPOT is (end to end − first token) / (output tokens − 1). The speed-up of a task is its median TPOT over repeats, "
    "baseline / arm; the figure is the median over tasks, its interval a bootstrap over blocks of tasks. Acceptance "
    "length τ is 1 + accepted draft tokens / drafts; rate α is accepted / drafted tokens; counts are divided last.",
    "The first visible token is the first after the thinking. Latency percentiles are over requests without error. "
    "Throughput is output tokens over the time in which the arm was busy.",
)


def render_report(result: Tree) -> str:
    """The page as HTML text; every value is escaped, nothing is fetched from anywhere."""
    lines = sentences.warnings(result)
    sections = [
        ("", page.cards(_cards(result))),
        ("Notes", page.paragraphs(lines, "warn") if lines else ""),
        ("Plots", page.figures(draw_plots(result))),
        ("Result", page.table(tables.main_table(result))),
        ("By condition", page.table(tables.conditions_table(result), names=2)),
        ("By suite", page.table(tables.suites_table(result), names=2)),
        ("Latency", page.table(tables.latency_table(result), names=2)),
        ("Accuracy", page.table(tables.accuracy_table(result), names=3)),
        ("Losslessness", _losslessness(result)),
        ("Cost model", _cost_model(result)),
        ("Cost in money", page.table(tables.money_table(result), names=2)),
        ("Errors", _errors(result)),
        ("How it was measured", page.paragraphs([*METHOD, *_client_share(result)])),
        ("Provenance", page.facts(_provenance(result))),
    ]
    return page.document(words.headline(result), lede(result), sections)


def lede(result: Tree) -> str:
    """What was measured on what, in one line."""
    cell, cells = tree.first_cell(result), tree.cells(result)
    suites = ", ".join(
        f"{suite} ({words.count((facts or {}).get('num_items'))} items)"
        for suite, facts in (result.get("suites") or {}).items()
    )
    arms = ", ".join(words.arm_label(result, arm) for arm in tree.arm_names(result))
    widths = {facts.get("num_speculative_tokens") for facts in result.get("arms") or []} - {None, 0}
    parts = [
        suites,
        f"arms {arms}" if arms else "",
        f"{words.condition(cell)}, {words.load(cell)}" if len(cells) == 1 else f"{len(cells)} conditions",
        f"K = {', '.join(str(width) for width in sorted(widths))}" if widths else "",
        f"on {words.hardware(result)}",
        str(dig(result, "provenance", "created") or ""),
    ]
    return " · ".join(part for part in parts if part)


def _cards(result: Tree) -> list[tuple[str, str]]:
    summary = result.get("summary") or {}
    arm, base = next(iter(tree.others(result)), None), tree.baseline(result)
    suffix = f", {words.arm_label(result, arm)}" if arm and (len(tree.others(result)) > 1 or _synthetic(result)) else ""
    interval = words.span(summary.get("speedup_ci95"), lambda end: words.number(end, 2))
    cards = [
        (words.times(summary.get("speedup_median")), f"speed-up, 95% interval {interval}{suffix}"),
        (words.number(summary.get("acceptance_length")), f"acceptance length τ (tokens per verification){suffix}"),
        (
            words.seconds(summary.get("spec_tpot_sec")),
            f"TPOT{suffix}, against {words.seconds(summary.get('plain_tpot_sec'))} {base or 'plain'}",
        ),
        (
            words.percent(summary.get("greedy_identity_rate")),
            f"of greedy outputs identical to {base or 'plain'}{suffix}",
        ),
    ]
    cell = tree.first_cell(result).get("name")
    scores = [words.percent(tree.pooled_accuracy(result, cell, name)) for name in (arm, base)]
    if words.NOTHING not in scores:
        cards.append((scores[0], f"accuracy (pass@1){suffix}, against {scores[1]} {base}"))
    costs = [dig(tree.first_cell(result), "arms", name or "", "cost_per_million_tokens") for name in (arm, base)]
    if None not in costs:
        against = f"against {words.significant(costs[1])} {base}"
        cards.append((words.significant(costs[0]), f"cost of a million output tokens{suffix}, {against}"))
    return cards


def _synthetic(result: Tree) -> bool:
    return any(tree.is_synthetic(result, arm) for arm in tree.arm_names(result))


def _losslessness(result: Tree) -> str:
    greedy, distribution = sentences.greedy(result), tables.distribution_table(result)
    if greedy is None and distribution is None:
        return page.paragraphs(["Not checked: no output could be compared with the baseline's."], "warn")
    blocks = []
    if greedy is not None:
        blocks.append(page.paragraphs([greedy[1]], "calm" if greedy[0] else "warn"))
        blocks.append(page.table(tables.greedy_table(result), names=2))
    parts = {
        "Greedy forks": page.table(tables.forks_table(result)),
        "Sampled outputs, a two-sample test": page.table(distribution, names=2),
        "Where sampled outputs differ most": page.table(tables.worst_tokens_table(result)),
    }
    return "".join([*blocks, *(f"<h3>{page.text(title)}</h3>{table}" for title, table in parts.items() if table)])


def _cost_model(result: Tree) -> str:
    lines = sentences.break_even(result)
    return (page.paragraphs(lines) if lines else "") + page.table(tables.cost_model_table(result), names=2)


def _errors(result: Tree) -> str:
    table = tables.errors_table(result)
    rows = result.get("requests") or []
    if table is None:
        return page.paragraphs(["Every request ended well."], "calm") if rows or tree.cells(result) else ""
    details = sorted({f"{row.get('error')}: {row.get('error_detail')}" for row in rows if row.get("error")})
    return page.table(table) + (page.paragraphs(details[:MAX_ERROR_EXAMPLES]) if details else "")


def _client_share(result: Tree) -> list[str]:
    share = result.get("client_cpu_share")
    figures = [facts for cell in tree.cells(result) for facts in (cell.get("arms") or {}).values()]
    lags = [lag for facts in figures if (lag := dig(facts, "client_lag_sec", "p99")) is not None]
    late = f"; where it was worst, one time in a hundred it woke {words.seconds(max(lags))} late" if lags else ""
    return [] if share is None else [f"The client used {words.percent(share)} of one core{late}."]


def _provenance(result: Tree) -> list[tuple[str, str]]:
    facts = result.get("provenance") or {}
    rows = [(str(key).replace("_", " "), _flat(value)) for key, value in facts.items() if value not in (None, {}, [])]
    for arm in result.get("arms") or []:
        options = {**(arm.get("options") or {}), "K": arm.get("num_speculative_tokens"), "url": arm.get("url")}
        listed = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
        rows.append((f"arm {words.arm_label(result, str(arm.get('name')))}", listed))
    rows += [
        (f"suite {suite}", f"{words.count(suite_facts.get('num_items'))} items, sha256 {suite_facts.get('sha256')}")
        for suite, suite_facts in (result.get("suites") or {}).items()
        if suite_facts
    ]
    return rows


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(inner) for inner in value) or words.NOTHING
    return str(value)

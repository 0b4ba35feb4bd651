"""The tables of a result as plain text cells: the report and the markdown summary both print these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.evaluation import tree, words
from specdec.evaluation.tree import Tree, dig

MAX_FORKS = 40
LATENCIES = {
    "ttft_sec": "TTFT",
    "ttfvt_sec": "first visible token",
    "tpot_sec": "TPOT",
    "chunk_gap_sec": "gap between chunks",
    "e2e_sec": "end to end",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Header and rows of text; ``note`` goes under it; ``numeric``: all columns but the first are figures."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""
    numeric: bool = True


def _table(
    result: Tree, header: list[str], rows: list[list[str]], note: str = "", numeric: bool = True
) -> Table | None:
    """A table without the columns and rows that nobody measured; None when nothing is left."""
    kept = [column for column in range(len(header)) if any(row[column] != words.NOTHING for row in rows)]
    if not kept:
        return None
    shown = " ".join(cell for row in (header, *rows) for cell in row)
    arms = [arm for arm in tree.arm_names(result) if words.arm_label(result, arm) in shown]
    text = " ".join(part for part in (note, words.synthetic_note(result, arms)) if part)
    rows = [[row[column] for column in kept] for row in rows]
    return Table(header=[header[column] for column in kept], rows=rows, note=text, numeric=numeric)


def main_table(result: Tree) -> Table | None:
    """Figures down, the first cells and arms across."""
    num_columns = sum(bool(dig(cell, "arms", arm)) for cell in tree.cells(result) for arm in tree.arm_names(result))
    rows = [[name, *cells] for name, cells in words.table_rows(result)]
    more = "Every condition is in the next table." if num_columns > words.MAX_COLUMNS else ""
    return _table(result, ["figure", *words.columns(result)], rows, more) if rows else None


def _comparison(cells: Sequence[tuple[str, Tree]], result: Tree) -> list[list[str]]:
    rows = []
    for name, cell in cells:
        for arm in tree.arm_names(result):
            figures, pair = dig(cell, "arms", arm) or {}, dig(cell, "comparisons", arm) or {}
            if figures or pair:
                rows.append([
                    name, words.arm_label(result, arm),
                    words.number(dig(figures, "acceptance", "acceptance_length")),
                    words.percent(dig(figures, "acceptance", "acceptance_rate")),
                    words.seconds(dig(figures, "ttft_sec", "p50")), words.seconds(dig(figures, "tpot_sec", "p50")),
                    words.with_interval(pair.get("speedup_median"), pair.get("speedup_ci95"), words.times),
                    words.significant(figures.get("throughput_tok_per_sec")), words.times(pair.get("throughput_ratio")),
                    words.percent(dig(figures, "acceptance", "fallback_share")),
                    words.requests(figures),
                ])  # fmt: skip
    return rows


COMPARISON = [
    "arm", "τ", "α", "TTFT", "TPOT", "speed-up [95%]", "tokens/s", "× baseline", "plain decode",
    "requests (errors)",
]  # fmt: skip


def conditions_table(result: Tree) -> Table | None:
    """Cells and arms down; only when there is more than one cell."""
    if len(tree.cells(result)) < 2:
        return None
    rows = _comparison([(str(cell.get("name")), cell) for cell in tree.cells(result)], result)
    return _table(result, ["condition", *COMPARISON], rows)


def suites_table(result: Tree) -> Table | None:
    """Suites and arms of the first cell; the suite's size and where it came from under it."""
    suites = {suite: facts for suite, facts in (tree.first_cell(result).get("suites") or {}).items() if facts}
    sources = [
        f"{suite}: {words.count(facts.get('num_items'))} items from {facts.get('source') or 'an unnamed source'}"
        for suite, facts in (result.get("suites") or {}).items()
        if facts
    ]
    rows = _comparison(list(suites.items()), result)
    return _table(result, ["suite", *COMPARISON], rows, "; ".join(sources) + "." if sources else "")


def latency_table(result: Tree) -> Table | None:
    """p50, p90 and p99 of each arm in the first cell."""
    rows = []
    for key, name in LATENCIES.items():
        for arm in tree.arm_names(result):
            figures = dig(result, "latency", arm, key) or {}
            cells = [words.seconds(figures.get(percent)) for percent in ("p50", "p90", "p99")]
            if any(cell != words.NOTHING for cell in cells):
                rows.append([name, words.arm_label(result, arm), *cells])
    note = (
        "A speculative chunk holds several tokens: the gaps are what a reader of the stream sees, and can't be "
        "compared with TPOT."
    )
    return _table(result, ["", "arm", "p50", "p90", "p99"], rows, note)


def accuracy_table(result: Tree) -> Table | None:
    """Scores by cell, suite and arm."""
    rows = [
        [
            str(row.get("cell")), str(row.get("suite")), words.arm_label(result, str(row.get("arm"))),
            words.with_interval(row.get("pass_at_1"), row.get("pass_at_1_ci95"), words.percent),
            words.with_interval(row.get("maj_at_n"), row.get("maj_at_n_ci95"), words.percent),
            _difference(result, row),
            words.count(row.get("num_items")), words.count(row.get("num_samples")),
            words.count(row.get("num_unanswered")), words.count(row.get("num_failed")),
            words.count(row.get("mean_output_tokens")),
            words.seconds(row.get("sec_per_answer")),
        ]
        for row in tree.accuracy_rows(result)
    ]  # fmt: skip
    header = [
        "condition", "suite", "arm", "pass@1 [95%]", "majority vote [95%]", "less the baseline's", "items", "samples",
        "no answer", "failed", "mean tokens", "time an answer",
    ]  # fmt: skip
    return _table(result, header, rows)


def _difference(result: Tree, row: Tree) -> str:
    """pass@1 less that of the baseline on the same items."""
    place = [row.get(key) for key in ("cell", "suite", "arm")]
    for found in result.get("accuracy_differences") or []:
        if [found.get(key) for key in ("cell", "suite", "arm")] == place:
            return words.with_interval(found.get("difference"), found.get("ci95"), words.percent)
    return words.NOTHING


def greedy_table(result: Tree) -> Table | None:
    """How many greedy outputs are the baseline's, and how many of the baseline's own come out again."""
    rows = []
    for entry in tree.greedy_rows(result):
        forks = entry.get("forks") or []
        rates = [words.percent(entry.get(key)) for key in ("greedy_identity_rate", "noise_floor_identity_rate")]
        counts = [words.count(entry.get(key)) for key in ("num_compared", "num_noise_floor_compared")]
        row = [str(entry.get("cell")), words.arm_label(result, str(entry.get("arm"))), rates[0], counts[0]]
        rows.append([*row, rates[1], counts[1], words.count(len(forks)), words.count(sum(map(words.is_tie, forks)))])
    header = ["condition", "arm", "identical", "compared", "noise floor", "compared", "forks", "numeric ties"]
    return _table(result, header, rows, "Noise floor: the baseline against itself.")


def forks_table(result: Tree) -> Table | None:
    """Where greedy outputs part; forks that rounding does not explain come first."""
    forks = [(entry, fork) for entry in tree.greedy_rows(result) for fork in entry.get("forks") or []]
    forks.sort(key=lambda pair: words.is_tie(pair[1]))
    rows = [
        [
            f"{entry.get('cell')}: {words.arm_label(result, str(entry.get('arm')))}",
            f"{fork.get('suite')}/{fork.get('item_id')}: {fork.get('prompt_excerpt') or ''}",
            words.count(fork.get("position")),
            _token(fork.get("plain_token"), fork.get("plain_text")),
            _token(fork.get("spec_token"), fork.get("spec_text")),
            ("≥ " if fork.get("margin_is_lower_bound") else "") + words.number(fork.get("margin_nats"), 4),
            ": ".join(str(part) for part in (fork.get("verdict"), fork.get("why")) if part),
        ]
        for entry, fork in forks[:MAX_FORKS]
    ]
    hidden = len(forks) - MAX_FORKS
    note = f"{words.count(hidden)} more forks are in result.json." if hidden > 0 else ""
    return _table(result, ["arm", "prompt", "token", "baseline", "arm's", "nats", "verdict"], rows, note, numeric=False)


def _token(token_id: int | None, text: str | None) -> str:
    return words.NOTHING if token_id is None else f"{token_id}" + ("" if text is None else f" {text!r}")


def distribution_table(result: Tree) -> Table | None:
    """The two-sample test of sampled outputs, arm by arm."""
    rows = []
    for entry in dig(result, "losslessness", "distribution") or []:
        lossy = entry.get("lossy")
        row = [
            words.arm_label(result, str(entry.get("arm"))),
            "not tested" if lossy is None else "differs" if lossy else "no difference found",
            words.p_value(entry.get("p_value")).removeprefix("= "),
            words.number(entry.get("statistic"), 2),
        ]
        rows.append(row + [words.count(entry.get(key)) for key in ("num_prompts", "num_samples", "num_positions")])
    note = "No difference found is no proof of equality: it says that this many samples show none."
    return _table(result, ["arm", "verdict", "p", "statistic", "prompts", "samples", "positions"], rows, note)


def worst_tokens_table(result: Tree) -> Table | None:
    """Where the sampled outputs differ most: token, baseline's and arm's frequency."""
    rows = [
        [
            words.arm_label(result, str(entry.get("arm"))),
            str(place.get("item_id")),
            words.count(place.get("position")),
            ", ".join(
                f"{'(end)' if token.get('token') is None else repr(token['token'])} "
                f"{words.number(token.get('baseline'))} → {words.number(token.get('arm'))}"
                for token in place.get("tokens") or []
            ),
        ]
        for entry in dig(result, "losslessness", "distribution") or []
        for place in entry.get("worst") or []
    ]
    return _table(result, ["arm", "item", "position", "token: baseline → arm"], rows, numeric=False)


def cost_model_table(result: Tree) -> Table | None:
    """Predicted against measured, and what it would take to break even."""
    rows = [
        [
            words.arm_label(result, str(point.get("arm"))),
            str(point.get("cell") or f"{words.condition(point)}, {words.load(point)}"),
            words.count(point.get("num_speculative_tokens")), words.number(point.get("acceptance_length")),
            words.number(point.get("break_even_acceptance_length")), words.seconds(point.get("plain_step_sec")),
            words.seconds(point.get("spec_step_sec")), words.times(point.get("predicted_speedup")),
            words.times(point.get("measured_speedup")), words.times(point.get("ceiling_speedup")),
        ]
        for point in result.get("cost_model") or []
    ]  # fmt: skip
    header = [
        "arm", "condition", "K", "τ", "to break even", "baseline step", "arm step", "predicted", "measured",
        "ceiling",
    ]  # fmt: skip
    note = (
        "Predicted: tokens a step × baseline step / arm step, where a step yields τ tokens or, without a draft, one. "
        "Ceiling: the same were every draft token accepted. Below the tokens a step to break even, speculation loses."
    )
    bounds = [point.get("bandwidth_bound_step_sec") for point in result.get("cost_model") or []]
    if bounds and bounds[0] is not None:
        note += f" Reading every weight once from memory takes {words.seconds(bounds[0])} here: no step can be faster."
    return _table(result, header, rows, note)


def money_table(result: Tree) -> Table | None:
    """What tokens cost at the price given; None without a price."""
    price = result.get("price_per_hour")
    if price is None:
        return None
    rows = [
        [
            str(cell.get("name")), words.arm_label(result, arm),
            words.significant(dig(cell, "arms", arm, "cost_per_million_tokens")),
            words.significant(dig(cell, "arms", arm, "cost_per_request")),
        ]
        for cell in tree.cells(result)
        for arm in tree.arm_names(result)
        if dig(cell, "arms", arm)
    ]  # fmt: skip
    note = f"At {words.significant(price)} an hour for the machine, in that price's currency, busy the whole hour."
    return _table(result, ["condition", "arm", "a million output tokens", "a request"], rows, note)


def errors_table(result: Tree) -> Table | None:
    """Requests that failed, by kind."""
    rows = [[kind, words.count(number)] for kind, number in sorted((result.get("errors") or {}).items()) if number]
    return _table({}, ["kind", "requests"], rows)

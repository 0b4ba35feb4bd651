"""Figures as people read them: the same words in the terminal's table, the report and the summary."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec.evaluation import tree
from specdec.evaluation.losslessness import TIE
from specdec.evaluation.tree import Tree, dig

NOTHING = "–"
SYNTHETIC = "synthetic acceptance: a cost surface, no claim about the head"
MAX_COLUMNS = 6  # of a terminal 120 characters wide


def headline(result: Tree) -> str:
    """One sentence that says what was found; honest about slow-downs, differences in output and about nothing."""
    summary = result.get("summary") or {}
    arm, target = next(iter(tree.others(result)), None), name_of(dig(result, "provenance", "target")) or "the target"
    stopped = " The run was interrupted." if result.get("interrupted") else ""
    ratio, interval = summary.get("speedup_median"), summary.get("speedup_ci95")
    if ratio is None:
        return f"Nothing to conclude about {target}: no task has a timing without error on both arms.{stopped}"
    parts = [f"{_subject(result, arm)} {_verdict(result, target, ratio, interval)}"]
    if summary.get("acceptance_length") is not None:
        parts.append(f"{number(summary['acceptance_length'], 2)} tokens per verification")
    if summary.get("greedy_identity_rate") is not None and not tree.is_synthetic(result, arm):
        parts.append(f"{percent(summary['greedy_identity_rate'])} of greedy outputs identical{_ties(result, arm)}")
    slower = _slower_cells(result, arm)
    if slower:
        parts.append(slower)
    parts += [f"NOT LOSSLESS: {sentence}" for other, sentence in alarms(result) if other == arm]
    doubt = " The timings are in doubt, see the notes." if result.get("timings_in_doubt") else ""
    return "; ".join(parts) + "." + doubt + stopped


def _ties(result: Tree, arm: str | None) -> str:
    """What the reader of a low rate has to know at once: that rounding explains the rest, if it does."""
    forks = [fork for row in tree.greedy_rows(result) if row.get("arm") == arm for fork in row.get("forks") or []]
    return ", the others part where two tokens tie" if forks and all(map(is_tie, forks)) else ""


def _subject(result: Tree, arm: str | None) -> str:
    facts = tree.arm_facts(result, arm)
    if facts.get("synthetic"):
        return f"{arm} ({SYNTHETIC})"
    speculates = facts.get("num_speculative_tokens") or dig(result, "summary", "acceptance_length") is not None
    return "Speculative decoding" if speculates and len(tree.others(result)) < 2 else f"Arm {arm}"


def _verdict(result: Tree, target: str, ratio: float, interval: list[float] | None) -> str:
    base = tree.baseline(result) or "plain"
    spread = f"95% interval {number(interval[0], 2)}–{number(interval[1], 2)}" if interval else "no interval"
    where = f", {tree.first_cell(result).get('name')}" if len(tree.cells(result)) > 1 else ""
    if interval and interval[0] <= 1 <= interval[1]:
        return (
            f"makes no clear difference to {target}: {number(ratio, 2)}× ({spread}{where}) in time per output token"
            f" against {base}"
        )
    slower = ", so slower" if ratio < 1 else ""
    return f"runs {target} {number(ratio, 2)}× as fast as {base}{slower} ({spread}{where})"


def _slower_cells(result: Tree, arm: str | None) -> str:
    """Which of the other conditions are surely slower; the first is the verdict's own."""
    found = []
    for cell in tree.cells(result)[1:]:
        ratio, interval = (dig(cell, "comparisons", arm or "", key) for key in ("speedup_median", "speedup_ci95"))
        if ratio is not None and ratio < 1 and interval and interval[1] < 1:
            found.append((ratio, cell.get("name")))
    if not found:
        return ""
    worst = min(found, key=lambda pair: pair[0])
    where = f"{len(found)} of {len(tree.cells(result))} conditions"
    return f"slower in {where}, {number(worst[0], 2)}× in {worst[1]}"


def alarms(result: Tree) -> list[tuple[str, str]]:
    """``(arm, sentence)`` for each sign that an arm changes what the target says."""
    found = []
    for entry in tree.greedy_rows(result):
        bad = [fork for fork in entry.get("forks") or [] if not is_tie(fork)]
        if bad:
            text = (
                f"{count(len(bad))} greedy fork{'s' * (len(bad) > 1)} in {entry.get('cell')} not explained by rounding"
            )
            found.append((str(entry.get("arm")), text))
    for entry in dig(result, "losslessness", "distribution") or []:
        if entry.get("lossy"):
            text = f"sampled outputs are distributed otherwise (p {p_value(entry.get('p_value'))})"
            found.append((str(entry.get("arm")), text))
    return found


def is_tie(fork: Tree) -> bool:
    """Whether two tokens lay so near to each other that rounding alone explains the fork."""
    return fork.get("verdict") == TIE


def arm_label(result: Tree, arm: str) -> str:
    """An arm's name; one with dictated acceptance says so wherever it appears."""
    return f"{arm} (synthetic)" if tree.is_synthetic(result, arm) else str(arm)


def synthetic_note(result: Tree, arms: list[str]) -> str:
    """What to print under anything that shows a synthetic arm; empty when none of ``arms`` is one."""
    names = [str(arm) for arm in arms if tree.is_synthetic(result, arm)]
    return f"{', '.join(names)} has {SYNTHETIC}." if names else ""


def sampling(cell: Tree) -> str:
    """How a cell samples."""
    temperature = cell.get("temperature")
    if temperature is None:
        return "the server's default sampling"
    return "greedy" if temperature == 0 else f"temperature {plain(temperature)}"


def condition(cell: Tree) -> str:
    """A cell's setting without its load."""
    parts = [sampling(cell)]
    if cell.get("max_new_tokens") is not None:
        parts.append(f"up to {count(cell['max_new_tokens'])} tokens")
    if cell.get("thinking_budget") is not None:
        parts.append(f"thinking budget {count(cell['thinking_budget'])}")
    if (cell.get("num_samples") or 1) > 1:
        parts.append(f"{count(cell['num_samples'])} samples")
    return ", ".join(parts)


def load(cell: Tree) -> str:
    """A cell's load."""
    if cell.get("rate") is not None:
        return f"{cell.get('arrival')} arrivals, {plain(cell['rate'])} requests/s"
    if str(cell.get("arrival")).startswith("trace:"):
        return f"{Path(cell['arrival']).name} at its own times"
    return f"concurrency {count(cell.get('concurrency'))}"


def columns(result: Tree) -> list[str]:
    """Headers of ``table_rows``: cell and arm, the first cell's arms first, as many as fit a terminal."""
    several = len(tree.cells(result)) > 1
    labels = []
    for cell, arm in column_keys(result):
        labels.append(f"{cell.get('name')}: {arm_label(result, arm)}" if several else arm_label(result, arm))
    return labels


def column_keys(result: Tree, limit: int = MAX_COLUMNS) -> list[tuple[Tree, str]]:
    """``(cell, arm)`` of each column; arms without figures in a cell have none there."""
    keys: list[tuple[Tree, str]] = []
    for cell in tree.cells(result):
        more = [(cell, arm) for arm in tree.arm_names(result) if dig(cell, "arms", arm)]
        if keys and len(keys) + len(more) > limit:
            break  # half a cell would hide what its arms are compared with
        keys += more
    return keys[:limit]


def table_rows(result: Tree) -> list[tuple[str, list[str]]]:
    """``(figure, one cell a column)`` of the result table; figures that nobody measured are left out."""
    keys = column_keys(result)
    rows = [(name, [show(result, cell, arm) for cell, arm in keys]) for name, show in FIGURES]
    return [(name, cells) for name, cells in rows if any(cell != NOTHING for cell in cells)]


def _of_arm(show: Callable[[Any], str], *path: str) -> Callable[[Tree, Tree, str], str]:
    return lambda result, cell, arm: show(dig(cell, "arms", arm, *path))


def _of_pair(show: Callable[[Any], str], key: str) -> Callable[[Tree, Tree, str], str]:
    return lambda result, cell, arm: show(dig(cell, "comparisons", arm, key))


def _trained(result: Tree, cell: Tree, arm: str) -> str:
    measured = cell is tree.first_cell(result) and arm in tree.others(result)[:1]
    return number(dig(result, "summary", "trained_acceptance_length")) if measured else NOTHING


def _identity(result: Tree, cell: Tree, arm: str) -> str:
    entries = dig(result, "losslessness", "greedy") or []
    found = [entry for entry in entries if entry.get("arm") == arm and entry.get("cell") == cell.get("name")]
    return percent(found[0].get("greedy_identity_rate")) if found else NOTHING


def _requests(result: Tree, cell: Tree, arm: str) -> str:
    return requests(dig(cell, "arms", arm) or {})


def _accuracy(result: Tree, cell: Tree, arm: str) -> str:
    return percent(tree.pooled_accuracy(result, cell.get("name"), arm))


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits with thousands separated; whatever is not measured or not finite is a dash."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number."""
    return number(value, 0)


def significant(value: float | None, digits: int = 3) -> str:
    """As many decimals as ``digits`` significant digits take, none below the unit."""
    if value is None or not math.isfinite(value) or value == 0:
        return number(value, 0)
    return number(value, min(6, max(0, digits - 1 - math.floor(math.log10(abs(value))))))


def plain(value: float | None) -> str:
    """A setting as somebody typed it, a found value to three digits; no zeros at the end of a fraction."""
    text = count(value) if value is None or value == int(value) else significant(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float | None) -> str:
    """A fraction in percent."""
    # All and none are told from almost all and almost none.
    return NOTHING if value is None else f"{number(100 * value, 0 if value in (0, 1) else 1)}%"


def seconds(value: float | None) -> str:
    """A duration to three digits, in the unit that suits it."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{significant(value)} s" if value >= 1 else f"{significant(1e3 * value)} ms"


def times(value: float | None) -> str:
    """A ratio."""
    return NOTHING if value is None else f"{number(value, 2)}×"


def with_interval(value: float | None, ends: list[float] | None, show: Callable[[float | None], str]) -> str:
    """A figure with its 95% interval in the same unit, where it has one."""
    shown = [show(end).rstrip("×%") for end in ends or []]
    return show(value) + (f" [{', '.join(shown)}]" if shown else "")


def span(value: list[float] | None, show: Callable[[float], str] = number) -> str:
    """An interval."""
    return NOTHING if not value else f"{show(value[0])} – {show(value[1])}"


def rates(values: list[float | None] | None) -> str:
    """Fractions, first position first."""
    known = any(value is not None for value in values or [])
    return " / ".join(number(value) for value in values or []) if known else NOTHING


def p_value(value: float | None) -> str:
    """A probability as tests report it, with its relation."""
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"= {number(value)}"


def requests(figures: Tree) -> str:
    """Requests of an arm, and how many of them failed."""
    total, errors = figures.get("num_requests"), figures.get("num_errors")
    return NOTHING if total is None else f"{count(total)} ({count(errors)})"


def name_of(value: Any) -> str:
    """A target or head as the provenance gives it: a name, or facts among which is one."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("directory")
    return "" if value is None else str(value)


def hardware(result: Tree) -> str:
    """What the run was measured on."""
    facts = dig(result, "provenance", "hardware") or {}
    if facts.get("gpus"):
        return ", ".join(str(gpu) for gpu in facts["gpus"])
    if not facts.get("cpu"):
        return "unknown hardware"
    return f"{facts['cpu']}, {count(facts.get('num_cores'))} cores"


FIGURES: tuple[tuple[str, Callable[[Tree, Tree, str], str]], ...] = (
    ("speed-up (median of tasks)", _of_pair(times, "speedup_median")),
    ("  95% interval", _of_pair(span, "speedup_ci95")),
    ("TPOT, median", _of_arm(seconds, "tpot_sec", "p50")),
    ("TTFT, median", _of_arm(seconds, "ttft_sec", "p50")),
    ("first visible token, median", _of_arm(seconds, "ttfvt_sec", "p50")),
    ("end to end, median", _of_arm(seconds, "e2e_sec", "p50")),
    ("acceptance length τ", _of_arm(number, "acceptance", "acceptance_length")),
    ("τ measured by training", _trained),
    ("acceptance rate α", _of_arm(percent, "acceptance", "acceptance_rate")),
    ("accepted by position", _of_arm(rates, "acceptance", "per_position_rates")),
    ("conditional on the one before", _of_arm(rates, "acceptance", "conditional_rates")),
    ("plain decode (K = 0) share", _of_arm(percent, "acceptance", "fallback_share")),
    ("engine step, median", _of_arm(seconds, "step_sec_p50")),
    ("tokens per engine step", _of_arm(number, "tokens_per_step")),
    ("throughput, tokens/s", _of_arm(significant, "throughput_tok_per_sec")),
    ("  against the baseline", _of_pair(times, "throughput_ratio")),
    ("goodput within the SLO, tokens/s", _of_arm(significant, "goodput_tok_per_sec")),
    ("  requests within the SLO", _of_arm(percent, "slo_share")),
    ("accuracy (pass@1)", _accuracy),
    ("greedy identity rate", _identity),
    ("output tokens, mean", _of_arm(count, "output_tokens", "mean")),
    ("TPOT between repeats", _of_arm(percent, "tpot_repeat_spread")),
    ("cost per million tokens", _of_arm(significant, "cost_per_million_tokens")),
    ("requests (errors)", _requests),
)
